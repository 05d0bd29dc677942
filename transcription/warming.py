"""A second of sound through the whole path, so that the first real recording meets nothing that is still cold.

ffmpeg, speech detector, features, engine, segments: all are used once. Knows no engine: it is given a way to run.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from contextlib import closing

import numpy as np

from audio.constants import SAMPLE_RATE
from audio.decode import decode_blocks
from audio.windows import cut_windows
from transcription.interface import TranscriptionRun
from transcription.options import TranscribeOptions


def warm_path(transcribe: Callable[[bytes, TranscribeOptions], TranscriptionRun]) -> None:
    """Raises what the run raises."""
    sound = second_of_sound()
    with decode_blocks(sound) as reader:
        for _ in cut_windows(reader, "vad"):
            pass
    options = TranscribeOptions(windows="fixed", temperatures=(0.0,), max_new_tokens=8)
    with closing(transcribe(sound, options)) as run:
        for _ in run:
            pass


def second_of_sound() -> bytes:
    """A WAV file with a second of quiet noise."""
    noise = np.random.default_rng(0).normal(0.0, 300.0, SAMPLE_RATE).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(SAMPLE_RATE)
        written.writeframes(noise.tobytes())
    return file.getvalue()
