"""LocalTranscriber: the five things Sotto does, on this machine's engines. The one class that page, CLI and API use.

In: recordings and options. Out: runs, reports, rows and the status (interface.py). The main path itself is in run.py.
It holds no engine: each batch borrows one from the pool and gives it back.
"""

from __future__ import annotations

import io
import logging
import threading
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from audio.constants import SAMPLE_RATE
from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from errors import AudioError, SottoError
from model_loader.device import DeviceInfo
from model_loader.engine import Engine
from model_loader.memory import read_memory, read_peak, reset_peak
from model_loader.pool import EnginePool
from model_loader.precision import PRECISIONS, resolve_precision
from transcription.compare import Bench, compare
from transcription.decode import Decoder
from transcription.interface import CompareRow, LanguageName, LiveText, PrecisionStatus, Source, Status
from transcription.language import excerpts, report_languages, voiced_windows
from transcription.live import listen
from transcription.options import TranscribeOptions
from transcription.run import Desk, Ear, LocalRun
from transcription.tokenizer import LANGUAGE_NAMES, WhisperTokens
from transcription.transcript import LanguageReport

if TYPE_CHECKING:
    from model_loader.loader import LoadReport
    from model_loader.weights import DownloadProgress

logger = logging.getLogger(__name__)

AUTO = "auto"
DEMO_BANNER = (
    "This is the demo model: a small Whisper trained on synthetic speech only, so most words of a human recording come "
    "out wrong. For real work start with --model openai/whisper-large-v3 or --model FOLDER (a Whisper checkpoint on "
    "disk); set HF_TOKEN for a gated model and --hub-mirror where the Hub cannot be reached."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a transcriber accepts and how much it decodes at once."""

    batch_size: int = 0
    """Windows decoded together; 0 chooses for the device."""
    max_bytes: int | None = None
    max_duration_s: float | None = None


class LocalTranscriber:
    """A Transcriber (interface.py) over the engines of this process. Callable from any thread."""

    def __init__(
        self,
        pool: EnginePool,
        *,
        model: str = AUTO,
        precision: str = AUTO,
        device: DeviceInfo,
        engine: str = "reference",
        limits: Limits | None = None,
        on_progress: Callable[[DownloadProgress], None] | None = None,
    ) -> None:
        """on_progress: told of downloads, from the thread that borrows.

        Raises UnknownPrecisionError, UnavailablePrecisionError. Nothing is loaded yet."""
        self._pool, self._model, self._device, self._engine_name = pool, model, device, engine
        self._precision = resolve_precision(precision, device).name
        self._limits = limits or Limits()
        self._on_progress = on_progress
        pool.on_progress = self._note_download
        self._lock = threading.Lock()
        self._report: LoadReport | None = None
        self._tokens: WhisperTokens | None = None
        self._names: dict[str, str] = {}
        """The checkpoint's name by the model asked for: what 'auto' turned out to be."""
        self._n_users = 0
        self._is_preparing = self._is_closed = False
        self._phase, self._message = "starting", "The model has not been loaded yet."

    # --- the five -----------------------------------------------------------------------------------------------------

    def transcribe(
        self, source: Source, options: TranscribeOptions, *, model: str | None = None, precision: str | None = None
    ) -> LocalRun:
        return LocalRun(source, options, self._desk(model, precision))

    def detect_language(
        self, source: Source, *, model: str | None = None, precision: str | None = None, max_windows: int = 5
    ) -> LanguageReport:
        """Raises AudioError where nobody speaks, OptionError for an English-only checkpoint."""
        windows = self._voiced_windows(source, max_windows)
        if not windows:
            raise AudioError("No speech was found in this recording, so its language cannot be told.")
        desk = self._desk(model, precision)
        with desk.borrow() as engine:
            decoder = Decoder(desk.tokens_of(engine), TranscribeOptions())
            logits = [decoder.first_logits(engine, [window]) for window in windows]
            return report_languages(torch.cat(logits), windows, decoder.tokens)

    def live(self, blocks: Iterable[npt.NDArray[np.float32]], options: TranscribeOptions) -> Iterator[LiveText]:
        return listen(blocks, Ear(self._desk(None, None), options).hear)

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
        """Raises UnknownPrecisionError before any work. Each precision is loaded afresh and unloaded again."""
        names = [resolve_precision(name, self._device).name for name in precisions]
        chosen = model or self._model
        bench = Bench(
            load=partial(self._load_afresh, chosen),
            run=lambda name: self.transcribe(source, options, model=chosen, precision=name),
            release=lambda name: self._unload(chosen, name),
            peak_bytes=self._peak_bytes,
            normalise=self._normalise,
            label=lambda name: PRECISIONS[name].label,
        )
        return compare(names, bench, reference_text=reference_text, repeats=repeats)

    def status(self) -> Status:
        device, report, tokens = self._device, self._report, self._tokens
        return Status(
            phase=self._phase,
            message=self._message,
            device_kind=device.kind,
            device_label=device.label,
            model=report.model if report else self._model,
            is_demo=bool(report and report.is_demo),
            banner=DEMO_BANNER if report and report.is_demo else None,
            precision_requested=self._precision,
            precision_effective=report.effective if report else None,
            engine=self._engine_name,
            is_busy=self._n_users > 0,
            languages=_language_names(tokens),
            can_translate=bool(report and not report.is_demo and tokens and tokens.translate is not None),
            precisions=tuple(PrecisionStatus(p.name, p.label, p.unavailable(device)) for p in PRECISIONS.values()),
            loaded=tuple(self._pool.loaded()),
            memory=read_memory(),
        )

    def unload(self) -> None:
        """Drop every engine from memory, once its user is done; the next request loads again."""
        self._pool.unload()

    # --- life ---------------------------------------------------------------------------------------------------------

    def prepare(self, *, warm_up: bool = True) -> None:
        """Load the model, and send a second of sound the whole way; ready only then.

        Errors end up in the status; nothing is raised.
        """
        self._is_preparing = True
        try:
            desk = self._desk(None, None)
            with desk.borrow() as engine:
                desk.tokens_of(engine)
            if warm_up:
                self._set_phase("loading", f"Warming up {self._model} at {self._precision}.")
                self._warm_up()
            self._set_phase("ready", "")
        except SottoError:
            logger.info("event=prepare_failed", exc_info=True)
        except Exception:
            if not self._is_closed:  # closing pulls the engine from under us
                logger.exception("event=prepare_failed")
                self._set_phase("failed", "The model could not be loaded; the log file says why.")
        finally:
            self._is_preparing = False

    def close(self) -> None:
        """Unload everything, once nobody uses it."""
        self._is_closed = True
        self._pool.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _desk(self, model: str | None, precision: str | None) -> Desk:
        """Raises UnknownPrecisionError: a misspelt name is refused before a recording is opened."""
        row = resolve_precision(precision, self._device).name if precision else self._precision
        return Desk(
            borrow=partial(self._borrow, model or self._model, row),
            tokens_of=self._tokens_of,
            model=model or self._model,
            precision=row,
            engine=self._engine_name,
            batch_size=self._limits.batch_size,
            max_bytes=self._limits.max_bytes,
            max_duration_s=self._limits.max_duration_s,
        )

    @contextmanager
    def _borrow(self, model: str, precision: str) -> Iterator[Engine]:
        """An engine for as long as the block lasts; the status shows loading, failure and use."""
        if not self._is_loaded(model, precision):
            self._set_phase("loading", f"Loading {model} at {precision}.")
        try:
            with self._pool.borrow(model, precision) as engine:
                self._names[model] = engine.report.model
                if not self._is_preparing:
                    self._set_phase("ready", "")
                with self._lock:
                    self._n_users += 1
                try:
                    yield engine
                finally:
                    with self._lock:
                        self._n_users -= 1
        except SottoError as error:
            if self._phase == "loading":
                # An engine that worked before is still there for the next request.
                self._set_phase("ready" if self._pool.loaded() else "failed", str(error))
            raise

    def _is_loaded(self, model: str, precision: str) -> bool:
        name = self._names.get(model, model)
        return any((report.model, report.requested) == (name, precision) for report in self._pool.loaded())

    def _note_download(self, progress: DownloadProgress) -> None:
        done, total = progress.done_bytes / 1e9, progress.total_bytes / 1e9
        self._set_phase("loading", f"Downloading {progress.model}: {done:.2f} of {total:.2f} GB.")
        if self._on_progress is not None:
            self._on_progress(progress)

    def _tokens_of(self, engine: Engine) -> WhisperTokens:
        """The engine's vocabulary, read once per checkpoint."""
        if self._tokens is None or self._report is None or self._report.folder != engine.report.folder:
            self._tokens = WhisperTokens.from_folder(engine.report.folder)
        self._report = engine.report
        return self._tokens

    def _voiced_windows(self, source: Source, count: int) -> list[Window]:
        """Windows with speech from all over the recording; from its first speech where the excerpts hold none."""
        limits = self._limits
        with decode_blocks(source, max_duration_s=limits.max_duration_s, max_bytes=limits.max_bytes) as reader:
            windows = voiced_windows(excerpts(reader, reader.duration_s, count), count)
        if windows:
            return windows
        with decode_blocks(source, max_duration_s=limits.max_duration_s) as reader:
            return list(islice(cut_windows(reader, "vad"), count))

    def _normalise(self, text: str, language: str) -> str:
        assert self._tokens is not None  # of the engine that made the text
        return self._tokens.normalise(text, language)

    def _load_afresh(self, model: str, precision: str) -> LoadReport:
        self._pool.unload(model, precision)
        reset_peak(self._device.torch_device)
        with self._borrow(model, precision) as engine:
            self._tokens_of(engine)
            return engine.report

    def _unload(self, model: str, precision: str) -> None:
        self._pool.unload(model, precision)

    def _peak_bytes(self) -> int | None:
        peak = read_peak(self._device.torch_device)
        return peak.allocated_bytes if self._device.kind == "cuda" else peak.process_bytes

    def _warm_up(self) -> None:
        """A second of sound through ffmpeg, the speech detector, features, engine and segments."""
        sound = _second_of_sound()
        with decode_blocks(sound) as reader:
            for _ in cut_windows(reader, "vad"):
                pass
        options = TranscribeOptions(windows="fixed", temperatures=(0.0,), max_new_tokens=8)
        with closing(self.transcribe(sound, options)) as run:
            for _ in run:
                pass

    def _set_phase(self, phase: str, message: str) -> None:
        self._phase, self._message = phase, message


def _language_names(tokens: WhisperTokens | None) -> tuple[LanguageName, ...]:
    names = [LanguageName(code, LANGUAGE_NAMES[code]) for code in (tokens.languages if tokens else ())]
    return tuple(sorted(names, key=lambda language: language.name))


def _second_of_sound() -> bytes:
    """A WAV file with a second of quiet noise."""
    noise = np.random.default_rng(0).normal(0.0, 300.0, SAMPLE_RATE).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(SAMPLE_RATE)
        written.writeframes(noise.tobytes())
    return file.getvalue()
