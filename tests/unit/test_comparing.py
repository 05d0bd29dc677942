"""`app.py compare` with scripted measurements: what is said around the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import app
import cli
from tests.measured import measured_row
from transcription import pipeline
from transcription.measure import Measured, MeasureOrder


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are scripted, and no process is started for them."""

    def answer(work: Any, order: MeasureOrder, *, name: str, on_step: Any, stop: Any) -> Measured:
        return Measured(measured_row(order.precision), Path())

    monkeypatch.setattr(pipeline, "run_in_worker", answer)


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
