"""What only the Chinese page says: kinds of error, and names of languages.

Error sentences are written where the error happens, in English, with its file names and figures. On the Chinese page
the kind of error comes first, in Chinese; the exact sentence follows as it was written.
"""

from __future__ import annotations

ERRORS: dict[str, str] = {
    "SottoError": "请求未能完成。",
    "UserError": "无法按此要求处理，请调整后重试。",
    "AudioError": "这段录音无法处理，请检查文件。",
    "NotAudioError": "文件中没有可以解码的声音，请选择真正的音频或视频文件。",
    "NoAudioTrackError": "这个视频没有声音轨道，请选择带声音的文件。",
    "EmptyAudioError": "文件是空的，请选择有内容的录音。",
    "AudioTooLargeError": "录音超过了大小或时长上限，请压缩、切分，或提高上限。",
    "OptionError": "有选项不在允许的范围内。",
    "ModelError": "模型检查点有问题。",
    "UnknownModelError": "找不到这个模型，请检查名称或文件夹。",
    "NotWhisperError": "这不是 Whisper 检查点，请另选模型。",
    "ModelUnavailableError": "现在无法取得这个模型（离线、受限、无法连接或文件不完整）。",
    "PrecisionError": "这个精度无法使用。",
    "UnknownPrecisionError": "没有这个精度，请从列表中选择。",
    "UnavailablePrecisionError": "本设备不能运行这个精度，请选择其他精度。",
    "CalibrationMissingError": "这个精度需要先校准：请在“精度对比”页校准。",
    "PortTakenError": "端口已被其他程序占用，请换一个端口。",
    "MachineError": "本机目前的状态无法完成这项工作。",
    "OutOfMemoryError": "内存或显存不足，请选择更小的精度或模型，或关闭其他程序。",
    "DiskFullError": "磁盘空间不足，请腾出空间后重试。",
    "DeviceError": "显卡未通过检查或运行中出错，请重新启动，或使用 --device cpu。",
    "NoSuchDeviceError": "指定的显卡不存在或无法使用，请改用 --device auto 或 cpu。",
    "EffectivePrecisionError": "内存中的精度与请求的不一致，因此没有转写；请选择其他精度。",
    "CancelledError": "已停止，已有结果已保留。",
}
"""Name of a class of errors.py -> its kind in one Chinese sentence, with what to do."""

LANGUAGES: dict[str, str] = {
    "af": "南非荷兰语", "am": "阿姆哈拉语", "ar": "阿拉伯语", "as": "阿萨姆语", "az": "阿塞拜疆语", "ba": "巴什基尔语",
    "be": "白俄罗斯语", "bg": "保加利亚语", "bn": "孟加拉语", "bo": "藏语", "br": "布列塔尼语", "bs": "波斯尼亚语",
    "ca": "加泰罗尼亚语", "cs": "捷克语", "cy": "威尔士语", "da": "丹麦语", "de": "德语", "el": "希腊语",
    "en": "英语", "es": "西班牙语", "et": "爱沙尼亚语", "eu": "巴斯克语", "fa": "波斯语", "fi": "芬兰语",
    "fo": "法罗语", "fr": "法语", "gl": "加利西亚语", "gu": "古吉拉特语", "ha": "豪萨语", "haw": "夏威夷语",
    "he": "希伯来语", "hi": "印地语", "hr": "克罗地亚语", "ht": "海地克里奥尔语", "hu": "匈牙利语", "hy": "亚美尼亚语",
    "id": "印度尼西亚语", "is": "冰岛语", "it": "意大利语", "ja": "日语", "jw": "爪哇语", "ka": "格鲁吉亚语",
    "kk": "哈萨克语", "km": "高棉语", "kn": "卡纳达语", "ko": "韩语", "la": "拉丁语", "lb": "卢森堡语",
    "ln": "林加拉语", "lo": "老挝语", "lt": "立陶宛语", "lv": "拉脱维亚语", "mg": "马达加斯加语", "mi": "毛利语",
    "mk": "马其顿语", "ml": "马拉雅拉姆语", "mn": "蒙古语", "mr": "马拉地语", "ms": "马来语", "mt": "马耳他语",
    "my": "缅甸语", "ne": "尼泊尔语", "nl": "荷兰语", "nn": "新挪威语", "no": "挪威语", "oc": "奥克语",
    "pa": "旁遮普语", "pl": "波兰语", "ps": "普什图语", "pt": "葡萄牙语", "ro": "罗马尼亚语", "ru": "俄语",
    "sa": "梵语", "sd": "信德语", "si": "僧伽罗语", "sk": "斯洛伐克语", "sl": "斯洛文尼亚语", "sn": "绍纳语",
    "so": "索马里语", "sq": "阿尔巴尼亚语", "sr": "塞尔维亚语", "su": "巽他语", "sv": "瑞典语", "sw": "斯瓦希里语",
    "ta": "泰米尔语", "te": "泰卢固语", "tg": "塔吉克语", "th": "泰语", "tk": "土库曼语", "tl": "他加禄语",
    "tr": "土耳其语", "tt": "鞑靼语", "uk": "乌克兰语", "ur": "乌尔都语", "uz": "乌兹别克语", "vi": "越南语",
    "yi": "意第绪语", "yo": "约鲁巴语", "yue": "粤语", "zh": "中文",
}  # fmt: skip
"""Language code -> its Chinese name, for every language of the published checkpoints."""
