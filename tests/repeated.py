"""Loading and closing the same engine many times, for the tests that look for memory that stays behind."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from model_loader.loader import load_engine
from model_loader.memory import MemoryPoint

ROUNDS = 30


def memory_after_each(
    model: str, precision: str, *, engines: Sequence[str] = ("reference",), **how: Any
) -> list[MemoryPoint]:
    """Memory after each of ROUNDS loads and unloads, of these engines in turn. how: other arguments of load_engine.

    A first load of each, which is not counted, brings libraries and kernels. What Python holds then is left out of
    later collections: they are most of a small load's time, and what a load leaves behind is made after it.
    """
    for engine in engines:
        load_engine(model, precision, engine=engine, **how).close()
    gc.collect()
    gc.freeze()
    return [_once(model, precision, {"engine": engine, **how}) for engine in islice(cycle(engines), ROUNDS)]


def _once(model: str, precision: str, how: dict[str, Any]) -> MemoryPoint:
    engine = load_engine(model, precision, **how)
    engine.close()
    after = engine.report.phases.after_unload
    assert after is not None
    return after
