"""What a user does on the page, and what the page then shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jiwer

TABS = ("transcribe", "language", "compare", "system")
"""All tabs of the page, in their order."""


def use_example(page: Any, entry: dict[str, Any]) -> None:
    """Press the button of an example, unless it is the chosen recording, and wait until it is."""
    chosen = page.locator(f"#recording-current .chosen:text-is('{entry['file']}')")
    if chosen.count():
        return
    page.locator(".examples button", has_text=clock(entry["seconds"])).filter(
        has_text=re.split("[:：]", entry["label"])[0].strip()
    ).first.click()
    chosen.wait_for()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#recording-file input[type=file]", path)
    page.locator("#recording-current .chosen", has_text=path.name).wait_for()


def transcribe(page: Any) -> str:
    """Press Transcribe, wait for the end, return the text on the page."""
    start(page)
    page.locator("#transcribe-status .summary", has_text="Done in").wait_for()
    return shown_text(page)


def have_text(page: Any) -> None:
    """Some text on the page: that of an earlier run, or a new one."""
    if not shown_text(page):
        transcribe(page)


def start(page: Any) -> None:
    """Press Transcribe and wait until whatever an earlier run said is gone."""
    page.evaluate("for (const old of document.querySelector('#transcribe-status .prose').children) old.id = 'old'")
    page.click("#transcribe-go")
    page.wait_for_selector("#transcribe-status #old", state="detached")


def shown_text(page: Any) -> str:
    return " ".join(page.locator("#segments .segment p").all_inner_texts())


def word_errors(reference: str, heard: str) -> float:
    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^\w\s':]", " ", text.lower()).split())

    return jiwer.wer(plain(reference), plain(heard))


def open_tab(page: Any, name: str) -> None:
    page.click(f"#tab-{name}-button")
    page.wait_for_selector(f"#tab-{name}-button[aria-selected=true]")


def unfold(page: Any, head: str, inside: str) -> None:
    """Click on an accordion's head until what is inside stays in sight: a tab that is shown for the first time is drawn
    in several frames, and Gradio closes meanwhile what was opened at once."""
    for _ in range(5):
        page.click(head)
        page.wait_for_timeout(1000)
        if page.is_visible(inside):
            return
    raise AssertionError(f"{head} does not unfold {inside}")


def open_card(page: Any, card: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#compare-open")
    chooser.value.set_files(card)
