"""A comparison while it runs, as the Compare tab follows it: how it begins, its rows and status lines, how it ends.

In: a transcriber, what was chosen, and the result that was there before. Out: rows, and sentences for the status line.
No widget is known here.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from transcription.interface import CompareRow, Comparison, Transcriber
from transcription.options import TranscribeOptions
from transcription.results import Result
from transcription.run_card import RunCard, make_card
from ui import render
from ui.recording import Chosen
from ui.texts import say

LOOK_S = 0.5
"""How soon a new step is shown."""
ALIVE_S = 5.0
"""A step that lasts is told again: only while telling does Gradio notice that nobody listens any more."""


def begin(
    transcriber: Transcriber, chosen: Chosen, values: Sequence[Any]
) -> tuple[Comparison, Callable[[Sequence[CompareRow]], RunCard]]:
    """The comparison, and what makes its card of the first rows: that reads the whole recording, for its hash."""
    names, text, repeats, order, language = values
    how = {"repeats": int(repeats), "order": order, "seed": secrets.randbelow(10_000)}
    options = TranscribeOptions(language=language or None)
    comparison = transcriber.compare(chosen.path, names, options, reference_text=text.strip(), **how)
    about = {"source": chosen.path, "name": chosen.name, "options": options, "reference_text": text, **how}
    return comparison, partial(make_card, **about)


def followed(comparison: Comparison) -> Iterator[CompareRow | None]:
    """Rows as they come, and None every now and then: a handler that waits cannot be ended, one that yields can.

    Closing it cancels the comparison. Raises what the comparison raises.
    """
    found: queue.Queue[CompareRow | Exception | None] = queue.Queue()

    def work() -> None:
        try:
            for row in comparison:
                found.put(row)
            found.put(None)
        except Exception as error:  # handed to the handler, which is the door
            found.put(error)

    threading.Thread(target=work, daemon=True).start()
    is_over = False
    try:
        while not is_over:
            try:
                item = found.get(timeout=LOOK_S)
            except queue.Empty:
                yield None
                continue
            is_over = not isinstance(item, CompareRow)
            if isinstance(item, Exception):
                raise item
            if item is not None:
                yield item
    finally:
        if not is_over:  # closed from outside
            comparison.cancel()


def steps(comparison: Comparison, locale: str) -> Iterator[str | tuple[CompareRow, ...]]:
    """All rows so far whenever one has been measured, and the status line: when it changes and every now and then."""
    rows: dict[str, CompareRow] = {}
    status, told_at_s = "", time.monotonic()
    for row in followed(comparison):
        if row is not None:
            rows[row.precision] = row
            yield tuple(rows[name] for name in comparison.names if name in rows)
        now = _measuring(comparison, rows, locale)
        if now != status or time.monotonic() - told_at_s >= ALIVE_S:  # each costs the page work for every widget
            status, told_at_s = now, time.monotonic()
            yield status


def _measuring(comparison: Comparison, rows: dict[str, CompareRow], locale: str) -> str:
    total = len(comparison.names)
    return render.waiting(
        say("compare_running", locale, done=min(len(rows) + 1, total), total=total, step=comparison.step)
    )


def ending(comparison: Comparison, card: RunCard | None, before: Result, locale: str) -> str:
    if comparison.is_cancelled:
        return say("compare_cancelled", locale) if card else stopped(before, locale)
    return say("compare_done", locale, n=sum(not row.failed for row in card.rows) if card else 0)


def stopped(before: Result, locale: str) -> str:
    return say("compare_stopped_kept" if before.rows else "compare_stopped", locale)
