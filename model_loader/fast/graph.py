"""Capture and replay one function of fixed shapes as a CUDA graph. Knows nothing of Whisper.

After kyutai-labs/moshi, moshi/utils/compile.py, CUDAGraphed: a function runs once as it is, which loads and compiles
its kernels; then it is captured, and every later call copies its arguments into place and replays. A function that
changes state of its own (a decoder step) makes that first run count as its first call; one that does not (the encoder)
is captured at its first call already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capture:
    """What a graph cost."""

    name: str
    capture_s: float
    n_bytes: int
    """Memory reserved while capturing: the graph's own working set."""


@dataclass(frozen=True, slots=True)
class CaptureCost:
    """What it cost to have every graph ready before the first recording."""

    n_graphs: int
    seconds: float
    n_bytes: int
    """Memory reserved meanwhile: the graphs' own, and the caches of all rows."""


class Captured:
    """A function of tensors on one GPU. Returns the same tensors at every call, with new contents."""

    def __init__(self, function: Callable[..., Any], name: str, *, has_state: bool, pool: Any = None) -> None:
        """name: for reports. pool: memory shared with other graphs that never run at the same time (share_memory)."""
        self._function: Callable[..., Any] | None = function
        self._name = name
        self._has_state, self._is_warm = has_state, False
        self._pool = pool
        self._graph: Any = None
        self._arguments: tuple[torch.Tensor, ...] = ()
        self._result: Any = None
        self.capture: Capture | None = None
        """Known once the graph exists."""

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Raises ValueError naming the argument that differs from the captured one."""
        if self._function is None:
            raise RuntimeError(f"{self._name} was released")
        if self._graph is None:
            if not self._is_warm:
                result = self._function(*arguments)
                self._is_warm = True  # not after an error: nothing may be loaded or compiled while capturing
                if self._has_state:
                    return result
                del result
            self._capture(arguments)
        self._check(arguments)
        for place, argument in zip(self._arguments, arguments, strict=True):
            place.copy_(argument)
        self._graph.replay()
        return self._result

    def release(self) -> None:
        """Give up the graph and its memory."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._function = self._result = None
        self._arguments = ()

    def _capture(self, arguments: tuple[torch.Tensor, ...]) -> None:
        assert self._function is not None
        device = torch.device("cuda", torch.cuda.current_device())
        started_s = time.perf_counter()
        torch.cuda.empty_cache()  # as capturing does itself: what it gives back is not this graph's
        before = torch.cuda.memory_reserved(device)
        self._arguments = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are forbidden while capturing: another may be reading the memory's state.
        # On the caller's stream where it has one: kernels keep the priority of the stream that captured them.
        current = torch.cuda.current_stream(device)
        stream = None if current == torch.cuda.default_stream(device) else current
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._result = self._function(*self._arguments)
        self._graph = graph  # not before it is whole: after an error the next call captures anew
        n_bytes = torch.cuda.memory_reserved(device) - before
        self.capture = Capture(self._name, time.perf_counter() - started_s, n_bytes)
        logger.info(
            "event=graph_captured name=%s capture_s=%.3f n_bytes=%d",
            *(self.capture.name, self.capture.capture_s, self.capture.n_bytes),
        )

    def _check(self, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments) != len(self._arguments):
            raise ValueError(f"{self._name} was captured with {len(self._arguments)} arguments, not {len(arguments)}")
        for index, (place, argument) in enumerate(zip(self._arguments, arguments, strict=True)):
            captured, given = _looks(place), _looks(argument)
            if captured != given:
                raise ValueError(f"argument {index} of {self._name} was captured as {captured}; this one is {given}")


def share_memory() -> Any:
    """A memory pool for graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


def _looks(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
