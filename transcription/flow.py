"""Windows of one recording on their way through an engine, several at once: results in time order.

Batches borrows an engine for one batch at a time, growing from one window so that the first text comes early. Stream
hands windows to an engine that many share, one by one, and keeps twice as many there as it has rows: windows of other
recordings fill the same rows, and a window that fails is decoded again while the others go on. Both hold a bounded
number of windows, and an engine never longer than its own work takes: a consumer that stops reading blocks nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch

from audio.windows import Window
from model_loader.engine import Encoded, Engine
from model_loader.fit import DEFAULT_BATCHES
from model_loader.orders import SharedEngine, WindowOrder, WindowOutcome
from transcription.decode import Decoder, WindowResult, log_mel_of, no_speech_probs

BATCH_WINDOWS = DEFAULT_BATCHES
"""Windows of one recording in a batch where neither the options nor the settings say, by kind of device."""

Borrow = Callable[[], AbstractContextManager[Engine]]
Decoded = tuple[Window, list[WindowResult]]
"""A window and its results in time order; more than one where it holds more text than one hypothesis can."""
OnDraft = Callable[[Sequence[int]], None]
"""Takes the tokens that the oldest window has written so far."""


class Flow(Protocol):
    """What a run needs: windows in, results out."""

    @property
    def room(self) -> int:
        """Windows to add before the next take()."""
        ...

    def look(self, windows: Sequence[Window]) -> torch.Tensor:
        """First logits, float32 [n_windows, n_vocab]. Adding the same windows next encodes nothing again."""
        ...

    def add(self, window: Window, language: str) -> None: ...

    def take(self) -> list[Decoded]:
        """Wait for the oldest windows; empty when there are none. Raises CancelledError, OutOfMemoryError."""
        ...

    def close(self) -> None:
        """Give up what is not taken."""
        ...


class Batches:
    """A Flow over an engine that serves one caller at a time."""

    def __init__(self, borrow: Borrow, decoder: Decoder, limit: int) -> None:
        """limit: windows in a batch at most."""
        self._borrow, self._decoder, self._limit = borrow, decoder, limit
        self._size = 1
        self._batch: list[Window] = []
        self._language = ""

    @property
    def room(self) -> int:
        return self._size - len(self._batch)

    def look(self, windows: Sequence[Window]) -> torch.Tensor:
        with self._borrow() as engine:
            return self._decoder.first_logits(engine, windows)

    def add(self, window: Window, language: str) -> None:
        self._batch.append(window)
        self._language = language

    def take(self) -> list[Decoded]:
        batch, self._batch = self._batch, []
        if not batch:
            return []
        self._decoder.check_stop()
        with self._borrow() as engine:
            results = self._decoder.decode(engine, batch, self._language)
        self._size = min(2 * len(batch), self._limit)
        return [(window, [r for r in results if r.window.index == window.index]) for window in batch]

    def close(self) -> None:
        self._batch = []


@dataclass(slots=True, eq=False)
class _Open:
    """A window that has not been taken."""

    window: Window
    language: str
    part: Window
    """What is being decoded: the window, or what lies behind a hypothesis that ran out of tokens."""
    future: Future[WindowOutcome] | None = None
    """None once nothing is left to decode."""
    silence: float = 0.0
    attempts: list[WindowResult] = field(default_factory=list)
    results: list[WindowResult] = field(default_factory=list)


class Stream:
    """A Flow over an engine that many share."""

    def __init__(self, borrow: Borrow, decoder: Decoder, limit: int, *, urgent: bool = False,
                 on_draft: OnDraft | None = None) -> None:  # fmt: skip
        """limit: windows in the engine at once, in rows and behind them. urgent: before others."""
        self._borrow, self._decoder, self._urgent = borrow, decoder, urgent
        self._on_draft = on_draft or (lambda tokens: None)
        self._limit = 1
        self._later_limit = limit
        self._open: deque[_Open] = deque()
        self._seen: dict[int, Encoded] = {}
        self._is_closed = False

    @property
    def room(self) -> int:
        """One at first: its text is the first to be seen, and shares the engine with no other window of its own."""
        return self._limit - len(self._open)

    def look(self, windows: Sequence[Window]) -> torch.Tensor:
        futures = [self._submit(lambda engine, w=window: self._look_order(engine, w)) for window in windows]  # type: ignore[misc]
        outcomes = [future.result() for future in futures]
        self._seen |= {window.index: found.encoded for window, found in zip(windows, outcomes, strict=True)}
        self._decoder.check_stop()
        return torch.stack([outcome.first_logits for outcome in outcomes if outcome.first_logits is not None])

    def add(self, window: Window, language: str) -> None:
        opened = _Open(window, language, window)
        self._decode(opened, self._seen.pop(window.index, None))
        self._open.append(opened)

    def take(self) -> list[Decoded]:
        if not self._open:
            return []
        oldest = self._open[0]
        while oldest.future is not None:
            wait([opened.future for opened in self._open if opened.future], return_when=FIRST_COMPLETED)
            for opened in self._open:
                if opened.future is not None and opened.future.done():
                    self._settle(opened, opened.future.result())
        self._limit = self._later_limit
        self._open.popleft()
        return [(oldest.window, oldest.results)]

    def close(self) -> None:
        self._is_closed = True

    def _settle(self, opened: _Open, outcome: WindowOutcome) -> None:
        """Score a hypothesis; decode again, or what is left of the window, or nothing more."""
        decoder = self._decoder
        decoder.check_stop()
        if outcome.note and outcome.note not in decoder.warnings:
            decoder.warnings.append(outcome.note)
        if not opened.attempts:
            assert outcome.first_logits is not None
            (opened.silence,) = no_speech_probs(outcome.first_logits[None], decoder.tokens)
        temperature = decoder.options.temperatures[len(opened.attempts)]
        opened.attempts.append(decoder.score(opened.part, outcome.sequence, temperature, opened.silence))
        fails = decoder.fails(opened.attempts[-1])
        if fails and len(opened.attempts) < len(decoder.options.temperatures):
            self._decode(opened, outcome.encoded)
            return
        with self._borrow() as engine:
            result = decoder.accept(engine, opened.part, opened.attempts, fails)
            if decoder.options.words:
                result = decoder.time(engine, outcome.encoded, result, opened.language)
        head, tail = decoder.split(result)
        opened.results.append(head)
        opened.attempts, opened.future = [], None
        if tail is not None:
            opened.part = tail
            self._decode(opened, None)

    def _decode(self, opened: _Open, encoded: Encoded | None) -> None:
        temperature = self._decoder.options.temperatures[len(opened.attempts)]
        is_first = not opened.attempts

        def note_draft(tokens: list[int]) -> None:
            if opened in list(self._open)[:1]:  # the consumer takes windows meanwhile
                self._on_draft(tokens)

        def order(engine: Engine) -> WindowOrder:
            features = None if encoded is not None else _features(engine, opened.part)
            request = self._decoder.request(engine, 1, opened.language, temperature)
            return WindowOrder(
                request.rules,
                tuple(request.prompts[0]),
                features=features,
                encoded=encoded,
                max_new_tokens=request.max_new_tokens,
                temperature=temperature,
                seed=request.seed,
                needs_first_logits=is_first,
                should_stop=self._is_given_up,
                on_tokens=note_draft,
            )

        opened.future = self._submit(order)

    def _look_order(self, engine: Engine, window: Window) -> WindowOrder:
        features = _features(engine, window)
        return WindowOrder(None, features=features, should_stop=self._is_given_up)

    def _submit(self, order: Callable[[Engine], WindowOrder]) -> Future[WindowOutcome]:
        """The engine stays borrowed until the future is there, wherever this thread is by then."""
        lease = ExitStack()
        try:
            engine = lease.enter_context(self._borrow())
            assert isinstance(engine, SharedEngine)
            future = engine.submit(order(engine), job=self, urgent=self._urgent)
        except BaseException:
            lease.close()
            raise
        future.add_done_callback(lambda _: lease.close())
        return future

    def _is_given_up(self) -> bool:
        return self._is_closed or self._decoder.should_stop()


def make_flow(borrow: Borrow, decoder: Decoder, engine: Engine, limit: int = 0, *, urgent: bool = False,
              on_draft: OnDraft | None = None) -> Flow:  # fmt: skip
    """The flow for this kind of engine. Beam search always goes in batches.

    limit: windows decoded together; 0 for as many as the engine has rows, or as are usual for a batch on its device.
    on_draft: told, from the engine's thread, whenever the oldest window has written more; never in batches.
    """
    limit = limit or usual_batch(engine, decoder.options.beam_size)
    if isinstance(engine, SharedEngine) and decoder.options.beam_size == 1:
        return Stream(borrow, decoder, windows_ahead(limit), urgent=urgent, on_draft=on_draft)
    return Batches(borrow, decoder, limit)


def usual_batch(engine: Engine, beam_size: int) -> int:
    """Windows decoded together where nobody says how many: the engine's rows, else what is usual on its device."""
    if isinstance(engine, SharedEngine) and beam_size == 1:
        return engine.max_rows
    return BATCH_WINDOWS[engine.device.type]


def windows_ahead(n_rows: int) -> int:
    """Windows of one recording in an engine at once: behind those in its rows as many again, so that every row that
    becomes free finds the next window encoded. Features of one are 1.5 MB at large-v3."""
    return 2 * n_rows


def _features(engine: Engine, window: Window) -> torch.Tensor:
    return log_mel_of(engine)([window.samples])[0]
