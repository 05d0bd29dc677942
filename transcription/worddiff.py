"""Two texts of one recording, word by word -> what is equal, missing, added or changed, and when it was said.

In: a reference text and the segments of another one. Out: parts in the order they were said. Words are compared as word
error rates compare them (case, punctuation and spelling made equal) and shown as they were written; languages written
without spaces are compared by character. What only several words say together is compared too, as where errors are
counted: "do not" equals "don't", "twenty one" equals "21". Times are estimates: a segment's words share its length
evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import groupby

from transcription.transcript import Segment, join_words, split_words

KINDS = ("equal", "missing", "added", "changed")

_REACH = 2
"""Equal words on each side of a difference that are looked at with it: "he has been" and "he's been" differ in words,
and are equal only with the last one."""
_SPAN = 12
"""Words that say one thing together, at most: "one hundred and twenty three thousand four hundred and fifty six"."""
_NEAR = 3
"""Words that are always looked at together where one of them leans."""
_LARGEST = 64
"""Differences of more words are left as they are: it is not the same text, and each costs time squared."""

_Step = tuple[bool, int, int]
"""(are equal, number of words before, number of words after)."""


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

    @property
    def leans(self) -> bool:
        """Its key may be another one beside other words: part of a number, several words in one ("don't", "U-Bahn")."""
        return " " in self.key or any(character.isdigit() for character in self.key)


def word_diff(
    reference: str, segments: Sequence[Segment], language: str, normalise: Callable[[str, str], str]
) -> tuple[DiffPart, ...]:
    """normalise: (text, language) -> text as word error rates compare it. Two empty texts give no parts.

    Joining the parts' `was` gives the reference's words, joining their `text` the segments'. The two sides of an equal
    part may be written differently.
    """

    @cache
    def key(word: str) -> str:
        return normalise(word, language)

    before = _with_keys(((word, None) for word in split_words(reference, language)), key, language)
    after = _with_keys(_timed(segments, language), key, language)

    def said(words: Sequence[_Word]) -> str:
        """The key of several words together."""
        # A number begins or ends with a part of it, but for a word or two ("a hundred dollars"): more would cost time.
        near = words if len(words) <= _NEAR else (words[0], words[-1])
        if any(word.leans for word in near):
            return key(join_words((word.text for word in words), language))
        return " ".join(word.key for word in words if word.key)

    # Said alike as a whole is equal as a whole, also where word by word another pairing is longer.
    whole = [key(join_words((word.text for word in words), language)) for words in (before, after)]
    alike = [(True, len(before), len(after))] if whole[0] == whole[1] and before and after else None
    parts, a1, b1 = list[DiffPart](), 0, 0
    for are_equal, run in groupby(alike or _steps(before, after, said), key=lambda step: step[0]):
        sizes = [(n_before, n_after) for _, n_before, n_after in run]
        a2, b2 = a1 + sum(size[0] for size in sizes), b1 + sum(size[1] for size in sizes)
        parts.append(
            DiffPart(
                text=join_words((word.text for word in after[b1:b2]), language),
                was=join_words((word.text for word in before[a1:a2]), language),
                kind="equal" if are_equal else "missing" if b1 == b2 else "added" if a1 == a2 else "changed",
                start_s=after[min(b1, len(after) - 1)].start_s if after else None,
            )
        )
        a1, b1 = a2, b2
    return tuple(parts)


def _steps(before: Sequence[_Word], after: Sequence[_Word], said: Callable[[Sequence[_Word]], str]) -> Iterator[_Step]:
    """Both texts from their start to their end. Word by word; around each difference again, several words together."""
    matcher = SequenceMatcher(None, [word.key for word in before], [word.key for word in after], autojunk=False)
    a, b = 0, 0
    for group in matcher.get_grouped_opcodes(_REACH):
        a1, a2, b1, b2 = group[0][1], group[-1][2], group[0][3], group[-1][4]
        steps = [(tag == "equal", i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in group]
        if a1 > a:
            yield True, a1 - a, b1 - b
        yield from _together(before[a1:a2], after[b1:b2], said, steps)
        a, b = a2, b2
    if a < len(before):
        yield True, len(before) - a, len(after) - b


def _together(
    before: Sequence[_Word], after: Sequence[_Word], said: Callable[[Sequence[_Word]], str], steps: list[_Step]
) -> list[_Step]:
    """These few words with as few as possible left over, where several may equal several; `steps` if none do."""
    n, m = len(before), len(after)
    if max(n, m) > _LARGEST or not any(word.leans for word in _left_over(before, after, steps)):
        return steps
    sizes = [{said(after[j - size : j]): size for size in range(min(j, _SPAN), 0, -1)} for j in range(m + 1)]
    heard = {text for ending in sizes for text in ending}
    spans = [
        [(size, text) for size in range(1, min(i, _SPAN) + 1) if (text := said(before[i - size : i])) in heard]
        for i in range(n + 1)
    ]
    # The fewest words left over up to each pair of places, and the last step on the way there.
    best: dict[tuple[int, int], tuple[int, _Step]] = {}
    for i in range(n + 1):
        for j in range(m + 1):
            ways = [(size, sizes[j][text]) for size, text in spans[i] if text in sizes[j]]
            found = [(best[i - p, j - q][0], (True, p, q)) for p, q in ways]
            found += [(best[i - 1, j][0] + 1, (False, 1, 0))] if i else []
            found += [(best[i, j - 1][0] + 1, (False, 0, 1))] if j else []
            best[i, j] = min(found, key=lambda way: way[0], default=(0, (True, 0, 0)))
    if best[n, m][0] >= sum(p + q for are_equal, p, q in steps if not are_equal):
        return steps
    path, i, j = list[_Step](), n, m
    while i or j:
        path.append(best[i, j][1])
        i, j = i - path[-1][1], j - path[-1][2]
    return path[::-1]


def _left_over(before: Sequence[_Word], after: Sequence[_Word], steps: Sequence[_Step]) -> Iterator[_Word]:
    """The words of both that are not equal."""
    a, b = 0, 0
    for are_equal, n_before, n_after in steps:
        if not are_equal:
            yield from (*before[a : a + n_before], *after[b : b + n_after])
        a, b = a + n_before, b + n_after


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
