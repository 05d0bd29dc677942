"""`app.py calibrate` from recordings to a folder that loads, with a checkpoint of one layer on each side."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import app
import cli
from calibrating import how_to_load
from errors import CancelledError, DiskFullError, OptionError
from model_loader.calibration import MANIFEST, STAGING, CalibrationReport, save_calibrated
from model_loader.loader import load_engine
from model_loader.transfer import sha256_of
from tests.saying import make_saying
from tests.short import make_short
from transcription import measure, pipeline
from transcription.calibrate import CalibrationProgress, _Listener, calibrate, recordings_in
from transcription.calibrated import check_target

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
    """Two of speech, one with an ending that tells nothing, and two files that are none."""
    folder = tmp_path / "audio"
    for name in ("de/talk.avi", "en/talk.wav"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(greeting, folder / name)
    (folder / "broken.mp3").write_bytes(b"no sound")
    (folder / "cover").write_bytes(b"\x89PNG\0")
    return folder


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
    assert "broken.mp3 was not heard" in said.err and "cover was not heard" in said.err and "budget" not in said.err
    assert said.err.endswith(f"\nLoad it with: ./start.sh transcribe FILE --model {out} --precision int8-static\n")
    report = CalibrationReport.load(out)
    assert list(report.files) == ["de/talk.avi", "en/talk.wav"]
    assert [layer.kept_16_bit for layer in report.ranked] == [True] * 2 + [False] * (N_LAYERS - 2)
    assert "2 recordings" in (page := (out / "report.html").read_text(encoding="utf-8")) and "broken.mp3" in page
    engine = load_engine(str(out), "int8-static", device="cpu", warm_up=False)
    counted = {(line.module_class, line.dtype): line.n_modules for line in engine.report.census.lines}
    engine.close()
    assert counted["Int8Linear", "int8"] == N_LAYERS - 2
    assert counted["Linear", "float32"] == 2 + 1, "the output head is one"


@pytest.mark.parametrize(
    ("agreements", "n_kept"), [([0.05, 0.02, 0.004], 2), ([0.05] * 5 + [0.004], N_LAYERS - 1)], ids=["some", "most"]
)
def test_a_budget_keeps_layers_until_it_is_met_and_what_it_saves_loads(
    run: Calibrate, agreements: list[float], n_kept: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rest, out = iter(agreements), tmp_path / "out"
    monkeypatch.setattr(_Listener, "agreement", lambda self, heard: next(rest))
    assert run("--out", out, "--keep-fp16", "auto") == 0
    sentence = f"is met with {n_kept} of 16 layers at 16 bits"
    assert sentence in capsys.readouterr().err and sentence in (out / "report.html").read_text(encoding="utf-8")
    assert sum(layer.kept_16_bit for layer in CalibrationReport.load(out).layers) == n_kept
    engine = load_engine(str(out), "int8-static", device="cpu", warm_up=False)
    assert sum(line.n_modules for line in engine.report.census.lines if line.dtype == "int8") == N_LAYERS - n_kept
    engine.close()


def test_a_budget_that_no_layers_meet_saves_nothing(
    run: Calibrate, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.rmtree(recordings / "en")
    monkeypatch.setattr(_Listener, "agreement", lambda self, heard: 0.05)
    assert run("--out", tmp_path / "out", "--keep-fp16", "auto") == 2
    said = capsys.readouterr()
    assert "is not met, with 15 of 16 layers at 16 bits: 5.00% differ" in said.err and "Nothing was saved" in said.err
    assert said.out == "" and said.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("n_kept", [N_LAYERS, 9999])
def test_a_layer_at_least_becomes_8_bit(
    run: Calibrate, n_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_Listener, "listen", lambda self, recordings: pytest.fail("it was listened to first"))
    assert run("--out", tmp_path / "out", "--keep-fp16", n_kept) == 2
    said = capsys.readouterr()
    assert "Give a number from 0 to 15" in said.err and said.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_first", [True, False], ids=["new", "over an older one"])
@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device (os error 28)"),
                                   OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)  # fmt: skip
def test_what_ends_the_saving_leaves_the_folder_as_it_was(
    saying: Path, error: BaseException, is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of them")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    out, report = tmp_path / "new" / "out", CalibrationReport("", None, {}, {}, (), (), {})
    if not is_first:
        out.mkdir(parents=True)
        for name in (MANIFEST, "model.safetensors", "config.json", "notes.txt"):
            (out / name).write_text("old")
    with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else DiskFullError) as raised:
        save_calibrated(torch.nn.Linear(2, 2), saying, out, report, {"report.html": "new"})
    if isinstance(raised.value, DiskFullError):
        assert "(No space left on device" in str(raised.value) and str(out) in str(raised.value)
    if is_first:
        assert not (tmp_path / "new").exists()
    else:
        assert len(list(out.iterdir())) == 4 and all(file.read_text() == "old" for file in out.iterdir())
    check_target(out)


def test_a_calibration_takes_the_place_of_an_older_one_and_of_what_was_left_by_a_killed_one(
    saying: Path, tmp_path: Path
) -> None:
    (tmp_path / STAGING).mkdir()
    for name in (f"{STAGING}/config.json", "model.safetensors.index.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("old")
    check_target(tmp_path)
    report = CalibrationReport("new", None, {}, {}, (), (), {})
    save_calibrated(torch.nn.Linear(2, 2), saying, tmp_path, report, {"report.html": "page"})
    names = {file.name for file in tmp_path.iterdir()}
    assert {MANIFEST, "model.safetensors", "config.json", "report.html", "notes.txt"} <= names
    assert not {STAGING, "model.safetensors.index.json"} & names and CalibrationReport.load(tmp_path) == report
    assert [file.name for file in tmp_path.iterdir() if file.read_bytes() == b"old"] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keep-fp16", "two"], "give a number of layers, or auto"),
        (["--keep-fp16", "auto", "--wer-budget", "-1"], "from 0 to 100"),
        (["--keep-fp16", "auto", "--wer-budget", "nan"], "from 0 to 100"),
        (["--wer-budget", "0.001"], "Give --keep-fp16 auto with it"),
        (["--keep-fp16", "3", "--wer-budget", "1"], "Give --keep-fp16 auto with it"),
        (["--audio", "nowhere"], "nowhere is not a folder"),
        (["--audio", ""], "--audio is empty"),
        (["--out", " "], "--out is empty"),
        (["--precision", "int8"], "--precision int8 would not be followed"),
        (["--precision", "static", "--audio", "nowhere"], "nowhere is not a folder"),
        (["--precision", "nope"], "There is no precision 'nope'"),
        (["--engine", "fast"], "--engine fast would not be followed"),
        (["--max-upload-mb", "1"], "--max-upload-mb 1 would not be followed"),
        (["--max-duration-h", "1"], "--max-duration-h 1.0 would not be followed"),
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


@pytest.mark.parametrize("step", ["Listening", "Quantising", "Checking"])
def test_what_the_listener_to_the_progress_raises_leaves_nothing(
    saying: Path, recordings: Path, step: str, tmp_path: Path
) -> None:
    def stop(progress: CalibrationProgress) -> None:
        if progress.step.startswith(step):
            raise CancelledError("Stopped.")

    engine: Any = load_engine(str(saying), "fp32", device="cpu", warm_up=False)
    with pytest.raises(CancelledError):
        calibrate(engine, recordings_in(recordings / "en"), tmp_path / "out", on_progress=stop)
    engine.close()
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_no_silence(
    run: Calibrate, saying: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_not_finite(saying, tmp_path / "broken")
    assert run("--model", broken, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "not finite at precision fp32" in said.err and "talk.avi" in said.err and said.err.count("\n") == 1
    assert "damaged" in said.err and "use " not in said.err and "no speech" not in said.err
    assert not (tmp_path / "out").exists()


def make_not_finite(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with a weight that is no number."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.conv1.weight"][0, 0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_without_a_folder_int8_static_finds_it_by_itself() -> None:
    assert "finds it by itself" in how_to_load(None)
    assert "--model 'my folder' " in how_to_load(Path("my folder"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("file", "file is a file; choose another --out."),
        ("file/out", "file is a file; choose another --out."),
        ("checkpoint", "holds other files and no calibration"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded_or_heard(
    run: Calibrate, name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "checkpoint").mkdir()
    for file in ("file", "checkpoint/model.safetensors"):
        (tmp_path / file).write_bytes(b"kept")
    loaded: list[Any] = []
    monkeypatch.setattr("model_loader.pool.load_engine", lambda *words, **options: loaded.append(words))
    monkeypatch.setattr(_Listener, "listen", lambda self, recordings: loaded.append(recordings))
    assert run("--out", tmp_path / name) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == "" and loaded == []
    with pytest.raises(OptionError, match=sentence):
        calibrate(None, [], tmp_path / name)  # type: ignore[arg-type]  # not looked at
    assert (tmp_path / "file").read_bytes() == (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == b"kept"


def test_a_place_that_no_file_can_be_made_in_is_refused(run: Calibrate, capsys: pytest.CaptureFixture[str]) -> None:
    """Even for root, whom permissions do not stop."""
    assert run("--out", "/proc/sotto/calibrated") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_new_and_empty_folders_and_calibrations_may_be_written(tmp_path: Path) -> None:
    for name in ("empty", "calibrated", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "calibrated" / MANIFEST).write_text("{}")
    (tmp_path / "own" / "config.json").write_text("left by an interrupted run")
    for name in ("new/below/another", "empty", "calibrated"):
        check_target(tmp_path / name)
    check_target(tmp_path / "own", is_own=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OptionError, match="no calibration"):
        check_target(tmp_path / "own")


# --- compared -------------------------------------------------------------------------------------------------------


def test_a_calibration_with_a_folder_of_its_own_is_compared(
    run: Calibrate, saying: Path, greeting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its row says which model it was made from, and which weights those were: as the row of the model itself does."""
    monkeypatch.setattr(pipeline, "run_in_worker", lambda work, order, *, on_step, **_: work(order, on_step))
    out, loaded = tmp_path / "out", []

    def load(model: str, precision: str, **options: Any) -> Any:
        loaded.append((model, precision))
        return load_engine(model, precision, **options | {"warm_up": False})  # which is of 30 s

    monkeypatch.setattr(measure, "load_engine", load)
    assert run("--out", out) == 0
    words = ["compare", greeting, "--model", saying, "--device", "cpu", "--offline", "--work-dir", tmp_path,
             "--engine", "reference", "--precisions", "fp32,int8-static", "--calibrated", out, "--repeats", 1,
             "--json", tmp_path / "rows.json"]  # fmt: skip
    assert cli.main([str(word) for word in words], serve=app.serve, examples=Path()) == 0, capsys.readouterr().err
    fp32, static = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert loaded == [(str(saying), "fp32"), (str(out), "int8-static")]
    assert static["error"] is None and static["effective"] == "int8-static"
    assert static["calibration"] == sha256_of(out / MANIFEST) and fp32["calibration"] == ""
    assert fp32["model"] == static["model"] == saying.name
    assert fp32["revision"] == static["revision"] == f"sha256:{sha256_of(saying / 'model.safetensors')[:16]}"
