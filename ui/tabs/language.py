"""Detect language: probabilities over the recording, and each window's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from transcription.transcript import LanguageReport
from ui import doors, render
from ui.page import SHARED, Page
from ui.recording import Chosen
from ui.texts import label, page_locale, say


def build(page: Page) -> None:
    """Draw the tab and wire it."""
    with gr.Row(elem_classes="actions"):
        go = gr.Button(label("language_go"), variant="primary", min_width=140, elem_id="language-go")
    status = gr.HTML(render.empty(label("language_empty")), elem_id="language-status")
    with gr.Row(visible=False) as results:
        guesses = gr.Label(
            label=label("language_label"), num_top_classes=5, min_width=240, scale=2, elem_id="language-label"
        )
        with gr.Column(min_width=280, scale=3):
            windows = gr.HTML(elem_id="language-windows")

    def detect(request: gr.Request, chosen: Chosen | None) -> Iterator[dict[Any, Any]]:
        locale = page_locale(request)
        if chosen is None:
            yield {status: render.notice(say("recording_none", locale))}
            return
        yield {status: render.waiting(say("language_running", locale)), results: gr.Row(visible=False)}
        try:
            report = page.transcriber.detect_language(chosen.path)
            names = render.language_names(page.pulse.status().languages, locale)
            shown = _shown(report, names, locale)
            yield dict(zip((status, guesses, windows, results), shown, strict=True))
        except Exception as error:  # the door
            yield {status: render.notice(doors.explain(error, locale), "error")}

    go.click(detect, page.recording.chosen, [status, guesses, windows, results], **SHARED)


def _shown(report: LanguageReport, names: dict[str, str], locale: str) -> tuple[Any, ...]:
    return (
        render.language_summary(report, names, locale),
        render.confidences(report.guesses, names) or None,
        render.language_windows(report, names, locale),
        gr.Row(visible=bool(report.guesses)),
    )
