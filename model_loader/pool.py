"""The engines in memory: who may use one, and which one goes when another is wanted.

In: a model, a precision and a kind of engine. Out: a warm engine, for the length of a with block: a SharedEngine for
any number of users at once, another for one. By default one engine is kept: the old one is closed, once nobody uses it,
before the new one loads, so that both never share the memory. Whoever waits for that keeps others from coming in.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_loader.device import describe_device
from model_loader.engine import Engine, ReferenceEngine
from model_loader.loader import CALIBRATIONS, LoadReport, choose_row, load_engine, refuse_unavailable
from model_loader.orders import SharedEngine
from model_loader.precision import AUTO, Precision, is_automatic, resolve_precision

if TYPE_CHECKING:
    from model_loader.fit import Foresight
    from model_loader.weights import DownloadProgress

logger = logging.getLogger(__name__)

_Key = tuple[str, str, str]
"""(model as asked for, precision by its name in the table, reference or fast)."""


class EnginePool:
    """Engines on one device. Safe to call from any thread."""

    def __init__(
        self,
        *,
        device: str = "auto",
        offline: bool = False,
        warm_up: bool = True,
        token: str | None = None,
        mirror: str | None = None,
        cache_dir: Path | None = None,
        calibrations: Path | None = None,
        capacity: int = 1,
        batch: int = 0,
        on_progress: Callable[[DownloadProgress], None] | None = None,
    ) -> None:
        """capacity: engines kept at once. batch: windows decoded together, and that precision 'auto' keeps room for (0:
        the usual)."""
        self._device = device
        self._offline, self._warm_up = offline, warm_up
        self._token, self._mirror, self._cache_dir = token, mirror, cache_dir
        self._calibrations = calibrations
        self._capacity, self._batch = capacity, batch
        self._automatic: dict[str, str] = {}
        """The precision that 'auto' took last, by model as asked for."""
        self.on_progress = on_progress
        """Told of downloads; may be replaced at any time."""
        self.on_fit: Callable[[Foresight], None] | None = None
        """Told whether an engine will fit, before its weights are read; may be replaced at any time."""
        self._use = threading.RLock()
        self._engines: dict[_Key, Engine] = {}  # least recently used first
        self._left = threading.Condition()
        self._users: Counter[int] = Counter()
        """Of shared engines, by id."""
        self._is_closed = False

    @contextmanager
    def borrow(self, model: str, precision: str, engine: str = AUTO) -> Iterator[Engine]:
        """Wait for the turn, load the engine if it is not there, and hold it for the block.

        engine: auto, fast or reference. Do not borrow inside the block: somebody may be waiting for its end. The block
        may be left by another thread if the engine is a SharedEngine. Raises what load_engine raises; a precision that
        the device cannot run is refused without touching the engine in memory.
        """
        place = describe_device(self._device)
        row = resolve_precision(precision, place)
        refuse_unavailable(row, place)
        with ExitStack() as turn:
            turn.enter_context(self._use)
            taken = self._take((model, AUTO if is_automatic(precision) else row.name, engine))
            if not isinstance(taken, SharedEngine):
                yield taken
                return
            with self._left:
                self._users[id(taken)] += 1
        try:
            yield taken
        finally:
            with self._left:
                self._users[id(taken)] -= 1
                self._left.notify_all()

    @contextmanager
    def borrow_alone(self, model: str, precision: str) -> Iterator[ReferenceEngine]:
        """A reference engine to be changed (calibration): all others are unloaded, and it is closed after the block."""
        with self._use:
            self.unload()
            engine = self._load((model, precision, "reference"))
            assert isinstance(engine, ReferenceEngine)  # asked for
            try:
                yield engine
            finally:
                engine.close()

    @property
    def calibrations(self) -> Path:
        """The folder that calibrated checkpoints are kept in."""
        return self._calibrations or CALIBRATIONS

    @contextmanager
    def reserved(self, *, unload: bool) -> Iterator[None]:
        """Nobody uses an engine of this pool inside the block. unload: give its memory back first."""
        with self._use:
            if unload:
                self.unload()
            yield

    def choose(self, model: str, engine: str = AUTO) -> tuple[Precision, str]:
        """The row that 'auto' takes of this model, and why; nothing is loaded. Raises what choose_row raises."""
        fetching = {name: value for name, value in self.loading.items() if name != "calibrations"}
        return choose_row(model, engine=engine, batch=self._batch, on_progress=self.on_progress, **fetching)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of load_engine that an engine of this pool is loaded with, for loading one elsewhere."""
        return {
            "device": self._device,
            "offline": self._offline,
            "token": self._token,
            "mirror": self._mirror,
            "cache_dir": self._cache_dir,
            "calibrations": self._calibrations,
        }

    @property
    def is_busy(self) -> bool:
        """Somebody holds the engine or loads one."""
        if not self._use.acquire(blocking=False):
            return True
        self._use.release()
        return self._users.total() > 0

    def loaded(self) -> tuple[LoadReport, ...]:
        """Reports of the engines in memory, most recently used last. Does not wait for their users."""
        return tuple(engine.report for engine in list(self._engines.values()))

    def unload(self, model: str | None = None, precision: str | None = None) -> int:
        """Close the engines of this model and precision (None: any), once their user is done. Returns how many.

        model: as it was asked for, or the checkpoint's name.
        """
        name = None if precision is None else resolve_precision(precision, describe_device(self._device)).name
        with self._use:
            if precision is not None and is_automatic(precision) and model is not None:
                name = self._automatic.get(model, name)
            chosen = [
                key
                for key, engine in self._engines.items()
                if model in (None, key[0], engine.report.model) and name in (None, key[1])
            ]
            for key in chosen:
                self._close(key)
            return len(chosen)

    def close(self) -> None:
        """Close all engines, once their user is done; borrowing afterwards raises RuntimeError."""
        with self._use:
            self._is_closed = True
            self.unload()

    def _take(self, key: _Key) -> Engine:
        if self._is_closed:
            raise RuntimeError("this pool is closed")
        found = self._find(key)
        engine = None if found is None else self._engines.pop(found)
        if engine is None:
            self._make_room()
            engine = self._load(key)
        if key[1] == AUTO:
            self._automatic[key[0]] = engine.report.requested
        taken = (key[0], engine.report.requested, engine.report.engine)
        if taken in self._engines:  # 'auto' turned out to be what was there
            self._close(taken)
        self._engines[taken] = engine  # at the end: the most recently used
        return engine

    def _find(self, asked: _Key) -> _Key | None:
        """The engine in memory that this asks for."""
        model, precision, kind = asked
        if precision == AUTO:
            precision = self._automatic.get(model, "")
        for key, engine in self._engines.items():
            # A reference engine is what 'auto' takes only where it could not take the fast one.
            is_automatic_choice = key[2] == "fast" or bool(engine.report.engine_reason)
            if key[:2] == (model, precision) and (kind == key[2] or (kind == AUTO and is_automatic_choice)):
                return key
        return None

    def _make_room(self) -> None:
        while len(self._engines) >= self._capacity:
            oldest = next(iter(self._engines))
            logger.info("event=engine_evicted model=%s precision=%s engine=%s", *oldest)
            self._close(oldest)

    def _close(self, key: _Key) -> None:
        """Close an engine once its users have left; nobody new comes in, as we have the turn."""
        engine = self._engines[key]
        with self._left:
            self._left.wait_for(lambda: self._users[id(engine)] == 0)
            del self._users[id(engine)]
        del self._engines[key]
        engine.close()

    def _load(self, key: _Key) -> Engine:
        model, precision, engine = key
        return load_engine(
            model,
            precision,
            engine=engine,
            batch=self._batch,
            warm_up=self._warm_up,
            on_progress=self.on_progress,
            on_fit=self.on_fit,
            **self.loading,
        )
