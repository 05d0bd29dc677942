"""Dataclasses to page text: numbers in words, everything foreign escaped, nothing claimed that was not measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fakes import SEGMENTS, FakeRun
from transcription.interface import LanguageName, PrecisionStatus, Status
from transcription.tokenizer import LANGUAGE_NAMES
from transcription.transcript import LanguageGuess, LanguageReport, Progress, Transcript, WindowLanguage, Word
from ui import chinese, render

HOSTILE = '<script>alert(1)</script> & "quotes"'
NAMES = {"en": "English", "de": "German"}


@pytest.fixture
def transcript() -> Transcript:
    run = FakeRun(SEGMENTS, 0.0, 12.2)
    assert list(run)
    return run.transcript


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0:00"), (7.9, "0:07"), (61, "1:01"), (3723, "1:02:03"), (36_000, "10:00:00")]
)
def test_clock(value: float, expected: str) -> None:
    assert render.clock(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (0.423, "0.42 s"), (12.34, "12.3 s"), (125.0, "2:05 min")]
)
def test_seconds(value: float | None, expected: str) -> None:
    assert render.seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0, "0 MiB"), (26_624, "26 KiB"), (45 * 2**20, "45 MiB"), (int(3.2 * 2**30), "3.2 GiB")],
)
def test_size(value: int | None, expected: str) -> None:
    assert render.size(value) == expected


def test_a_segment_carries_its_time_and_escapes_its_text() -> None:
    html = render.segment(replace(SEGMENTS[0], start_s=65.25, text=HOSTILE), "en")
    assert 'data-start="65.25"' in html
    assert ">1:05</button>" in html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_word_with_a_time_can_be_clicked() -> None:
    timed = replace(SEGMENTS[0], text="Hi <b> there", words=tuple(
        Word(start_s, start_s + 0.2, text, 0.9) for start_s, text in ((1.0, "Hi"), (1.25, "<b>"), (1.5, "there"))
    ))  # fmt: skip
    html = render.segment(timed, "en")
    assert [part.split('"')[0] for part in html.split('class="word" data-start="')[1:]] == ["1.00", "1.25", "1.50"]
    assert "&lt;b&gt;</span> <span" in html and 'class="word"' not in render.segment(SEGMENTS[0], "en")


@pytest.mark.parametrize("write", [render.chosen, render.notice, render.line])
def test_foreign_text_is_escaped(write: object) -> None:
    assert "<script>" not in write(HOSTILE)  # type: ignore[operator]


def test_progress_says_share_and_time_left() -> None:
    html = render.progress(Progress(30.0, 120.0, 2, 10.0, 30.0), "en")
    assert 'aria-valuenow="25"' in html
    assert "25 % · 0:30 of 2:00 · about 30.0 s left" in html


def test_progress_without_a_length_claims_no_share() -> None:
    html = render.progress(Progress(30.0, None, 2, 10.0, None), "en")
    assert "%" not in html
    assert "0:30 done" in html


def test_progress_never_passes_its_end() -> None:
    assert 'aria-valuenow="100"' in render.progress(Progress(130.0, 120.0, 2, 10.0, 0.0), "en")


def test_the_summary_tells_speed_coverage_language_and_what_ran(transcript: Transcript) -> None:
    html = render.summary(replace(transcript, elapsed_s=2.0, duration_s=20.0), NAMES, "en")
    for part in ("Done in 2.00 s", "10.0× real time", "English (98 %)", "fp32 on demo"):
        assert part in html
    assert "notice" not in html


def test_warnings_stand_under_the_summary(transcript: Transcript) -> None:
    html = render.summary(replace(transcript, warnings=(HOSTILE,)), NAMES, "en")
    assert "<li>&lt;script&gt;" in html


def test_a_stopped_run_keeps_its_facts_and_an_empty_one_has_none(transcript: Transcript) -> None:
    assert "real time" in render.kept(transcript, NAMES, "Stopped.", "calm", "en")
    assert "real time" not in render.kept(replace(transcript, segments=()), NAMES, "Stopped.", "calm", "en")


def test_subtitles_leave_out_empty_text() -> None:
    cues = render.subtitles([replace(SEGMENTS[0], text=" Hello. "), replace(SEGMENTS[0], text="  ")])
    assert cues == [{"text": "Hello.", "timestamp": [SEGMENTS[0].start_s, SEGMENTS[0].end_s]}]


def report(*windows: tuple[str, float]) -> LanguageReport:
    heard = tuple(
        WindowLanguage(30.0 * i, 30.0 * i + 30, (LanguageGuess(code, p), LanguageGuess("fr", 0.01)))
        for i, (code, p) in enumerate(windows)
    )
    best = LanguageGuess(windows[0][0], sum(p for _, p in windows) / len(windows))
    return LanguageReport((best, LanguageGuess("fr", 0.01)), heard)


def test_agreeing_windows_give_a_plain_answer() -> None:
    html = render.language_summary(report(("en", 0.9), ("en", 0.9)), NAMES, "en")
    assert "English, 90 % on average over 2 windows" in html
    assert "notice" not in html


@pytest.mark.parametrize("windows", [(("en", 0.9), ("de", 0.9)), (("en", 0.4), ("en", 0.4))])
def test_disagreeing_or_weak_windows_are_called_unsure(windows: tuple[tuple[str, float], ...]) -> None:
    assert "listen before you trust it" in render.language_summary(report(*windows), NAMES, "en")


def test_each_window_has_a_row_with_its_best_language() -> None:
    html = render.language_windows(report(("en", 0.9), ("de", 0.7)), NAMES, "en")
    assert html.count("<tr><td") == 2
    assert "0:30–1:00" in html
    assert "German" in html


def test_no_guesses_are_no_speech() -> None:
    assert "No speech" in render.language_summary(LanguageReport((), ()), NAMES, "en")


def test_the_precision_menu_marks_what_cannot_run() -> None:
    rows = (PrecisionStatus("fp32", "fp32", None), PrecisionStatus("fp8", "fp8", "fp8 needs a newer GPU."))
    assert render.precision_choices(rows, "fp32", "en") == [
        ("Default (fp32)", ""),
        ("fp32", "fp32"),
        ("fp8 — not on this machine", "fp8"),
    ]


def test_languages_are_in_order_after_automatic() -> None:
    rows = (LanguageName("de", "German"), LanguageName("en", "English"))
    assert [code for _, code in render.language_choices(rows, "en")] == ["", "en", "de"]


def test_chinese_readers_get_chinese_names_of_languages() -> None:
    assert set(chinese.LANGUAGES) == set(LANGUAGE_NAMES)
    assert len(set(chinese.LANGUAGES.values())) == len(chinese.LANGUAGES)
    rows = (LanguageName("de", "German"), LanguageName("xx", "Unheard-of"))
    assert render.language_names(rows, "zh") == {"de": "德语", "xx": "Unheard-of"}
    assert render.language_names(rows, "en") == {"de": "German", "xx": "Unheard-of"}
    assert ("德语", "de") in render.language_choices(rows, "zh")


def test_a_model_that_cannot_translate_does_not_offer_it() -> None:
    assert [task for _, task in render.task_choices(False, "en")] == ["transcribe"]
    assert [task for _, task in render.task_choices(True, "en")] == ["transcribe", "translate"]


def test_the_demo_banner_is_in_the_pages_language(cpu_status: Status) -> None:
    assert cpu_status.banner is not None
    assert cpu_status.banner in render.banner(cpu_status, "en")
    long = replace(cpu_status, banner="Start with --hub-mirror <URL>.")
    assert "Start with <code>--hub-mirror</code> &lt;URL&gt;." in render.banner(long, "en"), "no break at its hyphen"
    assert "演示模型" in render.banner(cpu_status, "zh")
    assert render.banner(replace(cpu_status, banner=None, is_demo=False), "zh") == ""
