"""Who is next: urgent things first, else one of each job in turn, each job's own in order. Knows no device.

One job of a thousand windows and one of a single window both get every second turn, so the short one waits for one
window and not for a thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

J = TypeVar("J", bound=Hashable)
T = TypeVar("T")


class Turns(Generic[J, T]):
    """Things waiting, T, each of a job, J. Not safe to use from several threads at once."""

    def __init__(self) -> None:
        self._urgent: dict[J, deque[T]] = {}
        self._usual: dict[J, deque[T]] = {}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def put(self, item: T, job: J, *, urgent: bool = False, first: bool = False) -> None:
        """Behind the job's others. first: before them, for a thing that has had its turn and comes back."""
        waiting = (self._urgent if urgent else self._usual).setdefault(job, deque())
        if first:
            waiting.appendleft(item)
        else:
            waiting.append(item)
        self._n += 1

    def take(self) -> T | None:
        """The next one, and its job goes to the end of the round; None if nothing waits."""
        for jobs in (self._urgent, self._usual):
            for job in jobs:
                waiting = jobs.pop(job)
                item = waiting.popleft()
                if waiting:
                    jobs[job] = waiting
                self._n -= 1
                return item
        return None

    def has_urgent(self) -> bool:
        return bool(self._urgent)

    def jobs(self) -> list[J]:
        """All that wait for something, each once."""
        return list(dict.fromkeys([*self._urgent, *self._usual]))

    def remove(self, unwanted: Iterable[J]) -> list[T]:
        """Take out everything of these jobs; how much the others wait for costs nothing."""
        removed = [item for job in unwanted for jobs in (self._urgent, self._usual) for item in jobs.pop(job, ())]
        self._n -= len(removed)
        return removed
