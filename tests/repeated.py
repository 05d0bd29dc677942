"""Loading and closing the same engine many times, for the tests that look for memory that stays behind."""

from __future__ import annotations

import gc
from typing import Any

from model_loader.loader import load_engine
from model_loader.memory import MemoryPoint

ROUNDS = 30


def memory_after_each(model: str, precision: str, **how: Any) -> list[MemoryPoint]:
    """Memory after each of ROUNDS loads and unloads. how: arguments of load_engine.

    A first load, which is not counted, brings libraries and kernels. What Python holds then is left out of later
    collections: they are most of a small load's time, and what a load leaves behind is made after it.
    """
    load_engine(model, precision, **how).close()
    gc.collect()
    gc.freeze()
    try:
        return [_once(model, precision, how) for _ in range(ROUNDS)]
    finally:
        gc.unfreeze()


def _once(model: str, precision: str, how: dict[str, Any]) -> MemoryPoint:
    engine = load_engine(model, precision, **how)
    engine.close()
    after = engine.report.phases.after_unload
    assert after is not None
    return after
