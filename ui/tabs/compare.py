"""Compare: several precisions on one recording, one after the other, each row measured and shown as it finishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from transcription.interface import CompareRow
from transcription.options import TranscribeOptions
from ui import doors, render
from ui.page import GPU, Facts, Menu, Page
from ui.recording import Chosen
from ui.texts import label, page_locale, say


def build(page: Page) -> None:
    """Draw the tab and wire it."""
    precisions = gr.CheckboxGroup(
        [], label=label("compare_precisions"), info=label("compare_precisions_info"), elem_id="compare-precisions"
    )
    reference = gr.Textbox(
        "", label=label("compare_reference"), info=label("compare_reference_info"), lines=2, max_lines=6
    )
    with gr.Row(elem_classes="actions"):
        go = gr.Button(label("compare_go"), variant="primary", min_width=140, elem_id="compare-go")
    status = gr.HTML(render.empty(label("compare_empty")), elem_id="compare-status")
    figures = gr.HTML(elem_id="compare-figures")
    texts = gr.HTML(elem_id="compare-texts")

    def compare(request: gr.Request, chosen: Chosen | None, names: list[str], text: str) -> Iterator[dict[Any, Any]]:
        locale = page_locale(request)
        refusal = "recording_none" if chosen is None else "compare_two" if len(names) < 2 else None
        if chosen is None or refusal:
            yield {status: render.notice(say(refusal or "recording_none", locale))}
            return
        rows: list[CompareRow] = []
        yield {status: _measuring(rows, names, locale), figures: "", texts: ""}
        try:
            for row in page.transcriber.compare(chosen.path, names, TranscribeOptions(), reference_text=text.strip()):
                rows.append(row)
                yield {status: _measuring(rows, names, locale), figures: _figures(rows, locale), texts: _texts(rows)}
            yield {status: render.line(say("compare_done", locale, n=sum(not row.failed for row in rows)))}
        except Exception as error:  # the door; rows that finished stay
            yield {status: render.notice(doors.explain(error, locale), "error")}

    page.menus.append(Menu((precisions,), _menus))
    go.click(compare, [page.recording.chosen, precisions, reference], [status, figures, texts], **GPU)


def _menus(facts: Facts, locale: str) -> tuple[Any, ...]:
    usable = [row for row in facts.precisions if row.unavailable is None]
    return (gr.CheckboxGroup(choices=[(row.label, row.name) for row in usable]),)


def _measuring(rows: Sequence[CompareRow], names: Sequence[str], locale: str) -> str:
    return render.waiting(say("compare_running", locale, done=min(len(rows) + 1, len(names)), total=len(names)))


def _figures(rows: Sequence[CompareRow], locale: str) -> str:
    return render.compare_table(rows, locale) + render.compare_against(rows, locale)


def _texts(rows: Sequence[CompareRow]) -> str:
    return render.compare_texts(rows)
