"""What a transcription is made of: plain frozen values, no torch, safe to pickle and to turn into JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Written without spaces between words; a character counts as a word (openai/whisper, tokenizer.py)."""

_SPACED = "0-9A-Za-z\u00c0-\u0dff\u1e00-\u1fff\uac00-\ud7a3"
"""Digits, and the letters of scripts that part words by spaces: Latin to Sinhala, Latin's and Greek's further letters,
Hangul. They stay words, with a space between two of them, wherever a language without spaces quotes them."""
_UNIT = re.compile(rf"[{_SPACED}]+|\S")
_LAST = re.compile(rf"[{_SPACED}]")
_FIRST = re.compile(rf"(?:<[^<>]*>)?[{_SPACED}]")  # web subtitles put a word's time in front of it

NO_SPEECH = "No speech was found in this recording."
"""The warning of a recording without any."""


def split_words(text: str, language: str) -> list[str]:
    """Words; where the language is written without spaces, characters, and foreign words and numbers whole."""
    return _UNIT.findall(text) if language in UNSPACED_LANGUAGES else text.split()


def join_words(words: Iterable[str], language: str) -> str:
    """The inverse of split_words; also joins the texts of segments."""
    kept = [word for word in words if word]
    if language not in UNSPACED_LANGUAGES:
        return " ".join(kept)
    gaps = [" " if _LAST.match(a[-1]) and _FIRST.match(b) else "" for a, b in pairwise(kept)]
    return "".join([*kept[:1], *(gap + word for gap, word in zip(gaps, kept[1:], strict=True))])


def is_one_word(before: str, after: str) -> bool:
    """Whether two pieces without a space between them are one word in a language that is written without spaces."""
    return bool(before and _LAST.match(before[-1]) and _LAST.match(after))


@dataclass(frozen=True, slots=True)
class Word:
    """One timed word. Times are seconds from the start of the recording."""

    start_s: float
    end_s: float
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """One timed piece of text inside one window. Times are seconds from the start of the recording."""

    start_s: float
    end_s: float
    text: str
    language: str
    window_index: int
    temperature: float
    avg_logprob: float
    """Mean natural-log probability of the window's text tokens at that temperature."""
    compression_ratio: float
    """Bytes of the window's text over their zlib size; above 2.4 the text repeats itself."""
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class LanguageGuess:
    """One language with its probability (0 to 1)."""

    code: str
    probability: float


@dataclass(frozen=True, slots=True)
class WindowLanguage:
    """The language probabilities of one voiced window, best first."""

    start_s: float
    end_s: float
    guesses: tuple[LanguageGuess, ...]


@dataclass(frozen=True, slots=True)
class LanguageReport:
    """Detected language over several voiced windows. `guesses` is best first and sums to at most 1."""

    guesses: tuple[LanguageGuess, ...]
    windows: tuple[WindowLanguage, ...]

    @property
    def best(self) -> LanguageGuess:
        return self.guesses[0]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running transcription is."""

    done_s: float
    """Seconds of the recording that are finished."""
    total_s: float | None
    """Length of the recording where the container says it, else None."""
    windows_done: int
    elapsed_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole recording's text and how it came to be."""

    segments: tuple[Segment, ...]
    language: str
    language_probability: float | None
    duration_s: float
    """Of the recording; of one that was stopped, to the end of the last finished window."""
    speech_s: float
    """Seconds in which the speech detector heard speech (equals duration_s with fixed windows)."""
    transcribed_s: float
    """Seconds covered by finished windows."""
    elapsed_s: float
    first_text_s: float | None
    """Seconds from the call to the first words: on the fast engine while their window is being written."""
    n_tokens: int
    model: str
    precision: str
    """The precision that really ran."""
    engine: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        return join_words((segment.text.strip() for segment in self.segments), self.language)

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio per second of work (higher is faster)."""
        return self.duration_s / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "text": self.text, "real_time_factor": self.real_time_factor}
