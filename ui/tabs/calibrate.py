"""The part of Compare that makes int8-static possible: calibrate the checkpoint on the examples or one's own
recordings, and show the report of the calibration that is there."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from errors import SottoError
from transcription.calibrated import made_at, read_calibrated
from transcription.interface import Transcriber
from ui import doors, render
from ui.page import GPU, QUIET, Facts, Menu, Page
from ui.runs import Waiting
from ui.texts import label, page_locale, say

if TYPE_CHECKING:
    from transcription.calibrate import Calibration, CalibrationProgress

LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class View:
    """The widgets of the box."""

    there: Any
    """What calibration there is."""
    recordings: Any
    go: Any
    cancel: Any
    report: Any
    status: Any

    def all(self) -> list[Any]:
        return [self.there, self.go, self.cancel, self.report, self.status]


class Stop(Exception):
    """Cancel was pressed."""


def build(page: Page, now: Any) -> Any:
    """Draw the box and wire it; gives the event to go on from.

    now: a button elsewhere that opens the box and starts.
    """
    box = gr.Accordion(label("calibrate_title"), open=False, elem_id="calibrate")
    with box:
        view = _view()

    def queue_up(request: gr.Request) -> dict[Any, Any]:
        locale = page_locale(request)
        if page.device.has_to_wait(_key(request)):
            return _running(view, say("compare_waiting", locale))
        return {view.status: gr.skip()}

    def start(request: gr.Request, recordings: Sequence[str] | None) -> Iterator[dict[Any, Any]]:
        yield from _calibrate(page, view, recordings, _key(request), page_locale(request))

    def stop(request: gr.Request) -> dict[Any, Any]:
        return _stop(page, view, _key(request), page_locale(request))

    page.menus.append(Menu((view.there, view.report), _there))
    now.click(lambda: gr.Accordion(open=True), None, box, **QUIET)
    view.cancel.click(stop, None, [view.status, view.go, view.cancel], **QUIET)
    asked = gr.on([view.go.click, now.click], queue_up, None, view.all(), **QUIET)
    return asked.then(start, view.recordings, view.all(), trigger_mode="multiple", **GPU)


def _view() -> View:
    gr.HTML(render.empty(label("calibrate_info")))
    there = gr.HTML(elem_id="calibrate-there")
    recordings = gr.File(
        label=label("calibrate_recordings"), file_count="multiple", file_types=["audio", "video"], height=140,
        elem_id="calibrate-recordings",
    )  # fmt: skip
    with gr.Row(elem_classes="actions"):
        go = gr.Button(label("calibrate_go"), min_width=180, elem_id="calibrate-go")
        cancel = gr.Button(label("compare_cancel"), min_width=100, interactive=False, elem_id="calibrate-cancel")
        report = gr.DownloadButton(label("calibrate_report"), min_width=140, visible=False, elem_id="calibrate-report")
    return View(there, recordings, go, cancel, report, gr.HTML(elem_id="calibrate-status"))


def _key(request: gr.Request) -> str:
    """Of the page's calibration among the runs that have the device; its comparison has another."""
    return f"calibrate {request.session_hash}"


class _Run:
    """A calibration in a thread: a closed tab does not break off half a checkpoint, Cancel does between two batches."""

    def __init__(self, transcriber: Transcriber, recordings: Sequence[Path]) -> None:
        self._found: queue.Queue[Any] = queue.Queue()
        self._is_cancelled = threading.Event()
        self._transcriber, self._recordings = transcriber, recordings

    def cancel(self) -> None:
        self._is_cancelled.set()

    def __iter__(self) -> Iterator[Any]:
        """Progress, then the calibration; None every now and then. Raises what it raises, Stop after a cancel."""
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        while thread.is_alive() or not self._found.empty():
            try:
                item = self._found.get(timeout=LOOK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            yield item

    def _work(self) -> None:
        try:
            self._found.put(self._transcriber.calibrate(self._recordings, on_progress=self._tell))
        except Exception as error:  # handed to the handler, which is the door
            self._found.put(error)

    def _tell(self, progress: CalibrationProgress) -> None:
        if self._is_cancelled.is_set():
            raise Stop
        self._found.put(progress)


def _calibrate(
    page: Page, view: View, recordings: Sequence[str] | None, key: str, locale: str
) -> Iterator[dict[Any, Any]]:
    """From the first line to the report, the cancellation or the error."""
    paths = _side_by_side(recordings or ()) or [example.path for example in page.examples]
    if not page.device.may_begin(key):
        yield {view.status: gr.skip()}  # _stop has said so
        return
    if not paths:
        yield _idle(view) | {view.status: render.notice(say("calibrate_nothing", locale))}
        return
    run = _Run(page.transcriber, paths)
    page.device.put(key, run)
    yield _running(view, say("calibrate_starting", locale))
    ended: dict[Any, Any] = {}
    try:
        for item in run:
            if hasattr(item, "step"):
                yield {view.status: render.waiting(_progress(item, locale))}
            elif item is not None:
                there, report = _described(item.folder, locale)
                ended = {view.status: _done(item, locale), view.there: there, view.report: report}
    except Stop:
        ended = {view.status: render.line(say("calibrate_stopped", locale))}
    except Exception as error:  # the door
        ended = {view.status: render.notice(doors.explain(error, locale), "error")}
    finally:
        page.device.drop(key, run)
    yield _idle(view) | ended


def _side_by_side(uploads: Sequence[str]) -> list[Path]:
    """Links in one folder: an upload lies in one of its own, whose name says nothing, and recordings are named by their
    path below the folder that holds them all."""
    if not uploads:
        return []
    folder, paths = _new_folder("recordings-"), []
    for number, upload in enumerate(map(Path, uploads), start=1):
        link = folder / upload.name
        if link.is_symlink():
            link = folder / f"{upload.stem} ({number}){upload.suffix}"
        link.symlink_to(upload)
        paths.append(link)
    return paths


def _new_folder(prefix: str) -> Path:
    """Inside Gradio's cache, from which it may serve files and which it clears by age."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=cache))


def _stop(page: Page, view: View, key: str, locale: str) -> dict[Any, Any]:
    """What runs ends behind the batch that it is at; what waits for its turn is given up here."""
    if isinstance(page.device.cancel(key), Waiting):
        return _idle(view) | {view.status: render.line(say("calibrate_stopped", locale))}
    return {view.status: render.waiting(say("calibrate_stopping", locale))}


def _running(view: View, sentence: str) -> dict[Any, Any]:
    return {
        view.status: render.waiting(sentence),
        view.go: gr.Button(interactive=False),
        view.cancel: gr.Button(interactive=True),
    }


def _idle(view: View) -> dict[Any, Any]:
    return {view.go: gr.Button(interactive=True), view.cancel: gr.Button(interactive=False)}


def _progress(item: CalibrationProgress, locale: str) -> str:
    return say("calibrate_running", locale, step=item.step, done=min(item.done + 1, item.total), total=item.total)


def _done(item: Calibration, locale: str) -> str:
    """What it heard and how near the text stayed; which recordings it could not hear, and why."""
    languages = ", ".join(item.report.languages)
    done = say("calibrate_done", locale, languages=languages, percent=render.percent(item.agreement_wer, 1))
    missed = [why if why.startswith(name) else f"{name}: {why}" for name, why in item.left_out.items()]
    return render.line(done) + "".join(map(render.notice, missed))


def _there(facts: Facts, locale: str) -> tuple[Any, Any]:
    """(sentence, report) of the loaded checkpoint's calibration."""
    folder = next((row.calibrated for row in facts.precisions if row.calibrated), None)
    return _described(folder, locale) if folder else ("", gr.DownloadButton(visible=False))


def _described(folder: Path, locale: str) -> tuple[str, Any]:
    """When it was made, on what, and a copy of its report."""
    try:
        heard = ", ".join(f"{code} {s:.0f} s" for code, s in read_calibrated(folder).languages.items())
        sentence = render.line(
            say("calibrate_there", locale, date=f"{made_at(folder):%Y-%m-%d %H:%M}", languages=heard)
        )
        page = _new_folder("calibration-") / "int8-static-report.html"
        shutil.copyfile(folder / "report.html", page)
    except (OSError, SottoError):  # being replaced at this moment, or a folder without a report
        return "", gr.DownloadButton(visible=False)
    return sentence, gr.DownloadButton(value=str(page), visible=True)
