"""Shared fixtures. Nothing here needs a GPU or a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded demo checkpoint."""
    return ROOT / "models" / "demo"


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """A folder of real recordings with broken files and container variants; tests that want it skip without it."""
    folder = Path(os.environ.get("SOTTO_TEST_AUDIO", ROOT.parent / "shared" / "audio"))
    if not (folder / "manifest.json").exists():
        pytest.skip(f"no test recordings at {folder}; set SOTTO_TEST_AUDIO to a folder that has them")
    return folder
