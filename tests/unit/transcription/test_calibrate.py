"""Calibrating on recordings: batch by batch, what could not be heard, what layers a budget keeps, and the page."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from audio.windows import Window
from errors import AudioError, ModelError, OptionError
from model_loader.calibration import CalibrationReport, LayerReport
from tests.fakes import FakeEngine, always, fake_report, hypothesis
from transcription import calibrate
from transcription.calibrate import (
    Calibration,
    CalibrationProgress,
    _Listener,
    _meet_budget,
    _names,
    recordings_in,
    render_page,
)

N_WINDOWS, BATCH = 11, 4


def layer(index: int, kept: bool = False) -> LayerReport:
    return LayerReport(f"model.layers.{index}<fc1>", -1.0, 1.0, 0.5, 0.01 * (10 - index), kept, 100)


def report_of(*layers: LayerReport) -> CalibrationReport:
    return CalibrationReport("<i>ours</i>", None, {"en": 20.0}, {"a.wav": "0"}, (), layers, {})


def test_windows_are_decoded_in_batches_and_let_go(monkeypatch: pytest.MonkeyPatch, greeting: Path) -> None:
    """However long a recording is, no more than two batches of it are in memory: the check reads it again."""
    sounds: list[weakref.ref[np.ndarray]] = []
    most = 0

    def cut(blocks: Any, mode: str) -> Iterator[Window]:
        nonlocal most
        for index in range(N_WINDOWS):
            samples = np.zeros(16_000, np.float32)
            sounds.append(weakref.ref(samples))
            most = max(most, sum(sound() is not None for sound in sounds))
            yield Window(index, float(index), samples, 1.0)

    monkeypatch.setattr(calibrate, "cut_windows", cut)
    engine = FakeEngine(lambda row, request: hypothesis((0.0, f"window {row}", 1.0)))
    told: list[CalibrationProgress] = []
    listener = _Listener(engine, engine.tokens, BATCH, told.append)  # type: ignore[arg-type]
    (heard,) = listener.listen([greeting])
    assert heard.seconds == N_WINDOWS and heard.language == "en" and heard.text.split()[-1] == "11"
    assert [len(batch) for batch in engine.batches] == [4, 4, 3] and most <= 2 * BATCH
    assert told == [CalibrationProgress(f"Listening to {greeting.name}", 0, 1)] * 4, "before the file and every batch"
    assert listener.agreement([heard]) is not None
    assert [len(batch) for batch in engine.batches] == [4, 4, 3] * 2
    assert told[4:] == [CalibrationProgress(f"Checking {greeting.name}", 0, 1)] * 4


def test_a_recording_that_breaks_off_counts_up_to_there_and_a_silent_one_is_told(
    monkeypatch: pytest.MonkeyPatch, greeting: Path
) -> None:
    def cut(blocks: Any, mode: str) -> Iterator[Window]:
        for index in range(BATCH):
            yield Window(index, float(index), np.zeros(16_000, np.float32), 1.0)
        raise AudioError("It ends too early.")

    engine = FakeEngine(lambda row, request: hypothesis((0.0, f"window {row}", 1.0)))
    listener = _Listener(engine, engine.tokens, BATCH, lambda progress: None)  # type: ignore[arg-type]
    monkeypatch.setattr(calibrate, "cut_windows", cut)
    (broken,) = listener.listen([greeting])
    assert (broken.seconds, broken.language, broken.problem) == (BATCH, "en", "It ends too early.")
    monkeypatch.setattr(calibrate, "cut_windows", lambda blocks, mode: iter(()))
    (silent,) = listener.listen([greeting])
    assert (silent.seconds, silent.language, silent.problem) == (0.0, "", "No speech was found in it.")


@pytest.mark.parametrize(("precision", "advice"), [("fp16", "With --device cpu"), ("fp32", "itself is damaged")])
def test_numbers_that_are_not_finite_end_it(
    precision: str, advice: str, monkeypatch: pytest.MonkeyPatch, greeting: Path
) -> None:
    window = Window(0, 0.0, np.zeros(16_000, np.float32), 1.0)
    monkeypatch.setattr(calibrate, "cut_windows", lambda blocks, mode: iter([window]))
    script = always((0.0, "words", 1.0), avg_logprob=math.nan)
    engine = FakeEngine(script, report=fake_report(effective=precision))
    listener = _Listener(engine, engine.tokens, BATCH, lambda progress: None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"not finite at precision {precision}.*{greeting.name}") as raised:
        list(listener.listen([greeting]))
    assert ("With --device cpu" in str(raised.value)) is (precision == "fp16") and advice in str(raised.value)


def test_a_folders_files_may_be_recordings_whatever_their_ending_but_not_hidden_ones_and_texts(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name, content in {
        "a.flac": b"text, and called a recording", "b.avi": b"RIFF\0", "c.MOV": b"\xff\xfe", "empty": b"",
        ".d.flac": b"\0", "__MACOSX/e.flac": b"\0",
        "talk.txt": b"x" * 4095 + "é".encode(),  # whose last letter is looked at by half
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert [path.name for path in recordings_in(tmp_path)] == ["a.flac", "b.avi", "c.MOV", "empty"]
    (tmp_path / "new").mkdir()
    with pytest.raises(OptionError, match="holds no recordings"):
        recordings_in(tmp_path / "new")


def test_a_recording_is_named_by_its_path_below_the_folder_given() -> None:
    paths = [Path("talks/de/one.wav"), Path("talks/en/one.wav"), Path("talks/two.wav")]
    assert list(_names(paths).values()) == ["de/one.wav", "en/one.wav", "two.wav"]
    assert list(_names(paths[:1]).values()) == ["one.wav"]


@pytest.mark.parametrize(
    ("scripted", "tried"),
    [([0.05, 0.02, 0.004], [1, 2, 4]), ([0.05] * 9, [1, 2, 4, 5]), ([None], [1])],
)
def test_a_budget_is_tried_up_to_the_last_layer_but_one(scripted: list[float | None], tried: list[int]) -> None:
    kept: list[int] = []
    layers = tuple(layer(index) for index in range(6))
    quantised: Any = SimpleNamespace(layers=layers, keep_16_bit=lambda names: kept.append(len(names)))
    rest = iter(scripted)
    listener: Any = SimpleNamespace(agreement=lambda heard: next(rest))
    found = _meet_budget(listener, [], quantised, 0.01, 0.5)
    assert kept == tried and found == scripted[len(tried) - 1]


def test_what_became_of_a_budget_is_a_sentence() -> None:
    report = report_of(layer(0, kept=True), layer(1))
    assert Calibration(Path(), report, 0.5).budget_outcome == ""
    assert "is met with 1 of 2 layers" in Calibration(Path(), report, 0.004, 0.01).budget_outcome
    missed = Calibration(Path(), report, 0.023, 0.01).budget_outcome
    assert "1.00% of words is not met" in missed and "2.30% differ" in missed
    assert "no words" in Calibration(Path(), report, None, 0.01).budget_outcome


def test_the_page_says_all_of_it_and_takes_no_name_for_markup() -> None:
    left_out = {"a<b>.wav": "It is <no> sound."}
    page = render_page(Calibration(Path(), report_of(layer(0)), 0.5, 0.01, left_out))
    assert "&lt;i&gt;ours&lt;/i&gt;" in page and "layers.0&lt;fc1&gt;" in page and "is not met" in page
    assert "<li>a&lt;b&gt;.wav: It is &lt;no&gt; sound.</li>" in page
    for raw in ("<i>", "<fc1>", "<b>.wav", "<no>"):
        assert raw not in page
    assert "Not heard" not in render_page(Calibration(Path(), report_of(layer(0)), 0.5))


def test_the_page_says_that_its_figure_is_optimistic_and_explains_only_the_colours_that_it_has() -> None:
    page = render_page(Calibration(Path(), report_of(layer(0)), 0.0))
    assert "on the same recordings, so the figure is optimistic" in page and "orange" not in page
    assert "orange layers stay at 16 bits" in render_page(Calibration(Path(), report_of(layer(0, kept=True)), 0.0))
