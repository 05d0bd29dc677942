"""What the scheduler knows of a window on its way: the order, whose turn it was, and how far it is in its row."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from model_loader.engine import Encoded
from model_loader.orders import WindowOrder, WindowOutcome

Question = Callable[[], bool]
Turn = tuple[Hashable, Question | None]
"""Who takes turns: a job's windows that stop together, so that its question is asked once for all that wait."""


@dataclass(slots=True, eq=False)
class Task:
    """An order on its way."""

    order: WindowOrder
    turn: Turn
    urgent: bool
    future: Future[WindowOutcome]
    ready: Any
    """The caller's event: features or encoder output are there. None on a CPU."""
    encoded: Encoded | None
    note: str = ""


@dataclass(slots=True)
class Busy:
    """A task in a row."""

    task: Task
    asked_before: int
    """Looks asked for before it began: they saw the row's former window."""
    wants_logits: bool
    """Of its first step."""
    is_probing: bool
    """It reads <|startoftranscript|> alone first, as its prompt begins with other tokens."""
    n_steps: int = 0
    is_stopped: bool = False

    @property
    def is_over(self) -> bool:
        """It is known without a look that no step is needed any more: stopped, or its last token has been chosen."""
        n_prompt = max(len(self.task.order.prompt), 1)
        return self.is_stopped or self.n_steps >= n_prompt + self.task.order.max_new_tokens - 1
