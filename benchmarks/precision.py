"""Every precision in one table: load, weights, peak, speed, what stays behind, and what articles claim about them.

    python -m benchmarks.precision                        all rows: large-v3 on a GPU, the demo model on a CPU
    python -m benchmarks.precision --rows fp16,bnb-int8,int8-static --engine auto
    python -m benchmarks.precision --accuracy             the whole table: word errors of every row, too

--accuracy decodes the demo model's held-out recordings on the engine that the app takes for a row. For int8-static the
demo model is calibrated on the recordings in examples/, unless --calibrated names a folder.

Each row runs in a process of its own, so that none inherits another's memory or warm kernels. Weights are random unless
--model names a checkpoint; int8-static is then calibrated on random sound, which fixes its memory and arithmetic and
says nothing about its text. Predicted figures (model_loader/fit.py) stand beside the measured ones. Times per token
include the prompt's; medians of REPEATS runs after one that is not counted. Kernels and waits of a token are counted on
the reference engine alone. A GPU, torch, transformers, triton and bitsandbytes are enough: no sound is read, unless
--accuracy asks for it. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.claims import answers
from benchmarks.memory import (
    circumstances,
    mib,
    process_bytes,
    random_features,
    request_of,
    run,
    run_apart,
    say,
    table,
    timed,
)
from benchmarks.shapes import SHAPES, make_checkpoint
from errors import SottoError
from model_loader.activity import count_activity
from model_loader.device import DeviceInfo, describe_device
from model_loader.fit import predict
from model_loader.header import read_folder
from model_loader.loader import load_engine
from model_loader.memory import read_peak, reset_peak
from model_loader.precision import PRECISIONS, Precision, resolve_precision

if TYPE_CHECKING:
    from model_loader.engine import Engine
    from model_loader.loader import LoadReport

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
REPEATS = 3
PROFILED_TOKENS = 4
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 2, 32

COLUMNS: tuple[tuple[str, str], ...] = (
    ("row", "precision"),
    ("engine", "engine"),
    ("load_s", "load s"),
    ("weights_mib", "weights"),
    ("predicted_weights_mib", "predicted"),
    ("weights_off_percent", "off %"),
    ("peak_1_mib", "peak b1"),
    ("predicted_peak_1_mib", "predicted"),
    ("peak_1_off_percent", "off %"),
    ("peak_n_mib", "peak bN"),
    ("predicted_peak_n_mib", "predicted"),
    ("peak_n_off_percent", "off %"),
    ("process_1_mib", "process b1"),
    ("process_n_mib", "process bN"),
    ("token_1_ms", "ms/token b1"),
    ("token_n_ms", "ms/token bN"),
    ("encoder_1_ms", "encoder ms b1"),
    ("encoder_n_ms", "ms/window bN"),
    ("kernels_per_token", "kernels/token"),
    ("waits_per_token", "waits/token"),
    ("left_process_mib", "left, process"),
    ("left_torch_mib", "left, torch"),
)
"""Key in the JSON, heading in the table. Memory in MiB: weights counted, peaks of torch's allocator (a CPU has none:
"-"), the whole process's beyond what it held before the load (libraries come in with it), left after unloading beyond
what was there before, of the whole process and of torch's tensors."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it has a handler of its own
    device = describe_device(arguments.device)
    if arguments.batch == 0:
        arguments.batch = 32 if device.kind == "cuda" else 4
    if arguments.calibrate:
        made = calibrate(arguments.model, Path(arguments.calibrations), device)
        print(json.dumps({"folder": str(made)}))
        return 0
    if arguments.one:
        print(json.dumps(measure(resolve_precision(arguments.one), arguments)))
        return 0
    named = [name for name in arguments.rows.split(",") if name.strip()]
    rows = [resolve_precision(name, device).name for name in named] or list(PRECISIONS)
    shape = arguments.shape or ("large-v3" if device.kind == "cuda" else "demo")
    with tempfile.TemporaryDirectory(prefix="sotto-") as folder:
        model = arguments.model or _make_model(shape, Path(folder))
        results = _run_rows(rows, model, Path(folder) / "calibrations", device, arguments)
    claims = answers(results)
    print(f"{device.label} · {arguments.model or shape} · N = {arguments.batch}")
    print("\n".join([table(results, COLUMNS), *claims]), flush=True)
    accuracy = _accuracy(rows, device, arguments) if arguments.accuracy else None
    sizes = {key: getattr(arguments, key) for key in ("batch", "tokens_1", "tokens_n")}
    record = circumstances("precision", device, arguments.model or shape) | sizes
    print(json.dumps({**record, "rows": results, "claims": claims, "accuracy": accuracy}))
    return 1 if any("error" in result for result in results) else 0


def measure(row: Precision, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row in this process: figures by the names of COLUMNS and more."""
    engine = load_engine(
        arguments.model,
        row.name,
        engine=engine_for(row, arguments.engine),
        device=arguments.device,
        offline=True,
        calibrations=Path(arguments.calibrations),
    )
    report = engine.report
    figures: dict[str, Any] = {"row": row.name, "engine": report.engine, "proof": report.census.summary}
    for mark, n_windows, n_tokens in (("1", 1, arguments.tokens_1), ("n", arguments.batch, arguments.tokens_n)):
        reset_peak(engine.device)
        figures |= {f"{key}_{mark}_ms": value for key, value in times(engine, n_windows, n_tokens).items()}
        peak = read_peak(engine.device)
        figures[f"peak_{mark}_mib"] = mib(peak.allocated_bytes)
        figures[f"process_{mark}_mib"] = mib(process_bytes(peak) - process_bytes(report.phases.before))
        figures |= _predicted(row, report, n_windows, n_tokens, mark)
    if report.engine == "reference":  # a captured step is one launch for the profiler, and runs ahead of its tokens
        figures |= _activity(engine)
    engine.close()
    phases = engine.report.phases
    assert phases.after_warm_up is not None and phases.after_unload is not None
    figures |= {
        "effective": report.effective,
        "load_s": round(report.load_s, 2),
        "warm_up_s": round(report.warm_up_s or 0.0, 2),
        "weights_mib": mib(report.weights_bytes),
        "warm_process_mib": mib(process_bytes(phases.after_warm_up)),
        "left_process_mib": mib(process_bytes(phases.after_unload) - process_bytes(phases.before)),
        "left_torch_mib": mib(phases.after_unload.allocated_bytes),
    }
    for kind in ("weights", "peak_1", "peak_n"):
        figures[f"{kind}_off_percent"] = _off(figures.get(f"predicted_{kind}_mib"), figures[f"{kind}_mib"])
    return figures


def engine_for(row: Precision, asked: str) -> str:
    """Weights packed for the fast engine's kernels are measured there; the reference engine only unpacks them."""
    return "fast" if row.linear_class == "PackedLinear" else asked


def calibrate(model: str, calibrations: Path, device: DeviceInfo) -> Path:
    """Make an int8-static folder from random sound and tokens: right in bytes and arithmetic, not in its text."""
    from model_loader.calibration import (
        CalibrationReport,
        calibrated_home,
        quantise_model,
        record_activations,
        save_calibrated,
        weight_files,
    )

    engine = load_engine(
        model, "fp16" if device.kind == "cuda" else "fp32", device=str(device.torch_device), offline=True
    )
    network: Any = engine.network  # type: ignore[union-attr]  # the reference engine was asked for
    with record_activations(network) as activations:
        encoded = engine.encode(random_features(engine, CALIBRATION_WINDOWS))
        engine.generate(encoded, request_of(engine, CALIBRATION_WINDOWS, CALIBRATION_TOKENS))
    quantised = quantise_model(network, activations)
    folder = calibrated_home(engine.report.folder, calibrations)
    weights = weight_files(engine.report.folder)
    report = CalibrationReport(engine.report.model, engine.report.revision, {}, {}, weights, quantised.layers, {})
    save_calibrated(network, engine.report.folder, folder, report)
    engine.close()
    return folder


def _make_model(shape: str, folder: Path) -> str:
    if shape == "demo":
        return "demo"
    say(f"writing a checkpoint of shape {shape}")
    return str(make_checkpoint(shape, folder / shape))


def _run_rows(
    rows: Sequence[str], model: str, calibrations: Path, device: DeviceInfo, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    common = ["--model", model, "--device", arguments.device, "--calibrations", str(calibrations)]
    runnable = [row for row in rows if PRECISIONS[row].unavailable(device) is None]
    if any(PRECISIONS[row].needs_calibration for row in runnable):
        say("calibrating on random sound")
        static = next(row for row in runnable if PRECISIONS[row].needs_calibration)
        made = run_apart("benchmarks.precision", static, device, [*common, "--calibrate"])
        if "error" in made:
            say(f"the calibration failed: {made['error']}")
    common += ["--engine", arguments.engine, "--batch", str(arguments.batch)]
    common += ["--tokens-1", str(arguments.tokens_1), "--tokens-n", str(arguments.tokens_n)]
    return [_told(run_apart("benchmarks.precision", row, device, [*common, "--one", row])) for row in rows]


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """Said at once too: a run that is cut off has not been for nothing."""
    say(", ".join(f"{key} {result[key]}" for key, _ in COLUMNS if result.get(key) is not None))
    return result


def times(engine: Engine, n_windows: int, n_tokens: int) -> dict[str, float]:
    """Milliseconds of the encoder per window and of the decoder per token (of the whole batch)."""
    features = random_features(engine, n_windows)
    request = request_of(engine, n_windows, n_tokens)
    encoded = engine.encode(features)
    engine.generate(encoded, request_of(engine, n_windows, min(n_tokens, 8)))  # kernels of this batch size
    encode_s = [timed(partial(engine.encode, features), engine.device) for _ in range(REPEATS)]
    decode_s = [timed(partial(engine.generate, encoded, request), engine.device)]
    while len(decode_s) < REPEATS and sum(decode_s) < 5.0:  # a row that needs 100 ms a token is measured once
        decode_s.append(timed(partial(engine.generate, encoded, request), engine.device))
    return {
        "encoder": round(1000 * statistics.median(encode_s) / n_windows, 3),
        "token": round(1000 * statistics.median(decode_s) / n_tokens, 3),
    }


def _activity(engine: Engine) -> dict[str, Any]:
    """Operators, kernels and waits of one token more, batch 1: a longer run less a shorter one, without the prompt."""
    encoded = engine.encode(random_features(engine, 1))
    short, long = (
        count_activity(partial(engine.generate, encoded, request_of(engine, 1, n)), engine.device)
        for n in (2, 2 + PROFILED_TOKENS)
    )
    per_token: dict[str, Any] = {}
    for name, before in asdict(short).items():
        after = getattr(long, name)
        key = f"{name.removeprefix('n_')}_per_token"
        per_token[key] = None if before is None else round((after - before) / PROFILED_TOKENS, 1)
    return per_token


def _predicted(row: Precision, report: LoadReport, n_windows: int, n_tokens: int, mark: str) -> dict[str, Any]:
    header = read_folder(report.folder)
    found = predict(header, row, n_windows, tokens=n_tokens, device=report.device, engine=report.engine)
    peak = mib(found.peak_bytes) if report.device.kind == "cuda" else None
    return {"predicted_weights_mib": mib(found.weights_bytes), f"predicted_peak_{mark}_mib": peak}


def _off(predicted: int | None, measured: int | None) -> float | None:
    return None if predicted is None or not measured else round(100 * (predicted / measured - 1), 1)


def _accuracy(rows: Sequence[str], device: DeviceInfo, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Word errors of the rows on the demo model, fp32 with them; prints its own table."""
    from benchmarks import accuracy

    recordings = accuracy.find_recordings(arguments.windows, accuracy.HELDOUT, arguments.limit)
    names = [row for row in dict.fromkeys(["fp32", *rows]) if PRECISIONS[row].unavailable(device) is None]
    with tempfile.TemporaryDirectory(prefix="sotto-") as folder:
        calibrated = arguments.calibrated
        if calibrated is None and any(PRECISIONS[row].needs_calibration for row in names):
            try:
                calibrated = calibrate_on_examples(Path(folder) / "calibrated", device)
            except SottoError as problem:  # no ffmpeg, say
                print(f"No text is measured for rows that need a calibration: {problem}")
                names = [row for row in names if not PRECISIONS[row].needs_calibration]
        measured = accuracy.run(
            "demo",
            names,
            device=arguments.device,
            recordings=recordings,
            batch_size=16,
            calibrated=calibrated,
            engine="auto",
        )
        results = []
        for result in measured:
            say(f"{result.precision}: {result.wer} % word errors in {result.decode_s:.0f} s")
            results.append(result)
    print(accuracy.table(results))
    return [accuracy.as_record(result) for result in results]


def calibrate_on_examples(folder: Path, device: DeviceInfo) -> Path:
    """The demo model as int8-static, calibrated as `python app.py calibrate --model demo` does. Raises SottoError."""
    from transcription.calibrate import calibrate, recordings_in

    say("calibrating the demo model on the recordings in examples/")
    kept = "fp16" if device.kind == "cuda" else "fp32"
    engine = load_engine("demo", kept, engine="reference", device=str(device.torch_device), offline=True, warm_up=False)
    try:
        calibrate(engine, recordings_in(EXAMPLES), folder)  # type: ignore[arg-type]  # the reference engine was asked for
    finally:
        engine.close()
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES, "demo"], help="default: large-v3 on a GPU, demo on a CPU")
    parser.add_argument("--model", help="a checkpoint (name or folder) instead of random weights")
    parser.add_argument("--rows", default="", help="precisions, with commas between; default: all")
    parser.add_argument(
        "--engine", choices=("reference", "fast", "auto"), default="reference", help="default: reference"
    )
    parser.add_argument("--batch", type=int, default=0, help="N, the larger batch; default: 32, on a CPU 4")
    parser.add_argument("--tokens-1", type=int, default=64, help="tokens at batch 1; default: 64")
    parser.add_argument("--tokens-n", type=int, default=32, help="tokens at batch N; default: 32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--accuracy", action="store_true", help="word errors of the demo model, too")
    parser.add_argument("--limit", type=int, default=0, help="with --accuracy: recordings per language; 0 for all")
    parser.add_argument("--windows", type=Path, help="with --accuracy: a file of benchmarks.accuracy --save-windows")
    parser.add_argument("--calibrated", type=Path, help="with --accuracy: the demo model calibrated already")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--calibrations", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run(main)
