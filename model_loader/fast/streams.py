"""Two streams of one GPU: the decoder's steps, which go before other work, and the encoder's. On a CPU there are none.

Streams belong to the thread of the steps, which serves one engine after the other: cuBLAS keeps 32 MiB for each stream
that it has seen, see engine.py's release. An event says how far a stream has come; whoever needs that work lets its
own stream wait for it, and the host does not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_of_thread = threading.local()
"""pairs: (steps, encoder) of this thread by device."""


class Streams:
    """Made by any thread; `steps` is entered once, by the thread that runs them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._both: tuple[Any, Any] | None = None

    def event(self) -> Any:
        """What this thread has launched so far; None on a CPU, where everything is done at once."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: Any) -> None:
        """Let this thread's stream wait for an event (None: nothing to wait for)."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """On this device and the stream of the steps."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            self._both = _pair(torch.cuda.current_device())
            with torch.cuda.stream(self._both[0]):
                yield

    @contextmanager
    def encoder(self, *events: Any) -> Iterator[None]:
        """On the encoder's stream, behind these events."""
        if self._both is None:
            yield
            return
        with torch.cuda.stream(self._both[1]):
            for event in events:
                self.wait(event)
            yield

    def encoder_follows_steps(self) -> None:
        """The encoder's stream waits for all that was launched on the steps'."""
        if self._both is not None:
            self._both[1].wait_stream(self._both[0])

    def finish(self) -> None:
        """Wait for both. Raises what the device reports."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _pair(device: int) -> tuple[Any, Any]:
    """(steps, encoder) of this thread, on the device that is set."""
    pairs: dict[int, tuple[Any, Any]] = _of_thread.__dict__.setdefault("pairs", {})
    if device not in pairs:
        pairs[device] = (torch.cuda.Stream(priority=-1), torch.cuda.Stream())  # type: ignore[no-untyped-call]
    return pairs[device]
