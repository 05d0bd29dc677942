"""`app.py calibrate` from recordings to a folder that loads, with a checkpoint of one layer on each side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import app
import cli
from model_loader.calibration import CalibrationReport
from model_loader.loader import load_engine
from tests.saying import make_saying
from tests.short import make_short
from transcription.calibrate import _Listener

N_LAYERS = 6 + 10
"""Attention projections and feed-forward layers of encoder and decoder."""

Calibrate = Callable[..., int]

pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saying")
    return make_short(make_saying("Good morning.", folder / "long", shape="least"), folder / "model")


@pytest.fixture
def recordings(greeting: Path, tmp_path: Path) -> Path:
    """Two of one name, one that is none, and one in which nobody speaks."""
    for name in ("de", "en"):
        (tmp_path / "audio" / name).mkdir(parents=True)
        shutil.copy(greeting, tmp_path / "audio" / name / "talk.wav")
    (tmp_path / "audio" / "broken.mp3").write_bytes(b"no sound")
    return tmp_path / "audio"


@pytest.fixture
def run(saying: Path, recordings: Path, tmp_path: Path) -> Calibrate:
    def call(*options: object) -> int:
        words = ["calibrate", "--model", saying, "--device", "cpu", "--offline", "--audio", recordings, *options]
        return cli.main([str(word) for word in [*words, "--work-dir", tmp_path]], serve=app.serve, examples=Path())

    return call


def test_kept_layers_stay_so_through_saving_and_loading(
    run: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--out", out, "--keep-fp16", 2) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and said.err.count("(kept at 16 bits)") == 2 and "Languages heard: en" in said.err
    assert "broken.mp3 was not heard" in said.err and "budget" not in said.err
    report = CalibrationReport.load(out)
    assert list(report.files) == ["de/talk.wav", "en/talk.wav"]
    assert [layer.kept_16_bit for layer in report.ranked] == [True] * 2 + [False] * (N_LAYERS - 2)
    assert "2 recordings" in (page := (out / "report.html").read_text(encoding="utf-8")) and "broken.mp3" in page
    engine = load_engine(str(out), "int8-static", device="cpu", warm_up=False)
    counted = {(line.module_class, line.dtype): line.n_modules for line in engine.report.census.lines}
    engine.close()
    assert counted["Int8Linear", "int8"] == N_LAYERS - 2
    assert counted["Linear", "float32"] == 2 + 1, "the output head is one"


@pytest.mark.parametrize(
    ("agreements", "n_kept", "sentence"),
    [
        ([0.05, 0.02, 0.004], 2, "is met with 2 of 16 layers at 16 bits"),
        ([0.05] * 9, N_LAYERS, "is not met, with 16 of 16 layers at 16 bits: 5.00% differ"),
    ],
)
def test_a_budget_keeps_layers_until_it_is_met_or_none_is_left(
    run: Calibrate, agreements: list[float], n_kept: int, sentence: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rest = iter(agreements)
    monkeypatch.setattr(_Listener, "agreement", lambda self, heard: next(rest))
    assert run("--out", tmp_path / "out", "--keep-fp16", "auto") == 0
    assert sentence in capsys.readouterr().err
    assert sum(layer.kept_16_bit for layer in CalibrationReport.load(tmp_path / "out").layers) == n_kept
    assert sentence in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keep-fp16", "two"], "give a number of layers, or auto"),
        (["--keep-fp16", "auto", "--wer-budget", "-1"], "from 0 to 100"),
        (["--audio", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    run: Calibrate, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == ""


def test_recordings_that_all_fail_are_one_sentence_with_the_first_reason(
    run: Calibrate, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("de", "en"):
        shutil.rmtree(recordings / name)
    assert run() == 2
    said = capsys.readouterr()
    assert "hold no speech" in said.err and "broken.mp3: " in said.err and said.err.count("\n") == 1
