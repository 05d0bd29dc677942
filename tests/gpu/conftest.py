"""What the GPU tests share. They need no ffmpeg, no network and no download."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from audio.features import LogMel
from benchmarks.shapes import make_checkpoint
from model_loader.device import DeviceInfo, describe_device
from tests.calibrated import calibrate_demo


@pytest.fixture(scope="session")
def gpu() -> DeviceInfo:
    return describe_device("cuda")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of base size with random weights: 145 MB, so that its bytes stand out from the noise."""
    return make_checkpoint("base", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def features() -> torch.Tensor:
    """A wavering, pulsing tone: float32 [1, 80, 3000]."""
    time_s = torch.arange(480_000) / 16_000
    pitch = torch.sin(2 * math.pi * (150 + 80 * torch.sin(2 * math.pi * 3 * time_s)) * time_s)
    waveform = 0.3 * pitch * (0.5 + 0.5 * torch.sin(2 * math.pi * 2 * time_s))
    return LogMel(80)([waveform.numpy()])


@pytest.fixture(scope="session")
def calibrations(features: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of calibrations that holds one of the demo checkpoint."""
    return calibrate_demo(tmp_path_factory.mktemp("calibrations"), features, device="cuda")


@pytest.fixture(autouse=True)
def known_calibrations(calibrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8-static finds that one."""
    monkeypatch.setattr("model_loader.loader.CALIBRATIONS", calibrations)
