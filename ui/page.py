"""What the tabs share: the transcriber, the recording, the once-a-second reading, and how events are queued."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transcription.interface import LanguageName, PrecisionStatus, Status, Transcriber
from ui.kept import Kept
from ui.recording import Example, Recording
from ui.runs import ActiveRuns

if TYPE_CHECKING:
    from model_loader.memory import MemoryReading

GPU: Mapping[str, Any] = MappingProxyType(
    {"concurrency_id": "gpu", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
)
"""Events that have the device for themselves: one at a time in Gradio's queue. The engine pool has its own lock; this
keeps the order. Each of them follows an event that says at once whether it has to wait (ActiveRuns.has_to_wait)."""
SHARED: Mapping[str, Any] = MappingProxyType({**GPU, "concurrency_id": "shared", "concurrency_limit": 32})
"""Events that share an engine: their windows fill its rows together, or take turns."""
QUIET: Mapping[str, Any] = MappingProxyType({"queue": False, "show_progress": "hidden", "api_visibility": "private"})
"""Events that only read or change the page."""

HISTORY_S = 600.0
FRESH_S = 0.8


@dataclass(frozen=True, slots=True)
class Facts:
    """The part of the status that menus are made of; a change of it redraws them."""

    languages: tuple[LanguageName, ...]
    can_translate: bool
    precision: str
    precisions: tuple[PrecisionStatus, ...]

    @classmethod
    def of(cls, status: Status) -> Facts:
        return cls(status.languages, status.can_translate, status.precision_requested, status.precisions)


@dataclass(frozen=True, slots=True)
class Moment:
    """One reading and when it was taken (seconds of a monotonic clock)."""

    at_s: float
    memory: MemoryReading


class Pulse:
    """The status, read at most about once a second however many pages ask, and the readings of the last minutes."""

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._read_at_s = 0.0
        self._history: deque[Moment] = deque()

    def status(self) -> Status:
        with self._lock:
            now_s = time.monotonic()
            if self._status is None or now_s - self._read_at_s >= FRESH_S:
                self._status = self._transcriber.status()
                self._read_at_s = now_s
                self._history.append(Moment(now_s, self._status.memory))
                while self._history and self._history[0].at_s < now_s - HISTORY_S:
                    self._history.popleft()
            return self._status

    def history(self) -> tuple[Moment, ...]:
        with self._lock:
            return tuple(self._history)


@dataclass(frozen=True, slots=True)
class Menu:
    """Widgets whose choices depend on the facts, and the function that draws their updates (facts, locale)."""

    widgets: tuple[Any, ...]
    draw: Callable[[Facts, str], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Page:
    """Handed to every tab's build(), which may add menus."""

    transcriber: Transcriber
    recording: Recording
    pulse: Pulse
    examples: tuple[Example, ...] = ()
    blocks: Any = None
    """gr.Blocks, for what happens when the page is opened."""
    kept: Kept = field(default_factory=Kept)
    device: ActiveRuns = field(default_factory=ActiveRuns)
    """Runs that have the device for themselves (GPU), or wait for it."""
    menus: list[Menu] = field(default_factory=list)
