"""`app.py compare` with scripted measurements: what is said around the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import app
import cli
from model_loader.calibration import MANIFEST, WEIGHTS, CalibrationReport, weight_files
from model_loader.weights import DEMO_FOLDER
from tests.measured import measured_row
from transcription import pipeline
from transcription.measure import Measured, MeasureOrder


@pytest.fixture(autouse=True)
def orders(monkeypatch: pytest.MonkeyPatch) -> list[MeasureOrder]:
    """What was to be measured: rows are scripted, and no process is started for them."""
    orders: list[MeasureOrder] = []

    def answer(work: Any, order: MeasureOrder, *, name: str, on_step: Any, stop: Any) -> Measured:
        orders.append(order)
        return Measured(measured_row(order.precision), DEMO_FOLDER)

    monkeypatch.setattr(pipeline, "run_in_worker", answer)
    return orders


def compare(recording: Path, tmp_path: Path, *options: str) -> int:
    words = ["compare", str(recording), "--device", "cpu", "--offline", "--work-dir", str(tmp_path), *options]
    return cli.main(words, serve=app.serve, examples=Path())


def test_what_auto_took_and_that_it_was_the_demo_model_is_said(
    greeting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the measuring processes load a model. Without any room 'auto' takes another row than the device's first."""
    monkeypatch.setattr("model_loader.loader.free_bytes", lambda device: 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert compare(greeting, tmp_path, "--model", "auto", "--precisions", "AUTO,bnb-nf4") == 0
    said = capsys.readouterr()
    assert said.out.count("\nbnb-nf4 ") == 2, "one row for both, in each of the two tables"
    assert "auto took bnb-nf4, which needs the least" in said.err and said.err.count("This is the demo model:") == 1


def test_without_auto_nothing_is_chosen(
    greeting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model_loader.pool.choose_row", None)
    assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "8bit") == 0
    assert "auto" not in capsys.readouterr().err


def test_three_warm_runs_unless_said_otherwise(greeting: Path, tmp_path: Path, orders: list[MeasureOrder]) -> None:
    """As on the page: of one run no spread is known, and nothing can be called faster."""
    assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "fp32") == 0
    assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "fp32", "--repeats", "1") == 0
    assert [order.repeats for order in orders] == [3, 1]


def calibration(folder: Path, of: Path) -> Path:
    """A folder with the manifest of a calibration of this checkpoint, and no weights that would load."""
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"")
    CalibrationReport("demo", None, {}, {}, weight_files(of), (), {}).save(folder)
    return folder


def test_a_named_calibration_goes_to_the_rows_that_need_one(
    greeting: Path, demo_folder: Path, tmp_path: Path, orders: list[MeasureOrder]
) -> None:
    folder = calibration(tmp_path / "calibrated", demo_folder)
    options = ("--model", "demo", "--precisions", "fp32,static", "--calibrated", str(folder))
    assert compare(greeting, tmp_path, *options) == 0
    assert [(order.precision, order.calibrated) for order in orders if order.takes_calibrated] == [
        ("int8-static", folder)
    ]
    assert [order.precision for order in orders] == ["fp32", "int8-static"]


@pytest.mark.parametrize(
    ("name", "precisions", "sentence"),
    [
        ("nowhere", "int8-static", "There is no folder"),
        ("empty", "int8-static", f"holds no calibration ({MANIFEST} is missing)"),
        ("broken", "int8-static", "cannot be read"),
        ("calibrated", "fp32,bf16", "would not be used"),
        ("other", "int8-static", "was calibrated from other weights (demo) than demo has now"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_one_sentence_before_any_work(
    greeting: Path, demo_folder: Path, tmp_path: Path, orders: list[MeasureOrder],
    capsys: pytest.CaptureFixture[str], name: str, precisions: str, sentence: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (calibration(tmp_path / "broken", demo_folder) / MANIFEST).write_text("[]")
    calibration(tmp_path / "calibrated", demo_folder)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / WEIGHTS).write_bytes(b"a fine-tune")
    calibration(tmp_path / "other", tmp_path / "checkpoint")
    options = ("--model", "demo", "--precisions", precisions, "--calibrated", str(tmp_path / name))
    assert compare(greeting, tmp_path, *options) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == "" and orders == []
