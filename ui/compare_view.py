"""A comparison -> page text and chart data: pure functions, no Gradio. The columns are precisions, the lines figures.

A figure that was not measured is a dash or "not available", never a zero, and is not drawn in a chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from errors import CalibrationMissingError
from transcription.comparison import by_reference, reason, row_names
from transcription.interface import CompareRow, PrecisionStatus
from transcription.results import ONE_TEXT, OTHER_RECORDING, OTHER_TEXT, Result
from transcription.transcript import NO_SPEECH, UNSPACED_LANGUAGES, join_words
from transcription.verdict import YOUR_TEXT, joined
from transcription.worddiff import KINDS, DiffPart
from ui import render
from ui.render import MIB, percent, seconds, size
from ui.texts import LOCALES, say

if TYPE_CHECKING:
    import pandas

DIFF_COLOURS = {"missing": "#dc2626", "added": "#2563eb", "changed": "#b45309"}
"""White text on each has a contrast of 4.5 or more."""
PARTS = {"weights": "#0f766e", "rest": "#d97706", "before": "#64748b"}
RUNS = {"first": "#64748b", "warm": "#0d9488", "first_old": "#d97706", "warm_old": "#8b5cf6"}
"""As those of PARTS: 3 or more against the light page and against the dark one. The charts' headings name them."""
HEADROOM = 1.1
"""The time chart goes up to so many times its largest figure: a line along the edge would be cut in half."""
WARNINGS = {OTHER_RECORDING: "compare_other_recording", OTHER_TEXT: "compare_other_text", ONE_TEXT: "compare_one_text"}
PHASES = ("before", "after_load", "after_warm_up", "peak", "after_unload")

Shown = Callable[[CompareRow, str], str]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    key: str
    """Its heading is compare_row_<key>."""
    shown: Shown
    is_measured: Callable[[CompareRow], bool]
    always: bool = False
    """Shown also where no precision has the figure, in words."""


def _line(key: str, name: str, form: Callable[[Any], str], *, always: bool = False) -> Line:
    def shown(row: CompareRow, locale: str) -> str:
        value = getattr(row, name)
        if value is None:
            return say("compare_not_available", locale) if always else "–"
        return form(value)

    return Line(key, shown, lambda row: getattr(row, name) is not None, always)


def _language(row: CompareRow, locale: str) -> str:
    if row.language_probability is None:
        return row.language or "–"
    return f"{row.language} ({percent(row.language_probability)})"


LINES: tuple[Line, ...] = (
    _line("load", "load_s", seconds),
    _line("warm_up", "warm_up_s", seconds),
    _line("first", "first_run_s", seconds),
    _line("warm", "warm_s", seconds),
    _line("spread", "warm_spread_s", seconds),
    _line("first_text", "first_text_s", seconds),
    _line("factor", "real_time_factor", "{:.1f}×".format),
    _line("tokens", "tokens_per_s", "{:.0f}".format),
    _line("weights", "weights_bytes", size),
    _line("before", "before_bytes", size),
    _line("peak", "peak_bytes", size),
    _line("allocated", "peak_allocated_bytes", size),
    _line("predicted", "predicted_peak_bytes", size),
    _line("left", "left_bytes", size),
    _line("energy", "energy_j", "{:.1f} J".format, always=True),
    _line("use", "utilisation_percent", "{:.0f} %".format, always=True),
    _line("wer", "wer", lambda share: percent(share, 1)),
    _line("cer", "cer", lambda share: percent(share, 1)),
    Line("language", _language, lambda row: bool(row.language)),
    Line("engine", lambda row, locale: row.engine or "–", lambda row: bool(row.engine)),
    _line("batch", "batch_size", str),
    Line("calibration", lambda row, locale: row.calibration[:12] or "–", lambda row: bool(row.calibration)),
    Line("effective", lambda row, locale: row.effective or "–", lambda row: bool(row.effective)),
)


def choice(row: PrecisionStatus, locale: str) -> str:
    return say("choice_uncalibrated", locale, label=row.label) if row.lacks_calibration else row.label


def unavailable(rows: Sequence[PrecisionStatus], locale: str) -> str:
    """Precisions that cannot be chosen here, each with its reason: Gradio 6.31 cannot grey a single choice."""
    items = "".join(
        f"<li><b>{escape(row.name)}</b> {escape(row.unavailable.removeprefix(f'{row.name} '))}</li>"
        for row in rows
        if row.unavailable is not None
    )
    head = escape(say("compare_unavailable", locale))
    return f'<div class="unavailable"><p>{head}</p><ul>{items}</ul></div>' if items else ""


def about(rows: Sequence[PrecisionStatus], locale: str) -> str:
    """What each precision does and what it cost in accuracy where that was measured, folded away."""
    items = "".join(f"<li><b>{escape(row.name)}</b> {escape(row.description)}</li>" for row in rows if row.description)
    head = escape(say("compare_about", locale))
    return f'<details class="about"><summary>{head}</summary><ul lang="en">{items}</ul></details>' if items else ""


def table(result: Result, locale: str) -> str:
    """Figures side by side, then what was counted in memory, why a precision failed, and what errors are held to.
    Nothing here ranks them."""
    named = list(zip(names(result, locale), result.rows, strict=True))
    measured = [(name, row) for name, row in named if not row.failed]
    drawn = ""
    if measured:
        rows = [row for _, row in measured]
        lines = [line for line in LINES if line.always or any(map(line.is_measured, rows))]
        body = "".join(_table_line(line, rows, locale) for line in lines)
        headers = ["", *(name for name, _ in measured)]
        drawn = f'<div class="compared">{render.frame(headers, body, numeric=frozenset(range(1, len(headers))))}</div>'
    said = _held_to(measured, locale) + _failures(named, locale)
    return _warned(result, locale) + drawn + said + proofs(measured, locale) + phases(measured, locale)


def names(result: Result, locale: str) -> list[str]:
    """What each row is called here: its precision, and a short mark where it is of the opened card (origin). No
    narrow column breaks its date."""
    mark = say("compare_card_mark", locale, date=_card_date(result).replace("-", "\u2011"))
    return [
        *(row_names(result.card.rows) if result.card else ()),
        *(row_names(result.old.rows, lambda row: mark) if result.old else ()),
    ]


def origin(result: Result, locale: str) -> str:
    """What the mark stands for, in full."""
    if result.old is None:
        return ""
    return render.line(say("compare_card_origin", locale, date=_card_date(result), origin=result.old.mark[1:-1]))


def _card_date(result: Result) -> str:
    """'11-20', as far as the card has one."""
    return result.old.date[5:10] if result.old else ""


def _warned(result: Result, locale: str) -> str:
    """What forbids comparing the rows of the opened card with the others."""
    return "".join(render.notice(say(WARNINGS[warning], locale)) for warning in result.warnings)


def _table_line(line: Line, rows: Sequence[CompareRow], locale: str) -> str:
    counts = sorted({len(row.warm_runs_s) for row in rows if row.warm_runs_s})
    heading = say(f"compare_row_{line.key}", locale, n=" / ".join(map(str, counts)))
    cells = "".join(f"<td class=num>{escape(line.shown(row, locale))}</td>" for row in rows)
    return f'<tr><th scope="row">{escape(heading)}</th>{cells}</tr>'


def _failures(named: Sequence[tuple[str, CompareRow]], locale: str) -> str:
    return "".join(
        f'<div class="notice error failure" role="status"><b>{escape(name)}</b> {escape(_reason(row, locale))}</div>'
        for name, row in named
        if row.failed
    )


def _reason(row: CompareRow, locale: str) -> str:
    """Why it failed, to stand after its name. What the command line would have one type is said for the page."""
    if row.error_kind == CalibrationMissingError.__name__:
        return say("compare_failed_uncalibrated", locale)
    return reason(row)


def proofs(named: Sequence[tuple[str, CompareRow]], locale: str) -> str:
    """The census of each row in words: below the table, for sentences would make its columns wide."""
    items = "".join(f"<li><b>{escape(name)}</b> {escape(row.proof)}</li>" for name, row in named if row.proof)
    head = escape(say("compare_proof", locale))
    return f'<div class="proofs"><p>{head}</p><ul lang="en">{items}</ul></div>' if items else ""


def phases(named: Sequence[tuple[str, CompareRow]], locale: str) -> str:
    """Memory from before the load to after the unload, folded away: of the process, and on a GPU of torch's tensors."""
    lines = []
    for name, row in named:
        found = {phase.name: phase for phase in row.phases}
        on_gpu = any(phase.torch_bytes is not None for phase in row.phases)
        process = [found[key].process_bytes if key in found else None for key in PHASES]
        tensors = [found[key].torch_bytes if key in found else None for key in PHASES]
        counted = say("engine_of_process_gpu" if on_gpu else "engine_of_process", locale)
        lines += [(name, counted, *map(size, process))] if found else []
        lines += [(name, say("engine_of_torch", locale), *map(size, tensors))] if on_gpu else []
    if not lines:
        return ""
    headers = ["", "", *(say(f"engine_phase_{key}", locale) for key in PHASES)]
    drawn = render.table(headers, lines, numeric=frozenset(range(2, len(headers))))
    return f"<details><summary>{escape(say('compare_phases', locale))}</summary>{drawn}</details>"


def _held_to(named: Sequence[tuple[str, CompareRow]], locale: str) -> str:
    """What the errors mean; where that is not the same for all rows, with the names of the rows in front."""
    judged = [(name, row) for name, row in named if row.wer is not None or row.cer is not None]
    held = by_reference([row for _, row in judged], [name for name, _ in judged])
    lines = []
    for reference, names in held.items():
        of = f"<b>{escape(', '.join(names))}</b> " if len(held) > 1 else ""
        key = "compare_against_text" if reference == YOUR_TEXT else "compare_against_peer"
        lines.append(f'<p class="line">{of}{escape(say(key, locale, reference=reference))}</p>')
    return "".join(lines)


def verdicts(result: Result, locale: str) -> str:
    """Where an opened card comes from, whether nothing was said at all, then one sentence per precision with its own
    warnings."""
    measured = [row for row in result.rows if not row.failed]
    is_silent = bool(measured) and all(NO_SPEECH in row.warnings for row in measured)
    head = render.notice(say("transcribe_silence", locale), "calm") if is_silent else ""
    lines = []
    for name, row in zip(names(result, locale), result.rows, strict=True):
        warnings = [warning for warning in row.warnings if not (is_silent and warning == NO_SPEECH)]
        if row.claims or warnings:
            said = f"{escape(_verdict(row, locale))}{_warnings(warnings)}"
            lines.append(f'<div class="verdict"><b>{escape(name)}</b> {said}</div>')
    return origin(result, locale) + head + "".join(lines)


def _verdict(row: CompareRow, locale: str) -> str:
    said = [say(f"verdict_{claim.key}", locale, **dict(claim.values)) for claim in row.claims]
    text = joined(row.claims, said, "；" if locale == "zh" else "; ")
    return f"{text[:1].upper()}{text[1:]}{'。' if locale == 'zh' else '.'}" if text else ""


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f"<ul>{items}</ul>" if items else ""


# Charts


def _chart_names(result: Result) -> list[str]:
    """One per row, short, and such that Vega's alphabetical order is the order of the table: invisible letters go
    before them, one more each time. (Its `sort` option takes effect one update late in Gradio 6.31.)"""
    n_new, date = len(result.card.rows) if result.card else 0, _card_date(result)
    return [
        "\u200b" * index + (row.precision if index < n_new else f"{row.precision} {date}")
        for index, row in enumerate(result.rows)
    ]


def memory_frame(result: Result, locale: str) -> pandas.DataFrame:
    """Columns name, part, mib: the weights, the rest of the peak and what was there before the load; stacked they are
    the peak.

    The weights come last: Gradio 6.31 stacks what comes first on top, and from zero on they can be compared.
    """
    drawn: dict[str, list[tuple[str, str, float]]] = {"before": [], "rest": [], "weights": []}
    for name, row in zip(_chart_names(result), result.rows, strict=True):
        if row.weights_bytes is not None and not row.failed:
            for part, n_bytes in _parts_of_memory(row, row.weights_bytes).items():
                drawn[part].append((name, say(f"chart_{part}", locale), n_bytes / MIB))
    return _frame([*drawn["before"], *drawn["rest"], *drawn["weights"]], ("name", "part", "mib"))


def _parts_of_memory(row: CompareRow, weights_bytes: int) -> dict[str, int]:
    """Python and libraries are part of a process's peak, and of no figure of torch's allocator."""
    peak_bytes = row.peak_bytes if row.peak_bytes is not None else row.peak_allocated_bytes
    parts = {"weights": weights_bytes}
    if peak_bytes is None:
        return parts
    beside_bytes = max(0, peak_bytes - weights_bytes)
    if row.peak_bytes is not None and row.before_bytes is not None:
        parts["before"] = min(row.before_bytes, beside_bytes)
    return parts | {"rest": beside_bytes - parts.get("before", 0)}


def time_frame(result: Result, locale: str) -> pandas.DataFrame:
    """Columns name, run, seconds: of the first run and of the warm ones (median). Of an older card they are lines of
    their own. A line without any point has one of NaN."""
    points: list[tuple[str, str, float]] = []
    n_new = len(result.card.rows) if result.card else 0
    for index, (name, row) in enumerate(zip(_chart_names(result), result.rows, strict=True)):
        of = "" if index < n_new else "_old"
        if row.failed or NO_SPEECH in row.warnings:  # looking for speech and finding none says nothing of a precision
            continue
        if row.first_run_s is not None:
            points.append((name, say(f"chart_first{of}", locale), row.first_run_s))
        if row.warm_s is not None:
            points.append((name, say(f"chart_warm{of}", locale), row.warm_s))
    # Gradio 6.31 draws no line that was not there when it first drew: each is, with a point that has no value.
    drawn = {run for _, run, _ in points}
    absent = [run for run in (say(f"chart_{kind}", locale) for kind in RUNS) if run not in drawn]
    points += [(points[0][0], run, math.nan) for run in absent if points]
    return _frame(points, ("name", "run", "seconds"))


def seconds_limits(time: pandas.DataFrame) -> list[float | None]:
    """Of the time chart: from zero to a little above the highest line."""
    highest_s = float(time.seconds.max()) if len(time) else math.nan
    return [0, HEADROOM * highest_s if highest_s > 0 else None]


def has_bars(memory: pandas.DataFrame) -> bool:
    """Two rows or more: a single bar compares nothing."""
    return bool(memory.name.nunique() > 1)


def has_lines(time: pandas.DataFrame) -> bool:
    """Each line has two points or more: Gradio 6.31 draws nothing of one, and its row would seem to lack a time."""
    n_points = time.dropna().groupby("run").size()
    return len(n_points) > 0 and bool((n_points > 1).all())


def _frame(rows: Sequence[tuple[str, str, float]], columns: tuple[str, str, str]) -> pandas.DataFrame:
    import pandas

    frame = pandas.DataFrame(rows, columns=list(columns))
    return frame.astype({columns[0]: str, columns[1]: str, columns[2]: float})


def chart_colours(kinds: dict[str, str]) -> dict[str, str]:
    """The name of each series, in every language, to its colour."""
    return {say(f"chart_{kind}", locale): colour for kind, colour in kinds.items() for locale in LOCALES}


# Words


def diff_colours() -> dict[str, str]:
    return {say(f"diff_{kind}", locale): colour for kind, colour in DIFF_COLOURS.items() for locale in LOCALES}


def parts(row: CompareRow) -> tuple[DiffPart, ...]:
    """Its words beside what they were held to; held to nothing, its own text, a part per segment."""
    said = ((segment.text.strip(), segment.start_s) for segment in row.segments)
    return row.diff or tuple(DiffPart(text, text, KINDS[0], start_s) for text, start_s in said if text)


def tokens(row: CompareRow, locale: str) -> list[tuple[str, str | None]]:
    """For gr.HighlightedText, one per part, in the same order."""
    return [
        (_part(part) + gap, None if part.kind == KINDS[0] else say(f"diff_{part.kind}", locale))
        for part, gap in zip(parts(row), _gaps(row), strict=True)
    ]


def _gaps(row: CompareRow) -> list[str]:
    """What stands behind each part: a space, or nothing where the language is written without."""
    texts = [_part(part) for part in parts(row)]
    seams = (join_words((a[-1:], b[:1]), row.language) for a, b in pairwise(texts))
    last = "" if row.language in UNSPACED_LANGUAGES else " "
    return [*(" " if " " in seam else "" for seam in seams), *(last for _ in texts[:1])]


def _part(part: DiffPart) -> str:
    if part.kind == "missing":
        return part.was
    return f"{part.was} → {part.text}" if part.kind == "changed" else part.text


def words_label(row: CompareRow, locale: str) -> str:
    info = _held("compare_words_info", row, locale) if row.diff else say("compare_text_info", locale)
    return f"{row.precision} · {info}"


def old_words(result: Result, locale: str) -> str:
    """The words of an older card, as far as it holds them; only to read, for its recording is not at hand."""
    if result.old is None:
        return ""
    named = zip(names(Result(None, result.old), locale), result.old.rows, strict=True)
    return "".join(
        f'<div class="said"><b>{escape(name)}</b> {escape(_old_label(row, locale))}'
        f'<p lang="{escape(row.language)}" dir="auto">{_read(row)}</p></div>'
        for name, row in named
        if parts(row)
    )


def _old_label(row: CompareRow, locale: str) -> str:
    return _held("compare_words_old", row, locale) if row.diff else say("compare_text_old", locale)


def _held(text: str, row: CompareRow, locale: str) -> str:
    """This text about what the row's words were held to."""
    reference = say("compare_your_text", locale) if row.reference == YOUR_TEXT else row.reference
    return say(text, locale, reference=reference)


def _read(row: CompareRow) -> str:
    """What is missing struck out, what is new underlined: the colours are not needed to tell them apart."""
    return "".join(_read_part(part) + gap for part, gap in zip(parts(row), _gaps(row), strict=True)).rstrip()


def _read_part(part: DiffPart) -> str:
    if part.kind == KINDS[0]:
        return escape(part.text)
    sides = (("del", part.was), ("ins", part.text))
    return " → ".join(f"<{tag}>{escape(text)}</{tag}>" for tag, text in sides if text)
