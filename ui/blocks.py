"""The page: header, banner, recording, tabs, and the memory panel beside them. No handler does work here.

To add a tab: one file in ui/tabs with build(page), one row in TABS, its name in ui/texts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from transcription.interface import Transcriber
from ui import memory_panel, recording, render
from ui.kept import Kept
from ui.page import QUIET, Facts, Page, Pulse
from ui.recording import Example
from ui.tabs import compare, language, system, transcribe
from ui.texts import label, page_locale, translations

FOLDER = Path(__file__).parent
TICK_S = 1.0
CACHE_CHECK_S = 3600
CACHE_KEEP_S = 24 * 3600
"""Uploads and written files older than this are deleted; longer than the longest job."""


@dataclass(frozen=True, slots=True)
class Tab:
    """One tab. `label` is a key of ui/texts.py."""

    id: str
    label: str
    build: Callable[[Page], None]
    uses_recording: bool = True


TABS: tuple[Tab, ...] = (
    Tab("transcribe", "tab_transcribe", transcribe.build),
    Tab("language", "tab_language", language.build),
    Tab("compare", "tab_compare", compare.build),
    Tab("system", "tab_system", system.build, uses_recording=False),
)


def build_ui(transcriber: Transcriber, examples: Sequence[Example] = (), *, kept: Path | None = None) -> gr.Blocks:
    """The whole page over a transcriber. Launch or mount it with page_options(). kept: folder of each browser's last
    comparison; None keeps none."""
    with gr.Blocks(title="Sotto", analytics_enabled=False, delete_cache=(CACHE_CHECK_S, CACHE_KEEP_S)) as blocks:
        gr.HTML(_header(), elem_id="header")
        banner = gr.HTML(elem_id="banner")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=7, min_width=300, elem_id="main"):
                card = recording.build(examples)
                page = Page(transcriber, card, Pulse(transcriber), tuple(examples), blocks, Kept(kept))
                with gr.Tabs(elem_id="tabs"):
                    for tab in TABS:
                        _build_tab(tab, page)
            with gr.Column(scale=3, min_width=300, elem_id="side"):
                panel = gr.HTML(elem_id="memory-panel")

        _wire_pulse(blocks, page, banner, panel)
    return blocks


def _wire_pulse(blocks: gr.Blocks, page: Page, banner: Any, panel: Any) -> None:
    """Once a second the memory; banner and menus when what they show has changed (a model has been loaded).

    The browser tells by a mark that it has: every output of a tick costs it work, even one that is skipped.
    """
    mark = gr.Textbox(visible="hidden", elem_id="facts-mark")
    widgets = [widget for menu in page.menus for widget in menu.widgets]

    def tick(request: gr.Request) -> tuple[str, str]:
        status = page.pulse.status()
        html = memory_panel.panel(status, page.pulse.history(), page_locale(request))
        return html, str(hash((Facts.of(status), status.banner)))

    def draw(request: gr.Request) -> list[Any]:
        status, locale = page.pulse.status(), page_locale(request)
        facts = Facts.of(status)
        return [render.banner(status, locale), *(update for menu in page.menus for update in menu.draw(facts, locale))]

    gr.Timer(TICK_S).tick(tick, None, [panel, mark], **QUIET)
    blocks.load(tick, None, [panel, mark], **QUIET)
    mark.change(draw, None, [banner, *widgets], **QUIET)


def page_options(*, examples_folder: Path | None = None, max_upload_mb: int | None = None) -> dict[str, Any]:
    """Keyword arguments that gr.mount_gradio_app() and Blocks.launch() both take: looks, languages, limits."""
    return {
        "theme": theme(),
        "css_paths": FOLDER / "style.css",
        "head": f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
        "i18n": translations(),
        "footer_links": ["settings"],
        "run_history": False,  # it would keep every call in the browser
        "ssr_mode": False,
        "enable_monitoring": False,
        "show_error": False,  # handlers say their own sentences; a traceback never reaches the page
        "allowed_paths": [str(examples_folder.resolve())] if examples_folder else [],
        "max_file_size": f"{max_upload_mb}mb" if max_upload_mb else None,
    }


def theme() -> Any:
    """Calm, quiet colours; fonts of the reader's own system, so that nothing is fetched from elsewhere."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", text_size="md", font=sans, font_mono=mono
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )


def _header() -> str:
    return f"<h1>Sotto</h1><p>{label('tagline')}</p>"


def _build_tab(tab: Tab, page: Page) -> None:
    with gr.Tab(label(tab.label), id=tab.id, elem_id=f"tab-{tab.id}") as drawn:
        tab.build(page)
    # In the page alone, without a way to the server and back.
    hides = "false" if tab.uses_recording else "true"
    drawn.select(None, js=f"() => {{ sotto.hideRecording({hides}); }}", api_visibility="private")
