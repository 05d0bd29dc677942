"""CompareRows -> a plain-text table, CSV and Markdown. Pure strings; the measuring is in measure.py.

COLUMNS is the one list of the figures that a comparison shows, FACTS of the words beside them. A figure that was not
measured is a dash, in CSV an empty cell, and where the device cannot measure it "not available": never a zero.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transcription.interface import CompareRow
from transcription.verdict import YOUR_TEXT

MIB = 2.0**20
DASH = "-"
NOT_AVAILABLE = "not available"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a row."""

    key: str
    """A field of CompareRow; the page has its heading under this name."""
    heading: str
    """With the unit that CSV gives the number in."""
    form: str
    """How people read it; for numbers after division by `unit`."""
    unit: float = 1.0
    csv_digits: int = 4
    on_terminal: bool = True
    """In the first table there, and not in the second."""
    lacking: str = DASH
    """Said of a row that was measured, but not in this."""

    def number(self, row: CompareRow) -> float | None:
        """In the unit of the heading; None where it was not measured."""
        value = getattr(row, self.key)
        return None if value is None else float(value) / self.unit

    def shown(self, row: CompareRow) -> str:
        value = self.number(row)
        if value is None:
            return DASH if row.warm_s is None else self.lacking
        return self.form.format(value)


COLUMNS: tuple[Column, ...] = (
    Column("load_s", "load (s)", "{:.2f}"),
    Column("warm_up_s", "warm-up (s)", "{:.2f}", on_terminal=False),
    Column("first_run_s", "first run (s)", "{:.2f}"),
    Column("warm_s", "warm (s)", "{:.2f}"),
    Column("warm_spread_s", "spread (s)", "{:.2f}"),
    Column("first_text_s", "first text (s)", "{:.2f}"),
    Column("real_time_factor", "real time (x)", "{:.1f}"),
    Column("tokens_per_s", "tokens/s", "{:.0f}"),
    Column("weights_bytes", "weights (MiB)", "{:.0f}", MIB),
    Column("before_bytes", "process before load (MiB)", "{:.0f}", MIB, on_terminal=False),
    Column("peak_bytes", "peak, process (MiB)", "{:.0f}", MIB),
    Column("peak_allocated_bytes", "peak, torch (MiB)", "{:.0f}", MIB),
    Column("predicted_peak_bytes", "predicted peak, one window (MiB)", "{:.0f}", MIB, on_terminal=False),
    Column("left_bytes", "left after unload (MiB)", "{:.0f}", MIB, on_terminal=False),
    Column("energy_j", "energy per run (J)", "{:.1f}", lacking=NOT_AVAILABLE),
    Column("utilisation_percent", "GPU use (%)", "{:.0f}", lacking=NOT_AVAILABLE),
    Column("wer", "WER (%)", "{:.1f}", 0.01),
    Column("cer", "CER (%)", "{:.1f}", 0.01),
    Column("language_probability", "language probability (%)", "{:.0f}", 0.01, on_terminal=False),
)

FACTS = ("effective", "engine", "language")
"""Fields of CompareRow, which are their headings too."""

NO_REFERENCE = "No words were compared: give the text that is said, or measure a second precision."


def terminal_table(rows: Sequence[CompareRow], names: Sequence[str]) -> str:
    """Aligned columns; those that no row has a figure for are left out. names: how each row is called."""
    columns = [c for c in COLUMNS if c.on_terminal and any(c.number(row) is not None for row in rows)]
    lines = [["precision", *(column.heading for column in columns)]]
    lines += [[name, *(column.shown(row) for column in columns)] for name, row in zip(names, rows, strict=True)]
    return _aligned(lines, [None, *(reason(row) or None for row in rows)])


def second_table(rows: Sequence[CompareRow], names: Sequence[str]) -> str:
    """What the first one has no room for, of the rows that did not fail; empty where there are none."""
    measured = [(row, name) for row, name in zip(rows, names, strict=True) if not row.failed]
    if not measured:
        return ""
    columns = [c for c in COLUMNS if not c.on_terminal and any(c.number(row) is not None for row, _ in measured)]
    lines = [["precision", *FACTS, *(column.heading for column in columns)]]
    lines += [[name, *_facts(row), *(column.shown(row) for column in columns)] for row, name in measured]
    return _aligned(lines, [None] * len(lines))


def reason(row: CompareRow) -> str:
    """Why it failed, to stand after its name: most sentences begin with that. Empty where it did not fail."""
    return (row.error or "").removeprefix(f"{row.precision} ")


def warned(rows: Sequence[CompareRow], names: Sequence[str]) -> list[str]:
    """What the measured rows warn of, each sentence once; where not all of them say it, with the names that do."""
    said: dict[str, list[str]] = {}
    measured = [(row, name) for row, name in zip(rows, names, strict=True) if not row.failed]
    for row, name in measured:
        for warning in dict.fromkeys(row.warnings):
            said.setdefault(warning, []).append(name)
    return [warning if len(own) == len(measured) else f"{', '.join(own)}: {warning}" for warning, own in said.items()]


def _facts(row: CompareRow, keys: Sequence[str] = FACTS) -> list[str]:
    return [getattr(row, key) or DASH for key in keys]


def _aligned(lines: Sequence[Sequence[str]], instead: Sequence[str | None]) -> str:
    """instead: by line, a sentence in place of its cells."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    drawn = []
    for line, sentence in zip(lines, instead, strict=True):
        name = line[0].ljust(widths[0])
        cells = "".join(f"  {cell.rjust(width)}" for cell, width in zip(line[1:], widths[1:], strict=True))
        drawn.append(f"{name}  {sentence}" if sentence else name + cells)
    return "\n".join(drawn)


def measured_on(rows: Sequence[CompareRow]) -> str:
    """Which model ran on which device, once; empty where nothing ran."""
    return "; ".join(dict.fromkeys(f"{row.model} on {row.device}" for row in rows if row.model and row.device))


def to_csv(rows: Sequence[CompareRow], names: Sequence[str]) -> str:
    """One line per row; numbers with a point, empty where not measured."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    words = ("precision", "effective", "model", "device", "language", "words held to")
    table.writerow([*words, *(column.heading for column in COLUMNS), "engine", "verdict", "warnings", "error", "text"])
    for name, row in zip(names, rows, strict=True):
        about = [name, row.effective or "", row.model, row.device, row.language, row.reference]
        figures = [_csv_number(column, row) for column in COLUMNS]
        said = [row.engine, row.verdict, " ".join(row.warnings), row.error or "", row.text]
        table.writerow([_harmless(cell) for cell in (*about, *figures, *said)])
    return file.getvalue()


def _csv_number(column: Column, row: CompareRow) -> str:
    value = column.number(row)
    if value is None:
        return column.shown(row).removeprefix(DASH)
    return f"{value:.{column.csv_digits}f}".rstrip("0").rstrip(".")


def _harmless(cell: str) -> str:
    """A spreadsheet takes a cell that begins like this for a formula; text of a recording must not become one."""
    return f"'{cell}" if cell[:1] in ("=", "+", "@", "\t", "\r") or (cell[:1] == "-" and not _is_number(cell)) else cell


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def to_markdown(rows: Sequence[CompareRow], names: Sequence[str]) -> str:
    """Model and device, a table, what its word errors mean, a sentence per row, and what the rows warn of."""
    columns = [c for c in COLUMNS if any(c.shown(row) != DASH for row in rows)]
    facts = [key for key in FACTS if any(getattr(row, key) for row in rows)]
    above = measured_on(rows)
    lines = [_cell(above), ""] if above else []
    lines.append(_line(["precision", *facts, *(column.heading for column in columns)]))
    lines.append(_line([*("---" for _ in ("precision", *facts)), *("---:" for _ in columns)]))
    for name, row in zip(names, rows, strict=True):
        lines.append(_line([name, *_facts(row, facts), *(column.shown(row) for column in columns)]))
    said = [f"- **{_cell(name)}**: {_cell(reason(row) or row.verdict)}" for name, row in zip(names, rows, strict=True)]
    lines += ["", *(line for held in held_to(rows, [_cell(name) for name in names]) for line in (held, ""))]
    lines += [line for line in said if not line.endswith(": ")]
    lines += [line for warning in warned(rows, names) for line in ("", _cell(warning))]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def by_reference(rows: Sequence[CompareRow], names: Sequence[str]) -> dict[str, list[str]]:
    """What words were held to -> the names of the rows that were, and have errors or none: of silence there are no
    words to count."""
    held: dict[str, list[str]] = {}
    for row, name in zip(rows, names, strict=True):
        if row.reference and row.wer is not None:
            held.setdefault(row.reference, []).append(name)
    return held


def held_to(rows: Sequence[CompareRow], names: Sequence[str]) -> list[str]:
    """What the word errors are measured against, a sentence each; of several, each names its rows.

    Nothing where no row was measured, where nobody speaks, or where the text that words were held to has none.
    """
    held = by_reference(rows, names)
    if not held and (any(row.reference for row in rows) or not any(row.first_text_s is not None for row in rows)):
        return []
    if len(held) < 2:
        return [_meaning(reference) for reference in held] or [NO_REFERENCE]
    return [f"{', '.join(own)}: {_meaning(reference)}" for reference, own in held.items()]


def _meaning(reference: str) -> str:
    if reference == YOUR_TEXT:
        return "WER and CER are errors against your text: accuracy."
    return f"WER and CER are differences from the text of {reference}: agreement with {reference}, not accuracy."


def row_names(rows: Sequence[CompareRow], mark: Callable[[CompareRow], str] = lambda row: "") -> list[str]:
    """The precision of each row, and a mark where it comes from elsewhere (a run card)."""
    return [f"{row.precision} {mark(row)}".strip() for row in rows]
