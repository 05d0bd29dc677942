"""Compare: several precisions on one recording, one after the other, each row measured and shown as it finishes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from model_loader.precision import PRECISIONS
from transcription.compare import ORDERS
from transcription.options import WARM_RUNS
from transcription.results import Result
from transcription.run_card import load_card
from ui import compare_view, doors, fit_view, recording, render
from ui.compare_run import begin, ending, steps, stopped
from ui.page import GPU, QUIET, Facts, Menu, Page
from ui.recording import Chosen
from ui.runs import Waiting
from ui.tabs import calibrate
from ui.tabs.transcribe import PLAY_JS
from ui.texts import label, page_locale, say

if TYPE_CHECKING:
    from collections.abc import Callable

# As an upload does, the file goes to the player in the browser alone (recording.py says why).
LOAD_JS = "(file, now) => (file ? sotto.loading(file) : now)"
DOWNLOADS = {"card": ("compare_save_card", ".json"), "csv": ("compare_save_csv", ".csv"),
             "markdown": ("compare_save_markdown", ".md")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """The widgets that a comparison writes to."""

    go: Any
    cancel: Any
    status: Any
    figures: Any
    verdicts: Any
    charts: Any
    memory: Any
    time: Any
    words: dict[str, Any]
    """By precision."""
    old_words: Any
    opened: Any
    """The button that opens a card."""
    close: Any
    """The button that closes it."""
    results: Any
    downloads: dict[str, Any]
    shown: Any
    """gr.State of Shown: what the page shows."""
    browser: Any
    """Hidden: the name under which this browser's last comparison is kept (page.js)."""

    def all(self) -> list[Any]:
        fixed = [self.go, self.cancel, self.status, self.figures, self.verdicts]
        return [
            *fixed,
            *self.words.values(),
            self.old_words,
            self.opened,
            self.close,
            self.results,
            *self.downloads.values(),
            self.shown,
            self.browser,
        ]


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows."""

    result: Result
    recording: Chosen | None = None
    """What the new rows were measured on; None while there are none."""


NOTHING = Shown(Result(None))


def build(page: Page) -> None:
    """Draw the tab and wire it."""
    inputs, calibrate_now = _inputs(page)
    view = _view(*_buttons())
    calibrated = calibrate.build(page, calibrate_now.button)

    def queue_up(request: gr.Request) -> dict[Any, Any]:
        return _queue_up(page, view, request)

    def start(request: gr.Request, chosen: Chosen | None, before: Shown, browser: str, *values: Any) -> Iterator[Any]:
        yield from _compare(page, view, chosen, before, browser, values, request)

    def stop(request: gr.Request, before: Shown) -> dict[Any, Any]:
        return _stop(page, view, before, request)

    def restore(request: gr.Request, browser: str) -> dict[Any, Any]:
        return _restore(page, view, browser, page_locale(request))

    def reopen(request: gr.Request, path: str | None, before: Shown) -> dict[Any, Any]:
        return _open(view, path, before, page_locale(request))

    def need(request: gr.Request, names: Sequence[str]) -> tuple[Any, str]:
        return _need(page, names, page_locale(request))

    def forget(request: gr.Request, before: Shown) -> dict[Any, Any]:
        return _close(view, before, page_locale(request))

    hint = [calibrate_now.row, calibrate_now.sentence]
    inputs[0].change(need, inputs[0], hint, **QUIET)
    calibrated.then(need, inputs[0], hint, **QUIET)
    given = [page.recording.chosen, view.shown, view.browser, *inputs]
    said = [view.status, view.go, view.cancel]
    # Every press has a turn of its own: by itself Gradio drops one that comes while an earlier one, given up, waits.
    asked = view.go.click(queue_up, None, said, **QUIET)
    asked.then(start, given, view.all(), trigger_mode="multiple", **GPU)
    view.cancel.click(stop, view.shown, said, **QUIET)
    charts = [view.charts, view.memory, view.time]
    # Gradio 6.31's BrowserState has not read its value yet when a page has just been opened.
    opening = page.blocks.load(restore, view.browser, view.all(), js="() => sotto.browser()", **QUIET)
    opening.then(_draw_charts, view.shown, charts, **QUIET)
    # The change of a state is not told after an event without queue (Gradio 6.31), so this one draws them by itself.
    view.opened.upload(reopen, [view.opened, view.shown], view.all(), **QUIET).then(
        _draw_charts, view.shown, charts, **QUIET
    )
    view.close.click(forget, view.shown, view.all(), **QUIET).then(_draw_charts, view.shown, charts, **QUIET)
    view.shown.change(_draw_charts, view.shown, charts, **QUIET)
    card = page.recording
    file, start_s = gr.File(visible="hidden"), gr.State(None)
    for name, words in view.words.items():
        clicked = words.select(
            _seek(name), [view.shown, card.chosen], [card.chosen, card.current, file, start_s], **QUIET
        )
        loaded = clicked.then(None, [file, card.player], card.player, js=LOAD_JS, api_visibility="private")
        settled = loaded.then(None, js="() => sotto.loaded()", api_visibility="private")
        settled.then(_play_from, start_s, card.player, **QUIET).then(None, js=PLAY_JS)


@dataclass(frozen=True, slots=True)
class CalibrateNow:
    """Under the precisions, where a chosen one needs a calibration that is not there."""

    row: Any
    sentence: Any
    button: Any


def _inputs(page: Page) -> tuple[list[Any], CalibrateNow]:
    """The inputs in the order that _compare takes their values."""
    precisions = gr.CheckboxGroup(
        [], label=label("compare_precisions"), info=label("compare_precisions_info"), elem_id="compare-precisions"
    )
    with gr.Row(visible=False, elem_id="compare-uncalibrated") as row:
        sentence = gr.HTML()
        button = gr.Button(label("calibrate_now"), min_width=180, size="md", scale=0, visible=bool(page.examples),
                           elem_id="calibrate-now")  # fmt: skip
    about = gr.HTML(elem_id="compare-about")
    reference = gr.Textbox(
        "", label=label("compare_reference"), info=label("compare_reference_info"), lines=2, max_lines=6,
        elem_id="compare-reference",
    )  # fmt: skip
    with gr.Row(elem_classes="options"):
        repeats = gr.Slider(
            1,
            10,
            value=WARM_RUNS,
            step=1,
            label=label("compare_repeats"),
            info=label("compare_repeats_info"),
            min_width=220,
        )
        order = gr.Radio(
            list(ORDERS), value=ORDERS[0], label=label("compare_order"), info=label("compare_order_info"), min_width=220
        )
        language = gr.Dropdown(
            [("", "")], value="", label=label("option_language"), min_width=200, elem_id="compare-language"
        )
    page.menus.append(Menu((precisions, about, order, language), _menus))
    return [precisions, reference, repeats, order, language], CalibrateNow(row, sentence, button)


def _menus(facts: Facts, locale: str) -> tuple[Any, ...]:
    usable = [row for row in facts.precisions if row.unavailable is None]
    orders = [(say(f"choice_{order}", locale), order) for order in ORDERS]
    return (
        gr.CheckboxGroup(choices=[(compare_view.choice(row, locale), row.name) for row in usable]),
        fit_view.choices(usable, locale)
        + compare_view.about(usable, locale)
        + compare_view.unavailable(facts.precisions, locale),
        gr.Radio(choices=orders),
        gr.Dropdown(choices=render.language_choices(facts.languages, locale)),
    )


def _uncalibrated(page: Page, names: Sequence[str]) -> str:
    """Those of the names that need a calibration first, with commas. Read anew: it may have been made just now."""
    rows = page.transcriber.status().precisions
    return ", ".join(row.name for row in rows if row.lacks_calibration and row.name in names)


def _need(page: Page, names: Sequence[str], locale: str) -> tuple[Any, str]:
    """(row, sentence) of CalibrateNow."""
    lacking = _uncalibrated(page, names)
    sentence = say("calibrate_needed", locale, names=lacking)
    return gr.Row(visible=bool(lacking)), render.notice(sentence) if lacking else ""


def _buttons() -> tuple[Any, Any, Any, Any]:
    with gr.Row(elem_classes="actions"):
        go = gr.Button(label("compare_go"), variant="primary", min_width=140, elem_id="compare-go")
        cancel = gr.Button(label("compare_cancel"), min_width=100, interactive=False, elem_id="compare-cancel")
        opened = gr.UploadButton(
            label("compare_load"), file_types=[".json"], min_width=140, size="lg", elem_id="compare-open"
        )
        close = gr.Button(label("compare_close"), min_width=140, visible=False, elem_id="compare-close")
    return go, cancel, opened, close


def _view(go: Any, cancel: Any, opened: Any, close: Any) -> View:
    status = gr.HTML(render.empty(label("compare_empty")), elem_id="compare-status")
    with gr.Row(visible=False, elem_classes="results") as results:
        downloads = {
            kind: gr.DownloadButton(label(text), size="sm", min_width=90, elem_id=f"compare-{kind}")
            for kind, (text, _) in DOWNLOADS.items()
        }
    verdicts = gr.HTML(elem_id="compare-verdicts")
    figures = gr.HTML(elem_id="compare-figures")
    charts, memory, time = _charts()
    words = {
        name: gr.HighlightedText(
            visible=False, color_map=compare_view.diff_colours(), show_legend=False, combine_adjacent=False,
            elem_classes="words", elem_id=f"compare-words-{name}", buttons=[],
        )
        for name in PRECISIONS
    }  # fmt: skip
    old_words, shown = gr.HTML(elem_id="compare-old-words"), gr.State(NOTHING)
    browser = gr.Textbox("", visible="hidden", elem_id="compare-browser")
    return View(
        go, cancel, status, figures, verdicts, charts, memory, time, words, old_words, opened, close, results,
        downloads, shown, browser,
    )  # fmt: skip


def _charts() -> tuple[Any, Any, Any]:
    """(row, memory, time)."""
    how = {"x_title": " ", "y_title": " ", "color_title": " ", "min_width": 260, "buttons": []}
    how |= {"colors_in_legend": [], "x_label_angle": -20}
    with gr.Row(visible=False, elem_id="compare-charts") as charts:
        memory = gr.BarPlot(
            x="name", y="mib", color="part", color_map=compare_view.chart_colours(compare_view.PARTS),
            label=label("compare_memory"), **how,
        )  # fmt: skip
        time = gr.LinePlot(
            x="name", y="seconds", color="run", color_map=compare_view.chart_colours(compare_view.RUNS),
            label=label("compare_time"), y_lim=[0, None], **how,
        )  # fmt: skip
    return charts, memory, time


def _draw_charts(request: gr.Request, shown: Shown) -> tuple[Any, Any, Any]:
    """An event of its own: of the values that a running handler yields, Gradio 6.31's charts miss the last.

    A chart is hidden until it has two rows to compare.
    """
    locale, result = page_locale(request), shown.result
    memory, time = compare_view.memory_frame(result, locale), compare_view.time_frame(result, locale)
    has_bars, has_lines = compare_view.has_bars(memory), compare_view.has_lines(time)
    return (
        gr.Row(visible=has_bars or has_lines),
        gr.BarPlot(value=memory, visible=True) if has_bars else gr.BarPlot(visible=False),
        gr.LinePlot(value=time, y_lim=compare_view.seconds_limits(time), visible=True)
        if has_lines
        else gr.LinePlot(visible=False),
    )


# --- a comparison ----------------------------------------------------------------------------------------------------


def _queue_up(page: Page, view: View, request: gr.Request) -> dict[Any, Any]:
    """Said at once where another comparison or a calibration has the device: the run itself begins in its turn."""
    if not page.device.has_to_wait(str(request.session_hash)):
        return {view.status: gr.skip()}
    sentence = say("compare_waiting", page_locale(request))
    return {view.status: render.waiting(sentence), view.go: gr.Button(interactive=False),
            view.cancel: gr.Button(interactive=True)}  # fmt: skip


def _stop(page: Page, view: View, before: Shown, request: gr.Request) -> dict[Any, Any]:
    """What runs says by itself that it has ended; what waits for its turn is given up here."""
    if not isinstance(page.device.cancel(str(request.session_hash)), Waiting):
        return {view.status: gr.skip()}
    sentence = stopped(before.result, page_locale(request))
    return {view.status: render.line(sentence), view.go: gr.Button(interactive=True),
            view.cancel: gr.Button(interactive=False)}  # fmt: skip


def _compare(
    page: Page,
    view: View,
    chosen: Chosen | None,
    before: Shown,
    browser: str,
    values: Sequence[Any],
    request: gr.Request,
) -> Iterator[dict[Any, Any]]:
    """Rows as they are measured; whatever ends it, those that are finished stay and can be downloaded. Until the first
    one is there, the result before stays."""
    locale, session = page_locale(request), str(request.session_hash)
    names, lacking = values[0], _uncalibrated(page, values[0])
    refusal = "recording_none" if chosen is None else "compare_two" if len(names) < 2 else None
    if not page.device.may_begin(session):
        yield {view.status: gr.skip()}  # _stop has said so
        return
    if chosen is None or refusal or lacking:
        sentence = say(refusal or "compare_uncalibrated", locale, names=lacking)
        yield _idle(view, before) | {view.status: render.notice(sentence)}
        return
    yield _started(view, len(names), locale)
    old, card, comparison = before.result.old, None, None
    try:
        comparison, new_card = begin(page.transcriber, chosen, values)
        page.device.put(session, comparison)
        for item in steps(comparison, locale):
            if isinstance(item, str):
                yield {view.status: item}
                continue
            card = replace(card, rows=item) if card else new_card(item)
            page.kept.put(browser, card, chosen)
            yield _drawn(view, Shown(Result(card, old), chosen), locale) | {
                view.results: gr.Row(visible=False),
                view.close: gr.Button(interactive=False),
            }
        status = render.line(ending(comparison, card, before.result, locale))
    except Exception as error:  # the door; rows that finished stay
        status = render.notice(doors.explain(error, locale), "error")
    finally:
        if comparison is not None:
            page.device.drop(session, comparison)
    ended = _redrawn(view, Shown(Result(card, old), chosen), locale) if card else {}
    yield ended | _idle(view, before) | {view.status: status}


def _idle(view: View, before: Shown) -> dict[Any, Any]:
    """The buttons while nothing is measured."""
    return {
        view.go: gr.Button(interactive=True),
        view.cancel: gr.Button(interactive=False),
        view.opened: gr.UploadButton(interactive=True),
        view.close: gr.Button(visible=before.result.old is not None, interactive=True),
    }


def _started(view: View, n: int, locale: str) -> dict[Any, Any]:
    """A card cannot be opened or closed meanwhile: the rows that come are drawn beside those of the beginning."""
    return {
        view.status: render.waiting(say("compare_running", locale, done=1, total=n, step="")),
        view.go: gr.Button(interactive=False),
        view.cancel: gr.Button(interactive=True),
        view.opened: gr.UploadButton(interactive=False),
        view.close: gr.Button(interactive=False),
    }


def _restore(page: Page, view: View, browser: str, locale: str) -> dict[Any, Any]:
    """What this browser measured last, in a page that was opened anew."""
    kept = page.kept.get(browser)
    if kept is None:
        return {view.browser: browser}
    card, chosen = kept
    sentence = say("compare_restored", locale, name=card.recording, n=len(card.rows), date=card.minute)
    updates = _redrawn(view, Shown(Result(card), chosen), locale)
    return updates | {view.status: render.line(sentence), view.browser: browser}


def _drawn(view: View, shown: Shown, locale: str) -> dict[Any, Any]:
    """Table, verdicts and words of a result; the charts follow (_draw_charts)."""
    result = shown.result
    updates = {
        view.shown: shown,
        view.figures: compare_view.table(result, locale),
        view.verdicts: compare_view.verdicts(result, locale),
        view.old_words: compare_view.old_words(result, locale),
        view.close: gr.Button(visible=result.old is not None),
    }
    rows = {row.precision: row for row in (result.card.rows if result.card else ())}
    for name, words in view.words.items():
        row = rows.get(name)
        if row is not None and compare_view.parts(row):
            updates[words] = gr.HighlightedText(
                value=compare_view.tokens(row, locale), label=compare_view.words_label(row, locale), visible=True
            )
        else:
            updates[words] = gr.HighlightedText(visible=False)
    return updates


def _files(view: View, result: Result) -> dict[Any, Any]:
    """One file per download in a folder of its own inside Gradio's cache, which Gradio clears by age.

    An opened card alone is not saved as a card again.
    """
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="compare-", dir=cache))
    card = result.card or result.old
    assert card is not None
    stem = f"sotto-compare-{card.date[:10]}"
    updates: dict[Any, Any] = {view.results: gr.Row(visible=True)}
    for kind, (_, suffix) in DOWNLOADS.items():
        if kind == "card" and result.card is None:
            updates[view.downloads[kind]] = gr.DownloadButton(visible=False)
            continue
        path = folder / f"{stem}{suffix}"
        path.write_text(result.render(kind), encoding="utf-8", newline="")
        updates[view.downloads[kind]] = gr.DownloadButton(value=str(path), visible=True)
    return updates


def _open(view: View, path: str | None, before: Shown, locale: str) -> dict[Any, Any]:
    """An earlier run card: its rows beside those that the page shows."""
    if path is None:
        return {view.status: gr.skip()}
    try:
        old = load_card(Path(path))
    except Exception as error:  # the door
        return {view.status: render.notice(doors.explain(error, locale), "error")}
    result = Result(before.result.card, old)
    sentence = say("compare_opened", locale, name=old.recording, n=len(old.rows), date=old.minute, device=old.device)
    return _redrawn(view, Shown(result, before.recording), locale) | {view.status: render.line(sentence)}


def _close(view: View, before: Shown, locale: str) -> dict[Any, Any]:
    """The rows of the opened card go; those that the page measured stay."""
    left = Shown(Result(before.result.card), before.recording)
    return _redrawn(view, left, locale) | {view.status: render.line(say("compare_closed", locale))}


def _redrawn(view: View, shown: Shown, locale: str) -> dict[Any, Any]:
    """Everything of a result; its files too, where there is one."""
    has_rows = shown.result.card or shown.result.old
    return _drawn(view, shown, locale) | (
        _files(view, shown.result) if has_rows else {view.results: gr.Row(visible=False)}
    )


def _seek(name: str) -> Callable[[Shown, Chosen | None, gr.SelectData], tuple[Any, Any, Any, Any]]:
    """The handler of a click on a word of one precision: the chosen recording, its line, its file, the second.

    What was compared becomes the chosen recording again where another one is by now.
    """

    def seek(shown: Shown, chosen: Chosen | None, event: gr.SelectData) -> tuple[Any, Any, Any, Any]:
        rows = shown.result.card.rows if shown.result.card else ()
        parts = next((compare_view.parts(row) for row in rows if row.precision == name), ())
        index = event.index if isinstance(event.index, int) else -1
        start_s = parts[index].start_s if 0 <= index < len(parts) else None
        if start_s is None or shown.recording is None:
            return gr.skip(), gr.skip(), None, None
        if shown.recording == chosen:
            return gr.skip(), gr.skip(), None, start_s
        return shown.recording, recording.shown(shown.recording), str(shown.recording.path), start_s

    return seek


def _play_from(start_s: float | None) -> Any:
    return gr.skip() if start_s is None else gr.Audio(playback_position=start_s)
