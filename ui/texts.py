"""Every word on the page, in English and Chinese.

Two ways out: `label(key)` for static labels, which the browser translates to its own language (gr.I18n), and
`say(key, locale, ...)` for what a handler writes, in the language that the browser's request asks for. A key without
both languages fails a test. Error sentences come from errors.py and are English.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.compare_texts import COMPARE_TEXTS

LOCALES = ("en", "zh")

TEXTS: dict[str, tuple[str, str]] = {
    # The page
    "tagline": (
        "Whisper at the precision your GPU can afford, with its cost measured.",
        "按你的显卡所能承受的精度运行 Whisper，并实测其代价。",
    ),
    "tab_transcribe": ("Transcribe", "转写"),
    "tab_language": ("Detect language", "语种识别"),
    "tab_compare": ("Compare", "精度对比"),
    "tab_system": ("System", "系统"),
    "banner_demo": (
        "This is the demo model: a small Whisper trained on synthetic speech only, so most words of a human recording "
        "come out wrong. For real work start with --model openai/whisper-large-v3 or --model FOLDER (a Whisper "
        "checkpoint on disk); set HF_TOKEN for a gated model and --hub-mirror where the Hub cannot be reached.",
        "这是演示模型：一个仅用合成语音训练的小型 Whisper，真人录音中的大多数词会出错。实际使用请以 "
        "--model openai/whisper-large-v3 或 --model 文件夹（本地 Whisper 检查点）启动；受限模型请设置 "
        "HF_TOKEN，无法访问 Hub 时请使用 --hub-mirror。",
    ),
    # The recording
    "recording_file": ("Audio or video file", "音频或视频文件"),
    "recording_player": ("Microphone and player", "麦克风与播放器"),
    "recording_none": (
        "Choose a file, record yourself, or take an example first.",
        "请先选择文件、录音，或点选一个示例。",
    ),
    "microphone_name": ("microphone", "麦克风录音"),
    "microphone_insecure": (
        "The browser gives the microphone only to https pages and to localhost. Open this page through https, or "
        "through an SSH tunnel to localhost, to record; uploads work as they are.",
        "浏览器只向 https 页面和 localhost 开放麦克风。要录音，请通过 https 或通往 localhost 的 SSH "
        "隧道打开本页；上传文件不受影响。",
    ),
    "recording_record": ("● Record", "● 录音"),
    "player_unplayable": (
        "This browser cannot play this file. Transcribing it may still work.",
        "此浏览器无法播放该文件，但仍可能可以转写。",
    ),
    # Options
    "option_precision": ("Precision", "精度"),
    "option_language": ("Language", "语言"),
    "option_more": ("More options", "更多选项"),
    "option_task": ("Task", "任务"),
    "option_windows": ("Windows", "分窗方式"),
    "option_windows_info": (
        "Where the recording is cut into pieces of at most 30 s",
        "在何处将录音切成至多 30 秒的片段",
    ),
    "option_prompt": ("Prompt", "提示词"),
    "option_prompt_info": ("Names and words that occur in the recording", "录音中出现的人名与术语"),
    "option_words": ("Times of words", "单词时间"),
    "option_words_info": ("Click a word to hear it; in JSON and VTT too", "点击单词即可播放；亦写入 JSON 与 VTT"),
    "option_beam": ("Beam size", "束宽"),
    "option_beam_info": ("1 is greedy; more candidates cost more time", "1 为贪心解码；候选越多耗时越长"),
    "choice_default_precision": ("Default ({name})", "默认（{name}）"),
    "choice_unavailable": ("{label} — not on this machine", "{label} — 本机不可用"),
    "choice_auto_language": ("Detect automatically", "自动识别"),
    "choice_transcribe": ("Transcribe", "转写"),
    "choice_translate": ("Translate to English", "译成英语"),
    "option_engine": ("Engine", "引擎"),
    "option_engine_info": (
        "reference is transformers' own generate; beams always run there",
        "reference 为 transformers 自带的 generate；束搜索总在其上运行",
    ),
    "choice_default": ("default", "默认"),
    "choice_vad": ("Cut in silence", "在静音处切分"),
    "choice_fixed": ("Every 30 s, overlapping", "每 30 秒，重叠切分"),
    # Transcribe
    "transcribe_go": ("Transcribe", "开始转写"),
    "transcribe_cancel": ("Cancel", "取消"),
    "transcribe_copy": ("Copy text", "复制文本"),
    "transcribe_empty": (
        "The transcript appears here, sentence by sentence. Click a time to hear it.",
        "转写结果会逐句出现在这里。点击时间即可收听。",
    ),
    "transcribe_starting": ("Listening…", "正在聆听…"),
    "transcribe_stopping": ("Stopping; the text so far stays.", "正在停止；已有文本会保留。"),
    "transcribe_cancelled": ("Stopped. The text so far is kept.", "已停止，已有文本已保留。"),
    "files_not_written": (
        "The files for download could not be written ({reason}). Make room on the server's disk and transcribe again, "
        "or copy the text from here.",
        "无法写入下载文件（{reason}）。请在服务器磁盘上腾出空间后重新转写，或直接从这里复制文本。",
    ),
    "transcribe_silence": ("No speech found in this recording.", "这段录音中没有发现语音。"),
    "transcribe_progress": ("{done} of {total}", "{done} / {total}"),
    "transcribe_progress_open": ("{done} done", "已完成 {done}"),
    "transcribe_eta": ("about {eta} left", "约剩 {eta}"),
    "transcribe_done": ("Done in {elapsed}", "完成，用时 {elapsed}"),
    "transcribe_factor": ("{factor}× real time", "实时的 {factor} 倍"),
    "transcribe_coverage": (
        "{speech} of speech in {duration}, {transcribed} transcribed",
        "全长 {duration}，语音 {speech}，已转写 {transcribed}",
    ),
    "transcribe_language": ("language {language}", "语言 {language}"),
    "transcribe_ran": ("{precision} on {model}, {engine} engine", "{model}，精度 {precision}，引擎 {engine}"),
    "transcribe_hear": ("Hear from {time}", "从 {time} 开始播放"),
    "transcribe_warnings": ("Notes", "提示"),
    # Detect language
    "language_go": ("Detect language", "识别语种"),
    "language_label": ("Languages", "语种"),
    "language_empty": (
        "Up to five stretches of speech along the recording are heard; their probabilities appear here.",
        "将沿录音聆听至多五段语音，各语种概率显示于此。",
    ),
    "language_running": ("Listening…", "正在聆听…"),
    "language_summary": ("{name}, {percent} on average over {n} windows", "{name}，{n} 个窗口平均 {percent}"),
    "language_summary_one": ("{name}, {percent}", "{name}，{percent}"),
    "language_unsure": (
        "The windows disagree or the best guess is weak: listen before you trust it.",
        "各窗口意见不一或最佳猜测偏弱：请先听一听再采信。",
    ),
    "language_window": ("Window", "窗口"),
    "language_best": ("Best", "最可能"),
    "language_second": ("Next", "其次"),
    "language_none": ("No speech found in this recording.", "这段录音中没有发现语音。"),
    # System and memory
    "memory_title": ("Memory", "内存"),
    "memory_main": ("Main memory", "主内存"),
    "memory_device": ("Device", "设备"),
    "memory_model": ("Model", "模型"),
    "memory_precision": ("Precision", "精度"),
    "memory_requested": ("requested", "请求"),
    "memory_effective": ("in memory", "实测"),
    "memory_not_loaded": ("not loaded", "未加载"),
    "memory_weights": ("Weights", "权重"),
    "memory_working": ("Working set", "工作集"),
    "memory_cached": ("Cached, reusable", "缓存（可复用）"),
    "memory_context": ("CUDA context", "CUDA 上下文"),
    "memory_other": ("Other processes", "其他进程"),
    "memory_program": ("This program", "本程序"),
    "memory_free": ("Free", "空闲"),
    "memory_used_of": ("{used} of {total}", "{used} / {total}"),
    "memory_temperature": ("Temperature", "温度"),
    "memory_power": ("Power", "功耗"),
    "memory_utilisation": ("Utilisation", "利用率"),
    "memory_driver": ("Driver", "驱动"),
    "memory_cores": ("Cores", "核心"),
    "memory_history": ("Last minutes", "最近几分钟"),
    "memory_history_height": ("height {total}", "高度 {total}"),
    "memory_history_now": ("now", "现在"),
    "memory_history_ago": ("{minutes} min ago", "{minutes} 分钟前"),
    "memory_unknown": ("no reading", "无读数"),
    "phase_starting": ("Starting", "启动中"),
    "phase_loading": ("Loading", "加载中"),
    "phase_ready": ("Ready", "就绪"),
    "phase_failed": ("Failed", "失败"),
    "phase_busy": ("Working", "工作中"),
    "system_gpus": ("GPUs", "显卡"),
    "memory_more_processes": ("and {n} more, see System", "另有 {n} 个，见“系统”"),
    "system_processes": ("Processes using memory", "占用内存的进程"),
    "system_no_processes": ("No process is listed.", "没有进程。"),
    "system_history": ("Memory over time", "内存随时间的变化"),
    "system_engines": ("Loaded engines", "已加载的引擎"),
    "system_no_engines": ("No engine is loaded; the next request loads one.", "尚无引擎；下一次请求时加载。"),
    "system_precisions": ("Precisions on this machine", "本机可用的精度"),
    "system_unload": ("Unload engines", "卸载引擎"),
    "system_unloaded": ("Unloaded. The next request loads again.", "已卸载。下一次请求时重新加载。"),
    "system_available": ("available", "可用"),
    "system_this_process": ("this program", "本程序"),
    "column_name": ("Name", "名称"),
    "column_memory": ("Memory", "内存"),
    "column_gpu": ("GPU", "显卡"),
    "column_state": ("State", "状态"),
    "system_fit": ("Does it fit", "显存是否够用"),
    "fit_none": ("Predicted once a checkpoint is known.", "检查点确定后即可预测。"),
    "fit_weights": ("Weights", "权重"),
    "fit_caches": ("Caches", "缓存"),
    "fit_working": ("Working set", "工作集"),
    "fit_needed": ("Needed", "所需"),
    "fit_largest": ("Largest batch", "最大批量"),
    "fit_predicted": ("Predicted", "预测"),
    "fit_measured": ("Measured", "实测"),
    "fit_of_process": ("process, libraries included", "整个进程，含库"),
    "fit_green": ("Fits", "够用"),
    "fit_amber": ("Tight", "紧张"),
    "fit_red": ("Does not fit", "不够"),
    "engine_checkpoint": ("Checkpoint", "检查点"),
    "engine_kind": ("Engine", "引擎"),
    "engine_requested": ("Requested", "请求精度"),
    "engine_effective": ("In memory", "实测精度"),
    "engine_layers": ("Layers", "层"),
    "engine_attention": ("Attention implementation", "注意力实现"),
    "engine_no_kernels": (
        "Torch's operations stand in for our kernels: {reason}",
        "以 torch 运算代替自有内核：{reason}",
    ),
    "engine_of_process": ("Whole process", "整个进程"),
    "engine_of_process_gpu": ("Whole process (driver)", "整个进程（驱动）"),
    "engine_of_torch": ("Tensors (torch)", "张量（torch）"),
    "engine_device": ("Device", "设备"),
    "engine_weights": ("Weights", "权重"),
    "engine_census": ("Everything in memory", "内存中的全部模块"),
    "census_class": ("Module", "模块"),
    "census_format": ("Format", "格式"),
    "census_modules": ("Count", "数量"),
    "census_weights": ("Weights", "权重数"),
    "census_bytes": ("Size", "大小"),
    "engine_load": ("Load", "加载"),
    "engine_warm_up": ("Warm-up", "预热"),
    "engine_graphs": ("CUDA graphs", "CUDA 图"),
    "engine_graphs_cost": (
        "{n_graphs} captured in {seconds}; with the caches of all rows {size}",
        "捕获 {n_graphs} 个，用时 {seconds}；连同全部行的缓存占 {size}",
    ),
    "engine_phase_before": ("Before", "加载前"),
    "engine_phase_after_load": ("After load", "加载后"),
    "engine_phase_after_warm_up": ("After warm-up", "预热后"),
    "engine_phase_after_unload": ("After unload", "卸载后"),
    "engine_phase_peak": ("Peak", "峰值"),
    **COMPARE_TEXTS,
    # Errors
    "error_unexpected": (
        "Something went wrong inside Sotto (report {id}). The log has the details under that number; the next request "
        "works as usual.",
        "Sotto 内部出错（编号 {id}）。日志中以该编号记录了详情；下一次请求可照常进行。",
    ),
}


def label(key: str) -> Any:
    """A static label that the browser shows in its own language."""
    if key not in TEXTS:
        raise KeyError(f"ui/texts.py has no text '{key}'.")
    return gr.I18n()(key)


def say(key: str, locale: str, /, **values: object) -> str:
    """The text in the given language, with its values filled in."""
    return TEXTS[key][LOCALES.index(locale)].format(**values)


def page_locale(request: gr.Request | None) -> str:
    """The language a browser asks for first: 'zh' or 'en'."""
    accepted = (request.headers.get("accept-language") or "") if request is not None else ""
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def translations() -> Any:
    """The table as Gradio wants it. zh-CN is Gradio's own locale; other Chinese locales fall back to it."""
    english, chinese = ({key: pair[i] for key, pair in TEXTS.items()} for i in range(2))
    return gr.I18n(**{"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese})
