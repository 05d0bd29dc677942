"""Does it fit: the prediction for every precision as a table, and beside what was measured. Pure functions to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from transcription.interface import PrecisionStatus
from ui import render
from ui.texts import say

if TYPE_CHECKING:
    from model_loader.fit import FitRow
    from model_loader.loader import LoadReport


MARKS = {"green": "✓", "amber": "!", "red": "✕"}
"""By colour: a sign of its own, so that no colour is needed to tell them apart."""


def mark(colour: str, locale: str) -> str:
    """A coloured sign and what it means, in words."""
    return (
        f'<span class="fit {colour}" aria-hidden="true">{MARKS[colour]}</span> {escape(say(f"fit_{colour}", locale))}'
    )


def choices(rows: Sequence[PrecisionStatus], locale: str) -> str:
    """The precisions that can be chosen, by whether they fit; nothing before a checkpoint is known."""
    lines = []
    for colour in MARKS:
        names = ", ".join(row.name for row in rows if row.fit == colour and row.unavailable is None)
        lines += [f"<li>{mark(colour, locale)}: {escape(names)}</li>"] if names else []
    return f'<ul class="fits">{"".join(lines)}</ul>' if lines else ""


def choice(name: str, rows: Sequence[FitRow], locale: str) -> str:
    """One precision's mark and figures; empty where they are not known."""
    verdict = next((row.verdict for row in rows if row.precision == name), None)
    return f'<p class="line">{mark(verdict.colour, locale)}. {escape(verdict.sentence)}</p>' if verdict else ""


def fits(rows: Sequence[FitRow], locale: str) -> str:
    """One row per precision for the loaded checkpoint; nothing before a checkpoint is known."""
    if not rows:
        return render.empty(escape(say("fit_none", locale)))
    keys = ("column_name", "fit_weights", "fit_caches", "fit_working", "fit_needed", "fit_largest", "column_state")
    body = "".join(_row(row, locale) for row in rows)
    return render.frame([say(key, locale) for key in keys], body, numeric=frozenset({1, 2, 3, 4, 5}))


def predicted(report: LoadReport, locale: str) -> str:
    """Weights and peak as predicted from the header, beside what was counted and measured."""
    prediction = report.prediction
    if prediction is None:
        return ""
    before, peak, note = report.phases.before, report.phases.peak, ""
    if peak.allocated_bytes is not None:
        measured: int | None = peak.allocated_bytes - (before.allocated_bytes or 0)
    elif peak.process_bytes is not None and before.process_bytes is not None:
        measured, note = peak.process_bytes - before.process_bytes, f" ({say('fit_of_process', locale)})"
    else:
        measured = None
    headers = [say(key, locale) for key in ("column_name", "fit_predicted", "fit_measured")]
    rows = [
        (say("fit_weights", locale), render.size(prediction.weights_bytes), render.size(report.weights_bytes)),
        (say("engine_phase_peak", locale), render.size(prediction.needed_bytes), render.size(measured) + note),
    ]
    reason = render.line(report.precision_choice) if report.precision_choice else ""
    return reason + render.table(headers, rows, numeric=frozenset({1, 2}))


def _row(row: FitRow, locale: str) -> str:
    figures, state = ["–"] * 5, escape(row.unavailable or "")
    if row.prediction is not None and row.verdict is not None:
        prediction = row.prediction
        parts = (prediction.weights_bytes, prediction.cache_bytes, prediction.working_bytes, prediction.needed_bytes)
        figures = [*map(render.size, parts), str(row.max_batch or "–")]
        state = f"{mark(row.verdict.colour, locale)}. {escape(row.verdict.sentence)}"
    cells = "".join(f"<td class=num>{figure}</td>" for figure in figures)
    return f"<tr><td>{escape(row.precision)}</td>{cells}<td>{state}</td></tr>"
