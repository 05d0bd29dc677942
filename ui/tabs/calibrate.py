"""The part of Compare that makes int8-static possible: calibrate the checkpoint on the example recordings."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from ui import doors, render
from ui.page import GPU, QUIET, Page
from ui.texts import label, page_locale, say

if TYPE_CHECKING:
    from transcription.calibrate import Calibration, CalibrationProgress

LOOK_S = 0.5


def build(page: Page, now: Any) -> Any:
    """Draw the box and wire it; gives the event to go on from. Without examples there is nothing to calibrate on.

    now: a button elsewhere that opens the box and starts.
    """
    box = gr.Accordion(label("calibrate_title"), open=False, elem_id="calibrate", visible=bool(page.examples))
    with box:
        gr.HTML(render.empty(label("calibrate_info")))
        with gr.Row(elem_classes="actions"):
            go = gr.Button(label("calibrate_go"), min_width=180, elem_id="calibrate-go")
            report = gr.DownloadButton(
                label("calibrate_report"), min_width=140, visible=False, elem_id="calibrate-report"
            )
        status = gr.HTML(elem_id="calibrate-status")

    def start(request: gr.Request) -> Iterator[dict[Any, Any]]:
        locale = page_locale(request)
        yield {status: render.waiting(say("calibrate_starting", locale)), go: gr.Button(interactive=False)}
        try:
            for item in _followed(page):
                if item is None:
                    continue
                if isinstance(item, Exception):
                    raise item
                if _is_progress(item):
                    yield {status: render.waiting(_progress(item, locale))}
                else:
                    yield {status: render.line(_done(item, locale)), report: _report(item)}
        except Exception as error:  # the door
            yield {status: render.notice(doors.explain(error, locale), "error")}
        yield {go: gr.Button(interactive=True)}

    now.click(lambda: gr.Accordion(open=True), None, box, **QUIET)
    return gr.on([go.click, now.click], start, None, [status, go, report], **GPU)


def _followed(page: Page) -> Iterator[Any]:
    """Progress, then the calibration or its error, from a thread: a closed tab does not break off half a checkpoint."""
    found: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            paths = [example.path for example in page.examples]
            found.put(page.transcriber.calibrate(paths, on_progress=found.put))
        except Exception as error:  # handed to the handler, which is the door
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() or not found.empty():
        try:
            yield found.get(timeout=LOOK_S)
        except queue.Empty:
            yield None


def _is_progress(item: Any) -> bool:
    return hasattr(item, "step")


def _progress(item: CalibrationProgress, locale: str) -> str:
    return say("calibrate_running", locale, step=item.step, done=min(item.done + 1, item.total), total=item.total)


def _done(item: Calibration, locale: str) -> str:
    languages = ", ".join(item.report.languages)
    return say("calibrate_done", locale, languages=languages, percent=render.percent(item.agreement_wer, 1))


def _report(item: Calibration) -> Any:
    """A copy inside Gradio's cache, from which it may serve files."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    page = Path(tempfile.mkdtemp(prefix="calibration-", dir=cache)) / "int8-static-report.html"
    shutil.copyfile(item.folder / "report.html", page)
    return gr.DownloadButton(value=str(page), visible=True)
