"""The numbers of Whisper's input, each derived from the ones above it. Source: openai/whisper, audio.py."""

from __future__ import annotations

from typing import Final

SAMPLE_RATE: Final = 16_000  # samples per second of every waveform
FFT_SAMPLES: Final = 400  # 25 ms, the length of one Fourier window
HOP_SAMPLES: Final = 160  # 10 ms, one frame
FRAMES_PER_S: Final = SAMPLE_RATE // HOP_SAMPLES  # 100

WINDOW_S: Final = 30.0  # what the encoder takes at once
WINDOW_SAMPLES: Final = int(WINDOW_S * SAMPLE_RATE)  # 480 000
WINDOW_FRAMES: Final = WINDOW_SAMPLES // HOP_SAMPLES  # 3 000
