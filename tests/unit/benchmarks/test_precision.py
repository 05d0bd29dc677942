"""The precision table on the toy shape and the answers to what articles claim, and windows without ffmpeg."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from benchmarks import accuracy, memory, precision
from benchmarks.claims import answers
from errors import OptionError, UserError
from model_loader.device import describe_device


def row(name: str, weights: int, token_ms: float, operators: float) -> dict[str, object]:
    times = {"encoder_n_ms": token_ms / 2, "token_1_ms": token_ms, "token_n_ms": 2 * token_ms}
    return {
        "row": name,
        "load_s": 1.0,
        "weights_mib": weights,
        "peak_1_mib": weights + 100,
        "peak_n_mib": None,
        "operators_per_token": operators,
        "kernels_per_token": None,
        "waits_per_token": None,
        **times,
    }


def test_claims_are_answered_with_the_rows_own_figures() -> None:
    rows = [row("fp32", 400, 10.0, 100), row("fp16", 200, 5.0, 100), row("int8-static", 100, 4.0, 120)]
    memory, speed, slowness = answers([*rows, row("bnb-int8", 110, 25.0, 400)])
    assert "weights -75 % of fp32's; weights -50 % of fp16's; peak at batch 1 -60 %" in memory
    assert "against fp32 encoder, batch N 2.50x, a token, batch 1 2.50x" in speed and "120 operators" in speed
    assert "a token at batch 1 5.0 times fp16's time" in slowness and "400 operators a token (fp16: 100)" in slowness
    assert "kernels" not in slowness and "waits" not in slowness, "what was not counted is not mentioned"


def test_claims_of_rows_on_different_engines_say_so_and_give_no_count_that_was_not_made() -> None:
    fast = [{**row(*sizes), "engine": "fast"} for sizes in (("fp32", 400, 10.0, 0), ("fp16", 200, 5.0, 0))]
    fast += [{**row("int8-static", 100, 4.0, 0), "engine": "fast"}]
    for figures in fast:
        for key in [key for key in figures if key.endswith("_per_token")]:
            del figures[key]
    _, speed, slowness = answers([*fast, {**row("bnb-int8", 110, 25.0, 400), "engine": "reference"}])
    assert speed.endswith("a token's are small.")
    assert "5.0 times fp16's time" in slowness and "reference engine against fast. LLM.int8()" in slowness


def test_claims_without_their_rows_say_so() -> None:
    told = answers([row("fp16", 200, 5.0, 100), {"row": "bnb-int8", "error": "no"}])
    assert len(told) == 3 and all("Not answered" in sentence for sentence in told)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is measured by the module's main() as in a process of its own, without the process."""

    def run_main(command: Sequence[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "benchmarks.precision"]
        output = io.StringIO()
        with redirect_stdout(output):
            status = precision.main(command[3:])
        return subprocess.CompletedProcess(command, status, output.getvalue(), "")

    monkeypatch.setattr("benchmarks.memory.subprocess.run", run_main)


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the result; whatever goes wrong there is the last line of standard error."""
    script = "import json, os, sys\nif sys.argv[1] == 'fail': sys.exit('noise\\nIt does not fit.')\n"
    (tmp_path / "apart.py").write_text(f"{script}print('noise')\nprint(json.dumps([os.getpid(), *sys.argv[1:]]))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cpu = describe_device("cpu")
    answer: Any = memory.run_apart("apart", "fp32", cpu, ["--one", "fp32"])
    assert answer[0] != os.getpid() and answer[1:] == ["--one", "fp32"]
    assert memory.run_apart("apart", "fp32", cpu, ["fail"]) == {"row": "fp32", "error": "It does not fit."}
    assert memory.run_apart("nowhere.apart", "fp16", cpu, []).keys() == {"row", "skipped"}, "no process is asked"


@pytest.mark.slow
def test_the_table_has_a_line_for_each_row_and_a_last_line_of_json(
    one_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "toy", "--device", "cpu", "--rows", "fp32,fp16,int8-static", "--batch", "2"]
    assert precision.main([*options, "--tokens-1", "4", "--tokens-n", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fp32, fp16, static = json.loads(lines[-1])["rows"]
    assert (fp32["effective"], static["effective"]) == ("fp32", "int8-static")
    assert "needs a GPU" in fp16["skipped"]
    for measured in (fp32, static):
        assert min(measured[f"{what}_ms"] for what in ("token_1", "token_n", "encoder_1", "encoder_n")) > 0
        assert abs(measured["weights_mib"] - measured["predicted_weights_mib"]) <= 1
        assert measured["operators_per_token"] > 50 and measured["kernels_per_token"] is None
        assert measured["peak_1_mib"] is None, "a CPU keeps no account"
        assert measured["process_n_mib"] >= measured["weights_mib"] > 0
    assert static["weights_mib"] < fp32["weights_mib"]
    assert re.search(r"Articles: static INT8 takes 60 % less memory. Here: weights -\d+ % of fp32's", "\n".join(lines))


class _Engine:
    def close(self) -> None: ...


@pytest.mark.parametrize("problem", [None, UserError("There is no ffmpeg.")])
def test_accuracy_calibrates_static_int8_by_itself(
    problem: UserError | None, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the examples, into a folder that is gone afterwards; where that cannot be, the other rows are measured."""
    heard: list[Path] = []
    measured: dict[str, Any] = {}

    def calibrate(engine: object, recordings: Sequence[Path], out: Path) -> None:
        heard.extend(recordings)
        if problem is not None:
            raise problem
        out.mkdir()

    def run(model: str, names: Sequence[str], **kwargs: Any) -> list[accuracy.Result]:
        folder = kwargs["calibrated"]
        measured.update(kwargs, model=model, names=list(names), is_there=folder is not None and folder.is_dir())
        return []

    monkeypatch.setattr(precision, "load_engine", lambda *args, **kwargs: _Engine())
    monkeypatch.setattr(precision, "_run_rows", lambda *args: [])
    monkeypatch.setattr("transcription.calibrate.calibrate", calibrate)
    monkeypatch.setattr(accuracy, "find_recordings", lambda *args: [])
    monkeypatch.setattr(accuracy, "run", run)
    monkeypatch.setattr(accuracy, "table", lambda results: "the table")
    assert precision.main(["--accuracy", "--device", "cpu", "--rows", "int8-static,int8"]) == 0
    out = capsys.readouterr().out
    assert out.index("N = 4") < out.index("the table"), "a run that is cut off keeps the first table"
    assert root / "examples" / "english.flac" in heard and measured["engine"] == "auto"
    if problem is None:
        assert (measured["names"], measured["is_there"]) == (["fp32", "int8-static", "int8"], True)
        assert not measured["calibrated"].exists()
    else:
        assert (measured["names"], measured["is_there"]) == (["fp32", "int8"], False)
        assert "There is no ffmpeg." in out


def test_edit_distance_is_jiwers() -> None:
    dice = random.Random(0)
    for _ in range(50):
        said, heard = ([dice.choice("abcd") for _ in range(dice.randint(1, 9))] for _ in range(2))
        found = jiwer.process_words(" ".join(said), " ".join(heard))
        expected = found.substitutions + found.deletions + found.insertions
        assert accuracy.edit_distance(said, heard) == expected, (said, heard)
    assert accuracy.edit_distance([], ["a", "b"]) == 2 and accuracy.edit_distance(["a"], []) == 1


def test_saved_windows_are_the_recordings(root: Path, tmp_path: Path) -> None:
    recordings = accuracy.read_recordings(root / "benchmarks" / "heldout", limit=1)
    accuracy.save_windows(recordings, tmp_path / "windows.npz")
    read = accuracy.find_recordings(tmp_path / "windows.npz", tmp_path / "nothing", 0)
    assert [(r.file, r.kind, r.language, r.text) for r in read] == [
        (r.file, r.kind, r.language, r.text) for r in recordings
    ]
    for before, after in zip(recordings, read, strict=True):
        assert after.window.samples.dtype == np.float32
        assert np.abs(before.window.samples - after.window.samples).max() <= 0.51 / 32767


def test_another_file_than_windows_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "other.npz").write_bytes(b"no archive")
    with pytest.raises(OptionError, match="--save-windows"):
        accuracy.read_windows(tmp_path / "other.npz")
    np.savez(tmp_path / "empty.npz", other=np.zeros(1))
    with pytest.raises(OptionError, match="--save-windows"):
        accuracy.read_windows(tmp_path / "empty.npz")
