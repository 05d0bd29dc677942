"""Log-mel features on a real GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audio.constants import SAMPLE_RATE
from audio.features import LogMel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_features_are_those_of_a_processor(n_mels: int) -> None:
    """A tone, noise that ends early, silence."""
    time_s = np.arange(30 * SAMPLE_RATE) / SAMPLE_RATE
    noise = np.random.default_rng(0).normal(0.0, 0.1, 7 * SAMPLE_RATE)
    waveforms = [wave.astype(np.float32) for wave in (0.3 * np.sin(2760 * time_s), noise, np.zeros(SAMPLE_RATE))]
    found = LogMel(n_mels, "cuda")(waveforms)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), LogMel(n_mels)(waveforms), rtol=1e-4, atol=1e-4)
