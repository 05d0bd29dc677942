"""Threads that outlive the engine they served and serve the next one.

cuDNN builds its plan of attention anew for every thread that asks, which takes 57 ms, and keeps 80 KiB on the GPU
behind a thread that has ended (cuDNN 9, H200): an engine loaded over and over would take more and more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]

_idle: list[SimpleQueue[Work]] = []
"""Of each thread without work the queue that it waits for."""


def run_in_thread(work: Work) -> threading.Event:
    """Run it in a thread of its own; the event is set when it has ended. One that raises ends its thread."""
    ended = threading.Event()
    try:
        orders = _idle.pop()
    except IndexError:
        orders = SimpleQueue()
        threading.Thread(target=_serve, args=(orders,), name="sotto-engine", daemon=True).start()

    def run() -> None:
        try:
            work()
            _idle.append(orders)
        finally:
            ended.set()

    orders.put(run)
    return ended


def _serve(orders: SimpleQueue[Work]) -> None:
    while True:
        orders.get()()
