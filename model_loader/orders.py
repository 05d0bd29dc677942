"""Windows handed to an engine one by one: what is asked, what comes back, and who may ask.

An engine that many may use at once (SharedEngine) takes orders from any thread and answers each with a future; windows
of one job and of many share its rows. An engine without `submit` serves one caller at a time, in batches (engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from model_loader.engine import Encoded, Engine, TokenRules, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class WindowOrder:
    """One window. Raises ValueError for what no engine can run.

    Either features or encoded is given. Without a prompt the window is only looked at: logits, no tokens.
    """

    rules: TokenRules | None
    """None where the window is only looked at: it goes beside windows of any rules."""
    prompt: tuple[int, ...] = ()
    features: torch.Tensor | None = None
    """float32 [n_mels, 3000], any device."""
    encoded: Encoded | None = None
    """The encoder's output of this window alone, from an outcome or encode()."""
    max_new_tokens: int = 1
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 samples, reproducibly for one seed whatever else is being decoded."""
    seed: int = 0
    timestamps: bool = True
    needs_first_logits: bool = True
    should_stop: Callable[[], bool] | None = None
    """Asked every few tokens, from the engine's thread; True ends the window with what it has, or before it begins."""
    on_tokens: Callable[[list[int]], None] | None = None
    """Told every few tokens what has been written so far, from the engine's thread; must be quick and never raise."""

    def __post_init__(self) -> None:
        if (self.features is None) == (self.encoded is None):
            raise ValueError("an order needs features or an encoder's output, and not both")
        if self.rules is None and self.prompt:
            raise ValueError("an order with a prompt needs rules for its tokens")
        if self.encoded is not None and self.encoded.n_windows != 1:
            raise ValueError(f"an order is one window; {self.encoded.n_windows} were given")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class WindowOutcome:
    """What became of an order."""

    sequence: TokenSequence
    first_logits: torch.Tensor | None
    """After <|startoftranscript|> alone: float32 [n_vocab] on the CPU; None where they were not asked for."""
    encoded: Encoded
    """For decoding the same window again without encoding it."""
    note: str = ""
    """A sentence for the user: the window was put off because memory ran out. Else empty."""


@runtime_checkable
class SharedEngine(Engine, Protocol):
    """An engine that many may use at once."""

    @property
    def max_rows(self) -> int:
        """Windows decoded together at most; less after memory ran out, none once it is closed."""
        ...

    def capture(self) -> None:
        """Have the memory of all rows and every graph ready; nothing on a CPU. Raises OutOfMemoryError, DeviceError."""
        ...

    def submit(self, order: WindowOrder, *, job: Hashable, urgent: bool = False) -> Future[WindowOutcome]:
        """Windows of different jobs take turns; urgent ones (a microphone's) go before all others.

        The future raises CancelledError (stopped before it began), OutOfMemoryError, DeviceError. Raises ValueError for
        features or prompts of a wrong size, RuntimeError once the engine is closed.
        """
        ...
