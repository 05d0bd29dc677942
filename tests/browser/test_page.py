"""The page as its users meet it: every test drives the real application in a real Chromium, and waits on conditions."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import soundfile

from tests.browser.conftest import OTHER_HOST, Visits
from tests.browser.steps import (
    TABS,
    clock,
    have_text,
    open_card,
    open_tab,
    shown_text,
    start,
    transcribe,
    unfold,
    upload,
    use_example,
    word_errors,
)
from tests.conftest import ROOT
from tests.measured import measured_row
from transcription.formats import FORMATS
from transcription.run_card import RunCard, load_card, to_json
from transcription.transcript import Segment, Transcript

SLOW_MS = 200_000
"""Longest wait for a process that loads torch, on two slow cores."""


@pytest.fixture(scope="module")
def two_sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The start of the English example, which becomes two segments."""
    return cut_english(tmp_path_factory.mktemp("spoken") / "two sentences.wav", 0.0, 7.3)


def cut_english(path: Path, start_s: float, end_s: float) -> Path:
    samples, rate = soundfile.read(ROOT / "examples" / "english.flac", dtype="float32")
    soundfile.write(path, samples[round(start_s * rate) : round(end_s * rate)], rate)
    return path


# Transcribe


def test_an_example_becomes_its_text(page: Any, manifest: list[dict[str, Any]]) -> None:
    """One that is not chosen at the start."""
    entry = next(entry for entry in manifest if entry["language"] == "de")
    use_example(page, entry)
    assert word_errors(entry["text"], transcribe(page)) <= 0.1


def test_the_first_example_is_ready_at_the_start(page: Any, visits: Visits, manifest: list[dict[str, Any]]) -> None:
    seen = {"#recording-current": manifest[0]["file"], "#player #duration": clock(manifest[0]["seconds"])}
    assert visits.first_sight == seen


def test_an_upload_with_a_foreign_name_gives_files_of_that_name(
    page: Any, manifest: list[dict[str, Any]], greeting: Path, tmp_path: Path
) -> None:
    """Upload, transcript, and all five downloads: what they hold is what FORMATS writes of the same transcript."""
    recording = tmp_path / "grabación número 1 – 録音.wav"
    recording.write_bytes(greeting.read_bytes())
    upload(page, recording)
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1

    files = {}
    for row in FORMATS.values():
        with page.expect_download() as download:
            page.click(f"#download-{row.name}")
        assert download.value.suggested_filename == f"{recording.stem}.{row.extension}"
        files[row.name] = Path(download.value.path()).read_bytes().decode("utf-8")
    transcript = transcript_of(json.loads(files["json"]))
    assert transcript.segments
    assert files == {row.name: row.render(transcript) for row in FORMATS.values()}


def transcript_of(content: dict[str, Any]) -> Transcript:
    known = {name: content[name] for name in Transcript.__dataclass_fields__}
    segments = tuple(Segment(**{**segment, "words": ()}) for segment in content["segments"])
    return Transcript(**{**known, "segments": segments, "warnings": tuple(content["warnings"])})


def test_a_video_is_transcribed(page: Any, manifest: list[dict[str, Any]], greeting: Path, tmp_path: Path) -> None:
    video = tmp_path / "greeting.mp4"
    picture = ["-f", "lavfi", "-i", "color=size=64x64:rate=5"]
    coded = ["-c:v", "mpeg4", "-c:a", "aac", "-shortest"]
    subprocess.run(["ffmpeg", "-v", "error", *picture, "-i", greeting, *coded, video], check=True)
    upload(page, video)
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1
    assert "speech in 3" in page.inner_text("#transcribe-status")


def test_the_microphone_is_heard(page: Any, manifest: list[dict[str, Any]]) -> None:
    page.click("#record")
    page.locator("#player #record-time, #player time", has_text="0:04").first.wait_for()
    page.click("#player .stop-button:visible")
    page.locator("#recording-current .chosen", has_text="microphone").wait_for()
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.3
    with page.expect_download() as download:
        page.click("#download-txt")
    assert download.value.suggested_filename == "microphone.txt"


def test_cancel_keeps_the_text_and_the_next_request_works(
    page: Any, manifest: list[dict[str, Any]], longest: dict[str, Any]
) -> None:
    """Before it, the draft of the next segment is seen below those that are finished."""
    upload(page, ROOT / "examples" / longest["file"])
    start(page)
    page.wait_for_selector("#segments .segment")
    page.wait_for_selector("#draft .draft:visible:not(:empty)")
    page.click("#transcribe-cancel")
    page.locator("#transcribe-status .notice.calm", has_text="kept").wait_for()
    page.wait_for_selector("#draft .draft", state="detached")
    kept = shown_text(page)
    assert kept
    assert len(kept) < 0.9 * len(longest["text"])
    page.wait_for_selector("#download-srt")

    use_example(page, manifest[0])
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1


def test_a_broken_file_gives_a_sentence_and_the_next_request_works(
    page: Any, expects_complaints: bool, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    broken = tmp_path / "not really.wav"
    broken.write_text("This is a shopping list: bread, milk.\n" * 20, encoding="utf-8")
    upload(page, broken)
    start(page)
    page.wait_for_selector("#transcribe-status .notice.error")
    sentence = page.inner_text("#transcribe-status")
    assert sentence.strip().endswith(".")
    assert "Traceback" not in page.content()
    assert "report" not in sentence, "an expected error must carry its own sentence"

    use_example(page, manifest[0])
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1


def test_a_format_the_browser_cannot_play_is_transcribed(
    page: Any, expects_complaints: bool, manifest: list[dict[str, Any]], greeting: Path, tmp_path: Path
) -> None:
    samples, rate = soundfile.read(greeting, dtype="float32")
    soundfile.write(tmp_path / "talk.aiff", samples, rate)
    upload(page, tmp_path / "talk.aiff")
    page.locator(".hint-unplayable").wait_for()
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1
    page.click("#player button[aria-label=Clear]")
    page.wait_for_selector("#recording-current .chosen", state="detached")
    upload(page, greeting)
    page.locator(".hint-unplayable").wait_for(state="hidden")


def test_a_name_says_nothing_about_what_a_file_holds(
    page: Any, expects_complaints: bool, manifest: list[dict[str, Any]], greeting: Path, tmp_path: Path
) -> None:
    for name in ("talk", "talk.dat", "talk.ogg", "talk.m2ts"):
        shutil.copy(greeting, tmp_path / name)
        use_example(page, manifest[1])  # the place for files is free again
        upload(page, tmp_path / name)
        assert page.inner_text("#recording-current .chosen") == name
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:5,\n{greeting}\n", encoding="utf-8")
    use_example(page, manifest[1])
    upload(page, tmp_path / "list.m3u8")
    start(page)
    page.wait_for_selector("#transcribe-status .notice.error")


def test_silence_is_said_calmly(page: Any, tmp_path: Path) -> None:
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, [0.0] * 48_000, 16_000)
    upload(page, silence)
    start(page)
    page.locator("#transcribe-status .notice.calm", has_text="No speech").wait_for()
    page.locator("#announcer[role=status]", has_text="No speech").wait_for(state="attached")
    assert page.locator("#transcribe-status .notice.error").count() == 0


def test_without_a_recording_the_page_asks_for_one(page: Any) -> None:
    page.click("#player button[aria-label=Clear]")
    page.wait_for_selector("#recording-current .chosen", state="detached")
    start(page)
    page.locator("#transcribe-status .notice", has_text="Choose a file").wait_for()


def test_a_click_on_a_time_plays_from_there_with_subtitles(
    page: Any, two_sentences: Path, manifest: list[dict[str, Any]]
) -> None:
    upload(page, two_sentences)
    transcribe(page)
    page.locator("#segments .hear").first.click()
    page.wait_for_function("sotto.playing")
    last = page.locator("#segments .hear").last
    start_s = float(last.get_attribute("data-start"))
    last.click()
    page.wait_for_function(
        "start => { const [m, s] = document.querySelector('#player #time').textContent.split(':'); "
        "return 60 * m + 1 * s >= Math.floor(start); }",
        arg=start_s,
    )
    words = page.locator("#segments .segment p").last.inner_text()
    page.locator("#player [data-testid=subtitle-display]", has_text=words).wait_for()
    assert page.evaluate("sotto.playing"), "the second click must not pause"
    use_example(page, manifest[0])
    page.wait_for_function("!sotto.playing")


def test_copy_puts_the_text_on_the_clipboard(page: Any) -> None:
    have_text(page)
    page.click("#copy")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).length > 0")
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines == page.locator("#segments .segment p").all_inner_texts()


def test_a_precision_that_cannot_run_here_says_why(page: Any) -> None:
    page.click("#precision input")
    page.locator("#precision [role=option]", has_text="not on this machine").first.click()
    reason = page.locator("#precision-reason .notice").inner_text()
    start(page)
    page.locator("#transcribe-status .notice.error", has_text=reason.split(":")[0]).wait_for()
    page.click("#precision input")
    page.locator("#precision [role=option]").first.click()
    page.locator("#precision-reason .notice").wait_for(state="detached")
    page.locator("#precision [role=option]").first.wait_for(state="detached")  # the list fades out, frame by frame


# Detect language


def test_detect_language_names_it_with_its_probability(page: Any, manifest: list[dict[str, Any]]) -> None:
    use_example(page, next(entry for entry in manifest if entry["language"] == "fr"))
    open_tab(page, "language")
    page.click("#language-go")
    page.locator("#language-label", has_text="French").wait_for()
    assert "French" in page.inner_text("#language-status")
    assert page.locator("#language-windows tbody tr").count() >= 1


# Everywhere


def test_the_memory_panel_ticks(page: Any) -> None:
    before = page.inner_html("#memory-panel")
    page.wait_for_function("before => document.querySelector('#memory-panel').innerHTML !== before", arg=before)
    page.wait_for_selector("#memory-panel .history path", state="attached")
    assert re.search(r"\d [GM]iB of \d+\.\d GiB", page.inner_text("#memory-panel"))


def test_the_demo_model_says_what_it_is(page: Any) -> None:
    assert "--model openai/whisper-large-v3" in page.inner_text("#banner")


def test_everything_is_reachable_by_keyboard(visits: Visits, page: Any) -> None:
    page.click("#header")  # the keyboard goes on from there
    tabs = page.locator("[role=tab]").evaluate_all("tabs => tabs.map(tab => tab.id)")
    assert set(tabs) == {f"tab-{tab}-button" for tab in TABS}
    wanted = {*tabs, "transcribe-go"}
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
        if wanted <= reached:
            break
    assert wanted <= reached
    page.focus("#tab-system-button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#system-hardware .history")
    visits.forget()  # a menu that Tab has passed opens when it is drawn anew (Gradio 6.31)


def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    have_text(page)
    page.set_viewport_size({"width": 390, "height": 844})
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("is => document.body.classList.contains('dark') === is", arg=scheme == "dark")
        for tab in TABS:
            open_tab(page, tab)
            page.wait_for_selector(f"#tab-{tab}:visible")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, (scheme, tab)
    assert page.is_visible("#memory-panel .narrow")
    table = page.locator("#system-choices .scroll").first
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")
    hint = table.evaluate("box => getComputedStyle(box).backgroundAttachment")
    assert "local" in hint and "scroll" in hint, "a shadow where the table goes on"


def test_a_chinese_browser_at_an_insecure_origin_gets_chinese_and_is_told_about_the_microphone(
    visits: Visits, page: Any, address: str
) -> None:
    assert page.locator(".hint-insecure-origin").is_hidden()
    other = visits.open(f"http://{OTHER_HOST}:{urlsplit(address).port}", locale="zh-CN", permissions=[])
    assert "https" in other.locator(".hint-insecure-origin").inner_text()
    assert other.inner_text("#transcribe-go") == "开始转写"
    assert [other.inner_text(f"#tab-{tab}-button") for tab in TABS] == ["转写", "语种识别", "精度对比", "系统"]
    assert "主内存" in other.inner_text("#memory-panel")
    other.click("#transcribe-go")
    other.locator("#transcribe-status .summary", has_text="完成").wait_for()
    other.context.close()


def test_nothing_is_fetched_from_elsewhere(page: Any, address: str) -> None:
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    hosts = {urlsplit(name).netloc for name in names}
    assert hosts, "the browser lists what it fetched"
    assert hosts <= {urlsplit(address).netloc, ""}


# System and Compare: they unload the engine, so they come last


def test_system_shows_the_engine_and_unloads_it(page: Any) -> None:
    open_tab(page, "system")
    card = page.locator("#system-software .engine")
    card.wait_for()
    assert "fp32" in card.inner_text()
    card.locator("summary").click()
    assert "decoder projection" in card.inner_text()
    page.click("#unload")
    page.locator("#system-software", has_text="No engine is loaded").wait_for()
    open_tab(page, "transcribe")
    transcribe(page)


def names_of(page: Any) -> list[str]:
    heads = page.locator("#compare-figures .compared thead th")
    return [heads.nth(i).inner_text() for i in range(1, heads.count())]


PARTS = ("weights", "rest of the peak", "before the load")
"""Of the bars, as the page names them."""
ROOM_JS = """(() => {
  const charts = Array.from(document.querySelectorAll('#compare-charts svg'));
  const chart = charts.find((one) => one.querySelector('.mark-line'));
  const lines = Array.from(chart.querySelectorAll('.mark-line path')).filter((one) => one.getAttribute('d'));
  const top = (one) => one.getBoundingClientRect().top;
  return Math.min(...lines.map(top)) - top(chart.querySelector('.role-frame .background'));
})()"""
"""Pixels between the top of the time chart and its highest line."""


def test_a_card_opened_in_a_new_page_is_shown_with_its_charts(page: Any, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    rows = [replace(measured_row(name), before_bytes=200_000_000) for name in ("fp32", "bf16")]
    card.write_text(to_json(RunCard("2026-11-20", tuple(rows))), encoding="utf-8")
    open_tab(page, "compare")
    assert names_of(page) == [], "nothing has been compared on this page"
    open_card(page, card)
    page.locator("#compare-figures thead th", has_text="bf16 · card").wait_for()
    page.locator("#announcer", has_text="2 rows of 2026-11-20").wait_for(state="attached")
    page.locator("#compare-charts svg, #compare-charts canvas").nth(1).wait_for()
    tops = {
        part: page.locator(f"#compare-charts path[aria-label*='{part}']").first.bounding_box()["y"] for part in PARTS
    }
    assert list(tops.values()) == sorted(tops.values(), reverse=True), "weights from zero on, to be compared"
    assert page.evaluate(ROOM_JS) > 8, "no line runs along the edge"
    colour = "getComputedStyle(document.querySelector('#compare-charts .role-axis-label text')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{colour} !== '{light}'")
    with page.expect_download() as download:
        page.click("#compare-csv")
    assert len(list(csv.reader(Path(download.value.path()).read_text().splitlines()))) == 3
    page.click("#compare-close")
    page.locator("#compare-figures .compared").wait_for(state="detached")
    page.locator("#compare-charts").wait_for(state="hidden")


def test_a_file_that_is_no_run_card_is_refused_in_a_sentence(page: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    open_tab(page, "compare")
    open_card(page, other)
    page.locator("#compare-status .notice.error", has_text="not a run card").wait_for()


@pytest.fixture(scope="module")
def calibrated(all_visits: Visits, manifest: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrate pressed once on the shared page; the report that it offers."""
    page = all_visits.shared()
    open_tab(page, "compare")
    unfold(page, "#calibrate button", "#calibrate-go")
    page.click("#calibrate-go")
    page.locator("#calibrate-status", has_text="Listening to ").wait_for()
    page.locator("#calibrate-status", has_text="Calibrated on ").wait_for(timeout=SLOW_MS)
    for entry in manifest:
        assert f" {entry['language']}" in page.inner_text("#calibrate-status")
    with page.expect_download() as download:
        page.click("#calibrate-report")
    report = tmp_path_factory.mktemp("calibrated") / "report.html"
    download.value.save_as(report)
    return report


def test_calibrating_gives_a_report_with_a_bar_for_each_layer(calibrated: Path, page: Any) -> None:
    opened = page.context.new_page()
    opened.goto(calibrated.as_uri())
    assert "Languages heard: " in opened.inner_text("body")
    bars = opened.locator("tr td div")
    assert bars.count() == 76, "a bar for each linear layer"
    widths = bars.evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True) and widths[0] > 3 * widths[-1] > 0
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    opened.close()


def test_two_precisions_are_measured_told_apart_and_kept(page: Any, calibrated: Path, tmp_path: Path) -> None:
    """fp32 and int8-static, which runs because Calibrate was pressed and misspells a word of this sentence."""
    upload(page, cut_english(tmp_path / "opening hours.wav", 2.96, 7.33))
    open_tab(page, "compare")
    opened = names_of(page)  # the rows of a card that was opened before stay
    page.click("#compare-go")
    page.locator("#compare-status .notice", has_text="two precisions").wait_for()
    for name in ("fp32", "int8-static"):
        page.locator("#compare-precisions label", has_text=name).first.click()
    page.click("#compare-go")
    page.locator("#compare-status", has_text="fp32: ").wait_for()
    page.locator("#compare-figures thead th:text-is('fp32')").wait_for(timeout=SLOW_MS)
    page.locator("#compare-status", has_text="int8-static: ").wait_for()
    assert names_of(page) == ["fp32", *opened], "the first row is there before the second is measured"
    page.locator("#compare-status", has_text="Measured on this machine").wait_for(timeout=SLOW_MS)

    assert names_of(page) == ["fp32", "int8-static", *opened]
    assert page.locator("#compare-figures .failure").count() == 0
    assert "agreement with fp32, not accuracy" in page.inner_text("#compare-figures")
    assert "49 Int8Linear int8" in page.inner_text("#compare-figures")
    assert "less memory than those of fp32" in page.inner_text("#compare-verdicts")
    page.locator("#compare-charts svg, #compare-charts canvas").nth(1).wait_for()  # the first one fetches Vega
    assert page.locator("#compare-charts svg, #compare-charts canvas").count() == 2
    assert "The text of this precision" in page.inner_text("#compare-words-fp32")
    hear_a_changed_word(page, "int8-static")
    keep_and_open_again(page, tmp_path)
    come_back(page)


def hear_a_changed_word(page: Any, precision: str) -> None:
    words = page.locator(f"#compare-words-{precision} .highlighted")
    assert words.count() >= 1, "its text differs from fp32's"
    assert "rgba(0, 0, 0, 0)" not in words.first.evaluate("one => getComputedStyle(one).backgroundColor")
    words.first.click()
    page.wait_for_function("document.querySelector('#player #time').innerText !== '0:00'")
    heard = page.inner_text("#recording-current .chosen")
    page.locator(".examples button:not(#record)").first.click()
    page.locator("#recording-current .chosen").filter(has_not_text=heard).wait_for()
    words.first.click()
    page.locator("#recording-current .chosen", has_text=heard).wait_for()
    page.wait_for_function("document.querySelector('#player #time').innerText !== '0:00'")


def come_back(page: Any) -> None:
    """In a new page of the same browser the last comparison is there, and so is the calibration with its report."""
    again = page.context.new_page()
    again.goto(page.url)
    open_tab(again, "compare")
    again.locator("#compare-status", has_text="Your last comparison").wait_for()
    assert names_of(again) == ["fp32", "int8-static"] and again.locator("#compare-card").is_visible()
    again.locator("#compare-charts svg, #compare-charts canvas").nth(1).wait_for()
    unfold(again, "#calibrate button", "#calibrate-go")
    again.locator("#calibrate-there", has_text="heard: ").wait_for()
    assert again.locator("#calibrate-report").is_visible()
    again.close()


def keep_and_open_again(page: Any, folder: Path) -> None:
    with page.expect_download() as download:
        page.click("#compare-card")
    card = folder / "card.json"
    download.value.save_as(card)
    assert [row.precision for row in load_card(card).rows] == ["fp32", "int8-static"]
    assert json.loads(card.read_text())["rows"][1]["verdict"]
    with page.expect_download() as download:
        page.click("#compare-csv")
    assert len(list(csv.reader(Path(download.value.path()).read_text().splitlines()))) == 1 + len(names_of(page))

    open_card(page, card)
    page.locator("#compare-status", has_text="2 rows of").wait_for()
    assert len(names_of(page)) == 4 and "fp32 · card" in names_of(page)[2]
    assert "CPU" in page.locator("#compare-verdicts .line").inner_text()
    lines = (
        "[...document.querySelectorAll('#compare-charts .mark-line path')].filter(one => one.getAttribute('d')).length"
    )
    page.wait_for_function(f"{lines} === 4")  # first and warm runs, of this comparison and of the card
