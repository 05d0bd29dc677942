"""Checkpoints and engines that the loader's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from audio.decode import decode_all
from audio.features import LogMel
from benchmarks.shapes import make_checkpoint
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import Encoded, ReferenceEngine
from model_loader.loader import load_engine
from tests.calibrated import calibrate_demo

EOT, SOT, ENGLISH, GERMAN, TRANSCRIBE, NO_TIMESTAMPS = 4396, 4397, 4398, 4400, 4498, 4502
"""Ids of the demo checkpoint."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's cache is found."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def cpu() -> DeviceInfo:
    return describe_device("cpu")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that loads in milliseconds."""
    return make_checkpoint("toy", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[ReferenceEngine]:
    """The demo checkpoint at fp32; tests that close an engine load their own."""
    engine = load_engine("demo", "fp32", device="cpu", warm_up=False)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def speech_features(root: Path) -> torch.Tensor:
    """Two example recordings, English and German: float32 [2, 80, 3000]."""
    waveforms = [decode_all(root / "examples" / name)[: 30 * 16000] for name in ("english.flac", "german.flac")]
    return LogMel(80)(waveforms)


@pytest.fixture(scope="session")
def encoded(demo_engine: ReferenceEngine, speech_features: torch.Tensor) -> Encoded:
    """Both recordings through the demo engine's encoder."""
    return demo_engine.encode(speech_features)


@pytest.fixture
def gpu_of() -> object:
    """A card that is not there: gpu_of(7, 5)."""

    def make(major: int, minor: int, name: str = "NVIDIA Test") -> DeviceInfo:
        return DeviceInfo("cuda", 0, name, (major, minor), 16 * 2**30, 8)

    return make


@pytest.fixture(scope="session")
def calibrations(speech_features: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of calibrations that holds one of the demo checkpoint, measured on the two recordings."""
    home = tmp_path_factory.mktemp("calibrations")
    return calibrate_demo(home, speech_features, device="cpu")


@pytest.fixture(autouse=True)
def known_calibrations(calibrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8-static finds that one, whatever this machine's user has calibrated."""
    monkeypatch.setattr("model_loader.loader.CALIBRATIONS", calibrations)
