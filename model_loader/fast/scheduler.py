"""Continuous batching: windows of all jobs share the rows, and a row that has finished takes the next window at once.

In: orders from any thread. Out: a future each. One thread owns the device: it looks for stopped orders, sends the next
windows to the encoder, begins encoded windows in free rows, and runs a step; then again.

    waiting (Turns) -> encoded -> busy in a row -> outcome

On a GPU encoder and audio cache work on a stream of their own and start beside the steps in flight; the next steps
come behind them. A step takes the whole GPU: an encoder that shared it got only the gaps between kernels, rows stayed
empty, and large-v3 went at 23 windows a second for 53 (H200). Windows are encoded ahead of the rows, so that a free row
takes the next at once. On a CPU the same happens one after the other.
Out of memory: the rows are dropped, every window in them waits again, and half as many rows are tried. What has
finished is out of reach of it. Another error ends the windows on the device, and the next ones are tried.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from errors import CancelledError, OutOfMemoryError
from model_loader.engine import Encoded, release
from model_loader.fast.graph import Capture
from model_loader.fast.rows import Looks, Rows, power_of_two_below
from model_loader.fast.slots import MAX_ROWS
from model_loader.fast.streams import Streams
from model_loader.fast.tasks import Busy, Question, Task, Turn
from model_loader.fast.threads import run_in_thread
from model_loader.fast.turns import Turns
from model_loader.memory import free_bytes
from model_loader.orders import WindowOrder, WindowOutcome

logger = logging.getLogger(__name__)

ENCODED_TOGETHER = 8
"""Windows sent to the encoder at once, on a GPU, when none is left encoded: more gain little (H200: 5.4 ms a window at
1, 4.5 at 32), and the steps of all rows wait meanwhile. Those without a row are 4 MB each at large-v3 in 16 bits."""

LOOK_EVERY = 2
"""Steps to a look at the rows, on a GPU: the copy keeps the next step waiting for 15 us (H200), and a step over one row
takes 980. Sooner where a row is known to be over."""

RETRY_AFTER_S = 60.0
"""From memory running out to the next try with all rows: a card that is too small stays so, and every try costs the
graphs; but another program may have gone."""

Value = TypeVar("Value")


class Scheduler:
    """Windows through one engine's encoder and rows. Callable from any thread."""

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        sot: int,
        device: torch.device,
        limit: int,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """encode: [n, n_mels, 3000] -> [n, 1500, d_model]. limit: rows at most. guard: turns the device's errors into
        ours."""
        self._rows, self._encode, self._sot, self._device = rows, encode, sot, device
        self._most = self._limit = min(limit, MAX_ROWS)
        self._guard = guard
        self._on_gpu = device.type == "cuda"
        self._streams = Streams(device)
        self._changed = threading.Condition()
        self._waiting: Turns[Turn, Task] = Turns()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_closed = False
        self._end_error: Exception = _closed()
        self._ended: threading.Event | None = None
        """Of the thread, once there is one."""
        # Below: the thread's own.
        self._encoded: deque[Task] = deque()
        self._busy: dict[int, Busy] = {}
        self._broken: set[int] = set()
        """Free or filled anew since a window that was not a number: every step until then writes more of it."""
        self._n_unseen = 0
        self._n_tried = 0
        """Rows that were made, or that memory was too small for."""
        self._ran_out_s = -math.inf
        """When memory last sufficed for fewer rows than there may be."""

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What every graph of a step cost so far."""
        return self._rows.captures

    @property
    def limit(self) -> int:
        """Rows at most; less after memory ran out, until all are tried again."""
        return self._limit

    def submit(self, order: WindowOrder, *, job: Hashable, urgent: bool = False) -> Future[WindowOutcome]:
        """Raises RuntimeError once it is closed."""
        future: Future[WindowOutcome] = Future()
        future.set_running_or_notify_cancel()
        task = Task(order, (job, order.should_stop), urgent, future, self._streams.event(), order.encoded)
        with self._changed:
            self._wake()
            self._waiting.put(task, task.turn, urgent=urgent)
        return future

    def call(self, work: Callable[[], Value], *, for_encoder: bool = True) -> Value:
        """Run it on the scheduler's thread, between two steps; wait for its value.

        for_encoder: on the encoder's stream, else on that of the steps.
        """
        future: Future[Value] = Future()
        ready = self._streams.event()

        def run() -> Value:
            if not for_encoder:
                return work()
            with self._streams.encoder(ready):
                return work()

        with self._changed:
            self._wake()
            self._calls.append((run, future))
        return future.result()

    def capture(self) -> bool:
        """Make room for all rows and the graphs of 1, 2, 4, ... of them now; nothing on a CPU.

        False where windows were on the device: they get their graphs as they need them.
        """

        def work() -> bool:
            if self._on_device:
                return False
            try:
                if self._rows.n_rows < self._limit:
                    self._make_rows(self._limit)
                size = 1
                while size < 2 * self._limit:
                    self._rows.capture(min(size, self._limit))
                    size *= 2
            except BaseException:
                self._rows.drop()  # the next window makes them anew, as many as fit
                raise
            return True

        return self._on_gpu and self.call(work, for_encoder=False)

    def close(self) -> None:
        """End the thread; what has not finished fails with RuntimeError. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._ended is not None:
            self._ended.wait()

    def _wake(self) -> None:
        if self._is_closed:
            raise self._end_error
        if self._ended is None:
            self._ended = run_in_thread(self._serve)
        self._changed.notify()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with torch.no_grad(), self._streams.steps():
                while self._wait_for_work():
                    try:
                        with self._guard():
                            self._round()
                    except OutOfMemoryError as error:
                        self._retreat(error)
                    except Exception as error:
                        logger.exception("event=decoding_failed windows=%d", len(self._busy))
                        if not self._fail(error):
                            return
        finally:
            self._end()

    def _end(self) -> None:
        """Nobody waits for an answer that will not come."""
        error = self._end_error
        with self._changed:
            self._is_closed = True
            waiting = self._waiting.remove(self._waiting.jobs())
            calls, self._calls = self._calls, deque()
        for task in [*self._tasks(), *waiting]:
            task.future.set_exception(error)
        for _, future in calls:
            future.set_exception(error)
        try:
            self._clear()
        except Exception:
            logger.exception("event=device_lost")

    def _wait_for_work(self) -> bool:
        """False once it is closed."""
        with self._changed:
            is_idle = not (self._waiting or self._on_device)
            while not (self._is_closed or self._calls or self._waiting or self._on_device):
                self._changed.wait()
            if is_idle and self._waiting and time.monotonic() - self._ran_out_s >= RETRY_AFTER_S:
                self._limit = self._most
            return not self._is_closed

    @property
    def _on_device(self) -> bool:
        return bool(self._busy or self._encoded)

    def _round(self) -> None:
        self._answer_calls()
        if self._n_unseen == 0:  # a row that is stopped between two looks would be seen no sooner
            self._end_stopped()
        self._encode_next()
        self._fill_free_rows()
        if self._busy:
            self._run_step()

    def _answer_calls(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    return
                work, future = self._calls.popleft()
            try:
                with self._guard():
                    future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    def _end_stopped(self) -> None:
        """Ask every question once; several windows may share one."""
        answers: dict[Question, bool | Exception] = {}

        def is_stopped(question: Question | None) -> bool:
            if question is None:
                return False
            if question not in answers:
                try:
                    answers[question] = bool(question())
                except Exception as error:  # its own job's fault, and nobody else's
                    answers[question] = error
            return answers[question] is not False

        with self._changed:
            turns = self._waiting.jobs()
        turns = [turn for turn in turns if is_stopped(turn[1])]
        with self._changed:
            stopped = self._waiting.remove(turns)
        stopped += [task for task in self._encoded if is_stopped(task.order.should_stop)]
        if stopped:
            self._encoded = deque(task for task in self._encoded if task not in stopped)
        for task in stopped:
            assert task.order.should_stop is not None
            answer = answers[task.order.should_stop]
            task.future.set_exception(answer if isinstance(answer, Exception) else _cancelled())
        for row, busy in self._busy.items():
            if not busy.is_stopped and is_stopped(busy.task.order.should_stop):
                busy.is_stopped = True
                self._rows.end(row)

    # --- encoder and audio cache --------------------------------------------------------------------------------------

    def _encode_next(self) -> None:
        """Send the next windows to the encoder once none is left encoded; none ahead of its time on a CPU."""
        if self._on_gpu:
            wanted = 0 if self._encoded else max(self._n_free(), ENCODED_TOGETHER)
            most = min(ENCODED_TOGETHER, self._limit)
        else:
            wanted, most = self._n_free() - len(self._encoded), 1
        tasks: list[Task] = []
        raw: list[Task] = []
        with self._changed:
            if wanted <= 0 and self._waiting.has_urgent() and not any(task.urgent for task in self._encoded):
                wanted = 1  # so that it is ready for the next free row
            while len(tasks) < wanted and len(raw) < most and (task := self._waiting.take()) is not None:
                tasks.append(task)
                if task.encoded is None:
                    raw.append(task)
        # Kept where an error finds them.
        self._encoded.extendleft(task for task in reversed(tasks) if task.urgent)
        self._encoded.extend(task for task in tasks if not task.urgent)
        while raw:
            part, raw = raw[: power_of_two_below(len(raw))], raw[power_of_two_below(len(raw)) :]
            self._encode_part(part)

    def _encode_part(self, tasks: list[Task]) -> None:
        with self._streams.encoder(*(task.ready for task in tasks)):
            given = [task.order.features for task in tasks if task.order.features is not None]
            hidden = self._encode(torch.stack([features.to(self._device, non_blocking=True) for features in given]))
            for index, task in enumerate(tasks):
                task.encoded = Encoded(hidden[index : index + 1].clone() if len(tasks) > 1 else hidden)
            encoded = self._streams.event()
        self._streams.wait(encoded)

    def _fill_free_rows(self) -> None:
        """Encoded windows into free rows. Rows have rules in common: other rules wait until no row needs the former."""
        if not self._encoded or not self._has_rows():
            return
        free = [row for row in range(self._rows.n_rows) if row not in self._busy]
        while free and self._encoded:
            task = self._encoded[0]  # where an error finds it
            rules = task.order.rules
            if rules is not None and rules != self._rows.rules.loaded:
                if any(busy.task.order.rules is not None for busy in self._busy.values()):
                    return
                self._rows.rules.load(rules)
            self._begin(task, free.pop(0))
            self._encoded.popleft()

    def _begin(self, task: Task, row: int) -> None:
        assert task.encoded is not None
        with self._streams.encoder(task.ready):
            self._rows.fill(row, task.encoded.hidden[0])
            filled = self._streams.event()
        self._streams.wait(filled)
        if row in self._broken:
            self._rows.forget_text(row)
            self._broken.discard(row)
        prompt = task.order.prompt or (self._sot,)
        is_probing = task.order.needs_first_logits and prompt[0] != self._sot
        self._rows.begin(row, (self._sot,) if is_probing else prompt, task.order)
        self._busy[row] = Busy(task, self._rows.n_asked, task.order.needs_first_logits, is_probing)

    def _has_rows(self) -> bool:
        """Make the rows, or more of them: one for a window alone, all that may be as soon as there are two.

        All as well where several are left from when memory ran out: later they would have to be empty first.
        """
        with self._changed:
            n_tasks = len(self._encoded) + len(self._busy) + len(self._waiting)
        wanted = self._limit if max(n_tasks, self._rows.n_rows) > 1 else 1
        if wanted <= self._rows.n_rows:
            return True
        if self._busy:
            return False  # they finish first
        self._make_rows(wanted)
        return True

    def _make_rows(self, wanted: int) -> None:
        """So many, or as many as fit: then no more are asked for, and rows that are there already stay."""
        if wanted > 1 and self._on_gpu:
            n_fitting = max(self._rows_that_fit(wanted), self._rows.n_rows)
            if n_fitting < wanted:
                self._limit, self._ran_out_s = n_fitting, time.monotonic()
            if n_fitting <= self._rows.n_rows:
                return
            wanted = n_fitting
        self._rows.drop()
        self._broken.clear()
        self._n_tried = wanted
        self._rows.make(wanted)
        self._streams.encoder_follows_steps()  # before it fills what is being cleared

    def _rows_that_fit(self, wanted: int) -> int:
        """Caches take half of the free memory at most: the encoder needs some, and so do others. Those of the rows that
        are there would go."""
        room = (free_bytes(self._device) + self._rows.n_bytes(self._rows.n_rows)) // 2
        while wanted > 1 and self._rows.n_bytes(wanted) > room:
            wanted //= 2
        return wanted

    def _n_free(self) -> int:
        return (self._rows.n_rows or self._limit) - len(self._busy)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        in_prompt = all(self._is_in_prompt(busy) for busy in self._busy.values())
        self._rows.step(max(self._busy) + 1, in_prompt=in_prompt)
        for row, busy in self._busy.items():
            self._note_step(row, busy)
        self._n_unseen += 1
        if self._on_gpu and self._n_unseen < LOOK_EVERY and not any(busy.is_over for busy in self._busy.values()):
            return
        self._n_unseen = 0
        self._see()
        if self._on_gpu:
            self._rows.ask()
            if self._busy and all(busy.is_over for busy in self._busy.values()):
                self._see()  # instead of launching a step that nobody needs

    def _see(self) -> None:
        """Wait for the answer to the newest question."""
        looks = self._rows.look()
        if looks is not None:
            self._collect(looks)

    def _is_in_prompt(self, busy: Busy) -> bool:
        return not busy.wants_logits and busy.n_steps < len(busy.task.order.prompt) - 1

    def _note_step(self, row: int, busy: Busy) -> None:
        busy.n_steps += 1
        if busy.wants_logits:
            self._rows.keep_logits(row)
            busy.wants_logits = False
        if busy.is_probing:
            self._rows.begin(row, busy.task.order.prompt, busy.task.order)
            busy.is_probing, busy.n_steps = False, 0

    def _collect(self, looks: Looks) -> None:
        """Hand over what has finished, its row is free; say what the others have written."""
        for row, busy in list(self._busy.items()):
            if looks.number <= busy.asked_before:
                continue
            task = busy.task
            n_prompt = len(task.order.prompt) or 1
            if not looks.finished[row]:
                if task.order.on_tokens is not None:
                    task.order.on_tokens(looks.written(row, n_prompt))
                continue
            rules = task.order.rules
            sequence = looks.sequence(row, n_prompt, None if rules is None else rules.eot)
            logits = self._rows.kept_logits(row) if task.order.needs_first_logits else None
            if not math.isfinite(sequence.avg_logprob):
                self._broken.add(row)
            del self._busy[row]
            assert task.encoded is not None
            task.future.set_result(WindowOutcome(sequence, logits, task.encoded, task.note))

    # --- when it goes wrong -------------------------------------------------------------------------------------------

    def _tasks(self) -> list[Task]:
        """All on the device, oldest first."""
        return [busy.task for busy in self._busy.values()] + list(self._encoded)

    def _clear(self) -> None:
        """Nothing is on the device any more, the rows' memory neither."""
        self._busy.clear()
        self._encoded.clear()
        self._broken.clear()
        self._n_tried = self._n_unseen = 0
        try:
            self._streams.finish()  # nobody may be writing what is given back
        finally:
            self._rows.drop()

    def _retreat(self, error: Exception) -> None:
        """Free memory, let every window wait again, and go on with half as many rows; give up at one."""
        error.__traceback__ = None  # it holds the tensors of the failed attempt
        tasks = self._tasks()
        n_rows = min(self._limit, max(self._n_tried, len(tasks)))
        self._clear()
        release(self._device)
        if n_rows <= 1:
            for task in tasks:
                task.future.set_exception(error)
            return
        self._limit, self._ran_out_s = n_rows // 2, time.monotonic()
        logger.warning("event=out_of_memory rows=%d next=%d", n_rows, self._limit)
        note = f"Memory ran out with {n_rows} windows at once; going on with {self._limit}. No text was lost."
        with self._changed:
            for task in reversed(tasks):
                task.note = note
                self._waiting.put(task, task.turn, urgent=task.urgent, first=True)

    def _fail(self, error: Exception) -> bool:
        """End every window on the device with this error; those that wait are tried next.

        False: the device does not even let its memory go, so the error is everybody's from now on.
        """
        for task in self._tasks():
            task.future.set_exception(error)
        try:
            self._clear()
        except Exception:
            self._end_error = error
            return False
        return True


def _closed() -> RuntimeError:
    return RuntimeError("this engine is closed")


def _cancelled() -> CancelledError:
    return CancelledError("Stopped. The text so far is kept.")
