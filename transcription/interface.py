"""What the page, the command line and the HTTP API know of a transcriber: two protocols and the values they hand over.

The protocols exist because there is more than one implementation: LocalTranscriber (pipeline.py), the scripted one in
tests/fakes.py, and later a client of a remote one. Nothing here does any work; importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from transcription.options import TranscribeOptions
from transcription.transcript import LanguageReport, Progress, Segment, Transcript, join_words

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from model_loader.loader import LoadReport
    from model_loader.memory import MemoryReading

Source = Path | bytes
"""A recording: a file, or its bytes. Never a URL."""


@dataclass(frozen=True, slots=True)
class PrecisionStatus:
    """One row of the precision table as this machine sees it."""

    name: str
    label: str
    unavailable: str | None
    """Why this machine cannot run it, as a sentence; None where it can."""


@dataclass(frozen=True, slots=True)
class LanguageName:
    """A language the loaded checkpoint knows."""

    code: str
    name: str


@dataclass(frozen=True, slots=True)
class Status:
    """Everything the page shows at all times. Reading it costs milliseconds and never loads a model."""

    phase: str
    """starting, loading, ready or failed."""
    message: str
    """One sentence on the phase: what is being loaded, or why it failed. Empty when ready."""
    device_kind: str
    """cuda or cpu: where the engine runs, after the preflight."""
    device_label: str
    """The device in words, for example 'NVIDIA H200 (GPU 0)' or 'CPU, 2 cores'."""
    model: str
    """The checkpoint's name; before the first load the requested one."""
    is_demo: bool
    banner: str | None
    """What to tell a user about the model (the demo checkpoint), else None."""
    precision_requested: str
    precision_effective: str | None
    """What the census found in memory; None before the first load."""
    engine: str
    """reference or fast."""
    is_busy: bool
    """An engine is working for somebody at this moment."""
    languages: tuple[LanguageName, ...]
    """The loaded checkpoint's languages by name; empty before the first load and for English-only checkpoints."""
    can_translate: bool
    """The checkpoint claims the translate task."""
    precisions: tuple[PrecisionStatus, ...]
    loaded: tuple[LoadReport, ...]
    """Reports of the engines in memory, most recently used last."""
    memory: MemoryReading


@dataclass(frozen=True, slots=True)
class LiveText:
    """The text of a microphone so far."""

    settled: str
    """Will not change any more."""
    tentative: str
    """The newest words; the next hypothesis may correct them."""
    language: str
    heard_s: float
    """Seconds of sound received so far."""
    lag_s: float
    """Seconds of work the newest hypothesis took."""
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return join_words((self.settled, self.tentative), self.language)


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One precision over one recording: what was measured, or the sentence why it failed. None means not measured."""

    precision: str
    label: str
    error: str | None = None
    effective: str | None = None
    """What the census found in memory."""
    text: str = ""
    segments: tuple[Segment, ...] = ()
    language: str = ""
    language_probability: float | None = None
    load_s: float | None = None
    warm_up_s: float | None = None
    first_run_s: float | None = None
    """The first transcription after the load."""
    warm_s: float | None = None
    """Median of the transcriptions after the first; the first one where there was only one."""
    warm_spread_s: float | None = None
    """Largest minus smallest of those; None where there was only one."""
    first_text_s: float | None = None
    """From the call to the first segment, of the last run."""
    real_time_factor: float | None = None
    """Seconds of audio per second of work at warm_s (higher is faster)."""
    tokens_per_s: float | None = None
    weights_bytes: int | None = None
    peak_bytes: int | None = None
    """Highest use of the device's memory by this process from load to the last run (GPU: allocator; CPU: resident)."""
    wer: float | None = None
    """Word error rate after Whisper's own normalisation, 0 to 1 and above."""
    cer: float | None = None
    reference: str = ""
    """What wer and cer were measured against: 'your text' (accuracy) or 'fp32' (agreement, not accuracy)."""
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.error is not None


class TranscriptionRun(Protocol):
    """One recording being transcribed. Work happens while somebody iterates; safe to read from other threads."""

    def __iter__(self) -> Iterator[Segment]:
        """Yield segments as their windows finish, in time order. Raises SottoError; finished segments stay readable."""
        ...

    @property
    def progress(self) -> Progress: ...

    @property
    def transcript(self) -> Transcript:
        """Everything finished so far; the whole text once the iteration ended, the kept part after a cancel."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user, oldest first."""
        ...

    @property
    def is_cancelled(self) -> bool: ...

    def cancel(self) -> None:
        """Stop within one decoding step; the iteration then ends without an error. Callable from any thread."""
        ...

    def close(self) -> None:
        """Release the engine and ffmpeg without finishing. Idempotent; also done when the iteration ends."""
        ...


class Transcriber(Protocol):
    """The five things Sotto does."""

    def transcribe(
        self, source: Source, options: TranscribeOptions, *, model: str | None = None, precision: str | None = None
    ) -> TranscriptionRun:
        """Return at once; errors of recording, model and options appear when the run is iterated."""
        ...

    def detect_language(
        self, source: Source, *, model: str | None = None, precision: str | None = None, max_windows: int = 5
    ) -> LanguageReport: ...

    def live(self, blocks: Iterable[npt.NDArray[np.float32]], options: TranscribeOptions) -> Iterator[LiveText]:
        """blocks: float32 mono 16 kHz [n_samples] as they arrive; ends when they end, with everything settled."""
        ...

    def compare(
        self,
        source: Source,
        precisions: Sequence[str],
        options: TranscribeOptions,
        *,
        reference_text: str = "",
        repeats: int = 1,
        model: str | None = None,
    ) -> Iterator[CompareRow]:
        """Yield one row per precision as it finishes; a failing one has `error` set and does not stop the others."""
        ...

    def status(self) -> Status: ...

    def unload(self) -> None:
        """Drop the engines from memory once nobody uses them; the next request loads again."""
        ...
