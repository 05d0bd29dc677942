"""The page as a program: it builds without warnings, its handlers keep what is finished, errors become sentences."""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from errors import NotAudioError, SottoError
from tests.conftest import ROOT
from tests.fakes import SEGMENTS, FakeRun, FakeTranscriber
from transcription.formats import FORMATS
from transcription.transcript import NO_SPEECH
from transcription.worker import WorkerError
from ui import chinese, doors
from ui.blocks import TABS, build_ui, page_options
from ui.page import Page, Pulse
from ui.recording import Chosen, Example, load_examples
from ui.tabs import transcribe
from ui.texts import TEXTS

REQUEST: Any = SimpleNamespace(headers={"accept-language": "en"}, session_hash="page-1")
VALUES = ("", "", "transcribe", "vad", " Lucía ", False, 1, "reference")


def built(examples: Sequence[Example] = ()) -> gr.Blocks:
    """The page over the scripted transcriber. Built inside a running loop: outside one, Gradio leaves its own open."""

    async def build() -> gr.Blocks:
        return build_ui(FakeTranscriber(), examples)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return asyncio.run(build())


@pytest.fixture(scope="module")
def blocks() -> gr.Blocks:
    return built(load_examples(ROOT / "examples"))


def test_every_tab_is_on_the_page(blocks: gr.Blocks) -> None:
    ids = {block.id for block in blocks.blocks.values() if isinstance(block, gr.Tab)}
    assert ids == {tab.id for tab in TABS}
    assert all(tab.label in TEXTS for tab in TABS)


def test_a_page_without_examples_builds() -> None:
    assert built()


def test_no_handler_is_public(blocks: gr.Blocks) -> None:
    assert {fn.api_visibility for fn in blocks.fns.values()} == {"private"}


def test_work_queues_alone_or_shared_and_the_rest_does_not_wait(blocks: gr.Blocks) -> None:
    alone, shared = ([fn for fn in blocks.fns.values() if fn.concurrency_id == queue] for queue in ("gpu", "shared"))
    assert len(alone) == 2 and {fn.concurrency_limit for fn in alone} == {1}  # compare, calibrate
    assert {fn.trigger_mode for fn in alone} == {"multiple"}, "a press given up while it waits keeps no later one out"
    assert len(shared) == 2 and {fn.concurrency_limit for fn in shared} == {32}  # transcribe, detect
    working = alone + shared
    assert all(not fn.queue for fn in blocks.fns.values() if fn.fn is not None and fn not in working)


@pytest.mark.parametrize("taker", [gr.mount_gradio_app, gr.Blocks.launch])
def test_the_options_fit_both_ways_of_serving(taker: Any) -> None:
    options = page_options(examples_folder=ROOT / "examples", max_upload_mb=2000)
    assert set(options) <= set(inspect.signature(taker).parameters)
    assert options["max_file_size"] == "2000mb"
    assert options["run_history"] is False


def test_examples_come_from_the_manifest_and_missing_files_are_left_out(tmp_path: Path) -> None:
    entries = [
        {"file": name, "language": "en", "text": "Hello.", "seconds": 1.5, "label": name} for name in ("a.wav", "b.wav")
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    assert [example.path.name for example in load_examples(tmp_path)] == ["a.wav"]
    assert load_examples(tmp_path / "nowhere") == ()


# Transcribe


def shown(transcriber: FakeTranscriber, chosen: Chosen | None = Chosen(Path("a.wav"), "a.wav")) -> list[dict[str, Any]]:  # noqa: B008
    """All updates of one run, by the names of the widgets."""
    names = ("status", "segments", "draft", "go", "cancel", "results")
    view = transcribe.View(*names, tuple(FORMATS), "player")
    page = Page(transcriber, None, Pulse(transcriber))  # type: ignore[arg-type]
    return list(transcribe._follow(page, transcribe.ActiveRuns(), view, chosen, VALUES, REQUEST))


def test_a_run_ends_with_its_text_files_and_subtitles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    transcriber = FakeTranscriber()
    *_, last = shown(transcriber)
    assert "Done in" in last["status"]
    assert last["segments"].count('class="segment"') == len(SEGMENTS)
    assert [Path(last[name]).name for name in FORMATS] == [f"a.{row.extension}" for row in FORMATS.values()]
    (_, options), *_ = transcriber.calls
    assert options.prompt == "Lucía"
    assert options.language is None and options.engine == "reference"


def test_segments_and_drafts_appear_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe, "LOOK_S", 0.01)
    monkeypatch.setattr(transcribe, "REDRAW_S", 0.02)
    *early, last = shown(FakeTranscriber(pause_s=0.1))
    words = [item.text.split()[0] for item in SEGMENTS]
    drafts = [update["draft"] for update in early if update.get("draft")]
    assert all(any(word in draft for draft in drafts) for word in words) and last["draft"] == ""
    growing = [update["segments"] for update in early if update.get("segments")]
    assert growing
    assert all(last["segments"].startswith(text) for text in growing), "only an addition travels as an addition"


def test_a_refused_recording_gives_its_sentence_and_the_button_back() -> None:
    *_, last = shown(FakeTranscriber(error=NotAudioError("notes.txt holds no sound; choose a recording.")))
    assert "holds no sound" in last["status"]
    assert 'role="alert"' in last["status"]
    assert last["go"].interactive


class BreakingRun(FakeRun):
    """Says one segment, then breaks."""

    def _work(self) -> Any:
        self._done.append(SEGMENTS[0])
        yield SEGMENTS[0]
        raise ZeroDivisionError("a bug of ours")


def test_what_was_finished_before_an_error_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    transcriber = FakeTranscriber()
    monkeypatch.setattr(transcriber, "transcribe", lambda *_, **__: BreakingRun(SEGMENTS, 0.0, 12.2))
    *_, last = shown(transcriber)
    assert SEGMENTS[0].text.strip() in last["segments"]
    assert Path(last["txt"]).read_text(encoding="utf-8").strip() == SEGMENTS[0].text.strip()
    assert "a bug of ours" not in last["status"]
    assert "ZeroDivisionError" in caplog.text


def test_a_full_disk_costs_the_downloads_and_not_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> list[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transcribe, "write_files", full)
    *_, last = shown(FakeTranscriber())
    assert "could not be written (No space left on device)" in last["status"] and "Done in" in last["status"]
    assert SEGMENTS[-1].text.strip() in last["segments"]
    assert last["go"].interactive and not last["cancel"].interactive
    assert not last["txt"].interactive


def test_silence_is_no_error_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "warnings", property(lambda _: (NO_SPEECH,)))
    *_, last = shown(FakeTranscriber(segments=()))
    assert last["status"].count("No speech") == 1
    assert 'class="notice calm"' in last["status"]
    assert not last["results"].visible


def test_without_a_recording_nothing_is_started() -> None:
    transcriber = FakeTranscriber()
    (only,) = shown(transcriber, None)
    assert "Choose a file" in only["status"]
    assert transcriber.calls == []


def test_cancel_reaches_the_run_of_its_own_page() -> None:
    runs, mine, theirs = transcribe.ActiveRuns(), FakeRun(SEGMENTS, 0.0, 1.0), FakeRun(SEGMENTS, 0.0, 1.0)
    runs.put("me", mine)
    runs.put("them", theirs)
    assert runs.cancel("me")
    assert (mine.is_cancelled, theirs.is_cancelled) == (True, False)
    runs.drop("me", mine)
    assert not runs.cancel("me")


# Errors


def test_a_deliberate_error_speaks_for_itself() -> None:
    assert doors.explain(SottoError("Choose another file."), "en") == "Choose another file."


def kinds(base: type[SottoError]) -> list[type[SottoError]]:
    return [base, *(one for child in base.__subclasses__() for one in kinds(child) if one.__module__ == "errors")]


@pytest.mark.parametrize("kind", dict.fromkeys(kinds(SottoError)))
def test_chinese_readers_get_the_kind_of_every_error_and_its_sentence(kind: type[SottoError]) -> None:
    assert doors.explain(kind("x.wav is empty."), "zh") == f"{chinese.ERRORS[kind.__name__]}（x.wav is empty.）"


def test_an_error_of_a_kind_of_its_own_is_of_its_parents_kind() -> None:
    assert doors.explain(WorkerError("Killed."), "zh") == f"{chinese.ERRORS['MachineError']}（Killed.）"


def test_an_unexpected_error_gives_an_id_and_logs_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        sentence = doors.explain(ValueError("secret details"), "en")
    assert "secret" not in sentence
    report_id = caplog.records[-1].args[0]  # type: ignore[index]
    assert str(report_id) in sentence
    assert caplog.records[-1].exc_info is not None
