"""Features against transformers' own, and the promises of the module."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from audio.constants import WINDOW_FRAMES, WINDOW_SAMPLES
from audio.features import LogMel, mel_filters

from .conftest import tone

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def waveforms() -> list[np.ndarray]:
    """Loud, quiet, short, empty, full: one batch, so that no window sees another's maximum."""
    noise = np.random.default_rng(0).standard_normal(WINDOW_SAMPLES).astype(np.float32)
    fading = tone(12.0, hz=180.0) * np.linspace(1, 0, 12 * 16_000, dtype=np.float32) ** 3
    return [noise * 0.1, noise[:200_000] * 1e-4, fading, tone(0.05), noise[:1], noise[:0], np.zeros(16_000, np.float32)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_mels", [80, 128])
def test_equal_to_transformers(n_mels: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    expected = extractor(waveforms(), sampling_rate=16_000, return_tensors="pt").input_features
    features = LogMel(n_mels, device)(waveforms())
    assert features.shape == (len(waveforms()), n_mels, WINDOW_FRAMES)
    assert features.dtype == torch.float32
    assert features.device.type == device
    assert torch.allclose(features.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters_equal_transformers(n_mels: int) -> None:
    expected = WhisperFeatureExtractor(feature_size=n_mels).mel_filters.T
    assert np.allclose(mel_filters(n_mels), expected, rtol=0, atol=1e-12)


def test_a_batch_equals_its_windows_one_by_one() -> None:
    log_mel = LogMel(80)
    together = log_mel(waveforms())
    for row, waveform in zip(together, waveforms(), strict=True):
        assert torch.allclose(row, log_mel([waveform])[0], rtol=0, atol=1e-6)


def test_autocast_around_it_changes_nothing() -> None:
    log_mel = LogMel(80)
    plain = log_mel(waveforms()[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(waveforms()[:2]), plain)


@pytest.mark.parametrize("shape", [(WINDOW_SAMPLES + 1,), (2, 100)])
def test_what_is_no_window_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a window is"):
        LogMel(80)([np.zeros(shape, np.float32)])


def test_the_module_loads_neither_transformers_nor_onnxruntime() -> None:
    """Nor by way of one another; torch, a second and a half of processor time, is an empty module here."""
    code = (
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "import audio.features, audio.windows, audio.decode; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert {"audio.features", "audio.windows", "audio.decode"} <= set(loaded)
    assert not {"transformers", "onnxruntime", "silero_vad", "ffmpeg", "imageio_ffmpeg"} & set(loaded)
