"""Signals and files that the audio tests make themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

from audio.constants import SAMPLE_RATE

PROGRAMS = {"system": shutil.which("ffmpeg"), "wheel": imageio_ffmpeg.get_ffmpeg_exe()}


@pytest.fixture(params=PROGRAMS)
def ffmpeg(request: pytest.FixtureRequest) -> str:
    """Each ffmpeg of this machine: the system's, which may be old, and the wheel's."""
    program = PROGRAMS[request.param]
    if program is None:
        pytest.skip("no system ffmpeg")
    return program


def by_turns(cases: Iterable[Any]) -> list[tuple[Any, ...]]:
    """(ffmpeg, case): every case by the wheel's ffmpeg, and every second by the system's, which is slow to start."""
    return [
        (program, *(case if isinstance(case, tuple) else (case,)))
        for index, case in enumerate(cases)
        for program in PROGRAMS
        if program == "wheel" or index % 2 == 0
    ]


def tone(duration_s: float, hz: float = 440.0, level: float = 0.5, rate: int = SAMPLE_RATE) -> np.ndarray:
    """A sine, float32 [n_samples]."""
    t = np.arange(round(duration_s * rate)) / rate
    return (level * np.sin(2 * np.pi * hz * t)).astype(np.float32)


@pytest.fixture
def write_wav(tmp_path: Path) -> Callable[..., Path]:
    def write(samples: np.ndarray, name: str = "made.wav", rate: int = SAMPLE_RATE, subtype: str = "PCM_16") -> Path:
        soundfile.write(tmp_path / name, samples, rate, subtype=subtype)
        return tmp_path / name

    return write


@pytest.fixture
def make_media(tmp_path: Path) -> Callable[..., Path]:
    """Run the wheel's ffmpeg with the given words; the file's name is the last of them."""

    return partial(run_ffmpeg, tmp_path)


@pytest.fixture(scope="module")
def make_media_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """As make_media; what was asked for before is there already."""
    return cache(partial(run_ffmpeg, tmp_path_factory.mktemp("media")))


def run_ffmpeg(folder: Path, *words: str) -> Path:
    """The wheel's ffmpeg with the given words; the last of them is the name of a file in `folder`."""
    path = folder / words[-1]
    command = [PROGRAMS["wheel"], "-v", "error", "-nostdin", *words[:-1], str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def long_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes; nobody writes to it."""
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, tone(300.0), SAMPLE_RATE)
    return path
