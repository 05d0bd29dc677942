"""LocalTranscriber: the five things Sotto does, on this machine's engines. The one class that page, CLI and API use.

In: recordings and options. Out: runs, reports, rows and the status (interface.py). The main path itself is in run.py.
It holds no engine: each batch borrows one from the pool and gives it back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from errors import AudioError, OptionError, OutOfMemoryError, SottoError
from model_loader.calibration import calibrated_home, find_calibrated
from model_loader.device import DeviceInfo
from model_loader.engine import Engine
from model_loader.fit import FitRow, Verdict, fit_rows
from model_loader.header import Header, header_at_hand, read_folder
from model_loader.memory import free_bytes, read_memory
from model_loader.orders import SharedEngine
from model_loader.pool import EnginePool
from model_loader.precision import PRECISIONS, is_automatic, resolve_precision
from model_loader.weights import resolve_checkpoint
from transcription.calibrate import Calibration, CalibrationProgress, calibrate
from transcription.calibrated import check_target, read_calibrated
from transcription.compare import MAX_REPEATS, Bench, LocalComparison
from transcription.decode import Decoder
from transcription.interface import LanguageName, LiveText, PrecisionStatus, Source, Status
from transcription.language import excerpts, report_languages, voiced_windows
from transcription.live import listen
from transcription.measure import Measured, MeasureOrder, measure
from transcription.options import TranscribeOptions
from transcription.run import Desk, Ear, LocalRun
from transcription.tokenizer import LANGUAGE_NAMES, WhisperTokens
from transcription.transcript import LanguageReport
from transcription.warming import warm_path
from transcription.worker import run_in_worker

if TYPE_CHECKING:
    from model_loader.fit import Foresight
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
        engine: str = AUTO,
        limits: Limits | None = None,
        on_progress: Callable[[DownloadProgress], None] | None = None,
        on_fit: Callable[[Foresight], None] | None = None,
    ) -> None:
        """engine: fast, reference or auto, where a request does not say. on_progress, on_fit: told of downloads, and
        whether an engine will fit before its weights are read; from the thread that borrows.

        Raises UnknownPrecisionError, UnavailablePrecisionError. Nothing is loaded yet."""
        self._pool, self._model, self._device, self._engine_name = pool, model, device, engine
        self._precision = self._row_name(precision)
        self._limits = limits or Limits()
        self._on_progress, self._on_fit = on_progress, on_fit
        pool.on_progress, pool.on_fit = self._note_download, self._note_fit
        self._lock = threading.Lock()
        self._report: LoadReport | None = None
        self._header: Header | None = None
        self._looked_for_header = False
        self._verdict: Verdict | None = None
        """Whether the newest engine fits, foretold before it was loaded; the message tells it unless it is green."""
        self._tokens: WhisperTokens | None = None
        self._names: dict[str, str] = {}
        """The checkpoint's name by the model asked for: what 'auto' turned out to be."""
        self._n_users = 0
        self._is_preparing = self._is_closed = False
        self._captures_ahead = False
        """Graphs are captured where an engine is loaded, not in somebody's recording: once this process serves."""
        self._phase, self._message = "starting", "The model has not been loaded yet."

    # --- the five -----------------------------------------------------------------------------------------------------

    def transcribe(
        self, source: Source, options: TranscribeOptions, *, model: str | None = None, precision: str | None = None
    ) -> LocalRun:
        return LocalRun(source, options, self._desk(model, precision, options.engine))

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
        return listen(blocks, Ear(self._desk(None, None, options.engine), options).hear)

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
    ) -> LocalComparison:
        """precisions: 'auto' is the row that a request at 'auto' would get; its checkpoint is fetched for that.
        calibrated: a folder that calibrate wrote, for the rows that need one; the model is fetched to hold it against.

        Raises OptionError, UnknownPrecisionError before any work, and ModelError for 'auto' and `calibrated`.
        """
        if not 1 <= repeats <= MAX_REPEATS:
            raise OptionError(f"The number of warm runs is {repeats}; choose a whole number from 1 to {MAX_REPEATS}.")
        limits, engine = self._limits, options.engine or self._engine_name
        names = [self._row_name(name) for name in precisions]
        if calibrated is not None:
            self._check_calibrated(calibrated, names, model or self._model)
        reason = None
        if AUTO in names:
            row, reason = self._pool.choose(model or self._model, engine)
            names = [row.name if name == AUTO else name for name in names]
        asked = MeasureOrder(
            source=source,
            options=options,
            model=model or self._model,
            precision="",
            label="",
            repeats=repeats,
            engine=engine,
            loading=self._pool.loading,
            batch_size=limits.batch_size,
            max_bytes=limits.max_bytes,
            max_duration_s=limits.max_duration_s,
            calibrated=calibrated,
        )
        bench = Bench(
            check=partial(self._check_readable, source),
            # A GPU's memory is what is measured; on a CPU the served engine disturbs nothing.
            room=partial(self._pool.reserved, unload=self._device.kind == "cuda"),
            measure=partial(self._measure, asked),
            normalise=self._normalise,
            label=lambda name: PRECISIONS[name].label,
        )
        return LocalComparison(
            names, bench, reference_text=reference_text, order=order, seed=seed, precision_reason=reason
        )

    def status(self) -> Status:
        device, report, tokens, fits = self._device, self._report, self._tokens, self._fits()
        return Status(
            phase=self._phase,
            message=self._message if self._phase != "starting" else self._before_the_load(fits),
            device_kind=device.kind,
            device_label=device.label,
            model=report.model if report else self._model,
            is_demo=bool(report and report.is_demo),
            banner=DEMO_BANNER if report and report.is_demo else None,
            precision_requested=self._precision,
            precision_effective=report.effective if report else None,
            engine=report.engine if report else self._engine_name,
            is_busy=self._n_users > 0,
            languages=_language_names(tokens),
            can_translate=bool(report and not report.is_demo and tokens and tokens.translate is not None),
            precisions=self._precisions(fits),
            loaded=tuple(self._pool.loaded()),
            precision_reason=report.precision_choice if report else None,
            fits=fits,
            memory=read_memory(),
        )

    def calibrate(
        self,
        recordings: Sequence[Path],
        *,
        out: Path | None = None,
        model: str | None = None,
        keep_16_bit: int = 0,
        wer_budget: float | None = None,
        on_progress: Callable[[CalibrationProgress], None] = lambda progress: None,
    ) -> Calibration:
        """Measure activation ranges and save a static INT8 checkpoint; transcription/calibrate.py says how.

        out: a folder; None keeps it where int8-static finds it by itself. Every engine is unloaded first. Raises
        OptionError before any work if the folder cannot be written or holds something else.
        """
        check_target(out or self._pool.calibrations, is_own=out is None)
        precision = "fp16" if self._device.kind == "cuda" else "fp32"
        with self._pool.borrow_alone(model or self._model, precision) as engine:
            folder = out or calibrated_home(engine.report.folder, self._pool.calibrations)
            return calibrate(
                engine,
                recordings,
                folder,
                keep_16_bit=keep_16_bit,
                wer_budget=wer_budget,
                batch_size=self._limits.batch_size,
                is_own=out is None,
                on_progress=on_progress,
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
                warm_path(self.transcribe)
                with desk.borrow() as engine:
                    self._capture(engine)
                self._captures_ahead = True
            self._set_phase("ready", "")
        except SottoError as error:
            logger.info("event=prepare_failed", exc_info=True)
            if self._phase == "loading":  # what the warm-up itself ran into, of which no borrowing knows
                self._set_phase("ready" if self._pool.loaded() else "failed", str(error))
        except Exception:
            if not self._is_closed:  # closing pulls the engine from under us
                logger.exception("event=prepare_failed")
                self._set_phase("failed", "The model could not be loaded; the log file says why.")
        finally:
            self._is_preparing = False

    def _capture(self, engine: Engine) -> None:
        """Rows and graphs, so that the first recording finds them; where they do not fit now, it tries again."""
        if not isinstance(engine, SharedEngine):
            return
        try:
            engine.capture()
        except OutOfMemoryError:
            logger.warning("event=capture_failed", exc_info=True)

    def close(self) -> None:
        """Unload everything, once nobody uses it."""
        self._is_closed = True
        self._pool.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _desk(self, model: str | None, precision: str | None, engine: str = "") -> Desk:
        """Raises UnknownPrecisionError: a misspelt name is refused before a recording is opened."""
        row = self._row_name(precision) if precision else self._precision
        engine = engine or self._engine_name
        return Desk(
            borrow=partial(self._borrow, model or self._model, row, engine),
            tokens_of=self._tokens_of,
            model=model or self._model,
            precision=row,
            engine=engine,
            batch_size=self._limits.batch_size,
            max_bytes=self._limits.max_bytes,
            max_duration_s=self._limits.max_duration_s,
        )

    @contextmanager
    def _borrow(self, model: str, precision: str, kind: str) -> Iterator[Engine]:
        """An engine for as long as the block lasts; the status shows loading, failure and use."""
        is_new = not self._is_loaded(model, precision, kind)
        if is_new:
            self._verdict = None
            self._set_phase("loading", f"Loading {model} at {precision}.")
        try:
            with self._pool.borrow(model, precision, kind) as engine:
                self._names[model] = engine.report.model
                self._verdict = engine.report.verdict
                if is_new and self._captures_ahead:
                    self._capture(engine)
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

    def _is_loaded(self, model: str, precision: str, kind: str) -> bool:
        name = self._names.get(model, model)
        return any(
            report.model == name
            and kind in (AUTO, report.engine)
            and (report.requested == precision or (precision == AUTO and report.precision_choice is not None))
            for report in self._pool.loaded()
        )

    def _fits(self) -> tuple[FitRow, ...]:
        """Every precision of the checkpoint against free memory, what our engines hold counted as free."""
        header = self._known_header()
        if header is None:
            return ()
        held_bytes = sum(report.weights_bytes for report in self._pool.loaded())
        free = free_bytes(self._device.torch_device) + held_bytes
        return fit_rows(header, self._device, free, self._limits.batch_size, engine=self._engine_name)

    def _before_the_load(self, fits: Sequence[FitRow]) -> str:
        """The message, and what the table says of the precision that will be loaded, unless it fits."""
        verdict = next((fit.verdict for fit in fits if fit.precision == self._precision), None)
        return f"{self._message} {verdict.warning if verdict else ''}".strip()

    def _known_header(self) -> Header | None:
        """Of the newest checkpoint; before the first load, of the one that it would take if that can be told here."""
        if self._header is None and not self._looked_for_header:
            self._looked_for_header = True
            with suppress(SottoError):  # the load will say it
                self._header = header_at_hand(self._model, self._pool.loading["cache_dir"])
        return self._header

    def _precisions(self, fits: Sequence[FitRow]) -> tuple[PrecisionStatus, ...]:
        """Every row of the table as this machine and the loaded checkpoint have it."""
        colours = {fit.precision: fit.verdict.colour for fit in fits if fit.verdict is not None}
        reasons = {fit.precision: fit.unavailable for fit in fits}
        folder = self._report.folder if self._report else None
        calibrated = find_calibrated(folder, self._pool.calibrations) if folder else None
        return tuple(
            PrecisionStatus(
                name=row.name,
                label=row.label,
                unavailable=reasons.get(row.name, row.unavailable(self._device)),
                lacks_calibration=row.needs_calibration and folder is not None and calibrated is None,
                calibrated=calibrated if row.needs_calibration else None,
                fit=colours.get(row.name, ""),
                description=row.description,
            )
            for row in PRECISIONS.values()
        )

    def _row_name(self, precision: str) -> str:
        """A row's name; 'auto' stays so until the checkpoint is there. Raises UnknownPrecisionError."""
        return AUTO if is_automatic(precision) else resolve_precision(precision, self._device).name

    def _note_download(self, progress: DownloadProgress) -> None:
        done, total = progress.done_bytes / 1e9, progress.total_bytes / 1e9
        self._set_phase("loading", f"Downloading {progress.model}: {done:.2f} of {total:.2f} GB.")
        if self._on_progress is not None:
            self._on_progress(progress)

    def _note_fit(self, seen: Foresight) -> None:
        self._header, self._verdict = seen.header, seen.verdict
        if self._phase == "loading":
            self._set_phase("loading", f"Loading {seen.header.name} at {seen.row.name}.")
        if self._on_fit is not None:
            self._on_fit(seen)

    def _tokens_of(self, engine: Engine) -> WhisperTokens:
        """The engine's vocabulary, read once per checkpoint."""
        if self._tokens is None or self._report is None or self._report.folder != engine.report.folder:
            self._tokens = WhisperTokens.from_folder(engine.report.folder)
            self._header = read_folder(engine.report.folder, engine.report.model)
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

    def _check_calibrated(self, folder: Path, names: Sequence[str], model: str) -> None:
        """Raises OptionError unless one of these rows takes a calibration, and the folder holds one of this model."""
        report = read_calibrated(folder)
        takers = [row.name for row in PRECISIONS.values() if row.needs_calibration]
        if not set(takers) & set(names):
            raise OptionError(
                f"The calibration in {folder} would not be used: none of the precisions needs one. Add "
                f"{' or '.join(takers)}, or leave it out."
            )
        fetching = {name: value for name, value in self._pool.loading.items() if name not in ("device", "calibrations")}
        checkpoint = resolve_checkpoint(model, device=self._device, on_progress=self._note_download, **fetching)
        if checkpoint.folder.resolve() != folder.resolve() and not report.is_of(checkpoint.folder):
            raise OptionError(
                f"{folder} was calibrated from other weights ({report.model}) than {checkpoint.name} has now. Give "
                "--model the checkpoint that it was made from, or calibrate this one: ./start.sh calibrate --model "
                f"{checkpoint.folder if checkpoint.source == 'folder' else checkpoint.name} --out DIR."
            )

    def _check_readable(self, source: Source) -> None:
        """Raises AudioError for a recording without sound, before a process is started for it."""
        limits = self._limits
        with decode_blocks(source, max_duration_s=limits.max_duration_s, max_bytes=limits.max_bytes) as reader:
            next(iter(reader), None)

    def _measure(self, asked: MeasureOrder, name: str, on_step: Callable[[str], None], stop: Event) -> Measured:
        order = replace(asked, precision=name, label=PRECISIONS[name].label)
        return run_in_worker(measure, order, name=name, on_step=on_step, stop=stop)

    def _normalise(self, measured: Measured, text: str, language: str) -> str:
        return _tokens_in(measured.folder).normalise(text, language)

    def _set_phase(self, phase: str, message: str) -> None:
        told = "" if self._verdict is None else self._verdict.warning if phase == "loading" else self._verdict.foretold
        self._phase, self._message = phase, " ".join(part for part in (message, told) if part)


def _language_names(tokens: WhisperTokens | None) -> tuple[LanguageName, ...]:
    names = [LanguageName(code, LANGUAGE_NAMES[code]) for code in (tokens.languages if tokens else ())]
    return tuple(sorted(names, key=lambda language: language.name))


@lru_cache(maxsize=2)
def _tokens_in(folder: Path) -> WhisperTokens:
    return WhisperTokens.from_folder(folder)
