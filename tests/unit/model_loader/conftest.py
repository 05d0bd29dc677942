"""Checkpoints and engines that the loader's tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch

from audio.features import LogMel
from benchmarks.shapes import make_checkpoint
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import Encoded, ReferenceEngine
from model_loader.loader import load_engine
from tests.calibrated import calibrate_demo
from tests.short import SHORT_S

EOT, SOT, ENGLISH, GERMAN, TRANSCRIBE, NO_TIMESTAMPS = 4396, 4397, 4398, 4400, 4498, 4502
"""Ids of the demo checkpoint."""

LANGUAGES = {"english": ENGLISH, "german": GERMAN, "spanish": 4401, "french": 4404, "russian": 4402, "chinese": 4399}
"""Recordings and the ids of their languages: all that the demo checkpoint knows."""

N_WEIGHTS = 11_244_032 - 50 * (30 - SHORT_S) * 256
"""Of short_demo: the demo checkpoint's, less the positions that it lacks."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's cache is found, and nothing that this machine's user has calibrated."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("model_loader.loader.CALIBRATIONS", tmp_path / "calibrations")


@pytest.fixture(scope="session")
def cpu() -> DeviceInfo:
    return describe_device("cpu")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that loads in milliseconds."""
    return make_checkpoint("toy", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def least_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of fewer layers, with heads as the fast engine wants them."""
    return make_checkpoint("least", tmp_path_factory.mktemp("least"))


@pytest.fixture(scope="session")
def demo_engine(short_demo: Path) -> Iterator[ReferenceEngine]:
    """The demo checkpoint at fp32; tests that close an engine load their own."""
    engine = load_engine(str(short_demo), "fp32", device="cpu", warm_up=False)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def six_features(root: Path) -> torch.Tensor:
    """The first sentence of each language's recording, in the order of LANGUAGES: float32 [6, 80, 800]."""
    entries = json.loads((root / "examples" / "manifest.json").read_text(encoding="utf-8"))
    ends = {entry["file"]: entry["sentences"][0]["end_s"] + 0.2 for entry in entries}
    read = [
        soundfile.read(root / "examples" / name, dtype="float32", frames=round(ends[name] * 16_000))[0]
        for name in (f"{language}.flac" for language in LANGUAGES)
    ]
    return LogMel(80)(read)[:, :, : 100 * SHORT_S].contiguous()


@pytest.fixture(scope="session")
def speech_features(six_features: torch.Tensor) -> torch.Tensor:
    """Two of them, English and German: float32 [2, 80, 800]."""
    return six_features[:2]


@pytest.fixture(scope="session")
def encoded(demo_engine: ReferenceEngine, speech_features: torch.Tensor) -> Encoded:
    """Both recordings through the demo engine's encoder."""
    return demo_engine.encode(speech_features)


@pytest.fixture(scope="session")
def reference(demo_engine: ReferenceEngine, speech_features: torch.Tensor) -> object:
    """What parity.check_parity holds a row to."""
    from tests.unit.model_loader.parity import make_reference  # which takes this file's constants

    return make_reference(demo_engine, speech_features)


@pytest.fixture
def gpu_of() -> object:
    """A card that is not there: gpu_of(7, 5)."""

    def make(major: int, minor: int, name: str = "NVIDIA Test") -> DeviceInfo:
        return DeviceInfo("cuda", 0, name, (major, minor), 16 * 2**30, 8)

    return make


@pytest.fixture(scope="session")
def calibrations(short_demo: Path, speech_features: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of calibrations that holds one of the demo checkpoint, measured on the two recordings."""
    home = tmp_path_factory.mktemp("calibrations")
    return calibrate_demo(home, speech_features, device="cpu", model=str(short_demo))
