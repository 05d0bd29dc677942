"""Which run belongs to which page, and who waits for the device: what Cancel buttons find, and what a page says
before its turn has come."""

from __future__ import annotations

import threading
from typing import Protocol


class Cancellable(Protocol):
    """A run of any kind."""

    def cancel(self) -> None: ...


class Waiting:
    """Presses of one page that have not had their turn, because another run has the device for itself. Gradio's queue
    hands the turns out in the order of the presses; Cancel gives up those that were made so far."""

    def __init__(self) -> None:
        self.n_pressed = self.n_given_up = self.n_turns = 0

    def cancel(self) -> None:
        self.n_given_up = self.n_pressed


class ActiveRuns:
    """Runs by page. Safe across threads."""

    def __init__(self) -> None:
        self._runs: dict[str, Cancellable] = {}
        self._lock = threading.Lock()

    def put(self, page: str, run: Cancellable) -> None:
        with self._lock:
            self._runs[page] = run

    def drop(self, page: str, run: Cancellable) -> None:
        with self._lock:
            if self._runs.get(page) is run:
                del self._runs[page]

    def cancel(self, page: str) -> Cancellable | None:
        """Gives what was cancelled."""
        with self._lock:
            run = self._runs.get(page)
        if run is not None:
            run.cancel()
        return run

    def has_to_wait(self, page: str) -> bool:
        """Whether a run of another page has begun; this page is then noted as waiting, so that Cancel finds it."""
        with self._lock:
            is_taken = any(name != page and not isinstance(run, Waiting) for name, run in self._runs.items())
            own = self._runs.get(page)
            if is_taken or isinstance(own, Waiting):
                waiting = own if isinstance(own, Waiting) else Waiting()
                waiting.n_pressed += 1
                self._runs[page] = waiting
            return is_taken

    def may_begin(self, page: str) -> bool:
        """A turn of the page has come; False where its press was given up while it waited."""
        with self._lock:
            waiting = self._runs.get(page)
            if not isinstance(waiting, Waiting):
                return True
            waiting.n_turns += 1
            if waiting.n_turns == waiting.n_pressed:
                del self._runs[page]
            return waiting.n_turns > waiting.n_given_up
