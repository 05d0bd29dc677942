"""A microphone's growing waveform -> settled and tentative text.

In: blocks float32 [n_samples], 16 kHz mono, as they arrive, and a function that hears one window. Out: LiveText.

The sound since the last pause is decoded again whenever enough new sound has come. Words that two hypotheses in a row
agree on, from the start, are settled and never change ("local agreement": Machacek, Dabre and Bojar, Turning Whisper
into Real-Time Transcription System, 2023); the rest is tentative. A pause ends an utterance: it is decoded once more as
a whole and settled. Speech without a pause is settled segment by segment before the window of 30 s is full. Silence is
never decoded, so nothing can be invented in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from audio.constants import SAMPLE_RATE
from audio.vad import FRAME_SAMPLES, SpeechDetector
from transcription.interface import LiveText
from transcription.transcript import Segment, join_words, split_words

Samples = npt.NDArray[np.float32]

STEP_S = 1.0
"""New sound that is worth another hypothesis; more where the machine needs longer than that for one."""
PAUSE_S = 0.7
"""A pause as long as this ends an utterance."""
FULL_S = 27.0
"""An utterance as long as this is settled up to its last segment; the window holds 30 s."""
PAD_S = 0.3
"""Sound kept before the speech begins, and after it ends."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One hypothesis: segments in seconds of the recording, in time order."""

    segments: tuple[Segment, ...]
    language: str
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return [word for segment in self.segments for word in split_words(segment.text, self.language)]


Hear = Callable[[Samples, float], Heard]
"""(samples float32 [n_samples], at most 30 s; start in seconds) -> hypothesis."""


def listen(blocks: Iterable[Samples], hear: Hear) -> Iterator[LiveText]:
    """Yield the text after every new hypothesis, and once more at the end with everything settled."""
    session = _Session(hear)
    for block in blocks:
        # A block longer than a step (a whole file) is taken in steps, so that a window never overflows.
        n_step = round(STEP_S * SAMPLE_RATE)
        for start in range(0, max(block.size, 1), n_step):
            if session.take(block[start : start + n_step]):
                yield session.text()
    session.finish()
    yield session.text()


@dataclass(slots=True)
class _Session:
    """Positions are samples from the start of the recording."""

    hear: Hear
    _detector: SpeechDetector = field(default_factory=SpeechDetector)
    _settled: list[str] = field(default_factory=list)
    _agreed: list[str] = field(default_factory=list)
    """Words of the current utterance that are settled."""
    _last: list[str] = field(default_factory=list)
    """Words of the current utterance in the newest hypothesis."""
    _start: int = 0
    """Where the current utterance begins."""
    _speech_end: int | None = None
    """Where the newest closed span of the current utterance ended."""
    _heard_until: int = 0
    _lag_s: float = 0.0
    _language: str = ""
    _warnings: tuple[str, ...] = ()

    def take(self, block: Samples) -> bool:
        """Add sound. True if there is a new text."""
        for _, end in self._detector.feed(block):
            self._speech_end = end
        end = self._detector.tape.end_sample
        is_speaking = end - self._detector.open_from_sample >= FRAME_SAMPLES
        if not is_speaking and self._speech_end is None:
            self._begin_at(self._detector.open_from_sample - round(PAD_S * SAMPLE_RATE))
            return False
        if not is_speaking and self._speech_end is not None and end - self._speech_end >= PAUSE_S * SAMPLE_RATE:
            self._end_utterance(min(self._speech_end + round(PAD_S * SAMPLE_RATE), end))
            return True
        if end - self._start >= FULL_S * SAMPLE_RATE:
            self._make_room(end)
            return True
        if end - self._heard_until >= max(STEP_S, self._lag_s) * SAMPLE_RATE:
            self._agree(self._hypothesis(end).words)
            return True
        return False

    def finish(self) -> None:
        """The microphone is off: settle what is there."""
        for _, end in self._detector.finish():
            self._speech_end = end
        if self._speech_end is not None:
            self._end_utterance(self._detector.tape.end_sample)

    def text(self) -> LiveText:
        tentative = self._last[len(self._agreed) :]
        return LiveText(
            settled=join_words([*self._settled, *self._agreed], self._language),
            tentative=join_words(tentative, self._language),
            language=self._language,
            heard_s=self._detector.tape.end_sample / SAMPLE_RATE,
            lag_s=self._lag_s,
            warnings=self._warnings,
        )

    def _hypothesis(self, end: int) -> Heard:
        started_s = time.monotonic()
        heard = self.hear(self._detector.tape.read(self._start, end), self._start / SAMPLE_RATE)
        self._lag_s = time.monotonic() - started_s
        self._heard_until = end
        self._language = heard.language
        self._warnings = tuple(dict.fromkeys([*self._warnings, *heard.warnings]))
        return heard

    def _agree(self, words: list[str]) -> None:
        """Settle the words that this hypothesis and the one before share from the start."""
        n_equal = 0
        for old, new in zip(self._last, words, strict=False):
            if old != new:
                break
            n_equal += 1
        self._agreed += words[len(self._agreed) : n_equal]
        self._last = words

    def _end_utterance(self, end: int) -> None:
        words = self._hypothesis(end).words
        self._settled += self._agreed + words[len(self._agreed) :]
        self._agreed, self._last, self._speech_end = [], [], None
        self._begin_at(end)

    def _make_room(self, end: int) -> None:
        """Settle all segments but the last, which may be cut in the middle; all of them where there is only one."""
        heard = self._hypothesis(end)
        done = heard.segments[:-1] if len(heard.segments) > 1 else heard.segments
        words, n_done = heard.words, len(Heard(done, heard.language).words)
        self._settled += [*self._agreed, *words[len(self._agreed) :]][:n_done]
        self._agreed, self._last = self._agreed[n_done:], words[n_done:]
        self._begin_at(round(heard.segments[-1].start_s * SAMPLE_RATE) if done != heard.segments else end)

    def _begin_at(self, sample: int) -> None:
        self._start = max(self._start, sample)
        self._heard_until = max(self._heard_until, self._start)
        if self._speech_end is not None and self._speech_end <= self._start:
            self._speech_end = None
        self._detector.tape.forget(min(self._start, self._detector.open_from_sample))
