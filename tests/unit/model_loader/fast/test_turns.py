"""Who is next, without a model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Hashable
from typing import TypeVar

from model_loader.fast.turns import Turns

J = TypeVar("J", bound=Hashable)
T = TypeVar("T")


def drained(turns: Turns[J, T]) -> list[T]:
    found = []
    while (item := turns.take()) is not None:
        found.append(item)
    return found


def test_jobs_take_turns_and_keep_their_own_order() -> None:
    turns: Turns[str, str] = Turns()
    for number in range(4):
        turns.put(f"long {number}", "long")
    assert turns.take() == "long 0"
    turns.put("clip", "clip")
    turns.put("other 0", "other")
    turns.put("other 1", "other")
    assert len(turns) == 6
    assert drained(turns) == ["long 1", "clip", "other 0", "long 2", "other 1", "long 3"]
    assert len(turns) == 0


def test_urgent_ones_go_first_also_in_turn() -> None:
    turns: Turns[str, str] = Turns()
    turns.put("file", "file")
    assert not turns.has_urgent()
    turns.put("a 0", "a", urgent=True)
    turns.put("a 1", "a", urgent=True)
    turns.put("b 0", "b", urgent=True)
    assert turns.has_urgent()
    assert drained(turns) == ["a 0", "b 0", "a 1", "file"]


def test_what_comes_back_is_first_of_its_job() -> None:
    turns: Turns[str, str] = Turns()
    turns.put("second", "job")
    turns.put("first", "job", first=True)
    assert drained(turns) == ["first", "second"]


def test_what_is_removed_has_no_turn() -> None:
    turns: Turns[str, str] = Turns()
    for number in range(3):
        turns.put(f"a {number}", "a")
    turns.put("b", "b", urgent=True)
    turns.put("c 0", "c", urgent=True)
    turns.put("c 1", "c")
    assert turns.jobs() == ["b", "c", "a"]
    assert turns.remove(["b", "c", "nobody"]) == ["b", "c 0", "c 1"]
    assert len(turns) == 3
    assert not turns.has_urgent() and drained(turns) == ["a 0", "a 1", "a 2"]
    assert turns.jobs() == []


def test_how_many_wait_can_be_asked_while_others_come() -> None:
    """Counted by looking through the jobs, it would fail where somebody is just being added."""
    turns: Turns[int, int] = Turns()
    lock, is_over = threading.Lock(), threading.Event()

    def come() -> None:
        job = 0
        while not is_over.is_set():
            with lock:
                turns.put(0, job := job + 1)
                if job > 1000:
                    turns.take()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    caller = threading.Thread(target=come)
    caller.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            len(turns)
    finally:
        is_over.set()
        caller.join()
        sys.setswitchinterval(interval)
    assert len(turns) == len(drained(turns))
