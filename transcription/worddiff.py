"""Two texts of one recording, word by word -> what is equal, missing, added or changed, and when it was said.

In: a reference text and the segments of another one. Out: parts in the order they were said. Words are compared as word
error rates compare them (case, punctuation and spelling made equal) and shown as they were written; languages written
without spaces are compared by character. Times are estimates: a segment's words share its length evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache

from transcription.transcript import Segment, join_words, split_words

KINDS = ("equal", "missing", "added", "changed")
_KIND_OF = {"equal": "equal", "delete": "missing", "insert": "added", "replace": "changed"}


@dataclass(frozen=True, slots=True)
class DiffPart:
    """A run of words that share one fate."""

    text: str
    """As the compared text has it; empty for what is missing."""
    was: str
    """As the reference has it; empty for what was added."""
    kind: str
    """One of KINDS."""
    start_s: float | None
    """Where in the recording it is said, estimated; None where the compared text says nothing at all."""


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    key: str
    """What is compared."""
    start_s: float | None


def word_diff(
    reference: str, segments: Sequence[Segment], language: str, normalise: Callable[[str, str], str]
) -> tuple[DiffPart, ...]:
    """normalise: (text, language) -> text as word error rates compare it. Two empty texts give no parts.

    Joining the parts' `was` gives the reference's words, joining their `text` the segments'.
    """

    @cache
    def key(word: str) -> str:
        return normalise(word, language)

    before = _with_keys(((word, None) for word in split_words(reference, language)), key, language)
    after = _with_keys(_timed(segments, language), key, language)
    matcher = SequenceMatcher(None, [word.key for word in before], [word.key for word in after], autojunk=False)
    return tuple(
        DiffPart(
            text=join_words((word.text for word in after[b1:b2]), language),
            was=join_words((word.text for word in before[a1:a2]), language),
            kind=_KIND_OF[tag],
            start_s=after[min(b1, len(after) - 1)].start_s if after else None,
        )
        for tag, a1, a2, b1, b2 in matcher.get_opcodes()
    )


def _timed(segments: Sequence[Segment], language: str) -> Iterator[tuple[str, float | None]]:
    for segment in segments:
        words = split_words(segment.text, language)
        step_s = (segment.end_s - segment.start_s) / max(len(words), 1)
        for index, word in enumerate(words):
            yield word, round(segment.start_s + index * step_s, 2)


def _with_keys(words: Iterator[tuple[str, float | None]], key: Callable[[str], str], language: str) -> list[_Word]:
    """Words that can be compared; what is nothing to a word error rate (a dash, a comma, 'um') stays with the word
    before it."""
    found: list[_Word] = []
    for text, start_s in words:
        own = key(text)
        if own or not found:
            found.append(_Word(text, own, start_s))
        else:
            last = found[-1]
            found[-1] = _Word(join_words((last.text, text), language), last.key, last.start_s)
    return found
