"""`app.py compare` with scripted measurements: what is said around the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import app
import cli
from errors import OptionError
from model_loader.calibration import MANIFEST, WEIGHTS, CalibrationReport, weight_files
from model_loader.weights import DEMO_FOLDER
from tests.measured import measured_row
from transcription import pipeline
from transcription.files import write_file
from transcription.measure import Measured, MeasureOrder
from transcription.results import Result
from transcription.worker import WorkerError


@pytest.fixture(autouse=True)
def orders(monkeypatch: pytest.MonkeyPatch) -> list[MeasureOrder]:
    """What was to be measured: rows are scripted, and no process is started for them."""
    orders: list[MeasureOrder] = []

    def answer(work: Any, order: MeasureOrder, *, name: str, on_step: Any, stop: Any) -> Measured:
        orders.append(order)
        if order.takes_calibrated or order.precision != "int8-static":
            return Measured(measured_row(order.precision), DEMO_FOLDER)
        raise WorkerError("int8-static needs a calibration of demo.", "CalibrationMissingError")

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
    assert compare(greeting, tmp_path, "--model", "auto", "--precisions", "AUTO,bf16") == 0
    said = capsys.readouterr()
    assert said.out.count("\nbf16 ") == 2, "one row for both, in each of the two tables"
    assert "auto took bf16, which needs the least" in said.err and said.err.count("This is the demo model:") == 1


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--precisions", "fp32,bf16", "--language", "klingon"), "does not know the language 'klingon'"),
        (("--precisions", "fp32,bf16", "--task", "translate"), "was not trained to translate"),
        (("--precisions", "int8-static"), "needs a calibration of demo"),
        (("--precisions", "fp32,bf16", "--model", "./nowhere"), "There is no model './nowhere'"),
        (("--precisions", ""), "--precisions names none"),
        (("--precisions", " , "), "--precisions names none"),
        (("--text", "./nowhere.txt"), "There is no file ./nowhere.txt"),
    ],
)
def test_what_every_precision_would_refuse_is_one_sentence_before_any_work(
    greeting: Path, tmp_path: Path, orders: list[MeasureOrder], capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...], sentence: str,
) -> None:  # fmt: skip
    assert compare(greeting, tmp_path, "--model", "demo", *options) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == "" and orders == []


def test_an_unreadable_recording_is_told_before_a_checkpoint_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model_loader.weights.resolve_checkpoint", None)
    assert compare(tmp_path / "nowhere.wav", tmp_path, "--model", "demo", "--precisions", "fp32") == 2
    assert "nowhere.wav" in capsys.readouterr().err


def test_a_missing_calibration_leaves_the_others_and_its_name_stands_once(
    greeting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    markdown = tmp_path / "x.md"
    options = ("--model", "demo", "--precisions", "fp32,static", "--markdown", str(markdown))
    assert compare(greeting, tmp_path, *options) == 0
    said = capsys.readouterr()
    assert "\nint8-static: needs a calibration of demo.\n" in said.err
    assert "\nint8-static  needs a calibration of demo.\n" in said.out
    assert "**int8-static**: needs a calibration of demo.\n" in markdown.read_text(encoding="utf-8")
    assert "held to this one" not in said.out + markdown.read_text(encoding="utf-8"), "there are no others"


def test_where_all_were_refused_each_reason_is_said_once_and_the_code_is_that_of_a_mistake(
    greeting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "x.json"
    options = ("--model", "demo", "--precisions", "int8-static,fp16", "--card", str(card))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_in_worker", refuse)
        assert compare(greeting, tmp_path, *options) == 2
        assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "fp32") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("int8-static: needs it.") == 1 and said.err.count("fp16: needs it.") == 1
    assert len(json.loads(card.read_text(encoding="utf-8"))["rows"]) == 2, "a file that was asked for is written"


def refuse(work: Any, order: MeasureOrder, *, name: str, on_step: Any, stop: Any) -> Measured:
    """fp32 breaks; the others need something."""
    if name == "fp32":
        raise WorkerError("It broke.")
    raise WorkerError(f"{name} needs it.", "UnavailablePrecisionError")


def test_files_are_written_before_anything_is_drawn_and_one_that_cannot_be_leaves_the_others(
    greeting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of measuring are not lost to a fault in how they are shown."""
    render = Result.render

    def drawn(self: Result, kind: str) -> str:
        if kind in ("table", "csv"):
            raise OverflowError("a bug")
        return render(self, kind)

    def written(path: Path, text: str) -> None:
        if path.suffix == ".md":
            raise OptionError("No room.")
        write_file(path, text)

    options = ("--model", "demo", "--precisions", "fp32", "--card", str(tmp_path / "card.json"))
    rows, table = ("--json", str(tmp_path / "rows.json")), ("--csv", str(tmp_path / "x.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(Result, "render", drawn)
        assert compare(greeting, tmp_path, *options, *rows, *table) == 1
    assert json.loads((tmp_path / "rows.json").read_text())[0]["precision"] == "fp32"
    assert json.loads((tmp_path / "card.json").read_text())["rows"][0]["precision"] == "fp32"
    capsys.readouterr()
    monkeypatch.setattr(cli, "write_file", written)
    assert compare(greeting, tmp_path, *options, "--markdown", str(tmp_path / "x.md")) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("precision") and said.err.endswith("No room.\n")


def test_a_card_with_a_number_without_end_is_refused_before_any_work(
    greeting: Path, tmp_path: Path, orders: list[MeasureOrder], capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "old.json"
    assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "fp32", "--card", str(card)) == 0
    content = json.loads(card.read_text(encoding="utf-8"))
    content["rows"][0]["weights_bytes"] = 10**400
    card.write_text(json.dumps(content), encoding="utf-8")
    orders.clear()
    assert compare(greeting, tmp_path, "--model", "demo", "--precisions", "fp32", "--with-card", str(card)) == 2
    assert "old.json is not a run card of Sotto: CompareRow.weights_bytes" in capsys.readouterr().err and orders == []


def test_a_recording_that_is_not_there_is_said_before_a_checkpoint_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "foo/bar", "--precisions", "auto,fp32")
    assert compare(tmp_path / "nothing.wav", tmp_path, *options) == 2
    assert "nothing.wav" in capsys.readouterr().err
