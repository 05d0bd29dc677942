"""Shared fixtures. Nothing here needs a GPU or a network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import soundfile

from tests.short import SHORT_S, make_short

ROOT = Path(__file__).resolve().parent.parent
BROWSER = ROOT / "tests" / "browser"

gc.disable()  # while the tests are imported, which makes half a million objects that stay


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def only_new_objects_are_collected() -> None:
    """Whatever lies in memory before a file's tests: to look through it takes half a second, and engines often ask."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m browser` finds the browser's tests."""
    for item in items:
        if BROWSER in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded demo checkpoint."""
    return ROOT / "models" / "demo"


@pytest.fixture(scope="session")
def short_demo(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint for windows of SHORT_S instead of 30 s."""
    return make_short(demo_folder, tmp_path_factory.mktemp("short") / "demo")


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features as short_demo wants them, for everything that transcribes."""
    monkeypatch.setattr("audio.features.WINDOW_SAMPLES", SHORT_S * 16_000)


@pytest.fixture(scope="session")
def greeting(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The English example's first sentence, "Good morning, and welcome to the library.": a fourth of its tokens."""
    samples, rate = soundfile.read(root / "examples" / "english.flac", dtype="float32")
    path = tmp_path_factory.mktemp("greeting") / "greeting.wav"
    soundfile.write(path, samples[: round(3.2 * rate)], rate)
    return path


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """A folder of real recordings with broken files and container variants; tests that want it skip without it."""
    folder = Path(os.environ.get("SOTTO_TEST_AUDIO", ROOT.parent / "shared" / "audio"))
    if not (folder / "manifest.json").exists():
        pytest.skip(f"no test recordings at {folder}; set SOTTO_TEST_AUDIO to a folder that has them")
    return folder
