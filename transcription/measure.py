"""One precision on one recording, measured: load, warm up, first run, warm runs, unload. Runs in a worker process.

In: an order. Out: a CompareRow of what was measured, and the checkpoint's folder. Nothing is compared here: one process
knows one precision only. Memory is that of this process, which does nothing else.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_loader.calibration import MANIFEST, CalibrationReport, WeightFile, find_calibrated, weight_files
from model_loader.loader import CALIBRATIONS, load_engine
from model_loader.memory import GpuReading, MemoryPoint, read_memory, read_peak, read_point
from model_loader.precision import PRECISIONS
from model_loader.transfer import sha256_of
from transcription.interface import CompareRow, MemoryPhase, Source
from transcription.options import TranscribeOptions
from transcription.run import Desk, LocalRun
from transcription.tokenizer import WhisperTokens
from transcription.transcript import Transcript
from transcription.warming import warm_path

if TYPE_CHECKING:
    from model_loader.engine import Engine
    from model_loader.loader import LoadReport
    from model_loader.weights import DownloadProgress
    from transcription.worker import Step

SAMPLE_EVERY_S = 0.1
"""NVML averages utilisation over a sixth of a second or more."""


@dataclass(frozen=True, slots=True)
class MeasureOrder:
    """What to measure. Travels to the worker process."""

    source: Source
    options: TranscribeOptions
    model: str
    precision: str
    label: str
    repeats: int = 1
    """Warm runs after the first run."""
    engine: str = "auto"
    loading: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Further arguments of load_engine: device, offline, token and the like."""
    batch_size: int = 0
    max_bytes: int | None = None
    max_duration_s: float | None = None
    calibrated: Path | None = None
    """Folder of a calibration of the model, for a precision that needs one; None: where it is kept by itself."""

    @property
    def takes_calibrated(self) -> bool:
        """The folder named in `calibrated` is loaded instead of the model."""
        return self.calibrated is not None and PRECISIONS[self.precision].needs_calibration


@dataclass(frozen=True, slots=True)
class Measured:
    """A row, and the folder of the checkpoint that made it (its normalisation of text)."""

    row: CompareRow
    folder: Path


@dataclass(slots=True)
class _WarmRuns:
    seconds: list[float] = field(default_factory=list)
    transcripts: list[Transcript] = field(default_factory=list)
    batch_size: int | None = None
    energy_j: float | None = None
    """Of all of them together."""
    utilisation_percent: float | None = None


def measure(order: MeasureOrder, step: Step) -> Measured:
    """Raises what load_engine and a run raise."""
    quiet_log_bars()
    step("loading")
    engine = _load(order, step)
    report = engine.report
    try:
        tokens = WhisperTokens.from_folder(report.folder)
        desk = _desk(order, engine, tokens)
        step("warming up")
        started_s = time.monotonic()
        warm_path(lambda source, options: LocalRun(source, options, desk))
        warm_up_s = (report.warm_up_s or 0.0) + time.monotonic() - started_s
        step("first run")
        first_run_s, transcript, _ = _run(order, desk)
        warm = _warm_runs(order, desk, report, step)
        peak, gpu = read_peak(report.device.torch_device), _gpu(report)
    finally:
        engine.close()
    left = read_point(report.device.torch_device)
    row = CompareRow(
        precision=order.precision,
        label=order.label,
        driver=gpu.driver if gpu else None,
        load_s=report.load_s,
        warm_up_s=warm_up_s,
        first_run_s=first_run_s,
        energy_j=None if warm.energy_j is None else warm.energy_j / len(warm.seconds),
        utilisation_percent=warm.utilisation_percent,
        batch_size=warm.batch_size,
        calibration=_calibration(order, report),
        **_told(warm.transcripts[-1] if warm.transcripts else transcript, report),
        **_proved(report),
        **_identified(order, report, step),
        **_timed(warm, transcript.duration_s),
        **_memory(report, peak, left),
        phases=_phases(report, peak, left),
    )
    return Measured(row, report.folder)


def quiet_log_bars() -> None:
    """Libraries draw no progress bars into the worker's log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _load(order: MeasureOrder, step: Step) -> Engine:
    def note(progress: DownloadProgress) -> None:
        step(f"downloading {progress.model}: {progress.done_bytes / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB")

    model = str(order.calibrated) if order.takes_calibrated else order.model
    return load_engine(model, order.precision, engine=order.engine, warm_up=True, on_progress=note, **order.loading)


def _desk(order: MeasureOrder, engine: Engine, tokens: WhisperTokens) -> Desk:
    """The engine is this process's own: borrowing it costs nothing."""
    return Desk(
        borrow=lambda: nullcontext(engine),
        tokens_of=lambda engine: tokens,
        model=order.model,
        precision=order.precision,
        engine=order.engine,
        batch_size=order.batch_size,
        max_bytes=order.max_bytes,
        max_duration_s=order.max_duration_s,
    )


def _run(order: MeasureOrder, desk: Desk) -> tuple[float, Transcript, int | None]:
    """(seconds, transcript, windows that could be decoded together) of one transcription."""
    started_s = time.monotonic()
    with closing(LocalRun(order.source, order.options, desk)) as run:
        for _ in run:
            pass
        return time.monotonic() - started_s, run.transcript, run.batch_size


def _warm_runs(order: MeasureOrder, desk: Desk, report: LoadReport, step: Step) -> _WarmRuns:
    warm, before = _WarmRuns(), _gpu(report)
    with _sampled_utilisation(report) as samples:
        for index in range(order.repeats):
            step(f"warm run {index + 1} of {order.repeats}")
            seconds, transcript, warm.batch_size = _run(order, desk)
            warm.seconds.append(seconds)
            warm.transcripts.append(transcript)
    warm.utilisation_percent = statistics.fmean(samples) if samples else None
    after = _gpu(report)
    if before and after and before.energy_j is not None and after.energy_j is not None:
        # The counter moves in steps of some 100 ms: a difference of nothing is no measurement.
        warm.energy_j = after.energy_j - before.energy_j or None
    return warm


@contextmanager
def _sampled_utilisation(report: LoadReport) -> Iterator[list[float]]:
    """Percent of the GPU, read in a thread while the block runs; stays empty on a CPU."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_EVERY_S):
            gpu = _gpu(report)
            if gpu and gpu.utilisation_percent is not None:
                samples.append(gpu.utilisation_percent)

    thread = threading.Thread(target=sample, daemon=True)
    if report.device.kind == "cuda":
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def _gpu(report: LoadReport) -> GpuReading | None:
    """NVML's reading of the engine's card; None on a CPU."""
    if report.device.kind != "cuda":
        return None
    index = report.device.torch_device.index or 0
    return next((gpu for gpu in read_memory().gpus if gpu.cuda_index == index), None)


# --- parts of a row --------------------------------------------------------------------------------------------------


def _told(transcript: Transcript, report: LoadReport) -> dict[str, Any]:
    kernels = (
        (f"Torch's operations stand in for our kernels: {report.kernels_reason}",) if report.kernels_reason else ()
    )
    return {
        "text": transcript.text,
        "segments": transcript.segments,
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "audio_s": transcript.duration_s,
        "engine": transcript.engine,
        "warnings": (*transcript.warnings, *kernels),
    }


def _proved(report: LoadReport) -> dict[str, Any]:
    return {
        "effective": report.effective,
        "proof": f"{report.census.summary}; attention implementation: {report.attention}",
        "device": report.device.label,
        "weights_bytes": report.weights_bytes,
    }


def _identified(order: MeasureOrder, report: LoadReport, step: Step) -> dict[str, Any]:
    """Which weights these are. Where no commit says it all of them are read, so after everything that is timed."""
    if order.calibrated is not None and order.takes_calibrated:
        made = CalibrationReport.load(order.calibrated)
        return {"model": made.model, "revision": made.revision or weights_hash(made.weights)}
    if report.revision is not None:
        return {"model": report.model, "revision": report.revision}
    step("reading the weights' hash")
    return {"model": report.model, "revision": weights_hash(weight_files(report.folder))}


def weights_hash(files: Sequence[WeightFile]) -> str | None:
    """'sha256:' and 16 digits, of several files those of `sha256sum FILES | sha256sum`; None without any."""
    if len(files) == 1:
        return f"sha256:{files[0].sha256[:16]}"
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()[:16]}" if lines else None


def _calibration(order: MeasureOrder, report: LoadReport) -> str:
    """SHA-256 of the manifest of the calibration that was loaded; empty for a precision without one."""
    if not PRECISIONS[report.requested].needs_calibration:
        return ""
    folder = find_calibrated(report.folder, order.loading.get("calibrations") or CALIBRATIONS)
    return sha256_of(folder / MANIFEST) if folder else ""


def _timed(warm: _WarmRuns, audio_s: float) -> dict[str, Any]:
    warm_s = statistics.median(warm.seconds)
    first_texts_s = [t.first_text_s for t in warm.transcripts if t.first_text_s is not None]
    n_tokens = warm.transcripts[-1].n_tokens
    return {
        "warm_runs_s": tuple(warm.seconds),
        "warm_s": warm_s,
        "warm_spread_s": spread(warm.seconds),
        "first_text_s": statistics.median(first_texts_s) if first_texts_s else None,
        "real_time_factor": audio_s / warm_s if warm_s else None,
        "tokens_per_s": n_tokens / warm_s if n_tokens and warm_s else None,
    }


def spread(seconds: Sequence[float]) -> float | None:
    """Largest minus smallest; None where one figure has none."""
    return max(seconds) - min(seconds) if len(seconds) > 1 else None


def _memory(report: LoadReport, peak: MemoryPoint, left: MemoryPoint) -> dict[str, Any]:
    before = report.phases.before.process_bytes
    kept = None if left.process_bytes is None or before is None else max(0, left.process_bytes - before)
    return {
        "before_bytes": before,
        "peak_bytes": peak.process_bytes,
        "peak_allocated_bytes": peak.allocated_bytes,
        "left_bytes": kept,
        "predicted_weights_bytes": report.prediction.weights_bytes if report.prediction else None,
        "predicted_peak_bytes": report.prediction.needed_bytes if report.prediction else None,
    }


def _phases(report: LoadReport, peak: MemoryPoint, left: MemoryPoint) -> tuple[MemoryPhase, ...]:
    """peak: of load and all runs, where the report knows the warm-up's."""
    known = report.phases
    points = {
        "before": known.before,
        "after_load": known.after_load,
        "after_warm_up": known.after_warm_up,
        "peak": peak,
        "after_unload": left,
    }
    return tuple(
        MemoryPhase(name, point.process_bytes, point.allocated_bytes) for name, point in points.items() if point
    )
