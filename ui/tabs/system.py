"""System: what the machine has, what is loaded and what it costs; read again every two seconds."""

from __future__ import annotations

import gradio as gr

from ui import doors, render, system_view
from ui.page import QUIET, Page
from ui.texts import label, page_locale, say

TICK_S = 2.0


def build(page: Page) -> None:
    """Draw the tab and wire it."""
    hardware = gr.HTML(elem_id="system-hardware")
    software = gr.HTML(elem_id="system-software")
    with gr.Row(elem_classes="actions"):
        unload = gr.Button(label("system_unload"), size="sm", min_width=140, elem_id="unload")
    answer = gr.HTML(elem_id="unload-answer")
    choices = gr.HTML(elem_id="system-choices")

    def tick(request: gr.Request) -> tuple[str, str, str]:
        status, locale = page.pulse.status(), page_locale(request)
        hardware = system_view.hardware(status, page.pulse.history(), locale)
        return hardware, system_view.software(status, locale), system_view.choices(status, locale)

    def drop(request: gr.Request) -> str:
        locale = page_locale(request)
        try:
            page.transcriber.unload()
        except Exception as error:  # the door
            return render.notice(doors.explain(error, locale), "error")
        return render.notice(say("system_unloaded", locale), "calm")

    gr.Timer(TICK_S).tick(tick, None, [hardware, software, choices], **QUIET)
    unload.click(drop, None, answer, **QUIET)
