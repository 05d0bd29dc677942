"""Does it fit: the prediction for every precision as a table, and beside what was measured. Pure functions to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ui import render
from ui.texts import say

if TYPE_CHECKING:
    from model_loader.fit import FitRow
    from model_loader.loader import LoadReport


def fits(rows: Sequence[FitRow], locale: str) -> str:
    """One row per precision for the loaded checkpoint; nothing before a checkpoint is known."""
    if not rows:
        return render.empty(escape(say("fit_none", locale)))
    keys = ("column_name", "fit_weights", "fit_caches", "fit_working", "fit_needed", "fit_largest", "column_state")
    return render.table([say(key, locale) for key in keys], [_cells(row, locale) for row in rows],
                        numeric=frozenset({1, 2, 3, 4, 5}))  # fmt: skip


def predicted(report: LoadReport, locale: str) -> str:
    """Weights and peak as predicted from the header, beside what was counted and measured."""
    prediction = report.prediction
    if prediction is None:
        return ""
    before, peak = report.phases.before, report.phases.peak
    if peak.allocated_bytes is not None:
        measured: int | None = peak.allocated_bytes - (before.allocated_bytes or 0)
    elif peak.process_bytes is not None and before.process_bytes is not None:
        measured = peak.process_bytes - before.process_bytes
    else:
        measured = None
    headers = [say(key, locale) for key in ("column_name", "fit_predicted", "fit_measured")]
    rows = [
        (say("fit_weights", locale), render.size(prediction.weights_bytes), render.size(report.weights_bytes)),
        (say("engine_phase_peak", locale), render.size(prediction.needed_bytes), render.size(measured)),
    ]
    reason = render.line(report.precision_choice) if report.precision_choice else ""
    return reason + render.table(headers, rows, numeric=frozenset({1, 2}))


def _cells(row: FitRow, locale: str) -> tuple[str, ...]:
    if row.prediction is None or row.verdict is None:
        return (row.precision, "–", "–", "–", "–", "–", row.unavailable or "")
    prediction = row.prediction
    parts = (prediction.weights_bytes, prediction.cache_bytes, prediction.working_bytes, prediction.needed_bytes)
    state = say(f"fit_{row.verdict.colour}", locale)
    return (row.precision, *map(render.size, parts), str(row.max_batch or "–"), f"{state}. {row.verdict.sentence}")
