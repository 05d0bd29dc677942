"""Continuous batching on a CPU with the demo checkpoint: whatever shares the rows, a window's tokens are its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import CancelledError, DeviceError, OutOfMemoryError
from model_loader.engine import Encoded, GenerateRequest
from model_loader.fast.engine import FastEngine
from model_loader.fast.rows import Rows
from model_loader.fast.scheduler import Scheduler
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.loader import load_engine
from model_loader.orders import WindowOrder, WindowOutcome
from tests.unit.model_loader.conftest import EOT, SOT
from tests.unit.model_loader.fast.orders import (
    PREVIOUS,
    PROMPTS,
    RULES,
    WAIT_S,
    by_itself,
    counted_steps,
    held,
    order,
    tokens,
)


@pytest.fixture(scope="module")
def fast(short_demo: Path) -> Iterator[FastEngine]:
    engine = load_engine(str(short_demo), "fp32", engine="fast", device="cpu", warm_up=False)
    assert isinstance(engine, FastEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def features(six_features: torch.Tensor) -> torch.Tensor:
    """A window of each of four languages: [4, 80, 800]."""
    return six_features[:4]


@pytest.fixture(scope="module")
def encoded(fast: FastEngine, features: torch.Tensor) -> Encoded:
    return fast.encode(features)


Make = Callable[[int], Scheduler]


@pytest.fixture
def make(fast: FastEngine) -> Iterator[Make]:
    """A scheduler of so many rows over the engine's weights."""
    made: list[Scheduler] = []
    decoder = fast._loaded.decoder

    def make(limit: int) -> Scheduler:
        rows = Rows(decoder, TorchWindowOps(), lambda slots: TorchOps(decoder, slots), quantised=False)
        scheduler = Scheduler(rows, fast._encode, sot=SOT, device=fast.device, limit=limit, guard=fast._guard)
        made.append(scheduler)
        return scheduler

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.fixture(scope="module")
def alone(fast: FastEngine, encoded: Encoded) -> list[list[int]]:
    """What each window says by itself, up to 17 tokens, the third up to 30."""
    return by_itself(fast, encoded, (17, 17, 30, 17))


@pytest.fixture(scope="module")
def drawn(fast: FastEngine, encoded: Encoded) -> list[list[int]]:
    """The same with tokens drawn at a temperature."""
    return by_itself(fast, encoded, (17,) * 4, temperature=0.7)


def test_the_host_knows_without_looking_when_a_row_has_its_last_token(
    make: Make, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it then launches no step that nobody needs. <|endoftext|> is forbidden, so only the limit ends a row."""
    scheduler = make(4)
    seen: list[tuple[bool, bool]] = []
    collect = scheduler._collect

    def watch(looks: Any) -> None:
        seen.extend((bool(looks.finished[row]), busy.is_over) for row, busy in scheduler._busy.items())
        collect(looks)

    monkeypatch.setattr(scheduler, "_collect", watch)
    endless = replace(RULES, suppress=(EOT, *RULES.suppress))
    asked = [
        order(0, encoded, rules=endless, max_new_tokens=3),
        order(1, encoded, rules=endless, max_new_tokens=1, needs_first_logits=False),
        order(2, encoded, rules=endless, prompt=(PREVIOUS, 300, *PROMPTS[2]), max_new_tokens=2),  # probes first
        order(3, encoded, rules=endless, prompt=()),  # only looks
    ]
    for future in [scheduler.submit(one, job=i) for i, one in enumerate(asked)]:
        future.result(WAIT_S)
    assert len(seen) > 10 and sum(over for _, over in seen) == 4
    assert all(finished == over for finished, over in seen)


@pytest.mark.parametrize(
    ("limit", "places", "temperature"),
    [(1, [2, 0, 3, 1], 0.0), (2, [0, 1, 2, 3, 1, 0], 0.7), (3, [3, 3, 1, 0, 2], 0.0), (3, [3, 3, 1, 0, 2], 0.7)],
)
def test_rows_order_and_neighbours_change_no_token(
    make: Make, encoded: Encoded, alone: list[list[int]], drawn: list[list[int]], limit: int, places: list[int],
    temperature: float,
) -> None:  # fmt: skip
    """Windows of unlike lengths, so that each row is refilled while its neighbours are in the middle of a text."""
    lengths = [5 + 4 * (position % 4) for position in range(len(places))]
    said = drawn if temperature else alone
    expected = [said[index][:length] for index, length in zip(places, lengths, strict=True)]
    scheduler = make(limit)
    orders = [
        order(index, encoded, max_new_tokens=length, temperature=temperature, seed=7)
        for index, length in zip(places, lengths, strict=True)
    ]
    futures = [scheduler.submit(one, job=number % 2) for number, one in enumerate(orders)]
    assert [tokens(future) for future in futures] == expected


def test_a_free_row_is_refilled_at_once(make: Make, encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(2)
    sizes = counted_steps(scheduler, monkeypatch)
    go = held(scheduler)
    lengths = [16, 3, 3, 3]
    futures = [scheduler.submit(order(i, encoded, max_new_tokens=n), job=0) for i, n in enumerate(lengths)]
    go()
    assert [len(tokens(future)) for future in futures] == lengths
    # 18 steps for the long window; the three short ones of 5 steps each pass through the other row meanwhile.
    assert len(sizes) == 18 and sizes.count(2) == 15


def test_features_are_encoded_on_the_way(make: Make, features: torch.Tensor, alone: list[list[int]]) -> None:
    scheduler = make(2)
    orders = [WindowOrder(RULES, PROMPTS[i], features=features[i], max_new_tokens=8) for i in range(4)]
    outcomes = [future.result(WAIT_S) for future in [scheduler.submit(one, job=0) for one in orders]]
    assert [outcome.sequence.tokens for outcome in outcomes] == [expected[:8] for expected in alone]
    again = replace(orders[2], features=None, encoded=outcomes[2].encoded)
    assert tokens(scheduler.submit(again, job=0)) == alone[2][:8]


def test_a_short_job_behind_a_long_one_waits_for_one_window(make: Make, encoded: Encoded) -> None:
    scheduler, ended = make(1), list[str]()
    go = held(scheduler)

    def submit(name: str, index: int, job: str, *, urgent: bool = False) -> Future[WindowOutcome]:
        future = scheduler.submit(order(index, encoded, max_new_tokens=3), job=job, urgent=urgent)
        future.add_done_callback(lambda _: ended.append(name))
        return future

    futures = [submit(f"long {i}", i % 4, "long") for i in range(6)]
    futures += [submit("clip", 1, "clip"), submit("live", 2, "live", urgent=True)]
    go()
    for future in futures:
        future.result(WAIT_S)
    assert ended == ["live", "long 0", "clip", "long 1", "long 2", "long 3", "long 4", "long 5"]


def test_a_live_window_passes_those_that_wait_encoded(make: Make, encoded: Encoded) -> None:
    """The row is busy and others wait: the live one has the next free row."""
    scheduler, ended, asked, questions = make(1), list[str](), list[Future[WindowOutcome]](), list[int]()

    def submit(name: str, *, urgent: bool = False, **changes: Any) -> None:
        future = scheduler.submit(order(0, encoded, **changes), job=name, urgent=urgent)
        future.add_done_callback(lambda _: ended.append(name))
        asked.append(future)

    def speak_up() -> bool:
        questions.append(1)
        if len(questions) == 4:
            submit("live", urgent=True, max_new_tokens=2)
        return False

    go = held(scheduler)
    submit("in work", should_stop=speak_up)
    submit("file")
    submit("other file")
    go()
    for future in asked[:3]:
        future.result(WAIT_S)
    assert ended == ["in work", "live", "file", "other file"]


def test_the_first_logits_are_those_of_the_first_step(make: Make, fast: FastEngine, encoded: Encoded) -> None:
    scheduler, expected = make(2), fast.first_logits(encoded)
    previous = (PREVIOUS, *range(300, 310), *PROMPTS[1])
    orders = [order(0, encoded), order(1, encoded, prompt=previous), order(2, encoded, prompt=())]
    outcomes = [future.result(WAIT_S) for future in [scheduler.submit(one, job=0) for one in orders]]
    for found, logits in zip(outcomes, expected[:3], strict=True):
        assert found.first_logits is not None
        torch.testing.assert_close(found.first_logits, logits, rtol=1e-4, atol=1e-4)
    (with_text,) = fast.generate(fast.select(encoded, [1]), GenerateRequest([list(previous)], 12, RULES))
    assert outcomes[1].sequence.tokens == with_text.tokens


def test_other_rules_wait_for_the_rows_and_are_not_mixed(make: Make, encoded: Encoded, alone: list[list[int]]) -> None:
    scheduler = make(3)
    banned = alone[0][3]
    other = replace(RULES, suppress=(*RULES.suppress, banned))
    futures = [scheduler.submit(replace(order(0, encoded), rules=r), job=i) for i, r in enumerate([RULES, other] * 2)]
    found = [tokens(future) for future in futures]
    assert found[0] == found[2] == alone[0][:12]
    assert found[1] == found[3] and banned not in found[1]


def test_a_look_goes_beside_windows_of_any_rules(
    make: Make, fast: FastEngine, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is kept empty for it, neither before nor behind it."""
    scheduler, expected = make(2), fast.first_logits(encoded)
    sizes = counted_steps(scheduler, monkeypatch)
    endless = replace(RULES, suppress=(EOT, *RULES.suppress))
    go = held(scheduler)
    first = scheduler.submit(WindowOrder(None, encoded=Encoded(encoded.hidden[3:4])), job=0)
    long = scheduler.submit(order(0, encoded, rules=endless, max_new_tokens=16), job=0)
    later = scheduler.submit(WindowOrder(None, encoded=Encoded(encoded.hidden[1:2])), job=0)
    short = scheduler.submit(order(2, encoded, rules=endless, max_new_tokens=3), job=0)
    go()
    assert len(tokens(long)) == 16 and len(tokens(short)) == 3
    for look, logits in ((first, expected[3]), (later, expected[1])):
        found = look.result(WAIT_S).first_logits
        assert found is not None
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert len(sizes) == 18, "those of the long window; the others pass through the row beside it"


def test_a_cancelled_job_ends_and_leaves_the_others(make: Make, encoded: Encoded, alone: list[list[int]]) -> None:
    scheduler, asked = make(2), list[int]()

    def stop_at_sixth() -> bool:
        asked.append(1)
        return len(asked) >= 6

    go = held(scheduler)
    stopped = [scheduler.submit(order(0, encoded, should_stop=stop_at_sixth), job="stopped") for _ in range(4)]
    other = scheduler.submit(order(1, encoded), job="other")
    go()
    assert tokens(other) == alone[1][:12]
    assert tokens(stopped[0]) == alone[0][:3]  # five steps, two of them in the prompt
    for future in stopped[2:]:
        with pytest.raises(CancelledError):
            future.result(WAIT_S)


def test_a_question_is_asked_once_a_look_for_all_that_wait_and_only_yes_stops(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, asked = make(1), list[int]()
    sizes = counted_steps(scheduler, monkeypatch)

    def question() -> Any:
        asked.append(len(sizes))
        return [None, 0, torch.tensor(False)][len(asked) % 3]

    go = held(scheduler)
    futures = [scheduler.submit(order(0, encoded, max_new_tokens=3, should_stop=question), job=0) for _ in range(5)]
    go()
    assert [tokens(future) for future in futures] == [alone[0][:3]] * 5
    assert asked == sorted(set(asked)), "at most once between two steps, however many wait"


def test_a_question_that_fails_is_its_own_jobs_fault(make: Make, encoded: Encoded, alone: list[list[int]]) -> None:
    def broken() -> bool:
        raise ValueError("no answer")

    scheduler = make(1)
    go = held(scheduler)
    good, bad = (scheduler.submit(order(0, encoded, should_stop=s), job=s) for s in (None, broken))
    go()
    with pytest.raises(ValueError, match="no answer"):
        bad.result(WAIT_S)
    assert tokens(good) == alone[0][:12]


@pytest.mark.parametrize("where", ["make", "step", "fill"])
def test_out_of_memory_halves_the_rows_and_loses_nothing(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scheduler = make(4)
    rows, work, calls = scheduler._rows, getattr(scheduler._rows, where), list[int]()

    def tight(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if (arguments[0] if where == "make" else rows.n_rows) > 2 and len(calls) >= (1 if where == "make" else 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*arguments, **options)

    monkeypatch.setattr(rows, where, tight)
    go = held(scheduler)
    futures = [scheduler.submit(order(i, encoded), job=0) for i in (0, 1, 2, 3, 0)]
    go()
    assert [tokens(future) for future in futures] == [alone[i][:12] for i in (0, 1, 2, 3, 0)]
    assert scheduler.limit == 2
    assert futures[0].result().note == "Memory ran out with 4 windows at once; going on with 2. No text was lost."


def test_rows_are_halved_from_those_that_were_tried_not_from_the_windows_at_hand(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(8)
    work = scheduler._rows.make

    def tight(n_rows: int) -> None:
        if n_rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        work(n_rows)

    monkeypatch.setattr(scheduler._rows, "make", tight)
    go = held(scheduler)
    futures = [scheduler.submit(order(i, encoded), job=0) for i in (0, 1)]
    go()
    assert [tokens(future) for future in futures] == [alone[i][:12] for i in (0, 1)]
    assert scheduler.limit == 4


def test_all_rows_are_tried_again_once_nothing_is_left_to_do(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have gone; but not at once, as a card that is too small stays so."""
    scheduler, tried, is_full = make(4), list[int](), [True]
    work = scheduler._rows.make

    def tight(n_rows: int) -> None:
        tried.append(n_rows)
        if n_rows > 2 and is_full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        work(n_rows)

    def two() -> list[list[int]]:
        return [tokens(f) for f in [scheduler.submit(order(i, encoded), job=0) for i in (0, 1)]]

    def rest() -> None:
        """Until the thread has seen that nothing is left."""
        while scheduler._on_device or scheduler._waiting:
            time.sleep(0.001)
        scheduler.call(lambda: None)

    monkeypatch.setattr(scheduler._rows, "make", tight)
    expected = [alone[i][:12] for i in (0, 1)]
    assert two() == expected and scheduler.limit == 2
    is_full[0] = False
    rest()
    assert two() == expected and scheduler.limit == 2 and tried == [4, 2]
    monkeypatch.setattr("model_loader.fast.scheduler.RETRY_AFTER_S", 0.0)
    rest()
    assert two() == expected and scheduler.limit == 4 and tried == [4, 2, 4]


def test_rows_that_are_there_stay_where_no_more_fit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; to make them anew would cost their graphs."""
    scheduler = make(4)
    monkeypatch.setattr(scheduler, "_on_gpu", True)
    free = [4 * scheduler._rows.n_bytes(1)]
    monkeypatch.setattr("model_loader.fast.scheduler.free_bytes", lambda device: free[0])
    scheduler._make_rows(4)
    slots = scheduler._rows._held
    assert (scheduler.limit, slots.n_rows) == (2, 2)
    free[0] = 2 * scheduler._rows.n_bytes(1)
    scheduler._make_rows(4)
    assert scheduler._rows._held is slots and scheduler.limit == 2
    free[0] = 6 * scheduler._rows.n_bytes(1)
    scheduler._make_rows(4)
    assert scheduler._rows.n_rows == 4


def test_out_of_memory_with_one_row_is_an_error_and_the_next_order_is_tried(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(2)

    def full(n_rows: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler._rows, "make", full)
        with pytest.raises(OutOfMemoryError, match="choose a smaller precision"):
            scheduler.submit(order(0, encoded), job=0).result(WAIT_S)
    assert tokens(scheduler.submit(order(0, encoded), job=0)) == alone[0][:12]


def test_an_error_ends_what_is_in_work_and_nothing_else(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    scheduler = make(1)
    step, calls = scheduler._rows.step, list[int]()

    def broken_once(n_rows: int, *, in_prompt: bool) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        step(n_rows, in_prompt=in_prompt)

    monkeypatch.setattr(scheduler._rows, "step", broken_once)
    go = held(scheduler)
    bad, good = (scheduler.submit(order(i, encoded), job=i) for i in (0, 1))
    go()
    with pytest.raises(RuntimeError, match="a kernel failed"):
        bad.result(WAIT_S)
    assert tokens(good) == alone[1][:12]
    assert "decoding_failed" in caplog.text


def test_a_device_that_is_lost_is_said_to_all_who_wait_and_come(
    make: Make, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(1)

    def lost(*arguments: Any, **options: Any) -> None:
        raise DeviceError("The device failed.")

    monkeypatch.setattr(scheduler._rows, "step", lost)
    monkeypatch.setattr(scheduler._streams, "finish", lost)
    go = held(scheduler)
    futures = [scheduler.submit(order(i, encoded), job=i) for i in range(3)]
    go()
    for future in futures:
        with pytest.raises(DeviceError):
            future.result(WAIT_S)
    assert scheduler._ended is not None
    assert scheduler._ended.wait(WAIT_S)
    with pytest.raises(DeviceError):
        scheduler.submit(order(0, encoded), job=0)


@pytest.mark.parametrize("n_steps_free", [0, 3])
def test_not_a_number_leaves_nothing_behind_in_its_row(
    make: Make, encoded: Encoded, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, n_steps_free: int
) -> None:
    """Its prompt is long and its neighbour's text longer, so that its NaN lie among what the next window looks at.

    n_steps_free: while its row waits for the next one, it is computed on beside the neighbour, from what it holds.
    """
    scheduler = make(2)
    steps = counted_steps(scheduler, monkeypatch)
    hidden = torch.full_like(encoded.hidden[:1], math.nan)
    long = (PREVIOUS, *range(300, 310), *PROMPTS[0])
    go = held(scheduler)
    broken = scheduler.submit(order(0, encoded, encoded=Encoded(hidden), prompt=long), job=0)
    neighbour = scheduler.submit(order(2, encoded, max_new_tokens=30), job=1)
    after = None if n_steps_free else scheduler.submit(order(1, encoded), job=2)
    go()
    assert broken.result(WAIT_S).sequence.tokens == [] and math.isnan(broken.result().sequence.avg_logprob)
    n_before = len(steps)
    while len(steps) < n_before + n_steps_free:
        time.sleep(0.001)
    after = after or scheduler.submit(order(1, encoded), job=2)
    assert tokens(after) == alone[1][:12] and tokens(neighbour) == alone[2]


def test_closing_fails_what_waits_and_refuses_what_comes(make: Make, encoded: Encoded) -> None:
    import threading

    scheduler = make(1)
    go = held(scheduler)
    futures = [scheduler.submit(order(i, encoded), job=0) for i in range(3)]
    threading.Timer(0.05, go).start()
    scheduler.close()
    scheduler.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(WAIT_S)
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(order(0, encoded), job=0)


def test_rows_are_the_engines_own_number(fast: FastEngine) -> None:
    assert fast.max_rows == 4  # a CPU's usual batch
    decoder = fast._loaded.decoder
    rows = Rows(decoder, TorchWindowOps(), lambda slots: TorchOps(decoder, slots), quantised=False)
    rows.make(2)
    held_bytes = rows._held.self_keys.nbytes + rows._held.cross_keys.nbytes
    assert rows.n_bytes(2) == 2 * held_bytes
