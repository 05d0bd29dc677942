"""The decoder's rows on the device: their memory, the step over them, and what became of them, read late.

A row is a place for one window. Rows are filled, begun and read one by one while the others go on; the step runs over
the first 1, 2, 4, ... of them that hold all that are busy (on a CPU over exactly as many), one graph for each size. The
host only launches: what the rows look like is copied behind every second step and read when more have been launched, so
that the GPU never waits for the host. Which window goes where, and when, is the scheduler's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from model_loader.engine import TokenSequence
from model_loader.fast.graph import Capture, Captured, share_memory
from model_loader.fast.slots import RuleTensors, Slots, make_slots, split_state
from model_loader.fast.step import Ops, WindowOps, decoder_step
from model_loader.fast.weights import DecoderWeights, project
from model_loader.orders import WindowOrder


@dataclass(frozen=True, slots=True)
class Looks:
    """All rows at one moment, on the CPU."""

    number: int
    """Of the question this answers, counted from 1."""
    finished: list[int]
    position: torch.Tensor  # int32 [R]
    logprob: torch.Tensor  # float32 [R]
    tokens: torch.Tensor  # int32 [R, T]

    def written(self, row: int, n_prompt: int) -> list[int]:
        """A row's tokens behind its prompt."""
        tokens: list[int] = self.tokens[row, n_prompt : int(self.position[row]) + 1].tolist()
        return tokens

    def sequence(self, row: int, n_prompt: int, eot: int | None) -> TokenSequence:
        """What a row has written behind its prompt, at its end."""
        new = self.written(row, n_prompt)
        logprob = float(self.logprob[row])
        is_ended = bool(new) and new[-1] == eot
        tokens = new[:-1] if is_ended else new
        return TokenSequence(tokens, logprob / len(new) if new else math.nan, len(tokens), is_ended)


class Rows:
    """For one thread, on its current stream; only `fill` may run on another."""

    def __init__(self, decoder: DecoderWeights, window_ops: WindowOps, make_ops: Callable[[Slots], Ops], *,
                 quantised: bool) -> None:  # fmt: skip
        self._decoder, self._window_ops, self._make_ops = decoder, window_ops, make_ops
        self._quantised = quantised
        self._on_gpu = decoder.device.type == "cuda"
        self._rules = RuleTensors.on(decoder.device, decoder.n_vocab)
        self._pool = share_memory() if self._on_gpu else None
        self._slots: Slots | None = None
        self._watch: _Watch | None = None
        self._steps: dict[int, _Step] = {}

    @property
    def n_rows(self) -> int:
        """Rows there is memory for at present."""
        return 0 if self._slots is None else self._slots.n_rows

    @property
    def rules(self) -> RuleTensors:
        """Of all rows; changed only while no busy one has any."""
        return self._rules

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What every graph cost so far."""
        graphs = [step.run for step in self._steps.values()]
        return tuple(g.capture for g in graphs if isinstance(g, Captured) and g.capture is not None)

    def n_bytes(self, n_rows: int) -> int:
        """Memory that so many rows take in their caches, which is nearly all."""
        decoder = self._decoder
        size = decoder.tokens.element_size()
        positions = decoder.n_audio_ctx * (1 if self._quantised else size) + decoder.n_text_ctx * size
        return 2 * len(decoder.layers) * decoder.d_model * positions * n_rows

    def make(self, n_rows: int) -> None:
        """Memory for so many rows, all free; what was there goes first, so that both never sit in memory together."""
        self.drop()
        self._slots = make_slots(self._decoder, n_rows, quantised=self._quantised)
        self._watch = _Watch(self._slots)

    def drop(self) -> None:
        """Give the memory back."""
        for step in self._steps.values():
            if isinstance(step.run, Captured):
                step.run.release()
        self._steps.clear()
        self._slots = self._watch = None

    def fill(self, row: int, hidden: torch.Tensor) -> None:
        """Keys and values of a window [S, D] for all layers -> the audio cache of a free row.

        A window at a time: one projection of large-v3 makes 246 MB, for 32 windows it would be as much as the cache.
        """
        self._window_ops.store_cross(project(hidden, self._decoder.cross), self._held, row)

    def begin(self, row: int, prompt: Sequence[int], order: WindowOrder) -> None:
        """Let a filled row read this prompt and go on from it."""
        self._held.begin(
            row,
            prompt,
            max_new_tokens=order.max_new_tokens,
            temperature=order.temperature,
            seed=order.seed,
            timestamps=order.timestamps,
        )

    def forget_text(self, row: int) -> None:
        self._held.forget_text(row)

    def end(self, row: int) -> None:
        """Let a row stand still with what it has."""
        self._held.finished[row] = 1

    def step(self, n_rows: int, *, in_prompt: bool) -> None:
        """Read one token of each of the first rows. in_prompt: nobody needs logits."""
        step = self._step_for(n_rows)
        (step.run_in_prompt if in_prompt else step.run)()

    def capture(self, n_rows: int) -> None:
        """Have the graph for so many rows ready; all rows must be free. Nothing on a CPU."""
        if self._on_gpu:
            for _ in range(2):  # the first call runs the kernels as they are
                self._step_for(n_rows).run()

    def keep_logits(self, row: int) -> None:
        """Keep what the newest step computed for this row: it is complete when a later look is answered."""
        assert self._watch is not None
        self._watch.keep_logits(row, self._held.logits[row])

    def kept_logits(self, row: int) -> torch.Tensor:
        """float32 [n_vocab] on the CPU, a copy."""
        assert self._watch is not None
        return self._watch.kept_logits(row)

    @property
    def n_asked(self) -> int:
        """Looks asked for so far."""
        return 0 if self._watch is None else self._watch.n_asked

    def look(self) -> Looks | None:
        """On a GPU the answer to the question before, None to the first; and ask again when it has been read."""
        assert self._watch is not None
        return self._watch.look()

    def ask(self) -> None:
        assert self._watch is not None
        self._watch.ask()

    @property
    def _held(self) -> Slots:
        assert self._slots is not None
        return self._slots

    def _step_for(self, n: int) -> _Step:
        """The step over the first n rows; makes its graph when first needed."""
        size = min(power_of_two_above(n), self.n_rows) if self._on_gpu else n
        if size not in self._steps:
            slots = self._held.first(size)
            run = partial(decoder_step, self._decoder, self._make_ops(slots), self._rules)
            if self._on_gpu:
                graph = Captured(run, f"decoder step of {size} rows", has_state=True, pool=self._pool)
                self._steps[size] = _Step(graph, graph)
            else:
                self._steps[size] = _Step(run, partial(run, in_prompt=True))
        return self._steps[size]


@dataclass(slots=True)
class _Step:
    run: Callable[[], Any]
    run_in_prompt: Callable[[], Any]
    """The same without the head where that is another function, on a CPU."""


class _Watch:
    """Copies of the rows' state. On a GPU each is as old as the last question: nobody waits for a step in flight."""

    def __init__(self, slots: Slots) -> None:
        self._place = slots.state
        self._is_late = slots.state.device.type == "cuda"
        self.n_asked = 0
        self._copy, self._logits = (
            torch.zeros(place.shape, dtype=place.dtype, pin_memory=self._is_late)
            for place in (slots.state, slots.logits)
        )
        self._views = split_state(self._copy, slots.n_rows)
        self._arrived: Any = torch.cuda.Event() if self._is_late else None  # type: ignore[no-untyped-call]

    def keep_logits(self, row: int, logits: torch.Tensor) -> None:
        self._logits[row].copy_(logits, non_blocking=self._is_late)

    def kept_logits(self, row: int) -> torch.Tensor:
        return self._logits[row].clone()

    def look(self) -> Looks | None:
        if not self._is_late:
            self.ask()
        elif self.n_asked == 0:
            return None
        else:
            self._arrived.synchronize()
        views = self._views
        return Looks(self.n_asked, views["finished"].tolist(), views["position"], views["logprob"], views["tokens"])

    def ask(self) -> None:
        self._copy.copy_(self._place, non_blocking=self._is_late)
        self.n_asked += 1
        if self._is_late:
            self._arrived.record()


def power_of_two_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)
