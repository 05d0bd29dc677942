"""Threads that are lent again."""

from __future__ import annotations

import threading

import pytest

from model_loader.fast import threads
from model_loader.fast.threads import run_in_thread

WAIT_S = 10.0


def ident_of(run: list[int]) -> None:
    run.append(threading.get_ident())


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_idle", [])


def test_a_thread_serves_the_next_one_when_its_work_has_ended() -> None:
    seen: list[int] = []
    for _ in range(3):
        assert run_in_thread(lambda: ident_of(seen)).wait(WAIT_S)
    assert len(set(seen)) == 1 and seen[0] != threading.get_ident()


def test_two_at_once_have_a_thread_each() -> None:
    both = threading.Barrier(2, timeout=WAIT_S)
    ended = [run_in_thread(lambda: (both.wait(), None)[1]) for _ in range(2)]
    assert all(event.wait(WAIT_S) for event in ended) and not both.broken


def test_a_thread_whose_work_raised_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fail() -> None:
        ident_of(seen)
        raise ZeroDivisionError

    assert run_in_thread(fail).wait(WAIT_S)
    assert run_in_thread(lambda: ident_of(seen)).wait(WAIT_S)
    assert len(seen) == 2 and len(threads._idle) == 1
