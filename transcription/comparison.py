"""CompareRow -> a line of a plain-text table. Pure strings; the measuring is in compare.py."""

from __future__ import annotations

from transcription.interface import CompareRow

_COLUMNS = (
    # heading, width, field, form, unit
    ("load", 7, "load_s", "{:.1f} s", 1.0),
    ("first text", 11, "first_text_s", "{:.2f} s", 1.0),
    ("run", 8, "warm_s", "{:.1f} s", 1.0),
    ("real time", 10, "real_time_factor", "{:.1f} x", 1.0),
    ("weights", 10, "weights_bytes", "{:.0f} MiB", 2.0**20),
    ("peak", 10, "peak_bytes", "{:.0f} MiB", 2.0**20),
    ("WER", 8, "wer", "{:.1f} %", 0.01),
)
_NAME_WIDTH = 14
_TEXT_WIDTH = 50

TABLE_HEADER = "precision".ljust(_NAME_WIDTH) + "".join(h.rjust(width) for h, width, *_ in _COLUMNS) + "  text"


def table_line(row: CompareRow) -> str:
    """A measured row, a dash for what was not measured; or the sentence why it failed."""
    if row.failed:
        return f"{row.precision:{_NAME_WIDTH}}{row.error}"
    cells = []
    for _, width, field, form, unit in _COLUMNS:
        value = getattr(row, field)
        cells.append(("-" if value is None else form.format(value / unit)).rjust(width))
    return f"{row.precision:{_NAME_WIDTH}}{''.join(cells)}  {row.text[:_TEXT_WIDTH]}"
