"""Transcribe: segments as they finish, progress, cancel, click to hear, copy, downloads."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from errors import UnavailablePrecisionError
from transcription.formats import FORMATS
from transcription.interface import TranscriptionRun
from transcription.options import ENGINES, TASKS, WINDOW_MODES, TranscribeOptions
from transcription.transcript import NO_SPEECH, Segment, Transcript
from ui import doors, fit_view, render
from ui.page import QUIET, SHARED, Facts, Menu, Page
from ui.recording import Chosen
from ui.runs import ActiveRuns
from ui.texts import label, page_locale, say

# A click on a time asks the server for the position (playback_position is Gradio's way to seek) and then plays.
HEAR_JS = """
element.addEventListener('click', (event) => {
  const place = event.target.closest('[data-start]');
  if (place) trigger('hear', {start_s: parseFloat(place.dataset.start)});
});
"""
PLAY_JS = "() => sotto.play()"
COPY_JS = "() => sotto.copyTranscript()"
LOOK_S = 0.05
"""The first words are on their way to the page no later than this."""
REDRAW_S = 0.25
ALIVE_S = 1.0
"""The time left is drawn anew even where no word has come."""


@dataclass(frozen=True, slots=True)
class View:
    """The widgets that a run writes to."""

    status: Any
    segments: Any
    draft: Any
    go: Any
    cancel: Any
    results: Any
    downloads: tuple[Any, ...]
    player: Any

    def all(self) -> list[Any]:
        return [
            self.status,
            self.segments,
            self.draft,
            self.go,
            self.cancel,
            self.results,
            *self.downloads,
            self.player,
        ]


def build(page: Page) -> None:
    """Draw the tab and wire it."""
    inputs = _options(page)
    with gr.Row(elem_classes="actions"):
        go = gr.Button(label("transcribe_go"), variant="primary", min_width=140, elem_id="transcribe-go")
        cancel = gr.Button(label("transcribe_cancel"), min_width=100, interactive=False, elem_id="transcribe-cancel")
    status = gr.HTML(elem_id="transcribe-status")
    with gr.Row(visible=False, elem_classes="results") as results:
        copy = gr.Button(label("transcribe_copy"), size="sm", min_width=90, elem_id="copy")
        downloads = tuple(
            gr.DownloadButton(row.extension.upper(), size="sm", min_width=64, elem_id=f"download-{row.name}")
            for row in FORMATS.values()
        )
    segments = gr.HTML(render.empty(label("transcribe_empty")), elem_id="segments", js_on_load=HEAR_JS)
    draft = gr.HTML(elem_id="draft")
    view = View(status, segments, draft, go, cancel, results, downloads, page.recording.player)
    runs = ActiveRuns()

    def start(request: gr.Request, chosen: Chosen | None, *values: Any) -> Iterator[dict[Any, Any]]:
        yield from _follow(page, runs, view, chosen, values, request)

    def stop(request: gr.Request) -> Any:
        is_running = runs.cancel(str(request.session_hash)) is not None
        return render.waiting(say("transcribe_stopping", page_locale(request))) if is_running else gr.skip()

    go.click(start, [page.recording.chosen, *inputs], view.all(), **SHARED)
    cancel.click(stop, None, status, **QUIET)
    segments.hear(_seek, None, page.recording.player, **QUIET).then(None, js=PLAY_JS)
    copy.click(None, None, None, js=COPY_JS)


def _options(page: Page) -> list[Any]:
    """The option widgets, in the order _read_options takes their values."""
    with gr.Row(elem_classes="options"):
        precision = gr.Dropdown(
            [("", "")], value="", label=label("option_precision"), min_width=200, elem_id="precision"
        )
        language = gr.Dropdown([("", "")], value="", label=label("option_language"), min_width=200, elem_id="language")
    reason = gr.HTML(elem_id="precision-reason")
    with gr.Accordion(label("option_more"), open=False, elem_id="more-options"):
        with gr.Row():
            task = gr.Radio(list(TASKS), value=TASKS[0], label=label("option_task"), min_width=200)
            windows = gr.Radio(
                list(WINDOW_MODES),
                value=WINDOW_MODES[0],
                label=label("option_windows"),
                info=label("option_windows_info"),
                min_width=200,
            )
        prompt = gr.Textbox("", label=label("option_prompt"), info=label("option_prompt_info"), lines=1, max_lines=4)
        words = gr.Checkbox(False, label=label("option_words"), info=label("option_words_info"), elem_id="words")
        with gr.Row():
            beam = gr.Slider(1, 10, value=1, step=1, label=label("option_beam"), info=label("option_beam_info"))
            engine = gr.Radio(
                ["", *ENGINES],
                value="",
                label=label("option_engine"),
                info=label("option_engine_info"),
                elem_id="engine",
            )

    page.menus.append(Menu((precision, language, task, windows, engine), _menus))

    def why_not(name: str, request: gr.Request) -> str:
        return _why_not(page, name, page_locale(request))

    precision.change(why_not, precision, reason, **QUIET)
    return [precision, language, task, windows, prompt, words, beam, engine]


def _menus(facts: Facts, locale: str) -> tuple[Any, ...]:
    """Choices in the page's language, as far as the checkpoint is known."""
    return (
        gr.Dropdown(choices=render.precision_choices(facts.precisions, facts.precision, locale)),
        gr.Dropdown(choices=render.language_choices(facts.languages, locale)),
        gr.Radio(choices=render.task_choices(facts.can_translate, locale)),
        gr.Radio(choices=render.window_choices(locale)),
        gr.Radio(choices=render.engine_choices(locale)),
    )


def _why_not(page: Page, name: str, locale: str) -> str:
    """Under the menu: why this machine cannot run the chosen precision, or whether it fits."""
    status = page.pulse.status()
    reason = next((row.unavailable for row in status.precisions if row.name == name), None)
    if reason is None:
        return fit_view.choice(name, status.fits, locale)
    return render.notice(doors.in_words(UnavailablePrecisionError, reason, locale))


def _follow(
    page: Page, runs: ActiveRuns, view: View, chosen: Chosen | None, values: tuple[Any, ...], request: gr.Request
) -> Iterator[dict[Any, Any]]:
    """Show a run from its first second to its result, its cancellation or its error."""
    locale, session = page_locale(request), str(request.session_hash)
    if chosen is None:
        yield {view.status: render.notice(say("recording_none", locale), "note")}
        return
    run = None
    try:
        precision, options = _read_options(values)
        run = page.transcriber.transcribe(chosen.path, options, precision=precision)
        runs.put(session, run)
        yield _started(view, locale)
        for segments, draft in _shown(run, locale):
            status = render.progress(run.progress, locale)
            yield {view.segments: segments, view.draft: draft, view.status: status}
        yield _finished(view, run, chosen, page, locale)
    except Exception as error:  # the door: whatever happens becomes a sentence, and finished text stays
        yield _failed(view, run, doors.explain(error, locale), chosen, page, locale)
    finally:
        if run is not None:
            runs.drop(session, run)
            run.close()


def _read_options(values: tuple[Any, ...]) -> tuple[str | None, TranscribeOptions]:
    """Widget values -> (precision or None for the default, options)."""
    precision, language, task, windows, prompt, words, beam, engine = values
    options = TranscribeOptions(
        language=language or None,
        task=task,
        windows=windows,
        prompt=prompt.strip(),
        words=bool(words),
        beam_size=int(beam),
        engine=engine,
    )
    return precision or None, options


def _shown(run: TranscriptionRun, locale: str) -> Iterator[tuple[str, str]]:
    """The growing list of segments, and the words being written, at most a few times a second.

    They are two, for Gradio sends only what was added to the first.
    """
    shown, drawn, drawn_at_s = "", ("", ""), 0.0
    for finished in _watched(run):
        shown += render.segments(finished, locale)
        now = (shown, render.draft(run.draft))
        age_s = time.monotonic() - drawn_at_s
        if (now != drawn and age_s >= REDRAW_S) or age_s >= ALIVE_S:
            drawn, drawn_at_s = now, time.monotonic()
            yield now


def _watched(run: TranscriptionRun) -> Iterator[list[Segment]]:
    """Iterate the run on a thread of its own, so that its drafts can be seen meanwhile. Yields what has been finished
    since the last look, every LOOK_S; raises what the run raises."""
    finished: list[Segment] = []
    errors: list[Exception] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            for segment in run:
                finished.append(segment)
        except Exception as error:
            errors.append(error)
        finally:
            is_over.set()

    threading.Thread(target=work, name="sotto-run", daemon=True).start()
    n_seen, goes_on = 0, True
    while goes_on:
        goes_on = not is_over.wait(LOOK_S)
        new = finished[n_seen:]
        n_seen += len(new)
        yield new
    if errors:
        raise errors[0]


def _started(view: View, locale: str) -> dict[Any, Any]:
    return {
        view.status: render.waiting(say("transcribe_starting", locale)),
        view.segments: "",
        view.draft: "",
        view.go: gr.Button(interactive=False),
        view.cancel: gr.Button(interactive=True),
        view.results: gr.Row(visible=False),
        view.player: gr.Audio(subtitles=[]),
        **{button: gr.DownloadButton(interactive=True) for button in view.downloads},
    }


def _finished(view: View, run: TranscriptionRun, chosen: Chosen, page: Page, locale: str) -> dict[Any, Any]:
    """The end of the iteration: complete, cancelled, or nothing heard."""
    transcript, names = run.transcript, render.language_names(page.pulse.status().languages, locale)
    if run.is_cancelled:
        status = render.kept(transcript, names, say("transcribe_cancelled", locale), "calm", locale)
    elif not transcript.segments:
        others = replace(transcript, warnings=tuple(w for w in transcript.warnings if w != NO_SPEECH))
        status = render.kept(others, names, say("transcribe_silence", locale), "calm", locale)
    else:
        status = render.summary(transcript, names, locale)
    return _ended(view, transcript, chosen, status, locale)


def _failed(
    view: View, run: TranscriptionRun | None, sentence: str, chosen: Chosen, page: Page, locale: str
) -> dict[Any, Any]:
    """The sentence, and whatever text was finished before."""
    if run is None:
        return {view.status: render.notice(sentence, "error"), view.go: gr.Button(interactive=True)}
    names = render.language_names(page.pulse.status().languages, locale)
    status = render.kept(run.transcript, names, sentence, "error", locale)
    return _ended(view, run.transcript, chosen, status, locale)


def _ended(view: View, transcript: Transcript, chosen: Chosen, status: str, locale: str) -> dict[Any, Any]:
    """Buttons back, all segments drawn, files written; where the disk is full the page says so and keeps the text."""
    updates = {
        view.status: status,
        view.segments: render.segments(transcript.segments, locale),
        view.draft: "",
        view.go: gr.Button(interactive=True),
        view.cancel: gr.Button(interactive=False),
        view.results: gr.Row(visible=bool(transcript.segments)),
    }
    if not transcript.segments:
        return updates
    updates[view.player] = gr.Audio(subtitles=render.subtitles(transcript.segments))
    try:
        paths = write_files(transcript, chosen.name)
    except OSError as error:
        trouble = say("files_not_written", locale, reason=error.strerror or str(error))
        updates[view.status] = status + render.notice(trouble, "error")
        return updates | {button: gr.DownloadButton(interactive=False) for button in view.downloads}
    return updates | dict(zip(view.downloads, map(str, paths), strict=True))


def write_files(transcript: Transcript, source_name: str) -> list[Path]:
    """One file per row of FORMATS in a folder of its own inside Gradio's cache, which Gradio clears by age."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="transcript-", dir=cache))
    paths = []
    for row in FORMATS.values():
        path = folder / row.file_name(source_name)
        path.write_text(row.render(transcript), encoding="utf-8", newline="")
        paths.append(path)
    return paths


def _seek(event: gr.EventData) -> Any:
    return gr.Audio(playback_position=event.start_s)
