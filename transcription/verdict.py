"""A measured row -> what can be said of it, in a sentence. Nothing is said that was not measured in this comparison.

In: a row, and the row of the same comparison that it is held to. Out: claims (a key and its values, so that the page
can say them in its own language) and an English sentence of them. A figure that is None gives no claim. "Faster" is
said only where the warm runs of both can bear it (compare_times); nothing at all of time and energy where no text came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

from transcription.transcript import UNSPACED_LANGUAGES, split_words

if TYPE_CHECKING:
    from transcription.interface import CompareRow

YOUR_TEXT = "your text"
SAME_SHARE = 0.005
"""Memory that differs by less is called the same."""
SAME_TIME = 0.02
"""Times that differ by less are called the same."""
LEAST_RUNS = 3
"""Warm runs of both that it takes to tell times apart. Of two equally fast precisions all runs of one are shorter than
all of the other in every third comparison with two runs each, in every tenth with three."""
UNLIKE_RATE = 0.9
"""From this word error rate on it is asked whether the text belongs to the recording."""
UNLIKE_WORDS = 5
"""Errors that it takes to ask: one wrong word of one is a rate of 100 %."""

Beside = Literal["few", "same", "near", "less", "more"]

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
    "time_near": "takes as long as {base}: the difference is under {percent} %",
    "time_once": "takes {times}x the time of {base} (one warm run: the spread was not measured)",
    "time_few": "takes {times}x the time of {base} (only {n} warm runs: too few to tell)",
    "energy": "uses {times}x the energy",
    "engines": "(on another engine: {own} against {other})",
    "words_same": "none of {total} words differs from {base}",
    "words_differ": "{n} of {total} words differ from {base}",
    "words_right": "none of {total} words is wrong against your text",
    "words_wrong": "{n} word errors in {total} words of your text",
    "characters_same": "none of {total} characters differs from {base}",
    "characters_differ": "{n} of {total} characters differ from {base}",
    "characters_right": "none of {total} characters is wrong against your text",
    "characters_wrong": "{n} character errors in {total} characters of your text",
    "words_unlike": "(hardly a word matches: is this the text of this recording?)",
}
ASIDES = frozenset({"engines", "words_unlike"})
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
            *([_time(row, base), _energy(row, base)] if row.text.strip() and base.text.strip() else []),
            _engines(row, base),
        ]
    found += [_words(row), _unlike(row)]
    return tuple(claim for claim in found if claim is not None)


def sentence(said: Sequence[Claim]) -> str:
    """One English sentence, empty where nothing can be said."""
    text = joined(said, [ENGLISH[claim.key].format(**dict(claim.values)) for claim in said], "; ")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def joined(said: Sequence[Claim], texts: Sequence[str], gap: str) -> str:
    """The text of each claim, one after the other. gap: between two of them, except before an aside."""
    parts = [(" " if claim.key in ASIDES else gap) + text for claim, text in zip(said, texts, strict=True)]
    return "".join(parts).removeprefix(gap)


def compare_times(own: Sequence[float], base: Sequence[float]) -> Beside:
    """What the warm runs of two can bear to be said. few: less than LEAST_RUNS of one. same: it cannot be told. near:
    told apart, but by less than SAME_TIME. less, more: every run of one is shorter than every one of the other, and the
    medians are further apart than the runs of either are among themselves."""
    if min(len(own), len(base)) < LEAST_RUNS:
        return "few"
    difference = abs(median(own) - median(base))
    is_apart = max(own) < min(base) or max(base) < min(own)
    if not is_apart or difference <= max(max(runs) - min(runs) for runs in (own, base)):
        return "same"
    if difference < SAME_TIME * median(base):
        return "near"
    return "less" if median(own) < median(base) else "more"


def times(own: float, base: float) -> str:
    """How many times as much, in digits: '0.94', '2.31', '12'."""
    ratio = own / base
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


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
    ratio, name = times(row.warm_s, base.warm_s), base.precision
    beside = compare_times(row.warm_runs_s, base.warm_runs_s)
    if beside == "few":
        n = min(len(row.warm_runs_s), len(base.warm_runs_s))
        return _claim("time_few", times=ratio, base=name, n=n) if n > 1 else _claim("time_once", times=ratio, base=name)
    if beside == "same":
        return _claim("time_same", base=name)
    if beside == "near":
        return _claim("time_near", base=name, percent=f"{100 * SAME_TIME:.0f}")
    return _claim(f"time_{beside}", times=ratio, base=name)


def _energy(row: CompareRow, base: CompareRow) -> Claim | None:
    if row.energy_j is None or not base.energy_j:
        return None
    return _claim("energy", times=times(row.energy_j, base.energy_j))


def _engines(row: CompareRow, base: CompareRow) -> Claim | None:
    """Two engines differ by more than the precision: whoever compares them is told."""
    if not row.engine or not base.engine or row.engine == base.engine:
        return None
    return _claim("engines", own=row.engine, other=base.engine)


def _words(row: CompareRow) -> Claim | None:
    """In a language written without spaces characters are counted, not words."""
    n, total = row.n_word_errors, row.n_reference_words
    if n is None or total is None or not row.reference:
        return None
    counted = "characters" if row.language in UNSPACED_LANGUAGES else "words"
    if row.reference == YOUR_TEXT:
        return _claim(f"{counted}_wrong", n=n, total=total) if n else _claim(f"{counted}_right", total=total)
    key = f"{counted}_differ" if n else f"{counted}_same"
    return _claim(key, n=n, total=total, base=row.reference) if n else _claim(key, total=total, base=row.reference)


def _unlike(row: CompareRow) -> Claim | None:
    """A text in another language or of another recording counts as 100 % errors, which is no accuracy. What was added
    is an error too, so that part of the right text reaches the rate as well: most of its words are found, though."""
    n, total = row.n_word_errors, row.n_reference_words
    if row.reference != YOUR_TEXT or not n or not total or not row.text.strip():
        return None
    if n < UNLIKE_WORDS or n < UNLIKE_RATE * total:
        return None
    n_words = sum(len(split_words(part.was, row.language)) for part in row.diff)
    n_found = sum(len(split_words(part.was, row.language)) for part in row.diff if part.kind == "equal")
    return None if n_found > n_words / 2 else _claim("words_unlike")
