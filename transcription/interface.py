"""What the page, the command line and the HTTP API know of a transcriber: two protocols and the values they hand over.

The protocols exist because there is more than one implementation: LocalTranscriber (pipeline.py), the scripted one in
tests/fakes.py, and later a client of a remote one. Nothing here does any work; importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from transcription.options import TranscribeOptions
from transcription.transcript import LanguageReport, Progress, Segment, Transcript, join_words
from transcription.verdict import Claim, sentence
from transcription.worddiff import DiffPart

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from model_loader.fit import FitRow
    from model_loader.loader import LoadReport
    from model_loader.memory import MemoryReading
    from transcription.calibrate import Calibration, CalibrationProgress

Source = Path | bytes
"""A recording: a file, or its bytes. Never a URL."""


@dataclass(frozen=True, slots=True)
class PrecisionStatus:
    """One row of the precision table as this machine sees it."""

    name: str
    label: str
    unavailable: str | None
    """Why this machine cannot run it, as a sentence; None where it can."""
    lacks_calibration: bool = False
    """It needs a calibration of the loaded checkpoint, and there is none yet. False before a checkpoint is loaded."""
    calibrated: Path | None = None
    """The folder of the calibration that it would load; None where it needs none or has none."""
    fit: str = ""
    """green, amber or red: does the loaded checkpoint fit (Status.fits says it in figures); empty where unknown."""
    description: str = ""
    """What it does, in a sentence, and what it cost in accuracy where that was measured. English."""


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
    """On the phase: what is being loaded, or why it failed; and what was predicted where it may not fit. Empty when
    ready and predicted to fit."""
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
    precision_reason: str | None = None
    """Why this precision, in a sentence, where 'auto' chose it."""
    fits: tuple[FitRow, ...] = ()
    """Every precision of the checkpoint held against free memory; empty while no checkpoint is known."""


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
class MemoryPhase:
    """Memory of a worker process at one moment. None means not to be had."""

    name: str
    """before, after_load, after_warm_up, peak or after_unload."""
    process_bytes: int | None = None
    """GPU: NVML's figure for the process, CUDA's context included; CPU: its resident memory."""
    torch_bytes: int | None = None
    """Tensors alive in torch's allocator; None on a CPU, where torch keeps no account."""


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One precision over one recording: what was measured, or the sentence why it failed. None means not measured."""

    precision: str
    label: str
    error: str | None = None
    error_kind: str = ""
    """Class of errors.py, by name; empty where nothing failed."""
    effective: str | None = None
    """What the census found in memory."""
    proof: str = ""
    """The census in words: how many linear layers of which class and format, what they compute in, which attention."""
    model: str = ""
    revision: str | None = None
    """Commit on the Hub; of other checkpoints 'sha256:' and the first 16 digits of the weights' hash."""
    engine: str = ""
    device: str = ""
    driver: str | None = None
    """Of the GPU; None on a CPU."""
    batch_size: int | None = None
    """Windows that could be decoded together: as set or usual on the device, less what memory had no room for."""
    calibration: str = ""
    """SHA-256 of the calibration's manifest; empty for a precision that needs none."""
    text: str = ""
    segments: tuple[Segment, ...] = ()
    language: str = ""
    language_probability: float | None = None
    audio_s: float | None = None
    """Seconds of sound in the recording."""
    load_s: float | None = None
    warm_up_s: float | None = None
    """Of engine and audio path, before the first run."""
    first_run_s: float | None = None
    """The first transcription of the recording."""
    warm_runs_s: tuple[float, ...] = ()
    """The transcriptions after the first."""
    warm_s: float | None = None
    """Their median."""
    warm_spread_s: float | None = None
    """Largest minus smallest of them; None where there was only one."""
    first_text_s: float | None = None
    """From the call to the first words (Transcript), median of the warm runs; None where nothing was said."""
    real_time_factor: float | None = None
    """Seconds of audio per second of work at warm_s (higher is faster)."""
    tokens_per_s: float | None = None
    weights_bytes: int | None = None
    before_bytes: int | None = None
    """Of the worker process before the load, libraries included: as peak_bytes counts."""
    peak_bytes: int | None = None
    """Highest use by the worker process from load to the last run (GPU: NVML's figure; CPU: resident memory)."""
    peak_allocated_bytes: int | None = None
    """Highest use in torch's allocator; None on a CPU, where torch keeps no account."""
    predicted_weights_bytes: int | None = None
    """From the checkpoint's header, before the load."""
    predicted_peak_bytes: int | None = None
    """Of tensors, one window at a time; as peak_allocated_bytes counts, for the warm-up."""
    phases: tuple[MemoryPhase, ...] = ()
    """In the order of time; the peak is that of load and all runs."""
    left_bytes: int | None = None
    """What the worker process still held after the unload, less before_bytes. Ending it returns that too."""
    energy_j: float | None = None
    """Of the whole card, mean of a warm run; None where the card has no counter."""
    utilisation_percent: float | None = None
    """Of the GPU, mean over the warm runs; None on a CPU."""
    wer: float | None = None
    """Word error rate after Whisper's own normalisation, 0 to 1 and above."""
    cer: float | None = None
    n_word_errors: int | None = None
    n_reference_words: int | None = None
    reference: str = ""
    """What the words were held to: 'your text' (accuracy) or a precision (agreement with it, not accuracy)."""
    diff: tuple[DiffPart, ...] = ()
    """Word by word against the same; empty where there is nothing to hold to."""
    claims: tuple[Claim, ...] = ()
    """What can be said of this row beside the one it is held to (verdict.py)."""
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def verdict(self) -> str:
        """The claims as one English sentence; empty where nothing can be said yet."""
        return sentence(self.claims)


class Comparison(Protocol):
    """One recording being measured at several precisions. Work happens while somebody iterates."""

    def __iter__(self) -> Iterator[CompareRow]:
        """Yield each row as it is measured.

        A row comes again, with its words compared, once the row that it is held to is there: the last one counts.
        A precision that fails has `error` set and does not stop the others. Raises AudioError before any work.
        """
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The precisions, in the order of the table."""
        ...

    @property
    def precision_reason(self) -> str | None:
        """Why this precision, in a sentence, where 'auto' was among those asked for."""
        ...

    @property
    def step(self) -> str:
        """What is being done now, in words; empty between rows."""
        ...

    @property
    def is_cancelled(self) -> bool: ...

    def cancel(self) -> None:
        """End the worker process at once; the iteration then ends. Callable from any thread."""
        ...


class TranscriptionRun(Protocol):
    """One recording being transcribed. Work happens while somebody iterates; safe to read from other threads."""

    def __iter__(self) -> Iterator[Segment]:
        """Yield segments as their windows finish, in time order. Raises SottoError; finished segments stay readable."""
        ...

    @property
    def progress(self) -> Progress: ...

    @property
    def draft(self) -> str:
        """The words written so far of the window that comes next: they may still change. Empty on the reference engine,
        which says nothing before a window is finished."""
        ...

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
    """The five things Sotto does, and what they need."""

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
        order: str = "given",
        seed: int = 0,
        model: str | None = None,
        calibrated: Path | None = None,
    ) -> Comparison:
        """repeats: warm runs after the first. order: given, or shuffled by `seed`. Each precision runs in a process of
        its own. calibrated: the folder of a calibration, for the precisions that need one; None: where it is kept.
        Raises OptionError, UnknownPrecisionError."""
        ...

    def calibrate(
        self, recordings: Sequence[Path], *, on_progress: Callable[[CalibrationProgress], None]
    ) -> Calibration:
        """Measure activation ranges on recordings and keep a static INT8 checkpoint where int8-static finds it.

        Minutes; every engine is unloaded first. Raises SottoError."""
        ...

    def status(self) -> Status: ...

    def unload(self) -> None:
        """Drop the engines from memory once nobody uses them; the next request loads again."""
        ...
