"""Where somebody speaks: a waveform in blocks in, spans of speech out, while the blocks arrive.

In: blocks float32 [n_samples], 16 kHz mono, of any sizes. Out: spans as (first sample, first one after it), in time
order, not overlapping, without padding.

Network: Silero VAD 6, the "sequence" export in the silero-vad wheel: one call takes many 32 ms frames and hands its
LSTM state on, so results do not depend on the block size. On one core it needs 5.2 s per hour of sound (onnxruntime
1.31, 128 frames per call; 32 and 512 need 5.4 and 6.1 s), against 11 to 13 s for the exports with one frame per call.
The wheel's Python package is not imported: it takes 1.7 s to load torch helpers that are not needed here.
Rule from probabilities to spans: Silero's own (get_speech_timestamps), written as a stream.
Sources: github.com/snakers4/silero-vad (utils_vad.py, sequence_vad.py); SYSTRAN/faster-whisper (batched defaults).
Not done here: packing spans into windows (windows.py).
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from audio.constants import SAMPLE_RATE, WINDOW_S
from audio.tape import Samples, Tape
from errors import MachineError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FRAME_SAMPLES: Final = 512  # 32 ms, fixed by the network
CONTEXT_SAMPLES: Final = 64  # the end of the frame before, seen again
STATE_SIZE: Final = 128  # of the LSTM
FRAMES_PER_CALL: Final = 128  # 4 s

SPEECH_THRESHOLD: Final = 0.5  # Silero's default
SILENCE_THRESHOLD: Final = 0.35  # Silero's default: 0.15 below
MIN_SPEECH_MS: Final = 250  # Silero's default; shorter bursts are clicks and knocks
MIN_SILENCE_MS: Final = 160  # faster-whisper, batched; shorter pauses are inside words

# Speech that never pauses is cut into pieces that fit a window with its padding.
MAX_SPAN_S: Final = WINDOW_S - 0.4  # 0.2 s at each end, see windows.py
CUT_SEARCH_S: Final = 5.0  # where the quietest moment is looked for, before the limit
CUT_MS: Final = 100  # the length of that moment

_MIN_SPEECH_SAMPLES: Final = MIN_SPEECH_MS * SAMPLE_RATE // 1000
_MIN_SILENCE_SAMPLES: Final = MIN_SILENCE_MS * SAMPLE_RATE // 1000
_MAX_SPAN_SAMPLES: Final = round(MAX_SPAN_S * SAMPLE_RATE)


class SpeechDetector:
    """The state of one stream. Positions are samples from the start of the recording.

    Speech without a pause comes in pieces of at most MAX_SPAN_S, cut at their quietest 100 ms; a piece starts where the
    one before ended. Silence gives no span.
    """

    def __init__(self) -> None:
        """Raises MachineError if the network is missing."""
        self.tape = Tape()
        """The samples fed; the caller forgets what nobody needs any more, never past open_from_sample."""
        self._session = _load_session()
        self._hidden = np.zeros((1, 1, STATE_SIZE), dtype=np.float32)
        self._cell = np.zeros((1, 1, STATE_SIZE), dtype=np.float32)
        self._context = np.zeros(CONTEXT_SAMPLES, dtype=np.float32)
        self._n_judged = 0  # samples
        self._start: int | None = None  # of the speech going on
        self._silence_start: int | None = None  # of the pause inside it
        self._is_continuation = False

    @property
    def open_from_sample(self) -> int:
        """No span that is still to come starts before this."""
        return self._n_judged if self._start is None else self._start

    def feed(self, block: Samples) -> list[tuple[int, int]]:
        """Take a block; return the spans that have ended, as (start, end)."""
        self.tape.append(block)
        spans: list[tuple[int, int]] = []
        while n_frames := min(FRAMES_PER_CALL, (self.tape.end_sample - self._n_judged) // FRAME_SAMPLES):
            samples = self.tape.read(self._n_judged, self._n_judged + n_frames * FRAME_SAMPLES)
            for probability in self._judge(samples):
                spans += self._step(probability)
        return spans

    def finish(self) -> list[tuple[int, int]]:
        """The recording is over: judge the last, incomplete frame and end the speech that is going on."""
        n_samples = self.tape.end_sample
        spans: list[tuple[int, int]] = []
        if n_samples > self._n_judged:
            rest = np.zeros(FRAME_SAMPLES, dtype=np.float32)
            rest[: n_samples - self._n_judged] = self.tape.read(self._n_judged, n_samples)
            for probability in self._judge(rest):
                spans += self._step(probability)
        if self._start is not None:
            spans += self._close(n_samples if self._silence_start is None else self._silence_start)
        return [(start, min(end, n_samples)) for start, end in spans]

    def _judge(self, samples: Samples) -> list[float]:
        """Probability of speech in each frame; samples: [n_frames * 512]."""
        frames = samples.reshape(-1, FRAME_SAMPLES)
        contexts = np.vstack([self._context[None], frames[:-1, -CONTEXT_SAMPLES:]])
        self._context = frames[-1, -CONTEXT_SAMPLES:].copy()
        probabilities, self._hidden, self._cell = self._session.run(
            ["speech_probs", "hn", "cn"],
            {"input": np.hstack([contexts, frames]), "h": self._hidden, "c": self._cell},
        )
        return [float(probability) for probability in probabilities]

    def _step(self, probability: float) -> list[tuple[int, int]]:
        """One frame on."""
        frame_start = self._n_judged
        self._n_judged += FRAME_SAMPLES
        if self._start is None:
            if probability >= SPEECH_THRESHOLD:
                self._start = frame_start
            return []
        if probability >= SPEECH_THRESHOLD:
            self._silence_start = None
        elif probability < SILENCE_THRESHOLD and self._silence_start is None:
            self._silence_start = frame_start
        if self._silence_start is not None and frame_start - self._silence_start >= _MIN_SILENCE_SAMPLES:
            return self._close(self._silence_start)
        if self._n_judged + FRAME_SAMPLES - self._start > _MAX_SPAN_SAMPLES:
            return self._cut()
        return []

    def _close(self, end: int) -> list[tuple[int, int]]:
        """End the speech at a pause; too short a burst is dropped, unless it is the rest of a longer speech."""
        assert self._start is not None
        start, self._start, self._silence_start = self._start, None, None
        is_speech = end - start >= _MIN_SPEECH_SAMPLES or (self._is_continuation and end > start)
        self._is_continuation = False
        return [(start, end)] if is_speech else []

    def _cut(self) -> list[tuple[int, int]]:
        """Split speech that goes on for too long at its quietest moment near the end."""
        assert self._start is not None
        search_start = self._n_judged - round(CUT_SEARCH_S * SAMPLE_RATE)
        cut = search_start + quietest_sample(self.tape.read(search_start, min(self._n_judged, self.tape.end_sample)))
        start, self._start, self._is_continuation = self._start, cut, True
        if self._silence_start is not None:
            self._silence_start = max(self._silence_start, cut)
        return [(start, cut)]


def quietest_sample(samples: Samples) -> int:
    """Middle of the 100 ms with the least power. samples: [n_samples], longer than that."""
    n_moment = CUT_MS * SAMPLE_RATE // 1000
    sums = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    powers = sums[n_moment:] - sums[:-n_moment]
    return int(np.argmin(powers)) + n_moment // 2


@functools.lru_cache(maxsize=1)
def _load_session() -> InferenceSession:
    """The network, on one thread: more do not help at this size, and take cores from decoding."""
    import onnxruntime

    package = importlib.util.find_spec("silero_vad")
    folder = Path(package.submodule_search_locations[0]) if package and package.submodule_search_locations else None
    path = folder / "data" / "silero_vad_16k_sequence.onnx" if folder else None
    if path is None or not path.exists():
        raise MachineError(
            "The speech detector's network was not found. Install the pinned packages: pip install -r requirements.txt."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; it warns about unused constants in the network
    return onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
