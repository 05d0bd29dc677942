"""A measured row -> what can be said of it, in a sentence. Nothing is said that was not measured in this comparison.

In: a row, and the row of the same comparison that it is held to. Out: claims (a key and its values, so that the page
can say them in its own language) and an English sentence of them. A figure that is None gives no claim. "Faster" is
said only where several warm runs of both were measured and every one of them was shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transcription.interface import CompareRow

YOUR_TEXT = "your text"
SAME_SHARE = 0.005
"""Memory that differs by less is called the same."""

ENGLISH: dict[str, str] = {
    "base": "the others are held to this one",
    "weights_less": "its weights take {percent} % less memory than those of {base}",
    "weights_more": "its weights take {percent} % more memory than those of {base}",
    "weights_same": "its weights take as much memory as those of {base}",
    "peak_less": "its peak is {percent} % lower",
    "peak_more": "its peak is {percent} % higher",
    "peak_same": "its peak is the same",
    "time_more": "takes {times}x the time of {base}",
    "time_less": "takes {times}x the time of {base}: faster here",
    "time_same": "its time cannot be told from that of {base}: the difference lies within the spread of the runs",
    "time_once": "takes {times}x the time of {base} (one warm run: the spread was not measured)",
    "energy": "uses {times}x the energy",
    "engines": "(on another engine: {own} against {other})",
    "words_same": "none of {total} words differs from {base}",
    "words_differ": "{n} of {total} words differ from {base}",
    "words_right": "none of {total} words is wrong against your text",
    "words_wrong": "{n} word errors in {total} words of your text",
}
ASIDES = frozenset({"engines"})
"""Claims that belong to the one before them."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that can be said."""

    key: str
    """Of ENGLISH."""
    values: tuple[tuple[str, str], ...] = ()


def claims(row: CompareRow, base: CompareRow | None) -> tuple[Claim, ...]:
    """base: the row of the same comparison that this one is held to; None where there is none (yet)."""
    if row.failed:
        return ()
    found: list[Claim | None] = []
    if base is not None and base.precision == row.precision:
        found.append(_claim("base"))
    elif base is not None and not base.failed:
        found += [
            _memory("weights", row.weights_bytes, base.weights_bytes, base.precision),
            _peak(row, base),
            _time(row, base),
            _energy(row, base),
            _engines(row, base),
        ]
    found.append(_words(row))
    return tuple(claim for claim in found if claim is not None)


def sentence(said: Sequence[Claim]) -> str:
    """One English sentence, empty where nothing can be said."""
    text = joined(said, [ENGLISH[claim.key].format(**dict(claim.values)) for claim in said], "; ")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def joined(said: Sequence[Claim], texts: Sequence[str], gap: str) -> str:
    """The text of each claim, one after the other. gap: between two of them, except before an aside."""
    parts = [(" " if claim.key in ASIDES else gap) + text for claim, text in zip(said, texts, strict=True)]
    return "".join(parts).removeprefix(gap)


def _claim(key: str, **values: object) -> Claim:
    return Claim(key, tuple((name, str(value)) for name, value in values.items()))


def _memory(what: str, own: int | None, base: int | None, name: str) -> Claim | None:
    if own is None or not base:
        return None
    share = own / base - 1
    if abs(share) < SAME_SHARE:
        return _claim(f"{what}_same", base=name)
    return _claim(f"{what}_{'less' if share < 0 else 'more'}", percent=f"{100 * abs(share):.0f}", base=name)


def _peak(row: CompareRow, base: CompareRow) -> Claim | None:
    """Of torch's allocator where both have it (a GPU), else of the process."""
    allocated = _memory("peak", row.peak_allocated_bytes, base.peak_allocated_bytes, base.precision)
    return allocated or _memory("peak", row.peak_bytes, base.peak_bytes, base.precision)


def _time(row: CompareRow, base: CompareRow) -> Claim | None:
    if row.warm_s is None or not base.warm_s:
        return None
    times = f"{row.warm_s / base.warm_s:.2g}" if row.warm_s < 10 * base.warm_s else f"{row.warm_s / base.warm_s:.0f}"
    own, other = row.warm_runs_s, base.warm_runs_s
    if len(own) < 2 or len(other) < 2:
        return _claim("time_once", times=times, base=base.precision)
    if max(own) >= min(other) and max(other) >= min(own):
        return _claim("time_same", base=base.precision)
    return _claim("time_less" if row.warm_s < base.warm_s else "time_more", times=times, base=base.precision)


def _energy(row: CompareRow, base: CompareRow) -> Claim | None:
    if row.energy_j is None or not base.energy_j:
        return None
    return _claim("energy", times=f"{row.energy_j / base.energy_j:.2g}")


def _engines(row: CompareRow, base: CompareRow) -> Claim | None:
    """Two engines differ by more than the precision: whoever compares them is told."""
    if not row.engine or not base.engine or row.engine == base.engine:
        return None
    return _claim("engines", own=row.engine, other=base.engine)


def _words(row: CompareRow) -> Claim | None:
    n, total = row.n_word_errors, row.n_reference_words
    if n is None or total is None or not row.reference:
        return None
    if row.reference == YOUR_TEXT:
        return _claim("words_wrong", n=n, total=total) if n else _claim("words_right", total=total)
    key = "words_differ" if n else "words_same"
    return _claim(key, n=n, total=total, base=row.reference) if n else _claim(key, total=total, base=row.reference)
