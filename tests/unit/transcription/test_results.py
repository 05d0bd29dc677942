"""A finished comparison as text and files: what rows warn of, what cannot be compared, and cards from anywhere."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from errors import OptionError
from tests.measured import measured_row
from transcription.comparison import held_to, row_names, to_csv, to_markdown, warned
from transcription.interface import CompareRow
from transcription.results import ONE_TEXT, Result
from transcription.run_card import MAX_NUMBER, RunCard, load_card, read_card, to_json
from transcription.transcript import NO_SPEECH
from transcription.verdict import Claim

DATE = "2026-11-20T08:00:00+00:00"
CUT, SLOW = "talk.flac is cut off.", "Torch's operations stand in for our kernels."


def card_of(*rows: CompareRow, text: str = "") -> RunCard:
    return RunCard(DATE, rows, "talk.wav", "f" * 64, reference_text=text)


def silent(name: str, reference: str = "") -> CompareRow:
    row = measured_row(name, reference=reference)
    return replace(
        row, wer=None, cer=None, n_word_errors=None, n_reference_words=None, first_text_s=None, warnings=(NO_SPEECH,)
    )


# What rows warn of


def test_a_warning_of_all_rows_is_said_once_and_another_with_the_names_of_its_rows() -> None:
    rows = (
        replace(measured_row("fp32"), warnings=(CUT, CUT)),
        replace(measured_row("bf16", reference="fp32"), warnings=(CUT, SLOW)),
        CompareRow("fp16", "", error="fp16 needs a GPU."),
    )
    assert warned(rows, row_names(rows)) == [CUT, f"bf16: {SLOW}"], "what failed has nothing to say"
    for kind in ("table", "markdown"):
        lines = Result(card_of(*rows)).render(kind).splitlines()
        assert lines.count(CUT) == 1 and lines.count(f"bf16: {SLOW}") == 1
    table = list(csv.DictReader(to_csv(rows, row_names(rows)).splitlines()))
    assert [line["warnings"] for line in table] == [f"{CUT} {CUT}", f"{CUT} {SLOW}", ""]


def test_markdown_says_warnings_after_the_verdicts() -> None:
    rows = (replace(measured_row("fp32"), warnings=("a | b",)), CompareRow("fp8", "", error="fp8 needs a GPU."))
    assert to_markdown(rows, row_names(rows)).endswith("\n- **fp8**: needs a GPU.\n\na \\| b\n")


def test_the_name_of_a_failed_row_is_not_said_twice() -> None:
    row = CompareRow("fp16", "", error="fp16 needs a GPU.")
    old = card_of(measured_row("fp32"), row)
    for shown in (Result(old).render("table"), Result(None, old).render("markdown")):
        assert "needs a GPU." in shown and "fp16 needs" not in shown


def test_that_nobody_speaks_is_said_once_and_nothing_of_word_errors() -> None:
    rows = (silent("fp32"), silent("bf16", "fp32"))
    for kind in ("table", "markdown"):
        shown = Result(card_of(*rows)).render(kind)
        assert shown.count(NO_SPEECH) == 1 and "WER" not in shown and "No words were compared" not in shown
    assert held_to(rows[:1], ["fp32"]) == [] and held_to([CompareRow("fp16", "", error="no")], ["fp16"]) == []
    assert len(held_to((*rows, measured_row("int8", reference="fp32")), ["fp32", "bf16", "int8"])) == 1


# Two cards


def test_errors_against_a_text_beside_agreement_are_warned_of() -> None:
    peer = card_of(measured_row("fp32"), measured_row("bf16", reference="fp32"))
    mine = card_of(measured_row("fp32", reference="your text"), text="Good morning.")
    for new, old in ((peer, mine), (mine, peer)):
        for kind in ("table", "markdown"):
            assert Result(new, old).render(kind).count(ONE_TEXT) == 1
    for same in (Result(peer, peer), Result(mine, mine), Result(mine), Result(card_of(silent("fp32")), mine)):
        assert not same.is_of_text_and_agreement and ONE_TEXT not in same.render("table" if same.card else "markdown")
    elsewhere = Result(peer, replace(mine, recording_sha256="e" * 64)).render("table")
    assert "another recording" in elsewhere and ONE_TEXT not in elsewhere, "one warning says it all"


def test_the_only_row_that_was_measured_holds_nobody_to_itself() -> None:
    base = replace(measured_row("fp32"), claims=(Claim("base"), Claim("words_right", (("total", "8"),))))
    other = replace(measured_row("bf16"), claims=(Claim("peak_same"),))
    failed = CompareRow("fp16", "", error="fp16 needs a GPU.")
    alone, two = card_of(base, failed), card_of(base, other)
    assert [claim.key for claim in alone.rows[0].claims] == ["words_right"] and two.rows == (base, other)
    for kind in ("table", "markdown", "csv", "json", "card"):
        assert "held to this one" not in Result(alone, alone).render(kind)
        assert "held to this one" in Result(two).render(kind)


# Cards from anywhere


@pytest.mark.parametrize("number", [10**400, -(10**400), MAX_NUMBER + 1, 1e300, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weights_bytes", "warm_s", "batch_size"])
def test_a_number_that_nobody_can_measure_is_a_sentence(key: str, number: float) -> None:
    content = json.loads(to_json(card_of(measured_row("fp32"))))
    content["rows"][0][key] = number
    with pytest.raises(OptionError, match=f"^x.json is not a run card of Sotto: CompareRow.{key} is not a"):
        read_card(json.dumps(content), "x.json")
    content["rows"][0][key] = 2**62
    assert Result(None, read_card(json.dumps(content))).render("csv")


def test_a_card_that_an_editor_put_a_mark_before_is_read(tmp_path: Path) -> None:
    card, path = card_of(measured_row("fp32")), tmp_path / "x.json"
    path.write_text(to_json(card), encoding="utf-8-sig")
    assert load_card(path).rows == card.rows


def test_half_a_character_in_a_card_is_a_sentence() -> None:
    """JSON can say it, but no file can hold it: it would break the page when its rows are written out."""
    card = RunCard("2026-11-28T10:00:00+00:00", (measured_row("fp32"),), "talk.wav")
    broken = to_json(card).replace("talk.wav", "\\ud800")
    with pytest.raises(OptionError, match="recording is not text"):
        read_card(broken, "x.json")
