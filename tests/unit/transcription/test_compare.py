"""Comparing: order, isolation of failures, what words are held to, and that nothing is said that was not measured."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import threading
import tomllib
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest

from errors import AudioError, MachineError, OptionError
from model_loader.calibration import MANIFEST
from model_loader.loader import MemoryPhases
from model_loader.memory import MemoryPoint
from tests.conftest import ROOT
from tests.fakes import demo_tokens, fake_report, measured_row, segment
from transcription import measure
from transcription.compare import Bench, LocalComparison, count_errors, error_rates, shuffled
from transcription.comparison import (
    COLUMNS,
    held_to,
    measured_on,
    row_names,
    second_table,
    terminal_table,
    to_csv,
    to_markdown,
)
from transcription.interface import CompareRow
from transcription.measure import Measured, spread
from transcription.options import TranscribeOptions
from transcription.results import Result, plan_outputs
from transcription.run_card import RunCard, load_card, make_card, read_card, to_json
from transcription.worker import WorkerError

TEXTS = {"fp32": "the cat sat on the mat", "bf16": "the cat sat on a mat", "bnb-nf4": "the cat sat on the mat today"}


def row_of(name: str, text: str | None = None, **changes: object) -> CompareRow:
    """As a worker measures it: words are not held to anything yet."""
    said = segment(0.0, 6.0, text or TEXTS.get(name, "the cat"))
    bare = measured_row(name, [said])
    return replace(bare, wer=None, cer=None, n_word_errors=None, n_reference_words=None, reference="", **changes)


def bench(failing: frozenset[str] = frozenset(), ran: list[str] | None = None, texts=None) -> Bench:
    def measure(name, on_step, stop):
        on_step("loading")
        if ran is not None:
            ran.append(name)
        if name in failing:
            raise MachineError(f"{name} broke. Choose another.")
        return Measured(row_of(name, (texts or TEXTS).get(name)), Path("."))

    return Bench(
        check=lambda: None,
        room=nullcontext,
        measure=measure,
        normalise=lambda measured, text, language: demo_tokens().normalise(text, language),
        label=lambda name: name,
    )


def final(comparison: LocalComparison) -> dict[str, CompareRow]:
    return {row.precision: row for row in comparison}


def test_rows_run_in_the_given_order_once_each() -> None:
    ran: list[str] = []
    rows = final(LocalComparison(["bf16", "fp32", "bf16"], bench(ran=ran)))
    assert ran == ["bf16", "fp32"] and list(rows) == ["bf16", "fp32"]


def test_a_shuffled_order_comes_from_its_seed_and_leaves_the_table_alone() -> None:
    names = ["fp32", "bf16", "bnb-nf4", "bnb-int8", "bnb-fp4"]
    ran: list[str] = []
    comparison = LocalComparison(names, bench(ran=ran), order="shuffled", seed=3)
    final(comparison)
    assert ran == list(shuffled(names, 3)) and sorted(ran) == sorted(names) and comparison.names == tuple(names)
    assert len({shuffled(names, seed) for seed in range(20)}) > 5
    with pytest.raises(OptionError, match="given or shuffled"):
        LocalComparison(names, bench(), order="upwards")


def test_without_a_text_words_are_held_to_fp32_wherever_it_stands() -> None:
    seen = list(LocalComparison(["bf16", "fp32", "bnb-nf4"], bench()))
    assert [row.precision for row in seen] == ["bf16", "bf16", "fp32", "bnb-nf4"], "bf16 again, once fp32 is there"
    assert seen[0].reference == "" and seen[0].wer is None and seen[0].claims == ()
    bf16, fp32, nf4 = seen[1:]
    assert (bf16.reference, bf16.n_word_errors, bf16.n_reference_words) == ("fp32", 1, 6)
    assert fp32.reference == "" and fp32.wer is None, "fp32 is not compared with itself"
    assert nf4.wer == pytest.approx(1 / 6) and [p.kind for p in nf4.diff] == ["equal", "added"]


def test_without_fp32_the_first_precision_is_the_one_and_is_named() -> None:
    rows = final(LocalComparison(["bf16", "bnb-nf4"], bench()))
    assert rows["bnb-nf4"].reference == "bf16"
    assert "agreement with bf16, not accuracy" in " ".join(held_to(list(rows.values()), list(rows)))


def test_a_given_text_measures_accuracy_of_every_row() -> None:
    rows = final(LocalComparison(["bf16", "fp32"], bench(), reference_text=" The CAT sat on the mat! "))
    assert rows["fp32"].wer == 0.0 and rows["fp32"].reference == "your text"
    assert rows["bf16"].n_word_errors == 1 and "your text" in rows["bf16"].verdict


def test_one_failing_leaves_the_others_and_passes_the_reference_on() -> None:
    rows = final(LocalComparison(["fp32", "bf16", "bnb-nf4"], bench(failing=frozenset({"fp32"}))))
    assert rows["fp32"].error == "fp32 broke. Choose another." and rows["fp32"].verdict == ""
    assert rows["bnb-nf4"].reference == "bf16" and not rows["bf16"].failed


def test_a_failed_row_says_of_what_kind_its_error_is() -> None:
    rows = final(LocalComparison(["fp32", "bf16"], bench(failing=frozenset({"fp32"}))))
    assert (rows["fp32"].error_kind, rows["bf16"].error_kind) == ("MachineError", "")

    def refuse(name, on_step, stop):
        raise WorkerError("int8-static needs a calibration.", "CalibrationMissingError")

    (row,) = LocalComparison(["int8-static"], replace(bench(), measure=refuse))
    assert row.error_kind == "CalibrationMissingError"


def test_a_cancel_keeps_what_is_measured_and_an_unreadable_recording_starts_nothing() -> None:
    comparison = LocalComparison(["fp32", "bf16"], bench())
    rows = iter(comparison)
    assert next(rows).precision == "fp32"
    comparison.cancel()
    assert list(rows) == [] and comparison.is_cancelled
    ran: list[str] = []

    def refuse() -> None:
        raise AudioError("no sound")

    with pytest.raises(AudioError):
        list(LocalComparison(["fp32"], replace(bench(ran=ran), check=refuse)))
    assert ran == []


def test_the_stop_event_reaches_the_worker() -> None:
    seen: list[threading.Event] = []

    def measure(name, on_step, stop):
        seen.append(stop)
        return Measured(row_of(name), Path("."))

    comparison = LocalComparison(["fp32"], replace(bench(), measure=measure))
    list(comparison)
    assert not seen[0].is_set()
    comparison.cancel()
    assert seen[0].is_set()


def test_error_rates_of_nothing_are_not_measured() -> None:
    assert error_rates("", "words") == (None, None)
    assert error_rates("one two", "one") == (0.5, pytest.approx(4 / 7))
    assert count_errors("a b c", "").n_word_errors == 3
    assert spread([1.0]) is None and spread([1.0, 3.0, 2.0]) == 2.0


def test_spaces_that_only_the_normalisation_wrote_are_no_right_characters() -> None:
    normalise = demo_tokens().normalise
    said, heard = normalise("今天天气很好。", "zh"), normalise("今天明气不好", "zh")
    assert error_rates(said, heard, "zh") == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    assert error_rates("今 天 天 气", "", "zh") == (1.0, 1.0) and error_rates("", "今 天", "zh") == (None, None)
    assert error_rates("one two", "one", "en") == (0.5, pytest.approx(4 / 7)), "written by people, these spaces count"


@pytest.mark.parametrize(
    ("language", "text", "said", "is_asked"),
    [
        ("zh", "今天天气很好", "hello this text is English", True),
        ("en", "the weather is good today", "今天天气很好", True),
        ("en", "the weather is good today", "we took a long walk down town", True),
        ("en", "the weather is good today", "the weather was good yesterday", False),
        ("en", "the weather is good today and we took a long walk", "the weather is good today", False),
        ("en", "cat", "dog", False),  # one word says nothing of the text
        ("en", "", "the weather is good today", False),  # nothing was heard
    ],
)
def test_a_text_of_something_else_is_asked_about(language: str, text: str, said: str, is_asked: bool) -> None:
    def measure(name, on_step, stop):
        row = replace(row_of(name), language=language, text=text, segments=(segment(0.0, 6.0, text),))
        return Measured(row, Path("."))

    (row,) = LocalComparison(["fp32"], replace(bench(), measure=measure), reference_text=said)
    asked = "of your text (hardly a word matches: is this the text of this recording?)."
    assert row.verdict.endswith(asked) == is_asked and ("hardly" in row.verdict) == is_asked


# Files


def compared() -> tuple[CompareRow, ...]:
    rows = final(LocalComparison(["fp32", "bf16", "bnb-nf4"], bench(failing=frozenset({"bnb-nf4"}))))
    return tuple(rows.values())


def a_card(rows: tuple[CompareRow, ...] | None = None) -> RunCard:
    return make_card(
        rows or compared(), b"sound", name="talk.wav", options=TranscribeOptions(), repeats=2, order="shuffled", seed=5,
        reference_text="",
    )  # fmt: skip


def test_a_run_card_comes_back_as_it_was() -> None:
    card = a_card()
    back = read_card(to_json(card))
    assert back.rows == card.rows and back.date == card.date and back.seed == 5
    assert back.rows[1].diff and back.rows[1].verdict == card.rows[1].verdict
    content = json.loads(to_json(card))
    assert {"torch", "transformers"} <= set(content["versions"]) and content["device"] == "CPU, 2 cores"
    assert content["audio_s"] == 12.2 and len(content["recording_sha256"]) == 64
    assert content["rows"][0]["energy_j"] is None, "not measured stays not measured"


def test_a_card_says_with_what_it_was_measured_and_one_that_does_not_is_still_read() -> None:
    rows = (replace(measured_row("int8-static"), calibration="c" * 64), measured_row("fp32"))
    card = a_card(rows)
    content = json.loads(to_json(card))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert content["sotto"] == project["version"]
    assert content["rows"][0]["phases"][1] == {"name": "peak", "process_bytes": 400_000_000, "torch_bytes": None}
    assert content["rows"][0]["batch_size"] == 4 and content["rows"][0]["predicted_peak_bytes"] == 70_000_000
    assert read_card(json.dumps(content)).rows == rows
    del content["sotto"]
    for row in content["rows"]:
        for name in ("error_kind", "batch_size", "calibration", "phases", "predicted_peak_bytes"):
            del row[name]
    old = read_card(json.dumps(content))
    assert old.sotto == "" and old.rows[0].phases == () and old.rows[0].batch_size is None


def test_a_worker_tells_memory_by_phase_and_which_calibration_it_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def point(process: int, tensors: int | None = None) -> MemoryPoint:
        return MemoryPoint(process, tensors, None, 0)

    phases = MemoryPhases(point(1, 0), point(5, 3), None, point(6, 4))
    report = fake_report(phases=phases, requested="int8-static", folder=tmp_path)
    found = measure._phases(report, point(9, 7), point(2, 0))
    assert [(phase.name, phase.process_bytes, phase.torch_bytes) for phase in found] == [
        ("before", 1, 0), ("after_load", 5, 3), ("peak", 9, 7), ("after_unload", 2, 0),
    ]  # fmt: skip
    (tmp_path / MANIFEST).write_text("{}")
    monkeypatch.setattr(measure, "find_calibrated", lambda checkpoint, calibrations: tmp_path)
    order = measure.MeasureOrder(b"", TranscribeOptions(), "demo", "int8-static", "")
    assert measure._calibration(order, report) == hashlib.sha256(b"{}").hexdigest()
    assert measure._calibration(order, fake_report()) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"}, {"version": 99}, {"rows": []}, {"rows": [{}]}, {"rows": 5}, {"date": 7},
        {"rows": [{"precision": "fp32", "label": "x", "warm_s": "fast"}]},
        {"rows": [{"precision": "fp32", "label": "x", "claims": [{"key": "best of all"}]}]},
        {"rows": [{"precision": "fp32", "label": "x", "diff": [{"text": "", "was": "", "kind": "x", "start_s": 1}]}]},
    ],
)  # fmt: skip
def test_what_is_no_run_card_is_a_sentence(change: dict[str, object]) -> None:
    content = {**json.loads(to_json(a_card())), **change}
    with pytest.raises(OptionError) as raised:
        read_card(json.dumps(content), "x.json")
    assert str(raised.value).startswith("x.json")


def test_files_that_are_no_json_or_not_there_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.json").write_text("[" * 100_000)
    for name in ("a.json", "b.json", "missing.json"):
        with pytest.raises(OptionError, match=name):
            load_card(tmp_path / name)


def test_a_card_of_a_later_version_may_hold_more() -> None:
    content = json.loads(to_json(a_card()))
    content["colour"] = "blue"
    content["rows"][0]["taste"] = 3
    assert read_card(json.dumps(content)).rows == a_card().rows


GOLDEN_MARKDOWN = """\
| precision | load (s) | WER (%) |
| --- | ---: | ---: |
| fp32 | 1.50 | - |
| b\\|f | 0.50 | 2.5 |

WER and CER are differences from the text of fp32: agreement with fp32, not accuracy.

- **b\\|f**: Too large.
"""


def test_csv_and_markdown_leave_empty_what_was_not_measured() -> None:
    rows = (
        CompareRow("fp32", "fp32", load_s=1.5, text="=SUM(A1)"),
        CompareRow("b|f", "", load_s=0.5, wer=0.025, reference="fp32", error="Too large."),
    )
    assert to_markdown(rows, row_names(rows)) == GOLDEN_MARKDOWN
    header, first, second = to_csv(rows, row_names(rows)).splitlines()
    assert header.startswith("precision,effective,model,device,language,words held to,load (s),warm-up (s),")
    assert first.startswith("fp32,,,,,,1.5,,,") and first.endswith(",'=SUM(A1)"), "no formula for a spreadsheet"
    assert ",0," not in first and "2.5" in second and second.endswith("Too large.,")


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.key)
def test_none_is_never_a_zero(column) -> None:
    assert column.key in {item.name for item in fields(CompareRow)}
    assert column.shown(CompareRow("fp32", "fp32")) == "-"
    assert column.shown(replace(measured_row("fp32"), **{column.key: 0})).startswith("0")


def test_the_table_leaves_out_what_nobody_measured_and_keeps_the_reason_of_a_failure() -> None:
    rows = (replace(measured_row("fp32"), wer=None, cer=None), CompareRow("fp8", "fp8", error="Needs a newer GPU."))
    table = terminal_table(rows, ["fp32", "fp8"]).splitlines()
    assert "GPU use" not in table[0] and "WER" not in table[0] and "energy" not in table[0]
    assert "12.2" in table[1] and table[2].split("  ")[-1] == "Needs a newer GPU."


def on_a_cpu() -> tuple[CompareRow, ...]:
    """A measured row as a CPU gives it, and one that failed."""
    row = replace(measured_row("bf16"), engine="fast", language_probability=0.97, left_bytes=3 * 2**20)
    return row, CompareRow("fp8", "fp8", error="Needs a newer GPU.")


def test_markdown_and_csv_hold_all_that_was_measured_and_say_what_a_cpu_cannot() -> None:
    rows = on_a_cpu()
    above, _, header, _, first, failed, *_ = to_markdown(rows, row_names(rows)).splitlines()
    assert above == "demo on CPU, 2 cores"
    cells = dict(zip(header.split(" | "), first.split(" | "), strict=True))
    expected = {
        "effective": "bf16", "engine": "fast", "language": "en", "language probability (%) |": "97 |",
        "warm-up (s)": "0.10", "left after unload (MiB)": "3", "energy per run (J)": "not available",
        "GPU use (%)": "not available", "spread (s)": None,
    }  # fmt: skip
    assert {name: cells.get(name) for name in expected} == expected, "nobody measured a spread: one warm run has none"
    assert "not available" not in failed
    table = csv.DictReader(to_csv(rows, row_names(rows)).splitlines())
    measured, failure = table
    assert (measured["energy per run (J)"], measured["GPU use (%)"]) == ("not available", "not available")
    assert (measured["engine"], measured["spread (s)"], failure["energy per run (J)"]) == ("fast", "", "")


def test_the_terminal_has_a_second_table_for_the_rest() -> None:
    rows = on_a_cpu()
    header, *lines = second_table(rows, ["bf16", "fp8"]).splitlines()
    assert re.split(r"  +", header) == [
        "precision", "effective", "engine", "language", "warm-up (s)", "predicted peak, one window (MiB)",
        "left after unload (MiB)", "language probability (%)",
    ]  # fmt: skip
    assert [line.split() for line in lines] == [["bf16", "bf16", "fast", "en", "0.10", "67", "3", "97"]]
    assert second_table(rows[1:], ["fp8"]) == "" and measured_on(rows[1:]) == ""
    shown = Result(a_card(rows)).render("table").splitlines()
    assert shown[0] == "demo on CPU, 2 cores" and shown[1].startswith("precision") and shown[5] == header
    assert sum("CPU, 2 cores" in line for line in shown) == 1


def test_rows_of_an_older_card_carry_its_date_and_device() -> None:
    old = replace(a_card(), date="2026-01-02T03:04:05+00:00")
    result = Result(a_card(), old)
    assert result.names[0] == "fp32" and result.names[3] == "fp32 (2026-01-02 03:04, demo, talk.wav, CPU, 2 cores)"
    assert len(json.loads(result.render("card"))["rows"]) == 3, "the card holds the new rows alone"
    assert "2026-01-02" in result.render("csv") and "2026-01-02" in result.render("table")


def test_an_older_card_of_another_recording_is_warned_of() -> None:
    card = a_card()
    other = replace(card, recording_sha256="f" * 64)
    assert not Result(card, card).is_of_two_recordings and not Result(None, other).is_of_two_recordings
    assert not Result(card, replace(other, recording_sha256="")).is_of_two_recordings, "not known"
    assert Result(card, other).is_of_two_recordings
    assert "measured another recording" in Result(card, other).render("table")
    assert "another recording" not in Result(card, card).render("table")


def test_where_rows_are_held_to_different_things_each_sentence_names_its_rows() -> None:
    new = [measured_row(name, reference="your text") for name in ("fp32", "int8")]
    old = [measured_row("fp32"), measured_row("int8", reference="fp32")]
    names = ["fp32", "int8", "old|fp32", "old|int8"]
    mine, peer = (
        "fp32, int8: WER and CER are errors against your text: accuracy.",
        "old|int8: WER and CER are differences from the text of fp32: agreement with fp32, not accuracy.",
    )
    assert held_to([*new, *old], names) == [mine, peer]
    assert f"\n\n{mine}\n\n{peer.replace('|', chr(92) + '|')}\n\n" in to_markdown([*new, *old], names)
    assert held_to(new, names[:2]) == ["WER and CER are errors against your text: accuracy."]
    assert held_to(old[:1], names[:1]) == [
        "No words were compared: give the text that is said, or measure a second precision."
    ]
    card = a_card(tuple(new))
    shown = Result(card, replace(card, rows=tuple(old))).render("table").splitlines()
    assert mine in shown and sum("not accuracy" in line for line in shown) == 1


def test_an_older_card_held_to_another_text_is_warned_of() -> None:
    card = replace(a_card(), reference_text="Good morning.")
    other = replace(card, reference_text="Good evening.")
    for same in (card, replace(card, reference_text=" Good  morning.\n"), replace(card, reference_text="")):
        assert not Result(card, same).is_of_two_texts and not Result(None, other).is_of_two_texts
        assert "another text" not in Result(card, same).render("table")
    assert Result(card, other).is_of_two_texts
    for kind in ("table", "markdown"):
        assert Result(card, other).render(kind).count("held to another text: its word errors cannot be compared") == 1
    elsewhere = Result(card, replace(other, recording_sha256="f" * 64)).render("table")
    assert "another recording" in elsewhere and "another text" not in elsewhere, "one warning says it all"


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    recording = tmp_path / "talk.mp3"
    assert plan_outputs({"json": "-", "csv": ""}, recording) == {}
    for given in ({"json": str(recording)}, {"csv": "x.md"}, {"card": "no/folder/x.json"}):
        with pytest.raises(OptionError):
            plan_outputs(given, recording)
    with pytest.raises(OptionError, match="file of its own"):
        plan_outputs({"json": str(tmp_path / "a.json"), "card": str(tmp_path / "a.json")}, recording)
    (tmp_path / "sub").mkdir()
    with pytest.raises(OptionError, match="file of its own"):  # the same place in other words
        plan_outputs({"json": str(tmp_path / "a.json"), "card": str(tmp_path / "sub" / ".." / "a.json")}, recording)
