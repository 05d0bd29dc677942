"""The page as its users meet it: every test drives the real application in a real Chromium, and waits on conditions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jiwer
import pytest
import soundfile

from tests.browser.conftest import OTHER_HOST, OpenPage
from tests.conftest import ROOT
from transcription.formats import FORMATS
from transcription.transcript import Segment, Transcript
from ui.blocks import TABS

ENGLISH = ROOT / "examples" / "english.flac"


# What a user does


def use_example(page: Any, entry: dict[str, Any]) -> None:
    """Press the button of an example and wait until it is the chosen recording."""
    page.locator(".examples button", has_text=clock(entry["seconds"])).filter(
        has_text=re.split("[:：]", entry["label"])[0].strip()
    ).first.click()
    page.wait_for_selector(f"#recording-current .chosen:text-is('{entry['file']}')")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#recording-file input[type=file]", path)
    page.locator("#recording-current .chosen", has_text=path.name).wait_for()


def transcribe(page: Any) -> str:
    """Press Transcribe, wait for the end, return the text on the page."""
    page.click("#transcribe-go")
    page.locator("#transcribe-status .summary", has_text="Done in").wait_for()
    return shown_text(page)


def shown_text(page: Any) -> str:
    return " ".join(page.locator("#segments .segment p").all_inner_texts())


def word_errors(reference: str, heard: str) -> float:
    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^\w\s':]", " ", text.lower()).split())

    return jiwer.wer(plain(reference), plain(heard))


def open_tab(page: Any, name: str) -> None:
    page.click(f"#tab-{name}-button")
    page.wait_for_selector(f"#tab-{name}-button[aria-selected=true]")


# Transcribe


@pytest.mark.parametrize("language", ["en", "de"])
def test_an_example_becomes_its_text(page: Any, manifest: list[dict[str, Any]], language: str) -> None:
    entry = next(entry for entry in manifest if entry["language"] == language)
    use_example(page, entry)
    assert word_errors(entry["text"], transcribe(page)) <= 0.1


def test_the_first_example_is_ready_at_the_start(page: Any, manifest: list[dict[str, Any]]) -> None:
    assert page.inner_text("#recording-current") == manifest[0]["file"]
    assert page.inner_text("#player #duration") == clock(manifest[0]["seconds"])


def test_an_upload_with_a_foreign_name_gives_files_of_that_name(
    page: Any, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Upload, transcript, and all five downloads: what they hold is what FORMATS writes of the same transcript."""
    recording = tmp_path / "grabación número 1 – 録音.flac"
    recording.write_bytes(ENGLISH.read_bytes())
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


def test_a_video_is_transcribed(page: Any, shared_audio: Path) -> None:
    upload(page, shared_audio / "formats" / "en-jfk-video.mp4")
    transcribe(page)
    assert "speech in 11" in page.inner_text("#transcribe-status")


def test_the_microphone_is_heard(page: Any, manifest: list[dict[str, Any]]) -> None:
    page.click("#player button[aria-label=Clear]")
    page.click("#player .record-button")
    page.locator("#player #record-time, #player time", has_text="0:05").first.wait_for()
    page.click("#player .stop-button:visible")
    page.locator("#recording-current .chosen", has_text="microphone").wait_for()
    assert word_errors(manifest[0]["sentences"][0]["text"], transcribe(page)) <= 0.3
    with page.expect_download() as download:
        page.click("#download-txt")
    assert download.value.suggested_filename == "microphone.txt"


def test_cancel_keeps_the_text_and_the_next_request_works(page: Any, manifest: list[dict[str, Any]]) -> None:
    longest = max(manifest, key=lambda entry: entry["seconds"])
    use_example(page, longest)
    page.click("#transcribe-go")
    page.wait_for_selector("#segments .segment")
    page.click("#transcribe-cancel")
    page.locator("#transcribe-status .notice.calm", has_text="kept").wait_for()
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
    page.click("#transcribe-go")
    page.wait_for_selector("#transcribe-status .notice.error")
    sentence = page.inner_text("#transcribe-status")
    assert sentence.strip().endswith(".")
    assert "Traceback" not in page.content()
    assert "report" not in sentence, "an expected error must carry its own sentence"

    use_example(page, manifest[0])
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1


def test_a_format_the_browser_cannot_play_is_transcribed(
    page: Any, expects_complaints: bool, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    samples, rate = soundfile.read(ENGLISH, dtype="float32")
    soundfile.write(tmp_path / "talk.aiff", samples, rate)
    upload(page, tmp_path / "talk.aiff")
    page.locator(".hint-unplayable").wait_for()
    assert word_errors(manifest[0]["text"], transcribe(page)) <= 0.1
    use_example(page, manifest[0])
    page.locator(".hint-unplayable").wait_for(state="hidden")


def test_silence_is_said_calmly(page: Any, tmp_path: Path) -> None:
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, [0.0] * 48_000, 16_000)
    upload(page, silence)
    page.click("#transcribe-go")
    page.locator("#transcribe-status .notice.calm", has_text="No speech").wait_for()
    assert page.locator("#transcribe-status .notice.error").count() == 0


def test_without_a_recording_the_page_asks_for_one(page: Any) -> None:
    page.click("#player button[aria-label=Clear]")
    page.wait_for_selector("#recording-current .chosen", state="detached")
    page.click("#transcribe-go")
    page.locator("#transcribe-status .notice", has_text="Choose a file").wait_for()


def test_a_click_on_a_time_plays_from_there_with_subtitles(page: Any, manifest: list[dict[str, Any]]) -> None:
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


def test_copy_puts_the_text_on_the_clipboard(page: Any) -> None:
    transcribe(page)
    page.click("#copy")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).length > 0")
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines == page.locator("#segments .segment p").all_inner_texts()


def test_a_precision_that_cannot_run_here_says_why(page: Any) -> None:
    page.click("#precision input")
    page.locator("#precision [role=option]", has_text="not on this machine").first.click()
    reason = page.locator("#precision-reason .notice").inner_text()
    page.click("#transcribe-go")
    page.locator("#transcribe-status .notice.error", has_text=reason.split(":")[0]).wait_for()


# Detect language, Compare, System


def test_detect_language_names_it_with_its_probability(page: Any, manifest: list[dict[str, Any]]) -> None:
    use_example(page, next(entry for entry in manifest if entry["language"] == "fr"))
    open_tab(page, "language")
    page.click("#language-go")
    page.locator("#language-label", has_text="French").wait_for()
    assert "French" in page.inner_text("#language-status")
    assert page.locator("#language-windows tbody tr").count() >= 1


def test_system_shows_the_engine_and_unloads_it(page: Any) -> None:
    transcribe(page)
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


# Everywhere


def test_the_memory_panel_ticks(page: Any) -> None:
    before = page.inner_html("#memory-panel")
    page.wait_for_function("before => document.querySelector('#memory-panel').innerHTML !== before", arg=before)
    page.wait_for_selector("#memory-panel .history path", state="attached")
    assert re.search(r"\d [GM]iB of \d+\.\d GiB", page.inner_text("#memory-panel"))


def test_the_demo_model_says_what_it_is(page: Any) -> None:
    assert "--model openai/whisper-large-v3" in page.inner_text("#banner")


def test_everything_is_reachable_by_keyboard(page: Any) -> None:
    wanted = {f"tab-{tab.id}-button" for tab in TABS} | {"transcribe-go"}
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(open_page: OpenPage, address: str, scheme: str) -> None:
    page = open_page(390, 844, url=f"{address}/?__theme={scheme}")
    transcribe(page)
    for tab in TABS:
        open_tab(page, tab.id)
        page.wait_for_selector(f"#tab-{tab.id}:visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab.id
    assert page.is_visible("#memory-panel .narrow")


def test_chinese_browsers_get_chinese(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    assert page.inner_text("#transcribe-go") == "开始转写"
    assert [page.inner_text(f"#tab-{tab.id}-button") for tab in TABS] == ["转写", "语种识别", "精度对比", "系统"]
    assert "主内存" in page.inner_text("#memory-panel")
    page.click("#transcribe-go")
    page.locator("#transcribe-status .summary", has_text="完成").wait_for()


def test_an_insecure_origin_is_told_about_the_microphone(open_page: OpenPage, address: str) -> None:
    assert open_page().locator(".hint-insecure-origin").is_hidden()
    other = open_page(url=f"http://{OTHER_HOST}:{urlsplit(address).port}", permissions=[])
    assert "https" in other.locator(".hint-insecure-origin").inner_text()


def test_nothing_is_fetched_from_elsewhere(open_page: OpenPage, address: str) -> None:
    names = open_page().evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    hosts = {urlsplit(name).netloc for name in names}
    assert hosts, "the browser lists what it fetched"
    assert hosts <= {urlsplit(address).netloc, ""}
