"""Shared fixtures. Nothing here needs a GPU or a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
BROWSER = ROOT / "tests" / "browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, a file's tests run on one of them and share its fixtures; the browser's share one app."""
    for item in items:
        is_browser = BROWSER in item.path.parents
        if is_browser:
            item.add_marker(pytest.mark.browser)
        item.add_marker(pytest.mark.xdist_group("browser" if is_browser else str(item.path.relative_to(ROOT))))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded demo checkpoint."""
    return ROOT / "models" / "demo"


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
