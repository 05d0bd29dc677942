"""Recording into windows of at most 30 s, the encoder's input, while the recording is being read.

In: blocks float32 [n_samples], 16 kHz mono. Out: windows in time order. A window is one contiguous stretch of the
recording, silence inside it included, so a time in the window plus its start is a time in the recording.

vad: spans of speech are packed together while they fit; a window is cut in silence, never in a word, except that speech
without a pause is split at its quietest 100 ms (vad.py). Every sample that the detector calls speech is in exactly one
window. PAD_S of the surroundings is added where the pause allows; neighbours share a short pause half and half.
fixed: 30 s every 25 s; the reader merges the overlap on time stamps. For sound that the detector misjudges (singing).
Memory: about one window and one block.
Not done here: features (features.py), merging of overlaps (transcription).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from audio.constants import SAMPLE_RATE, WINDOW_SAMPLES
from audio.tape import Samples, Tape
from audio.vad import FRAME_SAMPLES, SpeechDetector

Mode = Literal["vad", "fixed"]

PAD_S: Final = 0.2  # before and after: onsets and endings that the detector misses; MAX_SPAN_S leaves room for it
# A longer pause starts a new window. Two sentences in one window, demo checkpoint, 12 pairs: word errors 5 to 7 % with
# 0.3 to 6 s of silence between them, 52 % from 9 s on, because the model ends the text at the pause. Shorter limits
# would only cost encoder passes, each of which computes 30 s.
MAX_GAP_S: Final = 3.0
OVERLAP_S: Final = 5.0  # of fixed windows: longer than almost any word or breath group cut by the border

_PAD_SAMPLES: Final = round(PAD_S * SAMPLE_RATE)
_MAX_GAP_SAMPLES: Final = round(MAX_GAP_S * SAMPLE_RATE)
_OVERLAP_SAMPLES: Final = round(OVERLAP_S * SAMPLE_RATE)
_STEP_SAMPLES: Final = WINDOW_SAMPLES - _OVERLAP_SAMPLES


@dataclass(frozen=True, slots=True)
class Window:
    """A contiguous stretch of the recording. samples: float32 [n_samples], n_samples <= 480000."""

    index: int
    start_s: float
    samples: Samples
    speech_s: float
    """Speech in it by the detector; in fixed mode, which has none, the seconds that no earlier window holds."""

    @property
    def end_s(self) -> float:
        """Where it ends in the recording."""
        return self.start_s + self.samples.size / SAMPLE_RATE


def cut_windows(blocks: Iterable[Samples], mode: Mode = "vad") -> Iterator[Window]:
    """Yield windows as soon as they are known.

    blocks: float32 [n_samples] of any sizes, 16 kHz mono; they may come from a microphone.
    mode: vad or fixed, see above. Without speech, vad yields nothing. Raises ValueError for another mode.
    """
    if mode == "vad":
        return _cut_in_silence(blocks)
    if mode == "fixed":
        return _cut_fixed(blocks)
    raise ValueError(f"windows are cut by 'vad' or 'fixed', not '{mode}'")


def _cut_fixed(blocks: Iterable[Samples]) -> Iterator[Window]:
    """30 s every 25 s. A rest of at most OVERLAP_S is inside the window before and makes none of its own."""
    tape = Tape()
    index = 0
    for block in blocks:
        tape.append(block)
        while tape.end_sample - index * _STEP_SAMPLES >= WINDOW_SAMPLES:
            yield _fixed_window(tape, index, WINDOW_SAMPLES)
            index += 1
            tape.forget(index * _STEP_SAMPLES)
    n_rest = tape.end_sample - index * _STEP_SAMPLES
    if n_rest > (_OVERLAP_SAMPLES if index else 0):
        yield _fixed_window(tape, index, n_rest)


def _fixed_window(tape: Tape, index: int, n_samples: int) -> Window:
    start = index * _STEP_SAMPLES
    n_new = n_samples - (_OVERLAP_SAMPLES if index else 0)
    return Window(index, start / SAMPLE_RATE, tape.read(start, start + n_samples), n_new / SAMPLE_RATE)


def _cut_in_silence(blocks: Iterable[Samples]) -> Iterator[Window]:
    detector = SpeechDetector()
    packer = Packer()
    n_windows = 0
    for block in blocks:
        stretches = [done for span in detector.feed(block) for done in packer.add(*span)]
        stretches += packer.quiet_until(detector.open_from_sample)
        for stretch in stretches:
            yield _window(detector.tape, n_windows, stretch)
            n_windows += 1
        detector.tape.forget(packer.needed_from(detector.open_from_sample))
    stretches = [done for span in detector.finish() for done in packer.add(*span)]
    for stretch in [*stretches, *packer.finish(detector.tape.end_sample)]:
        yield _window(detector.tape, n_windows, stretch)
        n_windows += 1


@dataclass(slots=True)
class Stretch:
    """A window in the making, in samples: start and end of its speech, padding before and after."""

    start: int
    end: int
    pad_before: int
    n_speech: int
    pad_after: int = 0


def _window(tape: Tape, index: int, stretch: Stretch) -> Window:
    start = stretch.start - stretch.pad_before
    samples = tape.read(start, stretch.end + stretch.pad_after)
    return Window(index, start / SAMPLE_RATE, samples, stretch.n_speech / SAMPLE_RATE)


class Packer:
    """Packs spans into stretches of at most 30 s with padding; knows positions, no samples."""

    def __init__(self) -> None:
        self._open: Stretch | None = None
        self._last_end: int | None = None  # of the last span seen

    def add(self, start: int, end: int) -> list[Stretch]:
        """A span of at most MAX_SPAN_S, in time order. Returns the stretch that it completes, if it does."""
        done: list[Stretch] = []
        stretch = self._open
        if stretch is not None and self._fits(stretch, start, end):
            stretch.end = end
            stretch.n_speech += end - start
        else:
            if stretch is not None:
                stretch.pad_after = min(_PAD_SAMPLES, (start - stretch.end) // 2)
                done.append(stretch)
            room = start if self._last_end is None else (start - self._last_end) // 2
            self._open = Stretch(start, end, min(_PAD_SAMPLES, room), end - start)
        self._last_end = end
        return done

    def quiet_until(self, sample: int) -> list[Stretch]:
        """No span to come starts before sample. Returns the open stretch if nothing can be added to it any more."""
        stretch = self._open
        if stretch is None or sample - stretch.end < 2 * _PAD_SAMPLES:
            return []
        if self._fits(stretch, sample, sample + FRAME_SAMPLES):
            return []
        stretch.pad_after = _PAD_SAMPLES
        self._open = None
        return [stretch]

    def finish(self, n_samples: int) -> list[Stretch]:
        """The recording has n_samples. Returns the open stretch, if any."""
        stretch, self._open = self._open, None
        if stretch is None:
            return []
        stretch.pad_after = min(_PAD_SAMPLES, n_samples - stretch.end)
        return [stretch]

    def needed_from(self, open_from_sample: int) -> int:
        """Samples before this can be forgotten."""
        if self._open is not None:
            return self._open.start - self._open.pad_before
        return open_from_sample - _PAD_SAMPLES

    def _fits(self, stretch: Stretch, start: int, end: int) -> bool:
        n_samples = stretch.pad_before + (end - stretch.start) + _PAD_SAMPLES
        return n_samples <= WINDOW_SAMPLES and start - stretch.end <= _MAX_GAP_SAMPLES
