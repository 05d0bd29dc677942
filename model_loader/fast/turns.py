"""Who is next: urgent things first, else one of each job in turn, each job's own in order. Knows no device.

One job of a thousand windows and one of a single window both get every second turn, so the short one waits for one
window and not for a thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Things waiting. Not safe to use from several threads at once."""

    def __init__(self) -> None:
        self._urgent: dict[Hashable, deque[T]] = {}
        self._usual: dict[Hashable, deque[T]] = {}

    def __len__(self) -> int:
        return sum(len(waiting) for jobs in (self._urgent, self._usual) for waiting in jobs.values())

    def put(self, item: T, job: Hashable, *, urgent: bool = False, first: bool = False) -> None:
        """Behind the job's others. first: before them, for a thing that has had its turn and comes back."""
        waiting = (self._urgent if urgent else self._usual).setdefault(job, deque())
        if first:
            waiting.appendleft(item)
        else:
            waiting.append(item)

    def take(self) -> T | None:
        """The next one, and its job goes to the end of the round; None if nothing waits."""
        for jobs in (self._urgent, self._usual):
            for job in jobs:
                waiting = jobs.pop(job)
                item = waiting.popleft()
                if waiting:
                    jobs[job] = waiting
                return item
        return None

    def has_urgent(self) -> bool:
        return bool(self._urgent)

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out everything that is unwanted."""
        removed: list[T] = []
        for jobs in (self._urgent, self._usual):
            for job, waiting in list(jobs.items()):
                kept = deque[T]()
                for item in waiting:
                    (removed if unwanted(item) else kept).append(item)
                if kept:
                    jobs[job] = kept
                else:
                    del jobs[job]
        return removed
