"""What is said of a row beside another one: only what was measured, and only what the warm runs can bear."""

from __future__ import annotations

import re
from dataclasses import replace
from statistics import median

import pytest

from tests.measured import measured_row
from transcription.interface import CompareRow
from transcription.verdict import ENGLISH, claims, compare_times, sentence

FIGURES = ("weights_bytes", "peak_bytes", "peak_allocated_bytes", "warm_s", "energy_j", "n_word_errors")


def full(name: str, **changes: object) -> CompareRow:
    given = {"energy_j": 50.0, "peak_allocated_bytes": 300_000_000, "warm_runs_s": (1.0, 1.0, 1.1)}
    given |= {"reference": "fp32", "text": "the cat"}
    return replace(measured_row(name), **{**given, **changes})


@pytest.mark.parametrize("missing", FIGURES)
@pytest.mark.parametrize("side", ["row", "base"])
def test_what_was_not_measured_is_not_said(missing: str, side: str) -> None:
    """Every figure has a value of its own, so a None that counted as 0 would say '100 % less' or '0x'."""
    row = full("bf16", weights_bytes=30_000_000, peak_bytes=370_000_000, peak_allocated_bytes=270_000_000)
    row = replace(row, warm_s=2.0, energy_j=99.0)
    base = full("fp32")
    everything = {claim.key for claim in claims(row, base)}
    row, base = (replace(row, **{missing: None}), base) if side == "row" else (row, replace(base, **{missing: None}))
    said = sentence(claims(row, base))
    assert not re.search(r"\b0x|100 %|None|nan|inf", said)
    assert {claim.key for claim in claims(row, base)} <= everything
    if side == "row" and missing == "warm_s":
        assert "the time of" not in said
    if missing == "weights_bytes":
        assert "weights" not in said


@pytest.mark.parametrize(
    ("own", "base", "key"),
    [
        ((0.5, 0.55, 0.6), (1.0, 1.05, 1.1), "time_less"),
        ((2.0, 2.1, 2.1), (1.0, 1.05, 1.1), "time_more"),
        ((0.9, 0.95, 1.05), (1.0, 1.05, 1.1), "time_same"),
        ((0.96, 0.99, 0.995), (1.0, 1.01, 1.05), "time_same"),  # apart, but by less than the runs of either
        ((0.98, 0.981, 0.982), (0.99, 0.991, 0.992), "time_near"),
        ((0.5,), (1.0, 1.1, 1.1), "time_once"),
        ((0.5, 0.6, 0.6), (1.0,), "time_once"),
        ((0.5, 0.6), (1.0, 1.1, 1.1), "time_few"),
        ((0.5, 0.5, 0.6), (1.0, 1.1), "time_few"),
    ],
)
def test_faster_is_said_only_where_the_warm_runs_can_bear_it(own, base, key: str) -> None:
    row = full("bf16", warm_runs_s=own, warm_s=median(own))
    other = full("fp32", warm_runs_s=base, warm_s=median(base))
    assert [claim.key for claim in claims(row, other) if claim.key.startswith("time")] == [key]
    assert ("faster" in sentence(claims(row, other))) == (key == "time_less")
    assert f"time_{compare_times(own, base)}" == key.replace("once", "few")


def test_two_warm_runs_give_a_ratio_and_say_that_they_are_too_few() -> None:
    row, base = full("bf16", warm_runs_s=(0.5, 0.6), warm_s=0.55), full("fp32")
    assert "takes 0.55x the time of fp32 (only 2 warm runs: too few to tell)" in sentence(claims(row, base))


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.94, "0.94"), (0.997, "1.00"), (1.04, "1.04"), (2.313, "2.31"), (9.996, "10"), (12.4, "12")],
)
def test_a_ratio_has_two_decimals_below_ten(ratio: float, text: str) -> None:
    row = full("bf16", warm_runs_s=(ratio,), warm_s=ratio, energy_j=50.0 * ratio)
    said = sentence(claims(row, full("fp32")))
    assert f"takes {text}x the time of fp32" in said and f"uses {text}x the energy" in said


@pytest.mark.parametrize("silent", ["row", "base"])
def test_where_no_text_came_nothing_is_said_of_time_and_energy(silent: str) -> None:
    row, base = full("bf16", warm_s=1.6), full("fp32")
    row, base = (replace(row, text=" "), base) if silent == "row" else (row, replace(base, text=""))
    keys = {claim.key for claim in claims(row, base)}
    assert "weights_same" in keys and not {key for key in keys if key.startswith(("time", "energy"))}


def test_where_characters_are_counted_they_are_called_so() -> None:
    row = full("bf16", language="zh", n_word_errors=2, n_reference_words=45)
    assert "; 2 of 45 characters differ from fp32." in sentence(claims(row, full("fp32")))
    row = replace(row, reference="your text")
    assert "; 2 character errors in 45 characters of your text." in sentence(claims(row, full("fp32")))
    row = replace(row, n_word_errors=0)
    assert "none of 45 characters is wrong against your text" in sentence(claims(row, full("fp32")))
    row = replace(row, reference="fp32")
    assert "none of 45 characters differs from fp32" in sentence(claims(row, full("fp32")))


def test_a_verdict_reads_as_a_sentence() -> None:
    row = full("bf16", weights_bytes=22_500_000, peak_allocated_bytes=270_000_000, warm_s=1.7,
               warm_runs_s=(1.6, 1.7, 1.8), energy_j=None, n_word_errors=2, n_reference_words=33)  # fmt: skip
    assert sentence(claims(row, full("fp32"))) == (
        "Its weights take 50 % less memory than those of fp32; its peak is 10 % lower; takes 1.70x the time of fp32; "
        "2 of 33 words differ from fp32."
    )
    assert claims(CompareRow("bf16", "bf16", error="no"), full("fp32")) == () and sentence(()) == ""


def test_a_verdict_says_where_the_engines_differ() -> None:
    row = full("bnb-nf4", engine="reference", warm_s=2.0, warm_runs_s=(2.0, 2.0, 2.1))
    base = full("fp32", engine="fast")
    said = claims(replace(row, energy_j=None), base)
    assert "takes 2.00x the time of fp32 (on another engine: reference against fast); none of" in sentence(said)
    for same in (replace(base, engine="reference"), replace(base, engine="")):
        assert "engine" not in sentence(claims(row, same))


def test_the_page_can_say_every_claim() -> None:
    from ui.texts import TEXTS as PAGE

    for key, english in ENGLISH.items():
        names = set(re.findall(r"{(\w+)}", english))
        assert all(set(re.findall(r"{(\w+)}", text)) <= names for text in PAGE[f"verdict_{key}"])
