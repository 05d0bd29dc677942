"""The calibration box of Compare: its handlers with a scripted calibration."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_loader.calibration import WEIGHTS, CalibrationReport
from tests.fakes import FakeTranscriber
from transcription.calibrate import Calibration, CalibrationProgress
from ui.page import Facts, Page, Pulse
from ui.recording import Example
from ui.tabs import calibrate
from ui.tabs.calibrate import View

VIEW = View(**{item.name: item.name for item in fields(View)})  # type: ignore[arg-type]
REPORT = CalibrationReport("demo", None, {"en": 12.0, "de": 11.0}, {"a.flac": "0" * 64}, (), (), {"torch": "2"})


def calibrated(folder: Path) -> Path:
    folder.mkdir()
    REPORT.save(folder)
    (folder / WEIGHTS).write_bytes(b"")
    (folder / "report.html").write_text("<h1>Report</h1>")
    os.utime(folder / "int8_static.json", (1_764_000_000, 1_764_000_000))
    return folder


class Calibrating(FakeTranscriber):
    """Tells of two steps, waiting before the second until `go_on` is set."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        super().__init__()
        self.folder, self.failure, self.go_on = folder, error, threading.Event()
        self.go_on.set()

    def calibrate(self, recordings: Sequence[Path], *, on_progress: Callable[[Any], None]) -> Calibration:
        self.calls.append(("calibrate", list(recordings)))
        on_progress(CalibrationProgress("Listening to a.flac", 0, 2))
        assert self.go_on.wait(20)
        on_progress(CalibrationProgress("Listening to b.flac", 1, 2))
        if self.failure:
            raise self.failure
        return Calibration(calibrated(self.folder), REPORT, 0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))


def page_of(transcriber: FakeTranscriber) -> Page:
    example = Example(Path("example.flac"), "English", "en", "Good morning.", 2.0)
    return Page(transcriber, None, Pulse(transcriber), (example,))  # type: ignore[arg-type]


def run(page: Page, recordings: Sequence[str] | None = None) -> list[dict[Any, Any]]:
    return list(calibrate._calibrate(page, VIEW, recordings, "calibrate page-1", "en"))


def test_it_hears_the_examples_or_ones_own_recordings_and_offers_the_report(tmp_path: Path) -> None:
    transcriber = Calibrating(tmp_path / "calibrated")
    uploads = [tmp_path / folder / "talk.wav" for folder in ("0a1b", "2c3d")] + [tmp_path / "4e5f" / "rede.mp3"]
    first, *steps, last = run(page_of(transcriber), list(map(str, uploads)))
    ((_, heard),) = transcriber.calls
    assert [path.name for path in heard] == ["talk.wav", "talk (2).wav", "rede.mp3"], "as the user knows them"
    assert [path.readlink() for path in heard] == uploads and len({path.parent for path in heard}) == 1
    assert not first["go"].interactive and first["cancel"].interactive
    assert "Listening to b.flac (2 of 2)" in steps[-1]["status"]
    assert "Calibrated on en, de; 0.0 % of words differ" in last["status"] and last["go"].interactive
    assert "heard: en 12 s, de 11 s" in last["there"]
    assert Path(last["report"].value["path"]).read_text() == "<h1>Report</h1>"
    other = Calibrating(tmp_path / "other")
    run(page_of(other))
    assert other.calls == [("calibrate", [Path("example.flac")])]
    *_, only = run(replace(page_of(other), examples=()))
    assert "Add recordings" in only["status"] and len(other.calls) == 1


def test_cancel_ends_it_before_its_next_step_and_an_error_is_a_sentence(tmp_path: Path) -> None:
    transcriber = Calibrating(tmp_path / "calibrated")
    transcriber.go_on.clear()
    page = page_of(transcriber)
    running = calibrate._calibrate(page, VIEW, None, "calibrate page-1", "en")
    next(running)
    assert "Listening to a.flac" in next(running)["status"]
    page.device.cancel("calibrate page-1")
    transcriber.go_on.set()
    *_, last = running
    assert "Stopped. Nothing was changed." in last["status"] and last["go"].interactive
    assert not (tmp_path / "calibrated").exists() and not page.device.has_to_wait("page-2")
    *_, failed = run(page_of(Calibrating(tmp_path, error=OSError("gone"))))
    assert "gone" not in failed["status"] and "error" in failed["status"] and failed["go"].interactive


def test_a_comparison_waits_for_a_calibration_also_of_its_own_page(tmp_path: Path) -> None:
    transcriber = Calibrating(tmp_path / "calibrated")
    transcriber.go_on.clear()
    page = page_of(transcriber)
    running = calibrate._calibrate(page, VIEW, None, "calibrate page-1", "en")
    next(running)
    assert page.device.has_to_wait("page-1") and page.device.has_to_wait("page-2")
    transcriber.go_on.set()
    list(running)
    assert not page.device.has_to_wait("page-3")


def test_a_calibration_that_is_there_is_said_with_its_report_in_a_new_page(tmp_path: Path) -> None:
    facts = Facts.of(FakeTranscriber().status())
    assert calibrate._there(facts, "en")[0] == ""
    folder = calibrated(tmp_path / "calibrated")
    rows = tuple(replace(row, calibrated=folder if row.name == "int8-static" else None) for row in facts.precisions)
    sentence, report = calibrate._there(replace(facts, precisions=rows), "en")
    assert "Calibrated on 2025-11-2" in sentence and "en 12 s, de 11 s" in sentence and report.visible
    (folder / "int8_static.json").write_text("{")
    sentence, report = calibrate._there(replace(facts, precisions=rows), "en")
    assert sentence == "" and not report.visible
    assert calibrate._key(SimpleNamespace(session_hash="page-1")) == "calibrate page-1"  # type: ignore[arg-type]


def test_a_calibration_that_waits_is_given_up_at_once_and_one_that_runs_is_told_to_stop(tmp_path: Path) -> None:
    page = page_of(Calibrating(tmp_path / "calibrated"))
    page.device.put("page-2", calibrate._Run(page.transcriber, []))
    assert page.device.has_to_wait("calibrate page-1")
    stopped = calibrate._stop(page, VIEW, "calibrate page-1", "en")
    assert "Stopped" in stopped["status"] and stopped["go"].interactive
    (only,) = run(page)
    assert set(only) == {"status"}, "its turn, when it comes, changes nothing"
    page.device.put("calibrate page-1", calibrate._Run(page.transcriber, []))
    assert set(calibrate._stop(page, VIEW, "calibrate page-1", "en")) == {"status"}


def test_recordings_that_were_not_heard_are_named_with_the_reason(tmp_path: Path) -> None:
    made = Calibration(tmp_path, REPORT, 0.0, left_out={"notes.bin": "It holds no <sound>."})
    assert "notes.bin: It holds no &lt;sound&gt;." in calibrate._done(made, "en")
    assert "notice" not in calibrate._done(replace(made, left_out={}), "en")
