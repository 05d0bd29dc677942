"""Orders for the demo checkpoint's windows, and a scheduler that waits or whose steps are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from model_loader.engine import Encoded, GenerateRequest, TokenRules
from model_loader.fast.engine import FastEngine
from model_loader.fast.scheduler import Scheduler
from model_loader.orders import WindowOrder, WindowOutcome
from tests.unit.model_loader.conftest import EOT, LANGUAGES, NO_TIMESTAMPS, SOT, TRANSCRIBE

PREVIOUS = 4500
RULES = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, tuple(range(EOT + 1, NO_TIMESTAMPS)), (220,), 1500)
PROMPTS = [(SOT, code, TRANSCRIBE) for code in LANGUAGES.values()][:4]
WAIT_S = 120


def order(index: int, windows: Encoded, **changes: Any) -> WindowOrder:
    window = Encoded(windows.hidden[index : index + 1])
    values = {"rules": RULES, "prompt": PROMPTS[index], "encoded": window, "max_new_tokens": 12, **changes}
    return WindowOrder(**values)


def tokens(future: Future[WindowOutcome]) -> list[int]:
    return future.result(WAIT_S).sequence.tokens


def by_itself(
    fast: FastEngine, encoded: Encoded, n_tokens: tuple[int, ...], temperature: float = 0.0
) -> list[list[int]]:
    requests = [
        GenerateRequest([list(prompt)], count, RULES, temperature, seed=7)
        for prompt, count in zip(PROMPTS, n_tokens, strict=True)
    ]
    return [fast.generate(fast.select(encoded, [i]), asked)[0].tokens for i, asked in enumerate(requests)]


def counted_steps(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step from now on."""
    sizes: list[int] = []
    step = scheduler._rows.step
    monkeypatch.setattr(
        scheduler._rows, "step", lambda n, *, in_prompt: (sizes.append(n), step(n, in_prompt=in_prompt))[1]
    )
    return sizes


def held(scheduler: Scheduler) -> Callable[[], None]:
    """Keep the scheduler's thread from working until the function returned is called."""
    is_there, go = threading.Event(), threading.Event()

    def wait() -> None:
        is_there.set()
        go.wait(WAIT_S)

    threading.Thread(target=scheduler.call, args=(wait,), daemon=True).start()
    assert is_there.wait(WAIT_S)
    return go.set
