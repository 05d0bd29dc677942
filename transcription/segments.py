"""Tokens of a window -> segments in seconds of the recording, and the seam between overlapping windows.

In: WindowResults in time order. Out: Segments whose times are monotonic (a segment starts no earlier than the one
before it ended), inside their window, and whose text is not empty.

Windows cut in silence (`vad`) follow each other without overlap and need no seam. Fixed windows overlap, so the words
around a seam are heard twice, and near its edge each window hears some of them cut in half. Seam keeps what both heard:
it finds the longest run of words that both windows agree on and changes over in its middle; where they agree on
nothing, the timestamps decide. (transformers merges token runs in the same spirit: tokenization_whisper.py,
_find_longest_common_sequence.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

from transcription.decode import WindowResult
from transcription.tokenizer import WhisperTokens
from transcription.transcript import Segment, Word, join_words, split_words
from transcription.words import TokenTime, group_words

_SHORTEST_SEGMENT_S = 0.02
"""One timestamp step: no segment is shorter."""

_SLACK_S = 3.0
"""Two estimated word times further apart than this cannot be the same word."""

_SLACK_ONE_S = 1.0
"""The same for a single word, which is more often equal by chance."""


def to_segments(result: WindowResult, tokens: WhisperTokens, language: str) -> list[Segment]:
    """Segments of one window, in time order. Text without a closing timestamp reaches to the end of its window."""
    length_s = result.window.end_s - result.window.start_s
    segments: list[Segment] = []
    n_before = 0  # text tokens
    for start_s, end_s, ids in _timed_tokens(result.tokens, tokens, length_s):
        times, n_before = result.times[n_before : n_before + len(ids)], n_before + len(ids)
        text = tokens.decode(ids).strip()
        if not text:
            continue
        floor_s = segments[-1].end_s - result.window.start_s if segments else 0.0
        start_s = min(max(start_s, floor_s), max(length_s - _SHORTEST_SEGMENT_S, 0.0))
        end_s = min(max(end_s, start_s + _SHORTEST_SEGMENT_S), max(length_s, _SHORTEST_SEGMENT_S))
        segments.append(
            Segment(
                start_s=round(result.window.start_s + start_s, 3),
                end_s=round(result.window.start_s + end_s, 3),
                text=text,
                language=language,
                window_index=result.window.index,
                temperature=result.temperature,
                avg_logprob=result.avg_logprob,
                compression_ratio=result.compression_ratio,
                no_speech_prob=result.no_speech_prob,
            )
        )
        if times:
            segments[-1] = replace(segments[-1], words=_timed_words(segments[-1], result, ids, times, tokens))
    return segments


def _timed_tokens(
    sequence: Sequence[int], tokens: WhisperTokens, length_s: float
) -> Iterable[tuple[float, float, list[int]]]:
    """(start, end, text tokens) in seconds from the window's start, as the timestamps enclose them."""
    start_s, pending = 0.0, list[int]()
    for token in sequence:
        time_s = tokens.timestamp_s(token)
        if time_s is None:
            pending.append(token)
            continue
        if pending:
            yield start_s, time_s, [token for token in pending if token < tokens.eot]
        start_s, pending = time_s, []
    if pending:
        yield start_s, length_s, [token for token in pending if token < tokens.eot]


def _timed_words(
    segment: Segment, result: WindowResult, ids: Sequence[int], times: Sequence[TokenTime], tokens: WhisperTokens
) -> tuple[Word, ...]:
    """The segment's words, in order and inside it."""
    words: list[Word] = []
    floor_s = segment.start_s
    for positions in group_words(ids, tokens.decode, segment.language):
        own = [times[i] for i in positions]
        start_s = min(max(result.window.start_s + own[0].start_s, floor_s), segment.end_s)
        end_s = min(max(result.window.start_s + own[-1].end_s, start_s), segment.end_s)
        probability = sum(time.probability for time in own) / len(own)
        text = tokens.decode([ids[i] for i in positions]).strip()
        words.append(Word(round(start_s, 3), round(end_s, 3), text, round(probability, 4)))
        floor_s = end_s
    return tuple(words)


@dataclass(slots=True)
class Seam:
    """Joins the segments of overlapping windows. Give it window after window; take what can no longer change."""

    language: str
    _held: list[Segment] = field(default_factory=list)
    """The last window's segments that reach into the next window."""

    def join(self, segments: Sequence[Segment], *, start_s: float, next_start_s: float) -> list[Segment]:
        """Add a window that begins at start_s; the next one will begin at next_start_s. Returns finished segments."""
        joined = join_overlap(self._held, list(segments), start_s, self.language)
        first_open = next((i for i, s in enumerate(joined) if s.end_s > next_start_s), len(joined))
        self._held = joined[first_open:]
        return joined[:first_open]

    def flush(self) -> list[Segment]:
        """What is left after the last window."""
        held, self._held = self._held, []
        return held


@dataclass(frozen=True, slots=True)
class _TimedWord:
    """A word at its estimated time: segments have times, words are spread evenly over their segment."""

    text: str
    time_s: float
    segment: int
    position: int
    """Index of the word in its segment."""


def join_overlap(left: list[Segment], right: list[Segment], start_s: float, language: str) -> list[Segment]:
    """Join the tail of one window with the next one, which begins at start_s: no word twice, none lost."""
    if not left or not right:
        return [*left, *right]
    end_s = left[-1].end_s
    left_words = [w for w in _words(left, language) if w.time_s > start_s - _SLACK_S]
    right_words = [w for w in _words(right, language) if w.time_s < end_s + _SLACK_S]
    match = _longest_agreement(left_words, right_words)
    if match is None:
        return _join_by_time(left, right, start_s)
    i, j, n = match
    change = n // 2 if n > 1 else 1
    kept_left = _until(left, left_words[i + change - 1], language)
    kept_right = _after(right, right_words[j + change - 1], language)
    return _monotonic([*kept_left, *kept_right])


def _longest_agreement(left: list[_TimedWord], right: list[_TimedWord]) -> tuple[int, int, int] | None:
    """(left index, right index, words) of the longest run of equal words at about the same time."""
    a, b = [_bare(w.text) for w in left], [_bare(w.text) for w in right]
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    fitting = [
        block
        for block in blocks
        if block.size
        and "".join(a[block.a : block.a + block.size])
        and abs(left[block.a].time_s - right[block.b].time_s) <= (_SLACK_S if block.size > 1 else _SLACK_ONE_S)
    ]
    if not fitting:
        return None
    best = max(fitting, key=lambda block: block.size)
    return best.a, best.b, best.size


def _join_by_time(left: list[Segment], right: list[Segment], start_s: float) -> list[Segment]:
    """Nothing in common: the left window counts until the middle of the overlap, the right one after it."""
    middle_s = (start_s + left[-1].end_s) / 2
    kept_left = [s for s in left if (s.start_s + s.end_s) / 2 <= middle_s or s.start_s < start_s]
    kept_right = [s for s in right if (s.start_s + s.end_s) / 2 > middle_s]
    return _monotonic([*kept_left, *kept_right])


def _words(segments: Sequence[Segment], language: str) -> list[_TimedWord]:
    words: list[_TimedWord] = []
    for index, segment in enumerate(segments):
        texts = split_words(segment.text, language)
        step_s = (segment.end_s - segment.start_s) / max(len(texts), 1)
        for position, text in enumerate(texts):
            words.append(_TimedWord(text, segment.start_s + (position + 0.5) * step_s, index, position))
    return words


def _until(segments: list[Segment], last: _TimedWord, language: str) -> list[Segment]:
    """Segments up to and with that word."""
    segment = segments[last.segment]
    words = split_words(segment.text, language)
    if last.position == len(words) - 1:
        return segments[: last.segment + 1]
    step_s = (segment.end_s - segment.start_s) / len(words)
    kept = join_words(words[: last.position + 1], language)
    end_s = round(segment.start_s + (last.position + 1) * step_s, 3)
    timed = _same_words(segment, words)[: last.position + 1]
    end_s = timed[-1].end_s if timed else end_s
    return [*segments[: last.segment], replace(segment, text=kept, end_s=end_s, words=timed)]


def _after(segments: list[Segment], before: _TimedWord, language: str) -> list[Segment]:
    """Segments behind that word."""
    words = split_words(segments[before.segment].text, language)
    remaining = words[before.position + 1 :]
    if not remaining:
        return segments[before.segment + 1 :]
    segment = segments[before.segment]
    step_s = (segment.end_s - segment.start_s) / len(words)
    start_s = round(segment.end_s - len(remaining) * step_s, 3)
    timed = _same_words(segment, words)[before.position + 1 :]
    start_s = timed[0].start_s if timed else start_s
    kept = replace(segment, text=join_words(remaining, language), start_s=start_s, words=timed)
    return [kept, *segments[before.segment + 1 :]]


def _same_words(segment: Segment, words: Sequence[str]) -> tuple[Word, ...]:
    """The segment's timed words where they are these; none where punctuation is counted otherwise."""
    return segment.words if len(segment.words) == len(words) else ()


def _monotonic(segments: list[Segment]) -> list[Segment]:
    """Push back a start that lies before the end of the segment before it."""
    result: list[Segment] = []
    for segment in segments:
        floor_s = result[-1].end_s if result else 0.0
        start_s = max(segment.start_s, floor_s)
        result.append(replace(segment, start_s=start_s, end_s=max(segment.end_s, start_s + _SHORTEST_SEGMENT_S)))
    return result


def _bare(word: str) -> str:
    """The word as compared: case folded, without punctuation."""
    return "".join(c for c in word.casefold() if not unicodedata.category(c).startswith(("P", "S")))
