"""Stand-ins with scripted answers, so that everything above the engine is tested without weights.

FakeEngine says what its script says; FakePool lends it; FakeTranscriber answers like a LocalTranscriber that has loaded
the demo checkpoint. None of them is imported outside tests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from errors import CancelledError
from model_loader.alignment import Attended
from model_loader.device import describe_device
from model_loader.engine import GenerateRequest, TokenSequence
from model_loader.memory import read_memory
from model_loader.orders import WindowOrder, WindowOutcome
from model_loader.precision import PRECISIONS
from tests.measured import measured_row
from transcription.interface import CompareRow, LanguageName, LiveText, PrecisionStatus, Source, Status
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens
from transcription.transcript import LanguageGuess, LanguageReport, Progress, Segment, Transcript, WindowLanguage
from transcription.verdict import claims

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
N_VOCAB = 6004


@dataclass
class FakeEncoded:
    """The windows of a batch: their running number since the engine was made."""

    rows: list[int]

    @property
    def n_windows(self) -> int:
        return len(self.rows)

    @property
    def hidden(self) -> torch.Tensor:
        return torch.zeros(self.n_windows, 1500, 1)


Script = Callable[[int, GenerateRequest], TokenSequence]
"""(running number of the window, request) -> its hypothesis."""


@dataclass
class FakeEngine:
    """Whatever the script says. `requests` and `batches` tell what was asked for."""

    script: Script
    language: str = "en"
    no_speech: float = 0.0
    """Probability of 'no speech' of every window."""
    not_finite: bool = False
    report: Any = field(default_factory=lambda: fake_report())
    requests: list[GenerateRequest] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    n_encoded: int = 0

    def __post_init__(self) -> None:
        self.tokens = demo_tokens()
        self.dims = SimpleNamespace(n_mels=80, n_vocab=N_VOCAB, n_text_ctx=448)
        self.device = torch.device("cpu")

    def encode(self, features: torch.Tensor) -> FakeEncoded:
        assert features.shape[1:] == (80, 3000)
        rows = list(range(self.n_encoded, self.n_encoded + features.shape[0]))
        self.n_encoded += len(rows)
        return FakeEncoded(rows)

    def select(self, encoded: FakeEncoded, indices: Sequence[int]) -> FakeEncoded:
        return FakeEncoded([encoded.rows[i] for i in indices])

    def first_logits(self, encoded: FakeEncoded) -> torch.Tensor:
        logits = torch.full((len(encoded.rows), N_VOCAB), -30.0)
        logits[:, self.tokens.languages[self.language]] = 5.0
        # softmax over two values that matter: p = e^x / (e^x + e^5)
        p = min(max(self.no_speech, 1e-6), 1 - 1e-6)
        logits[:, self.tokens.no_speech] = 5.0 + float(np.log(p / (1 - p)))
        return torch.full_like(logits, float("nan")) if self.not_finite else logits

    def generate(self, encoded: FakeEncoded, request: GenerateRequest) -> list[TokenSequence]:
        assert len(request.prompts) == len(encoded.rows)
        self.requests.append(request)
        self.batches.append(list(encoded.rows))
        return [self.script(row, request) for row in encoded.rows]

    def attend(self, encoded: FakeEncoded, tokens: Sequence[int], n_frames: int) -> Attended:
        raise NotImplementedError("a script has nothing to look at")

    def close(self) -> None: ...


@dataclass
class FakeSharedEngine(FakeEngine):
    """The same, taken window by window. `orders` tells what was asked for, as (running number, order, urgent)."""

    orders: list[tuple[int, WindowOrder, bool]] = field(default_factory=list)
    held: list[Callable[[], None]] | None = None
    """Not None: outcomes are kept back, each until its function here is called."""
    max_rows: int = 4
    n_captured: int = 0
    """Calls of capture()."""
    capture_error: Exception | None = None

    def capture(self) -> None:
        self.n_captured += 1
        if self.capture_error is not None:
            raise self.capture_error

    def submit(self, order: WindowOrder, *, job: Any, urgent: bool = False) -> Future[WindowOutcome]:
        encoded: Any = order.encoded or self.encode(order.features[None])  # type: ignore[index]
        (row,) = encoded.rows
        self.orders.append((row, order, urgent))
        future: Future[WindowOutcome] = Future()

        def answer() -> None:
            if order.should_stop is not None and order.should_stop():
                future.set_exception(CancelledError("Stopped. The text so far is kept."))
                return
            prompt = list(order.prompt) or [self.tokens.sot]
            rules = order.rules or self.tokens.rules()
            asked = GenerateRequest([prompt], order.max_new_tokens, rules, order.temperature)
            try:
                sequence = self.script(row, asked) if order.prompt else TokenSequence([], 0.0, 0, False)
                future.set_result(WindowOutcome(sequence, self.first_logits(encoded)[0], encoded))
            except Exception as error:
                future.set_exception(error)

        if self.held is None:
            answer()
        else:
            self.held.append(answer)
        return future


@dataclass
class FakePool:
    """Lends one engine to one user at a time, a shared one to many, and counts."""

    engine: FakeEngine
    n_borrowed: int = 0
    n_users: int = 0
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next borrows, first one first."""
    on_progress: Any = None
    on_fit: Any = None
    calibrations: Path = Path("nowhere")
    loading: dict[str, Any] = field(default_factory=lambda: {"cache_dir": None})

    @contextmanager
    def borrow(self, model: str, precision: str, engine: str = "auto") -> Iterator[FakeEngine]:
        is_shared = isinstance(self.engine, FakeSharedEngine)
        assert is_shared or not self.is_lent
        if self.failures:
            raise self.failures.pop(0)
        self.n_borrowed += 1
        self.n_users += 1
        try:
            yield self.engine
        finally:
            self.n_users -= 1

    @property
    def is_lent(self) -> bool:
        return self.n_users > 0

    def loaded(self) -> list[Any]:
        return [self.engine.report]

    def unload(self, model: str, precision: str) -> None: ...

    def close(self) -> None: ...


def fake_report(**changes: Any) -> Any:
    """What the code above the loader reads of a LoadReport."""
    values = {
        "model": "demo", "folder": DEMO, "is_demo": True, "requested": "fp32", "effective": "fp32", "load_s": 0.1,
        "warm_up_s": 0.1, "weights_bytes": 45_000_000, "precision_choice": None, "engine": "reference",
        "verdict": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


_TOKENS: list[WhisperTokens] = []


def demo_tokens() -> WhisperTokens:
    """The demo checkpoint's vocabulary, read once."""
    if not _TOKENS:
        _TOKENS.append(WhisperTokens.from_folder(DEMO))
    return _TOKENS[0]


def hypothesis(
    *parts: tuple[float | None, str, float | None], avg_logprob: float = -0.2, finished: bool = True
) -> TokenSequence:
    """(start, text, end) in seconds from the window's start -> the tokens of it; None leaves a timestamp out."""
    tokens: list[int] = []
    for start_s, text, end_s in parts:
        tokens += _stamp(start_s) + demo_tokens().encode(" " + text) + _stamp(end_s)
    return TokenSequence(tokens=tokens, avg_logprob=avg_logprob, n_tokens=len(tokens), finished=finished)


def always(*parts: tuple[float | None, str, float | None], **kwargs: Any) -> Script:
    """A script that says the same for every window."""
    return lambda row, request: hypothesis(*parts, **kwargs)


def _stamp(time_s: float | None) -> list[int]:
    return [] if time_s is None else [demo_tokens().timestamp_begin + round(time_s / 0.02)]


class FakeRun:
    """Yields scripted segments, pausing before each; cancel works as in the real one."""

    def __init__(self, segments: Sequence[Segment], pause_s: float, duration_s: float) -> None:
        self._segments, self._pause_s, self._duration_s = segments, pause_s, duration_s
        self._done: list[Segment] = []
        self._stop = threading.Event()
        self._started_s = time.monotonic()
        self._stream = self._work()

    def __iter__(self) -> Iterator[Segment]:
        return self._stream

    def _work(self) -> Iterator[Segment]:
        for segment in self._segments:
            if self._stop.wait(self._pause_s):
                return
            self._done.append(segment)
            yield segment

    @property
    def progress(self) -> Progress:
        done_s = self._done[-1].end_s if self._done else 0.0
        elapsed_s = time.monotonic() - self._started_s
        return Progress(done_s, self._duration_s, len(self._done), elapsed_s, (self._duration_s - done_s) / 10)

    @property
    def draft(self) -> str:
        """The first word of the segment that comes next."""
        return self._segments[len(self._done)].text.split()[0] if len(self._done) < len(self._segments) else ""

    @property
    def transcript(self) -> Transcript:
        done_s = self._done[-1].end_s if self._done else 0.0
        return Transcript(
            segments=tuple(self._done), language="en", language_probability=0.98, duration_s=self._duration_s,
            speech_s=done_s, transcribed_s=done_s, elapsed_s=time.monotonic() - self._started_s, first_text_s=0.1,
            n_tokens=10 * len(self._done), model="demo", precision="fp32", engine="reference", warnings=self.warnings,
        )  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        return ()

    @property
    def is_cancelled(self) -> bool:
        return self._stop.is_set()

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()


def segment(start_s: float, end_s: float, text: str, **changes: Any) -> Segment:
    values: dict[str, Any] = {
        "start_s": start_s, "end_s": end_s, "text": text, "language": "en", "window_index": 0, "temperature": 0.0,
        "avg_logprob": -0.2, "compression_ratio": 1.2, "no_speech_prob": 0.01,
    }  # fmt: skip
    return Segment(**{**values, **changes})


SEGMENTS = (
    segment(0.3, 2.9, "Good morning, and welcome to the library."),
    segment(3.3, 7.0, "The reading room opens at nine o'clock."),
    segment(7.4, 11.8, "Take a chair next to the window."),
)


class FakeComparison:
    """Yields scripted rows, pausing before each; a cancel ends it."""

    def __init__(self, rows: Sequence[CompareRow], pause_s: float = 0.0) -> None:
        self.rows, self.names, self.step = rows, tuple(row.precision for row in rows), ""
        self.precision_reason: str | None = None
        self._pause_s, self._stop = pause_s, threading.Event()

    def __iter__(self) -> Iterator[CompareRow]:
        for row in self.rows:
            self.step = f"{row.precision}: loading"
            if self._stop.wait(self._pause_s):
                return
            yield row

    @property
    def is_cancelled(self) -> bool:
        return self._stop.is_set()

    def cancel(self) -> None:
        self._stop.set()


class FakeTranscriber:
    """A Transcriber with scripted answers."""

    def __init__(
        self,
        *,
        segments: Sequence[Segment] = SEGMENTS,
        pause_s: float = 0.0,
        error: Exception | None = None,
        run: type[FakeRun] = FakeRun,
        reference: str = "",
        uncalibrated: Sequence[str] = (),
    ) -> None:
        """error: raised by every call. run: class of the runs. reference: what compared rows say they were held to.
        uncalibrated: precisions that need a calibration first."""
        self.segments, self.pause_s, self.error, self.uncalibrated = segments, pause_s, error, uncalibrated
        self.run, self.reference = run, reference
        self.calls: list[tuple[str, Any]] = []

    def transcribe(
        self, source: Source, options: TranscribeOptions, *, model: str | None = None, precision: str | None = None
    ) -> FakeRun:
        self.calls.append(("transcribe", options))
        if self.error is not None:
            raise self.error
        return self.run(self.segments, self.pause_s, 12.2)

    def detect_language(
        self, source: Source, *, model: str | None = None, precision: str | None = None, max_windows: int = 5
    ) -> LanguageReport:
        self.calls.append(("detect_language", source))
        if self.error is not None:
            raise self.error
        guesses = (LanguageGuess("en", 0.97), LanguageGuess("de", 0.02), LanguageGuess("fr", 0.01))
        return LanguageReport(guesses, (WindowLanguage(0.0, 12.2, guesses),))

    def live(self, blocks: Iterable[np.ndarray], options: TranscribeOptions) -> Iterator[LiveText]:
        heard_s = 0.0
        for block in blocks:
            heard_s += block.size / 16_000
            yield LiveText("Good morning,", "and welcome", "en", heard_s, 0.1)
        yield LiveText("Good morning, and welcome.", "", "en", heard_s, 0.1)

    def compare(
        self, source: Source, precisions: Sequence[str], options: TranscribeOptions, *, reference_text: str = "",
        repeats: int = 1, order: str = "given", seed: int = 0, model: str | None = None, calibrated: Path | None = None,
    ) -> FakeComparison:  # fmt: skip
        self.calls.append(
            ("compare", {"repeats": repeats, "order": order, "seed": seed, "language": options and options.language})
        )
        if self.error is not None:
            raise self.error
        against = "your text" if reference_text else self.reference
        rows = [measured_row(name, self.segments, against, repeats) for name in precisions]
        return FakeComparison(tuple(replace(row, claims=claims(row, rows[0])) for row in rows), self.pause_s)

    def calibrate(self, recordings: Sequence[Path], *, on_progress: Callable[[Any], None]) -> Any:
        self.calls.append(("calibrate", list(recordings)))
        raise NotImplementedError("the scripted transcriber has no layers")

    def unload(self) -> None:
        self.calls.append(("unload", None))

    def close(self) -> None: ...

    def prepare(self, *, warm_up: bool = True) -> None: ...

    def status(self) -> Status:
        device = describe_device("cpu")
        return Status(
            phase="ready", message="", device_kind="cpu", device_label=device.label, model="demo", is_demo=True,
            banner="This is the demo model.", precision_requested="fp32", precision_effective="fp32",
            engine="reference", is_busy=False,
            languages=(LanguageName("en", "English"), LanguageName("de", "German"), LanguageName("zh", "Chinese")),
            can_translate=False,
            precisions=tuple(
                PrecisionStatus(
                    p.name, p.label, p.unavailable(device), p.name in self.uncalibrated, description=p.description
                )
                for p in PRECISIONS.values()
            ),
            loaded=(), memory=read_memory(),
        )  # fmt: skip
