"""What Compare draws: the parts of its charts and their colours, what stands below its table, and silence."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.measured import measured_row
from transcription.interface import CompareRow
from transcription.results import Result
from transcription.run_card import RunCard
from transcription.transcript import NO_SPEECH
from ui import compare_view
from ui.tabs import compare
from ui.tabs.compare import Shown
from ui.texts import say

FAILED = CompareRow("fp8", "fp8", error="fp8 needs a newer GPU.")
PAGE_COLOURS = ("#ffffff", "#0f172a")
"""Of the boxes that charts stand in, light and dark (Gradio's neutral_900)."""
REQUEST: Any = SimpleNamespace(headers={"accept-language": "en"}, session_hash="page-1")


def result(*rows: CompareRow) -> Result:
    return Result(RunCard("2026-11-20T10:00:00+00:00", rows))


def test_what_was_there_before_the_load_is_a_part_of_its_own_in_the_bars_of_a_process() -> None:
    def parts(row: CompareRow) -> dict[str, float]:
        memory = compare_view.memory_frame(result(row), "en")
        return dict(zip(memory.part, memory.mib, strict=True))

    loaded = replace(measured_row("fp32"), weights_bytes=40 * 2**20, before_bytes=340 * 2**20, peak_bytes=600 * 2**20)
    assert parts(loaded) == {"before the load": 340, "rest of the peak": 220, "weights": 40}
    tight = replace(loaded, peak_bytes=350 * 2**20)
    assert sum(parts(tight).values()) == 350, "stacked, the parts are the peak"
    on_gpu = replace(loaded, peak_bytes=None, peak_allocated_bytes=90 * 2**20)
    assert parts(on_gpu) == {"rest of the peak": 50, "weights": 40}, "torch's allocator knows nothing of libraries"
    assert set(parts(loaded)) <= set(compare_view.chart_colours(compare_view.PARTS))


def test_the_time_chart_goes_higher_than_its_lines() -> None:
    slow = replace(measured_row("fp32"), first_run_s=2.0)
    *_, chart = compare._draw_charts(REQUEST, Shown(result(slow, measured_row("bf16"))))
    assert chart.y_lim == [0, pytest.approx(2.2)]
    assert compare_view.seconds_limits(compare_view.time_frame(result(FAILED), "en")) == [0, None]


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines count it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_colours_can_be_told_from_what_is_behind_them() -> None:
    for colour in (*compare_view.PARTS.values(), *compare_view.RUNS.values()):
        assert all(contrast(colour, behind) >= 3 for behind in PAGE_COLOURS), colour
    for colour in compare_view.DIFF_COLOURS.values():
        assert contrast(colour, "#ffffff") >= 4.5, "white text stands on it"


def test_what_was_counted_in_memory_stands_below_the_table_that_it_would_widen() -> None:
    row = replace(measured_row("int8"), proof="24 <decoder> projection int8")
    html = compare_view.table(result(measured_row("fp32"), row), "en")
    assert "<b>int8</b> 24 &lt;decoder&gt; projection int8" in html[html.index("</table>") :]
    assert "Proof" not in html[: html.index("</table>")]
    assert "Proof" not in compare_view.table(result(measured_row("fp32")), "en")


def test_silence_is_said_once_and_judged_by_nothing() -> None:
    silent = replace(
        measured_row("fp32", reference="fp32"), wer=None, cer=None, warnings=(NO_SPEECH, "No kernels."), claims=()
    )
    both = result(silent, replace(silent, precision="bf16"))
    verdicts = compare_view.verdicts(both, "en")
    assert verdicts.count("No speech") == 1 and verdicts.startswith('<div class="notice calm"')
    assert verdicts.count("No kernels.") == 2
    assert "Errors are against" not in compare_view.table(both, "en")
    assert [update.visible for update in compare._draw_charts(REQUEST, Shown(both))] == [True, True, False]
    spoken = compare_view.verdicts(result(silent, measured_row("bf16")), "en")
    assert NO_SPEECH in spoken and 'class="notice' not in spoken, "one row alone says so itself"


def test_sentences_promise_no_more_than_was_measured() -> None:
    assert "on the same recordings" in say("calibrate_done", "en", languages="en", percent="0.0 %")
    assert "may still work" in say("player_unplayable", "en"), "it may be no recording at all"
