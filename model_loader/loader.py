"""load_engine: a name and a precision in, a warm and proven engine out, in five steps on one screen.

Every step reports: the checkpoint that was taken, what is really in memory beside what was requested, seconds, and
memory before, after the load, after the warm-up, at the peak, and after close(). Knows no audio and no text.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from errors import (
    CalibrationMissingError,
    EffectivePrecisionError,
    ModelUnavailableError,
    OutOfMemoryError,
    SottoError,
    UnavailablePrecisionError,
)
from model_loader.calibration import CalibrationReport, find_calibrated
from model_loader.census import Census, prove, take_census
from model_loader.device import DeviceInfo, describe_device, lacks_triton
from model_loader.engine import GenerateRequest, ReferenceEngine, TokenRules, freed_at_once, is_out_of_memory, release
from model_loader.fast.engine import FastEngine, refusal
from model_loader.fast.graph import CaptureCost
from model_loader.fast.weights import unsupported
from model_loader.files import Sizes
from model_loader.fit import FitPrediction, Foresight, Verdict, foresee, lacking, predict
from model_loader.header import Header, from_sizes, read_folder
from model_loader.memory import MemoryPoint, free_bytes, read_peak, read_point, reset_peak
from model_loader.precision import Precision, is_automatic, resolve_precision
from model_loader.weights import Checkpoint, DownloadProgress, resolve_checkpoint

logger = logging.getLogger(__name__)

CALIBRATIONS = Path.home() / ".cache" / "sotto" / "calibrations"
"""Where calibrated checkpoints are kept unless the caller names another folder."""

WARM_UP_TOKENS = 8
"""Decoded in the warm-up: enough for every kernel of prompt, first and later steps to be loaded and chosen."""

LoadedEngine = ReferenceEngine | FastEngine


@dataclass(frozen=True, slots=True)
class MemoryPhases:
    """Memory of the device through the life of an engine."""

    before: MemoryPoint
    after_load: MemoryPoint
    after_warm_up: MemoryPoint | None
    peak: MemoryPoint
    """Highest use from before the load to the end of the warm-up."""
    after_unload: MemoryPoint | None = None
    """Set by close()."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded, and what it cost."""

    model: str
    """The checkpoint's name: a Hub name, 'demo' or a folder."""
    revision: str | None
    source: str
    """folder, hub, cache or demo."""
    folder: Path
    is_demo: bool
    device: DeviceInfo
    requested: str
    """The precision asked for, by its name in the table ('8bit' is bnb-int8, 'auto' what was chosen)."""
    effective: str
    """The precision found in memory."""
    census: Census
    phases: MemoryPhases
    load_s: float
    """Weights from disk to the device, converted, counted and packed for the engine; without a download."""
    warm_up_s: float | None
    """None where it was not asked for."""
    choice: str | None = None
    """Why this checkpoint, in a sentence, where 'auto' chose it."""
    engine: str = "reference"
    """reference (transformers' own generate) or fast (the captured step)."""
    engine_reason: str = ""
    """Why it is not the fast one, in a sentence, where 'auto' could not take that."""
    kernels_reason: str = ""
    """Why torch's operations stand in for our own GPU kernels, in a sentence, where the engine has such kernels."""
    precision_choice: str | None = None
    """Why this precision, in a sentence, where 'auto' chose it."""
    prediction: FitPrediction | None = None
    """Predicted for a batch of one and the warm-up's tokens, as the phases were measured."""
    verdict: Verdict | None = None
    """Whether it would fit, as it was foretold before a byte of weights was read: for the batches of the program."""
    captured: CaptureCost | None = None
    """Set by the fast engine's capture(); None on a CPU and where graphs are captured when first needed."""

    @property
    def weights_bytes(self) -> int:
        """Counted, not estimated."""
        return self.census.n_bytes

    @property
    def attention(self) -> str:
        return self.census.attention


def load_engine(
    model: str,
    precision: str,
    *,
    engine: str = "reference",
    device: str = "auto",
    offline: bool = False,
    warm_up: bool = True,
    on_progress: Callable[[DownloadProgress], None] | None = None,
    token: str | None = None,
    mirror: str | None = None,
    cache_dir: Path | None = None,
    calibrations: Path | None = None,
    batch: int = 0,
    on_fit: Callable[[Foresight], None] | None = None,
) -> LoadedEngine:
    """Find, foresee, load, prove and warm one engine.

    model: a Hub name, a folder, 'demo' or 'auto'. precision: a row, an alias or 'auto'. mirror: a Hub mirror's URL.
    calibrations: the folder that calibrated checkpoints are kept in.
    batch: windows decoded together by the fast engine, and that precision 'auto' keeps room for; 0 for the usual.
    on_fit: told whether it will fit: of what is to be fetched before its weights are, and always before they are read.
    engine: reference, fast, or auto: fast where the row and the checkpoint allow it.
    Raises SottoError: UnknownPrecisionError, UnavailablePrecisionError, ModelError, DeviceError, OutOfMemoryError,
    DiskFullError, CalibrationMissingError, EffectivePrecisionError.
    """
    place = describe_device(device)
    row = resolve_precision(precision, place)
    refuse_unavailable(row, place)
    asked = None if is_automatic(precision) else row
    scales = _Scales(asked, place, batch, engine, calibrations or CALIBRATIONS, on_fit)
    # 1. Find the checkpoint; fetch it where it is not here.
    ways: dict[str, Any] = {"token": token, "mirror": mirror, "cache_dir": cache_dir, "on_progress": on_progress}
    checkpoint = resolve_checkpoint(model, device=place, offline=offline, on_sizes=scales.weigh_sizes, **ways)
    # 2. Foresee from its header whether it fits; where 'auto' was asked for, which row does.
    release(place.torch_device)
    seen, folder = scales.weigh(checkpoint)
    row = seen.row
    engine, reason = _choose_engine(engine, row, checkpoint)
    # 3. Load: straight onto the device, converted on the way.
    with _device_errors(checkpoint, row, place), freed_at_once(place.torch_device):
        reset_peak(place.torch_device)
        before = read_point(place.torch_device)
        started_s = time.perf_counter()
        network = _load(folder, row, place)
        # 4. Prove: count what is there.
        census = take_census(network, row)
        effective = prove(census, row, place)
        report = replace(_report(checkpoint, seen, place, effective, census, before), engine_reason=reason)
        made = _make_engine(engine, network, seen=seen, report=report, folder=folder, batch=batch)
        load_s = time.perf_counter() - started_s
        del network
        _note_load(made, load_s)
        # 5. Warm up: one window from features to tokens.
        if warm_up:
            _warm_up(made)
    _log(made.report)
    return made


def choose_row(
    model: str,
    *,
    engine: str = "auto",
    batch: int = 0,
    device: str = "auto",
    **fetching: Any,
) -> tuple[Precision, str]:
    """The row that load_engine takes for precision 'auto', and why; the arguments are load_engine's, those for fetching
    resolve_checkpoint's.

    No weights are loaded, but a checkpoint that is not here is fetched. Raises ModelError, DeviceError, DiskFullError,
    UnavailablePrecisionError.
    """
    place = describe_device(device)
    checkpoint = resolve_checkpoint(model, device=place, **fetching)
    release(place.torch_device)
    scales = _Scales(None, place, batch, engine).for_checkpoint(checkpoint)
    seen = scales.weigh_header(read_folder(checkpoint.folder, checkpoint.name))
    return seen.row, str(seen.choice)


@dataclass(frozen=True, slots=True)
class _Scales:
    """What is asked for, held against the memory that is free now."""

    row: Precision | None
    """None: what 'auto' takes."""
    device: DeviceInfo
    batch: int
    engine: str
    calibrations: Path = CALIBRATIONS
    on_fit: Callable[[Foresight], None] | None = None

    def weigh(self, checkpoint: Checkpoint) -> tuple[Foresight, Path]:
        """What the load will need, and the folder that the row's weights lie in. Raises PrecisionError, ModelError."""
        scales = self.for_checkpoint(checkpoint)
        seen = scales.weigh_header(read_folder(checkpoint.folder, checkpoint.name))
        folder = _weights_folder(checkpoint, seen.header, seen.row, self.calibrations)
        if folder != checkpoint.folder:  # calibrated weights, some of which may have been kept wide
            seen = replace(scales.weigh_header(read_folder(folder, checkpoint.name)), header=seen.header)
        if seen.verdict.warning:
            logger.warning("event=may_not_fit colour=%s verdict=%r", seen.verdict.colour, seen.verdict.sentence)
        self._tell(seen)
        return seen, folder

    def for_checkpoint(self, checkpoint: Checkpoint) -> _Scales:
        """The same, with the engine that 'auto' leaves every row of this checkpoint to, if it is the reference."""
        is_left = self.engine == "auto" and unsupported(checkpoint.config) is not None
        return replace(self, engine="reference") if is_left else self

    def weigh_sizes(self, name: str, sizes: Sizes) -> None:
        """Of a checkpoint on its way, from its config.json."""
        self._tell(self.weigh_header(from_sizes(name, sizes)))

    def weigh_header(self, header: Header) -> Foresight:
        free = free_bytes(self.device.torch_device)
        return foresee(header, self.row, self.device, free, batch=self.batch, engine=self.engine)

    def _tell(self, seen: Foresight) -> None:
        if self.on_fit is not None:
            self.on_fit(seen)


def _log(report: LoadReport) -> None:
    logger.info(
        "event=engine_loaded model=%s revision=%s precision=%s engine=%s device=%s weights_bytes=%d load_s=%.2f "
        "warm_up_s=%s",
        *(report.model, report.revision, report.effective, report.engine, report.device.torch_device),
        *(report.weights_bytes, report.load_s, report.warm_up_s),
    )


def _settled(device: DeviceInfo, fresh: object) -> MemoryPoint:
    """Memory once what converting needed is given back: only then is it what the new engine takes."""
    release(device.torch_device, fresh=fresh)
    return read_point(device.torch_device)


def refuse_unavailable(row: Precision, device: DeviceInfo) -> None:
    """Raise UnavailablePrecisionError, with the nearest row that runs, before anything is read."""
    reason = row.unavailable(device)
    if reason is not None:
        raise UnavailablePrecisionError(reason)


def _choose_engine(requested: str, row: Precision, checkpoint: Checkpoint) -> tuple[str, str]:
    """(reference or fast, why it is not the fast one); before anything is read."""
    if requested == "reference":
        return "reference", ""
    reason = refusal(row, checkpoint.config)
    if reason is None:
        return "fast", ""
    if requested == "fast":
        raise UnavailablePrecisionError(f"{reason} Choose --engine auto, or another precision.")
    return "reference", reason


def _missing_kernels(engine: str, row: Precision, device: DeviceInfo) -> str:
    """Why our own kernels do not run, a sentence; empty where they do, or where nothing of ours would."""
    has_ours = engine == "fast" or row.linear_class == "Int8Linear"
    return (lacks_triton(device.torch_device) or "") if has_ours and device.kind == "cuda" else ""


def _make_engine(
    name: str,
    network: Any,
    *,
    seen: Foresight,
    report: LoadReport,
    folder: Path,
    batch: int,
) -> LoadedEngine:
    """name: reference or fast, which packs the weights anew. folder: where the row's weights lie."""
    row = seen.row
    report = replace(report, kernels_reason=_missing_kernels(name, row, report.device))
    if name == "reference":
        return ReferenceEngine(network, row, report)
    return FastEngine(
        network,
        row,
        replace(report, prediction=_predicted(seen, report.device, "fast")),
        reference=lambda: ReferenceEngine(_load(folder, row, report.device), row, report),
        max_rows=batch,
    )


def _weights_folder(checkpoint: Checkpoint, header: Header, row: Precision, calibrations: Path) -> Path:
    """Where the row's weights lie: the checkpoint's folder, or what was calibrated from it."""
    if row.needs_calibration:
        found = find_calibrated(checkpoint.folder, calibrations)
        name = str(checkpoint.folder) if checkpoint.source == "folder" else checkpoint.name
        command = f"'./start.sh calibrate --model {name}'"
        if found is None:
            raise CalibrationMissingError(
                f"{row.name} needs a calibration of {checkpoint.name}, and there is none yet. Make one with {command} "
                "(it listens to the bundled recordings; --audio FOLDER takes yours), or choose int8-dynamic, which "
                "needs none."
            )
        if found != checkpoint.folder and not CalibrationReport.load(found).is_of(checkpoint.folder):
            raise CalibrationMissingError(
                f"The weights of {checkpoint.name} have changed since they were calibrated, so {row.name} would run "
                f"the old ones. Calibrate again with {command}, or choose int8-dynamic, which needs no calibration."
            )
        return found
    reason = lacking(header, row)
    if reason is not None:
        raise UnavailablePrecisionError(reason)
    return checkpoint.folder


def _load(folder: Path, row: Precision, device: DeviceInfo) -> Any:
    """The model in evaluation mode; libraries say nothing on the terminal while they load."""
    # fp32 means fp32: cuDNN's convolutions would use TF32 (10 bits of mantissa) by default.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]  # torch wants both alike
    # cuDNN's attention builds a plan for every new length of the cache: 50 ms for each of a first request's tokens
    # (H200, large-v3 shape, fp16: first request 2.4 times the steady one, 41 ms a token against 22).
    torch.backends.cuda.enable_cudnn_sdp(False)
    with quiet_libraries():
        _check_config(folder)
        return row.convert(row, folder, device.torch_device).eval()


def _check_config(folder: Path) -> None:
    """Raises ValueError for what transformers refuses of config.json, which it says in errors of other kinds."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import WhisperConfig

    try:
        WhisperConfig.from_pretrained(folder)
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: {_first_line(error).rstrip(':')}") from error


def _note_load(engine: LoadedEngine, load_s: float) -> None:
    """Adds to the report what the load took."""
    place = engine.report.device
    phases = replace(engine.report.phases, after_load=_settled(place, engine), peak=read_peak(place.torch_device))
    engine.report = replace(engine.report, phases=phases, load_s=load_s)


def _warm_up(engine: LoadedEngine) -> None:
    """One window of silence through all a request does: encode, language logits, prompt, tokens. Adds to the report."""
    started_s = time.perf_counter()
    dims = engine.dims
    if isinstance(engine, FastEngine):
        engine.compile()
    encoded = engine.encode(torch.zeros(1, dims.n_mels, 3000))
    engine.first_logits(encoded)
    # Every Whisper vocabulary ends with <|notimestamps|> and 1501 timestamps. Which ids the prompt holds is irrelevant
    # here; that <|endoftext|> does not end it after one token is not.
    begin = max(dims.n_vocab - 1501, 2)
    rules = TokenRules(eot=begin - 2, no_timestamps=begin - 1, timestamp_begin=begin, suppress=(begin - 2,))
    engine.generate(encoded, GenerateRequest(prompts=[[0, 0, 0]], max_new_tokens=WARM_UP_TOKENS, rules=rules))
    place = engine.report.device.torch_device
    after, peak = read_point(place), read_peak(place)
    warm_up_s = time.perf_counter() - started_s
    phases = replace(engine.report.phases, after_warm_up=after, peak=peak)
    engine.report = replace(engine.report, warm_up_s=warm_up_s, phases=phases)


def _report(
    checkpoint: Checkpoint,
    seen: Foresight,
    device: DeviceInfo,
    effective: str,
    census: Census,
    before: MemoryPoint,
) -> LoadReport:
    """What is known before there is an engine; load_engine adds seconds and memory."""
    return LoadReport(
        model=checkpoint.name,
        revision=checkpoint.revision,
        source=checkpoint.source,
        folder=checkpoint.folder,
        is_demo=checkpoint.is_demo,
        device=device,
        requested=seen.row.name,
        effective=effective,
        census=census,
        phases=MemoryPhases(before, before, None, before),
        load_s=0.0,
        warm_up_s=None,
        choice=checkpoint.choice,
        precision_choice=seen.choice,
        prediction=_predicted(seen, device, "reference"),
        verdict=seen.verdict,
    )


def _predicted(seen: Foresight, device: DeviceInfo, engine: str) -> FitPrediction:
    return predict(seen.stored, seen.row, tokens=WARM_UP_TOKENS, device=device, engine=engine)


_MEND = {
    "folder": "Copy or save it there again",
    "demo": "Restore it from the repository",
    "hub": "Fetch it again: delete that folder and start once with a network",
}
"""What helps a damaged checkpoint, by where it comes from; the cache is the Hub's."""


@contextmanager
def _device_errors(checkpoint: Checkpoint, row: Precision, device: DeviceInfo) -> Iterator[None]:
    """What goes wrong in libraries while loading, as our errors."""
    from safetensors import SafetensorError

    try:
        yield
    except SottoError:
        raise
    except ImportError as error:
        raise EffectivePrecisionError(
            f"{row.name} cannot be made here: {str(error).splitlines()[0]} Install the package, or choose another "
            "precision."
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelUnavailableError(
            f"The checkpoint {checkpoint.name} in {checkpoint.folder} cannot be read ({_first_line(error)}). "
            f"{_MEND.get(checkpoint.source, _MEND['hub'])}, or choose another model."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None
        release(device.torch_device)
        raise OutOfMemoryError(
            f"{checkpoint.name} does not fit into the memory of {device.label} at {row.name}. Choose a smaller "
            "precision (./start.sh precisions) or model, or close other programs that use the device."
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no advice of libraries on the terminal: what matters is in the report."""
    from transformers.utils import logging as transformers_logging

    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bar:
                transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
