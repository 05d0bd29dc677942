"""The Compare tab: its text and charts as values, its handlers with scripted rows."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from model_loader.precision import PRECISIONS
from tests.fakes import SEGMENTS, FakeComparison, FakeTranscriber, demo_tokens
from tests.measured import measured_row
from transcription.interface import CompareRow, MemoryPhase, PrecisionStatus
from transcription.results import Result
from transcription.run_card import RunCard, to_json
from transcription.verdict import claims
from transcription.worddiff import DiffPart, word_diff
from ui import compare_view
from ui.compare_run import followed
from ui.kept import Kept
from ui.page import Facts, Page, Pulse
from ui.recording import Chosen
from ui.tabs import compare
from ui.tabs.compare import NOTHING, Shown, _play_from, _seek
from ui.texts import LOCALES

WORDS = {name: f"words-{name}" for name in PRECISIONS}
FILES = {kind: f"file-{kind}" for kind in compare.DOWNLOADS}
VIEW = compare.View(
    **{item.name: item.name for item in fields(compare.View)} | {"words": WORDS, "downloads": FILES}  # type: ignore
)
FAILED = CompareRow("fp8", "fp8", error="fp8 needs <a> newer GPU.")
MARK = "· card\u00a011\u201120"
"""Of the rows of a card of 20 November."""


def result(*rows: CompareRow, old: RunCard | None = None) -> Result:
    return Result(RunCard("2026-11-20T10:00:00+00:00", rows), old)


def held(name: str, text: str) -> CompareRow:
    row = measured_row(name, SEGMENTS, "fp32")
    return replace(row, diff=word_diff(text, row.segments, "en", demo_tokens().normalise))


def test_precisions_that_cannot_run_are_listed_with_the_reason_instead_of_left_out() -> None:
    facts = Facts.of(FakeTranscriber().status())
    choice, greyed, *_ = compare._menus(facts, "en")
    away = [row for row in facts.precisions if row.unavailable is not None]
    offered = {name for _, name in choice.constructor_args["choices"]}
    assert {"fp16", "fp16-autocast", "fp8"} <= {row.name for row in away} and not offered & {row.name for row in away}
    assert all(
        f"<b>{row.name}</b> {escape((row.unavailable or '').removeprefix(row.name + ' '))}" in greyed for row in away
    )
    assert offered | {row.name for row in away} == {row.name for row in facts.precisions}
    assert compare_view.unavailable([PrecisionStatus("fp32", "fp32", None)], "en") == ""


def test_each_precision_that_can_be_chosen_is_described_with_what_it_costs() -> None:
    facts = Facts.of(FakeTranscriber().status())
    _, about, *_ = compare._menus(facts, "en")
    folded = about[about.index("<details") : about.index("</details>")]
    for row in facts.precisions:
        assert (f"<b>{row.name}</b> {escape(row.description)}" in folded) == (row.unavailable is None)
    assert "of its Russian words" in folded
    assert compare_view.about([PrecisionStatus("fp32", "fp32", None)], "en") == ""


REQUEST: Any = SimpleNamespace(headers={"accept-language": "en"}, session_hash="page-1")
RECORDING = Chosen(Path(__file__), "talk.wav")
BROWSER = "0123456789abcdef" * 2


def shown(
    transcriber: FakeTranscriber, names: list[str], before: Shown = NOTHING, language: str = "", **more: Any
) -> list[dict[Any, Any]]:
    """All updates of one comparison, by the names of the widgets. more: of the Page."""
    page = Page(transcriber, None, Pulse(transcriber), **more)  # type: ignore[arg-type]
    values = (names, "", 1, "given", language)
    return list(compare._compare(page, VIEW, RECORDING, before, BROWSER, values, REQUEST))


def test_the_language_is_chosen_and_three_warm_runs_are_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    transcriber = FakeTranscriber()
    *_, last = shown(transcriber, ["fp32", "bf16"], language="de")
    shown(transcriber, ["fp32", "bf16"])
    assert [asked["language"] for _, asked in transcriber.calls] == ["de", None]
    assert last["shown"].result.card.options["language"] == "de"
    page = Page(transcriber, None, Pulse(transcriber))  # type: ignore[arg-type]

    async def build() -> tuple[Any, Any]:  # inside a running loop: outside one, Gradio leaves its own open
        with gr.Blocks():
            (_, _, repeats, _, language), _ = compare._inputs(page)
        return repeats, language

    repeats, language = asyncio.run(build())
    assert repeats.value == 3 and language.value == ""
    *_, menu = page.menus[0].draw(Facts.of(transcriber.status()), "en")
    assert {"", "de"} <= {code for _, code in menu.constructor_args["choices"]}


def test_a_missing_calibration_is_said_before_anything_starts_with_a_button_to_make_it() -> None:
    transcriber = FakeTranscriber(uncalibrated=["int8-static"])
    (only,) = shown(transcriber, ["fp32", "int8-static"])
    assert "int8-static needs a calibration first" in only["status"] and transcriber.calls == []
    page = Page(transcriber, None, Pulse(transcriber))  # type: ignore[arg-type]
    row, sentence = compare._need(page, ["fp32", "int8-static"], "en")
    assert row.visible and "int8-static needs a calibration" in sentence
    row, sentence = compare._need(page, ["fp32"], "en")
    assert not row.visible and sentence == ""
    choice, *_ = compare._menus(Facts.of(transcriber.status()), "en")
    marked = [name for text, name in choice.constructor_args["choices"] if "needs a calibration first" in text]
    assert marked == ["int8-static"]


def test_a_failure_names_its_precision_once_and_sends_nobody_to_a_terminal() -> None:
    missing = CompareRow(
        "int8-static", "", error="int8-static needs it. Run app.py.", error_kind="CalibrationMissingError"
    )
    html = compare_view.table(result(missing, CompareRow("fp8", "", error="fp8 needs a newer GPU.")), "en")
    assert "<b>int8-static</b> needs a calibration" in html and "app.py" not in html
    assert "<b>fp8</b> needs a newer GPU." in html


@pytest.mark.parametrize("locale", LOCALES)
def test_the_table_keeps_failures_and_says_what_was_not_measured(locale: str) -> None:
    html = compare_view.table(result(measured_row("fp32"), FAILED), locale)
    assert "12.2×" in html and "<b>fp8</b> needs &lt;a&gt; newer GPU." in html
    assert "0.0 J" not in html and "None" not in html and "faster" not in html
    assert ("not available" in html) == (locale == "en")


@pytest.mark.parametrize("line", compare_view.LINES, ids=lambda line: line.key)
def test_none_is_never_shown_as_a_zero(line: compare_view.Line) -> None:
    shown = line.shown(CompareRow("fp32", "fp32"), "en")
    assert not any(character.isdigit() for character in shown)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("your text", "accuracy."), ("fp32", "agreement with fp32, not accuracy"), ("bf16", "agreement with bf16")],
)
def test_word_errors_say_what_they_are_held_to(reference: str, expected: str) -> None:
    assert expected in compare_view.table(result(measured_row("bnb-nf4", reference=reference)), "en")
    assert "accuracy" not in compare_view.table(result(measured_row("bnb-nf4")), "en")


def test_where_rows_are_held_to_different_things_each_sentence_names_its_rows() -> None:
    new = [measured_row(name, reference="your text") for name in ("fp32", "bf16")]
    old = RunCard("2026-11-20T08:00:00+00:00", (measured_row("fp32"), measured_row("int8", reference="fp32")))
    html = compare_view.table(result(*new, old=old), "en")
    assert "<b>fp32, bf16</b> Errors are against your text: accuracy." in html
    assert f"<b>int8 {MARK}</b> Errors are against the text of fp32" in html
    assert '<p class="line">Errors are against your text: accuracy.</p>' in compare_view.table(result(*new), "en")


@pytest.mark.parametrize(("locale", "warned"), [("en", "was held to another text"), ("zh", "对照的是另一段文本")])
def test_an_opened_card_held_to_another_text_is_warned_of(locale: str, warned: str) -> None:
    old = RunCard("2026-11-20T08:00:00+00:00", (measured_row("fp32"),), reference_text="Good evening.")
    shown = Result(replace(old, reference_text="Good morning."), old)
    assert warned in compare_view.table(shown, locale)
    assert warned not in compare_view.table(Result(old, old), locale)


def test_charts_hold_only_what_was_measured_in_the_order_of_the_table() -> None:
    unknown = replace(measured_row("bf16"), weights_bytes=None, first_run_s=None)
    shown = result(measured_row("fp32"), unknown, FAILED, old=RunCard("2025-01-02", (measured_row("fp32"),)))
    memory, time = compare_view.memory_frame(shown, "en"), compare_view.time_frame(shown, "en")
    assert [name.strip("\u200b") for name in memory.name] == ["fp32", "fp32 01-02", "fp32", "fp32 01-02"]
    assert memory.mib[::2].sum() == pytest.approx(400_000_000 / 2**20), "stacked, the parts are the peak"
    assert [name.strip("\u200b") for name in time.name].count("bf16") == 1 and sorted(time.name) == list(time.name)
    assert (time.seconds > 0).all()
    assert len(compare_view.memory_frame(result(FAILED), "en")) == 0


@pytest.mark.parametrize("locale", LOCALES)
def test_weights_are_the_last_part_of_the_bars_which_is_the_lowest(locale: str) -> None:
    unknown = replace(measured_row("fp32"), peak_bytes=None)
    parts = list(dict.fromkeys(compare_view.memory_frame(result(unknown, measured_row("bf16")), locale).part))
    assert (
        len(parts) == 2 and compare_view.chart_colours(compare_view.PARTS)[parts[-1]] == compare_view.PARTS["weights"]
    )


def test_charts_are_hidden_while_they_would_hold_one_row() -> None:
    def visible(*rows: CompareRow, old: RunCard | None = None) -> list[bool]:
        return [update.visible for update in compare._draw_charts(REQUEST, Shown(result(*rows, old=old)))]

    one, two = measured_row("fp32"), measured_row("bf16")
    assert visible() == visible(FAILED) == visible(one) == visible(one, FAILED) == [False, False, False]
    assert visible(one, two) == [True, True, True]
    assert visible(one, replace(two, first_run_s=None, warm_s=None)) == [True, True, False]
    assert visible(one, replace(two, peak_bytes=None)) == [True, True, True]
    assert visible(one, replace(two, weights_bytes=None)) == [True, False, True]
    card = RunCard("2025-01-02", (one,))
    assert visible(one, old=card) == [True, True, False], "each line would have one point, and no line"
    assert visible(one, old=replace(card, rows=(one, two))) == [True, True, False], "the new row would be missing"
    assert visible(one, two, old=replace(card, rows=(one, two))) == [True, True, True]


def test_a_diff_becomes_tokens_that_a_click_finds_again() -> None:
    row = held("bf16", "Good evening, and welcome to the big library. Take a chair next to the window.")
    tokens = compare_view.tokens(row, "en")
    assert len(tokens) == len(row.diff)
    assert {kind for _, kind in tokens} <= {None, *compare_view.diff_colours()}
    assert any("evening, → morning," in text for text, kind in tokens if kind == "changed")
    assert {kind for _, kind in compare_view.tokens(row, "zh")} & {"改动", "多出", "缺失"}


def test_a_row_held_to_nothing_shows_its_own_text_a_token_per_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    row = measured_row("fp32", SEGMENTS)
    assert compare_view.tokens(row, "en") == [(f"{segment.text.strip()} ", None) for segment in SEGMENTS]
    assert compare_view.words_label(row, "en") == "fp32 · The text of this precision. Click a passage to hear it."
    assert "Held to fp32" in compare_view.words_label(held("bf16", "Good evening."), "en")
    drawn = compare._drawn(VIEW, Shown(result(row, measured_row("bf16"), FAILED)), "en")
    assert [name for name in WORDS if drawn[WORDS[name]].visible] == ["fp32"], "the others said nothing"
    *_, start_s = _seek("fp32")(Shown(result(row), RECORDING), RECORDING, SimpleNamespace(index=1))  # type: ignore[arg-type]
    assert start_s == SEGMENTS[1].start_s


def test_verdicts_are_in_the_pages_language() -> None:
    rows = list(FakeTranscriber().compare(Path("x"), ["fp32", "bf16"], None))  # type: ignore[arg-type]
    assert "takes 1.00x the time of fp32" in compare_view.verdicts(result(*rows), "en")
    assert "用时为 fp32 的 1.00 倍" in compare_view.verdicts(result(*rows), "zh")


def test_a_verdict_says_where_the_engines_differ() -> None:
    row = replace(measured_row("bnb-nf4", SEGMENTS), engine="reference")
    base = replace(measured_row("fp32", SEGMENTS), engine="fast")
    shown = result(replace(row, claims=claims(row, base)))
    assert "(one warm run: the spread was not measured) (on another engine: reference against fast)." in (
        compare_view.verdicts(shown, "en")
    )
    assert "（引擎不同：reference 对 fast）" in compare_view.verdicts(shown, "zh")


def test_a_verdict_counts_characters_where_words_have_no_spaces_and_asks_about_another_text() -> None:
    row = replace(measured_row("bf16", SEGMENTS, "your text"), language="zh", n_word_errors=45, n_reference_words=45)
    shown = result(replace(row, claims=claims(row, None)))
    english = compare_view.verdicts(shown, "en")
    assert "45 character errors in 45 characters of your text (hardly a word matches" in english
    assert "你的文本 45 个字中有 45 处错误 （几乎没有一处吻合" in compare_view.verdicts(shown, "zh")


def test_an_equal_part_is_shown_as_this_precision_wrote_it() -> None:
    row = replace(measured_row("bf16"), diff=(DiffPart("don't", "do not", "equal", 1.0),))
    assert compare_view.tokens(row, "en") == [("don't ", None)] and compare_view._read(row) == escape("don't")


def test_an_older_cards_runs_are_lines_of_their_own_in_the_chart() -> None:
    old = RunCard("2026-11-20T08:00:00+00:00", (measured_row("fp32"),))
    time = compare_view.time_frame(result(measured_row("fp32"), old=old), "en")
    assert list(time.run) == ["first run", "warm run", "first run, opened card", "warm run, opened card"]
    assert set(time.run) <= set(compare_view.chart_colours(compare_view.RUNS))


def test_every_line_is_there_from_the_first_drawing_on() -> None:
    """With a point that has no value: Gradio 6.31 never draws a line that comes later."""
    time = compare_view.time_frame(result(measured_row("fp32")), "en")
    assert set(time.run) == {"first run", "warm run", "first run, opened card", "warm run, opened card"}
    assert [run for run, s in zip(time.run, time.seconds, strict=True) if s > 0] == ["first run", "warm run"]
    assert time.seconds.isna().sum() == 2 and set(time.name) == {"fp32"}


def test_an_opened_card_is_shown_with_its_words_exported_warned_of_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    row = held("bf16", "Good evening, and welcome.")
    row = replace(row, diff=(*row.diff, DiffPart("", "<i>gone</i>", "missing", 3.0)))
    path, rows = tmp_path / "card.json", (measured_row("fp32", SEGMENTS[:1]), row)
    path.write_text(to_json(RunCard("2026-11-20T08:00:00+00:00", rows, "talk.wav", "f" * 64)), encoding="utf-8")
    opened = compare._open(VIEW, str(path), NOTHING, "en")
    assert opened["close"].visible and opened["results"].visible and not opened["file-card"].visible
    assert "2026-11-20 08:00" in Path(opened["file-csv"].value["path"]).read_text(encoding="utf-8")
    assert f"bf16 {MARK}<" in opened["figures"] and f"<b>bf16 {MARK}</b>" in opened["old_words"]
    assert opened["verdicts"].count("talk.wav") == 1, "where it comes from is said once, above"
    assert "Card 11-20: 2026-11-20 08:00, demo, talk.wav, CPU, 2 cores<" in opened["verdicts"]
    assert "<del>evening,</del> → <ins>morning,</ins>" in opened["old_words"]
    assert "<del>&lt;i&gt;gone&lt;/i&gt;</del>" in opened["old_words"]
    assert "Held to fp32." in opened["old_words"]
    assert f'The text of this precision.<p lang="en" dir="auto">{SEGMENTS[0].text.strip()}</p>' in opened["old_words"]

    *_, last = shown(FakeTranscriber(), ["fp32", "bf16"], opened["shown"])
    assert "measured another recording" in last["figures"] and last["close"].visible and last["file-card"].visible
    closed = compare._close(VIEW, last["shown"], "en")
    assert MARK not in closed["figures"] and "another recording" not in closed["figures"]
    assert "2026-11-20" not in closed["figures"] + closed["verdicts"]
    assert not closed["close"].visible and closed["old_words"] == ""
    assert closed["shown"].result.card == last["shown"].result.card and closed["shown"].recording == RECORDING
    *_, again = shown(FakeTranscriber(), ["fp32", "bf16"], closed["shown"])
    assert again["shown"].result.old is None, "a closed card goes into no later run"


def test_memory_by_phase_is_folded_away_with_the_driver_and_torch_apart() -> None:
    on_gpu = (MemoryPhase("before", 500 * 2**20, 0), MemoryPhase("after_unload", 510 * 2**20, 2**20))
    html = compare_view.table(result(measured_row("fp32"), replace(measured_row("bf16"), phases=on_gpu)), "en")
    folded = html[html.index("<details><summary>Memory by phase") :]
    assert all(head in folded for head in ("Before", "After load", "After warm-up", "Peak", "After unload"))
    assert folded.count("<td>fp32</td>") == 1 and folded.count("<td>bf16</td>") == 2
    assert "Whole process (driver)" in folded and "Tensors (torch)" in folded and ">510 MiB<" in folded
    assert "Predicted peak, one window" in html and ">67 MiB<" in html
    assert "<details>" not in compare_view.table(result(replace(measured_row("fp32"), phases=())), "en")


def test_following_yields_rows_and_moments_between_and_raises_what_came() -> None:
    rows = [measured_row("fp32"), measured_row("bf16")]
    comparison = FakeComparison(rows, pause_s=0.7)
    seen = list(followed(comparison))
    assert [row for row in seen if row is not None] == rows and None in seen
    assert not comparison.is_cancelled

    class Broken(FakeComparison):
        def __iter__(self) -> Any:
            yield rows[0]
            raise OSError("gone")

    stream = followed(Broken(rows))
    assert next(stream) == rows[0]
    with pytest.raises(OSError, match="gone"):
        list(stream)


def test_closing_the_page_cancels_the_comparison() -> None:
    comparison = FakeComparison([measured_row("fp32")], pause_s=60)
    stream = followed(comparison)
    assert next(stream) is None
    stream.close()
    assert comparison.is_cancelled
    assert threading.active_count() < 50


def test_a_click_on_a_word_seeks_the_player() -> None:
    row, click = held("bf16", "Good evening."), SimpleNamespace(index=1)
    chosen, line, file, start_s = _seek("bf16")(Shown(result(row), RECORDING), RECORDING, click)  # type: ignore[arg-type]
    assert start_s == row.diff[1].start_s and file is None
    assert "__type__" in str(chosen) and "__type__" in str(line), "the chosen recording stays"
    assert "playback_position" in _play_from(start_s).constructor_args
    for shown in (NOTHING, Shown(result(FAILED), RECORDING)):
        *_, file, start_s = _seek("bf16")(shown, RECORDING, click)  # type: ignore[arg-type]
        assert file is None and start_s is None and "__type__" in str(_play_from(start_s))


def test_a_click_plays_what_was_compared_also_when_another_recording_is_chosen_by_now() -> None:
    row, other = held("bf16", "Good evening."), Chosen(Path("other.wav"), "other.wav")
    chosen, line, file, start_s = _seek("bf16")(Shown(result(row), RECORDING), other, SimpleNamespace(index=1))  # type: ignore[arg-type]
    assert chosen == RECORDING and "talk.wav" in line
    assert file == str(RECORDING.path) and start_s == row.diff[1].start_s


def test_a_result_keeps_the_recording_that_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    *_, last = shown(FakeTranscriber(), ["fp32", "bf16"])
    assert last["shown"].recording == RECORDING and len(last["shown"].result.rows) == 2


def after(updates: list[dict[Any, Any]]) -> dict[Any, Any]:
    """What each widget was told last."""
    return {name: value for update in updates for name, value in update.items() if "__type__" not in str(value)}


class Stopped(FakeTranscriber):
    """Its comparisons are cancelled before their first row."""

    def compare(self, *given: Any, **how: Any) -> FakeComparison:
        comparison = super().compare(*given, **how)
        comparison.cancel()
        return comparison


@pytest.mark.parametrize("failing", [Stopped(), FakeTranscriber(error=OSError("gone"))])
def test_a_run_that_measures_nothing_leaves_the_result_before_as_it_is(
    failing: FakeTranscriber, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    *_, before = shown(FakeTranscriber(), ["fp32", "bf16"])
    updates = shown(failing, ["fp32", "int8"], before["shown"])
    touched = {name for update in updates for name in update}
    assert touched == {"status", "go", "cancel", "opened", "close"}, "table, words and files stay"
    last = after(updates)
    assert last["go"].interactive and not last["cancel"].interactive and last["opened"].interactive
    if isinstance(failing, Stopped):
        assert "earlier result is still here" in last["status"]
        assert "earlier" not in after(shown(failing, ["fp32", "int8"]))["status"]


def test_the_result_before_stays_until_the_first_row_and_no_card_is_opened_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    *_, before = shown(FakeTranscriber(), ["fp32", "bf16"])
    first, *rest = shown(FakeTranscriber(), ["fp32", "int8"], before["shown"])
    assert "shown" not in first and "results" not in first and not first["opened"].interactive
    drawn = [update for update in rest if "shown" in update]
    assert [len(update["shown"].result.rows) for update in drawn] == [1, 2, 2]
    assert not drawn[0]["results"].visible and drawn[-1]["results"].visible and drawn[-1]["opened"].interactive


def test_a_page_opened_anew_has_every_row_that_was_measured_and_plays_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    kept = Kept(tmp_path / "comparisons")
    page = Page(FakeTranscriber(), None, Pulse(FakeTranscriber()), kept=kept)  # type: ignore[arg-type]
    values = (["fp32", "bf16"], "", 1, "given", "")
    running = compare._compare(page, VIEW, RECORDING, NOTHING, BROWSER, values, REQUEST)
    next(update for update in running if "shown" in update)
    running.close()  # as a closed tab does it, behind the first of two rows
    restored = compare._restore(page, VIEW, BROWSER, "en")
    assert [row.precision for row in restored["shown"].result.card.rows] == ["fp32"]
    assert "talk.wav, precisions measured: 1." in restored["status"] and restored["shown"].recording == RECORDING
    assert restored["results"].visible and restored["file-card"].visible
    for other in ("", "0" * 32, f"../comparisons/{BROWSER}", None):
        assert set(compare._restore(page, VIEW, other, "en")) == {"browser"}  # type: ignore[arg-type]
    (tmp_path / "comparisons" / f"{BROWSER}.json").write_text("{")
    assert set(compare._restore(page, VIEW, BROWSER, "en")) == {"browser"}


def test_what_is_kept_goes_after_a_week_and_a_full_disk_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    kept, names = Kept(tmp_path), [BROWSER, BROWSER[::-1]]
    card = RunCard("2026-11-20T10:00:00+00:00", (measured_row("fp32"),))
    kept.put(names[0], card, RECORDING)
    os.utime(tmp_path / f"{names[0]}.json", (0, 0))
    kept.put(names[1], card, Chosen(tmp_path / "gone.wav", "gone.wav"))
    assert kept.get(names[0]) is None and kept.get(names[1]) == (card, None)
    (tmp_path / "file").write_text("")
    *_, last = shown(FakeTranscriber(), ["fp32", "bf16"], kept=Kept(tmp_path / "file" / "comparisons"))
    assert len(last["shown"].result.rows) == 2


def test_who_waits_for_the_device_is_told_at_once_and_may_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    transcriber = FakeTranscriber()
    page = Page(transcriber, None, Pulse(transcriber))  # type: ignore[arg-type]
    values = (["fp32", "bf16"], "", 1, "given", "")
    assert set(compare._queue_up(page, VIEW, REQUEST)) == {"status"}
    other = FakeComparison([])
    page.device.put("page-2", other)
    told = compare._queue_up(page, VIEW, REQUEST)
    assert "Another comparison" in told["status"] and told["cancel"].interactive and not told["go"].interactive
    stopped = compare._stop(page, VIEW, NOTHING, REQUEST)
    assert "Stopped" in stopped["status"] and stopped["go"].interactive and not other.is_cancelled
    compare._queue_up(page, VIEW, REQUEST)  # pressed again: the queue now holds two turns of this page
    page.device.drop("page-2", other)
    given_up, begun = (
        list(compare._compare(page, VIEW, RECORDING, NOTHING, BROWSER, values, REQUEST)) for _ in range(2)
    )
    assert len(given_up) == 1 and set(given_up[0]) == {"status"}
    assert len(begun[-1]["shown"].result.rows) == 2 and len(transcriber.calls) == 1


def test_a_card_held_to_a_text_beside_one_that_is_not_is_warned_of() -> None:
    old = RunCard("2026-11-20T08:00:00+00:00", (measured_row("fp32", reference="your text"),), reference_text="Good.")
    new = replace(old, rows=(measured_row("fp32", reference="fp32"),), reference_text="")
    for locale, part in (("en", "only one was held to a given text"), ("zh", "只有一方对照了给定文本")):
        assert part in compare_view.table(Result(new, old), locale)
        assert part not in compare_view.table(Result(old, old), locale)
