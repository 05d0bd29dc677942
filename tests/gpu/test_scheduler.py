"""Continuous batching on a real GPU: graphs of every size, refill beside the encoder, out-of-memory, a second life."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model_loader.engine import Encoded, TokenRules, release
from model_loader.fast.engine import FastEngine
from model_loader.fast.scheduler import ENCODED_TOGETHER
from model_loader.loader import load_engine
from model_loader.orders import WindowOrder
from tests.unit.model_loader.fast.orders import held

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

EOT, SOT, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS, PREVIOUS = 4396, 4397, 4398, 4498, 4502, 4500
RULES = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, tuple(range(EOT + 1, NO_TIMESTAMPS)), (220,), 1500)
ENDLESS = replace(RULES, suppress=(EOT, *RULES.suppress))
WAIT_S = 120
MIB = 2**20


@pytest.fixture(scope="module")
def engine() -> Iterator[FastEngine]:
    made = load_engine("demo", "fp32", engine="fast", device="cuda")
    assert isinstance(made, FastEngine)
    yield made
    made.close()


@pytest.fixture(scope="module")
def many(features: torch.Tensor) -> torch.Tensor:
    """Unlike windows: the tone at twelve loudnesses. [12, 80, 3000]."""
    return torch.cat([features * (1 - 0.05 * index) for index in range(12)]).cuda()


def order(features: torch.Tensor, n_tokens: int, **changes: Any) -> WindowOrder:
    values = {"rules": ENDLESS, "prompt": (SOT, ENGLISH, TRANSCRIBE), "features": features, **changes}
    return WindowOrder(max_new_tokens=n_tokens, **values)


def tokens(engine: FastEngine, orders: list[WindowOrder], jobs: int = 1) -> list[list[int]]:
    futures = [engine.submit(one, job=index % jobs) for index, one in enumerate(orders)]
    return [future.result(WAIT_S).sequence.tokens for future in futures]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_refill_order_and_neighbours_change_no_token(
    engine: FastEngine, many: torch.Tensor, temperature: float
) -> None:
    """64 windows of lengths from 5 to 60 tokens: more than there are rows, so that rows are refilled all the time."""
    asked = [order(many[i % 12], 5 + (i * 7) % 56, temperature=temperature, seed=3) for i in range(64)]
    alone = [tokens(engine, [one])[0] for one in asked[:12]]
    together = tokens(engine, asked, jobs=5)
    assert [len(found) for found in together] == [one.max_new_tokens for one in asked]
    assert together[:12] == alone
    shuffled = [(i * 37) % 64 for i in range(64)]
    again = tokens(engine, [asked[i] for i in shuffled], jobs=3)
    assert again == [together[i] for i in shuffled]


def test_first_logits_and_a_long_prompt(engine: FastEngine, many: torch.Tensor) -> None:
    expected = engine.first_logits(engine.encode(many[:2]))
    long = (PREVIOUS, *range(300, 360), SOT, ENGLISH, TRANSCRIBE)
    futures = [engine.submit(order(many[i], 8, prompt=p), job=0) for i, p in enumerate([(), long])]
    for future, logits in zip(futures, expected, strict=True):
        found = future.result(WAIT_S).first_logits
        assert found is not None
        torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


def test_graphs_of_all_sizes_are_captured_beforehand_and_once(many: torch.Tensor) -> None:
    engine = load_engine("demo", "fp16", engine="fast", device="cuda", batch=8)
    assert isinstance(engine, FastEngine)
    engine.capture()
    steps = [c.name for c in engine.captures if "step" in c.name]
    assert steps == [f"decoder step of {n} rows" for n in (1, 2, 4, 8)]
    assert {f"encoder of {n} windows" for n in (1, 2, 4, 8)} <= {c.name for c in engine.captures}
    cost = engine.report.captured
    assert cost is not None and cost.n_graphs == len(engine.captures) and cost.seconds > 0 and cost.n_bytes > 0
    tokens(engine, [order(many[i % 12], 20) for i in range(20)], jobs=2)
    assert [c.name for c in engine.captures if "step" in c.name] == steps
    engine.close()


def test_windows_that_come_and_go_hold_up_a_long_text_by_their_own_work_alone(
    engine: FastEngine, many: torch.Tensor
) -> None:
    """Steps come behind the encoder of other windows, but the host waits for neither."""
    tokens(engine, [order(many[i % 12], 30) for i in range(40)])  # all graphs are there

    def seconds(others: int) -> float:
        started_s = time.perf_counter()
        long = engine.submit(order(many[0], 400), job="long")
        short = [engine.submit(order(many[i % 12], 4), job="short") for i in range(others)]
        long.result(WAIT_S)
        took_s = time.perf_counter() - started_s
        for future in short:
            future.result(WAIT_S)
        return took_s

    quiet = min(seconds(0) for _ in range(3))
    busy = min(seconds(24) for _ in range(3))
    assert busy < 4 * quiet, f"{busy:.3f} s with others, {quiet:.3f} s alone"


def test_a_short_job_behind_a_long_one(engine: FastEngine, many: torch.Tensor) -> None:
    """Before it end those in rows, those that are encoded already, and those that the encoder takes with it."""
    ended: list[str] = []
    futures = []
    for name, n in [("long", 200), ("clip", 1)]:
        for i in range(n):
            future = engine.submit(order(many[i % 12], 30), job=name)
            future.add_done_callback(lambda _, name=name: ended.append(name))  # type: ignore[misc]
            futures.append(future)
    for future in futures:
        future.result(WAIT_S)
    assert ended.index("clip") < engine.max_rows + 2 * ENCODED_TOGETHER


@pytest.mark.parametrize("where", ["fill", "step", "make"])
def test_out_of_memory_halves_the_rows_and_loses_nothing(
    many: torch.Tensor, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A real failure of the allocator, in the thread that owns the device."""
    engine = load_engine("demo", "fp16", engine="fast", device="cuda", batch=8)
    assert isinstance(engine, FastEngine)
    rows = engine._serving._rows
    work: Callable[..., Any] = getattr(rows, where)

    def tight(*arguments: Any, **options: Any) -> Any:
        if (arguments[0] if where == "make" else rows.n_rows) > 2:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return work(*arguments, **options)

    expected = tokens(engine, [order(many[i], 12) for i in range(8)])
    rows.drop()
    monkeypatch.setattr(rows, where, tight)
    go = held(engine._serving)  # all eight are there when memory runs out
    futures = [engine.submit(order(many[i], 12), job=0) for i in range(8)]
    go()
    outcomes = [future.result(WAIT_S) for future in futures]
    assert [outcome.sequence.tokens for outcome in outcomes] == expected
    assert engine.max_rows == 2 and all("No text was lost" in outcome.note for outcome in outcomes)
    monkeypatch.setattr(rows, where, work)
    monkeypatch.setattr("model_loader.fast.scheduler.RETRY_AFTER_S", 0.0)
    time.sleep(0.2)  # all rows are tried again by an engine that has been idle
    assert tokens(engine, [order(many[0], 12)]) == expected[:1]
    assert rows.n_rows == engine.max_rows == 8, "tried again for one window, so that the next need not wait for it"
    engine.close()


def test_an_engine_lives_again_after_its_end_and_its_memory_comes_back(many: torch.Tensor) -> None:
    device = torch.device("cuda", 0)
    found, left = [], []
    for _ in range(3):
        engine = load_engine("demo", "fp16", engine="fast", device="cuda")
        assert isinstance(engine, FastEngine)
        found.append(tokens(engine, [order(many[i % 12], 10) for i in range(40)]))
        engine.close()
        release(device)
        left.append(torch.cuda.memory_allocated(device))
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit(order(many[0], 4), job=0)
    assert found[0] == found[1] == found[2]
    assert left[2] - left[0] < MIB


def test_closing_in_the_middle_of_work_ends_it(many: torch.Tensor) -> None:
    engine = load_engine("demo", "fp16", engine="fast", device="cuda")
    assert isinstance(engine, FastEngine)
    hidden = engine.encode(many[:1])
    futures = [engine.submit(order(many[i % 12], 400), job=0) for i in range(80)]
    futures.append(engine.submit(replace(order(many[0], 4), features=None, encoded=Encoded(hidden.hidden)), job=1))
    engine.close()
    ended = [future.exception(WAIT_S) for future in futures]
    assert all(error is None or "closed" in str(error) for error in ended) and any(error for error in ended)
