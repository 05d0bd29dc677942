"""What each precision costs to hold and to start: load, memory in phases, proof, warm-up, first and later requests.

    python -m benchmarks.memory                                  all rows: large-v3 on a GPU, base on a CPU
    python -m benchmarks.memory --shape small --rows fp16,8bit --batch 8
    python -m benchmarks.memory --model demo

Weights are random unless --model names a checkpoint; sizes and arithmetic are those of the real one. Each row runs in a
process of its own, so that no row inherits another's memory, CUDA context or warm kernels. A request is what a user's
first window does: encode, language logits, prompt, tokens with timestamps. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from benchmarks.shapes import SHAPES, make_checkpoint
from errors import SottoError
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import GenerateRequest, TokenRules
from model_loader.loader import load_engine
from model_loader.memory import MemoryPoint, read_memory, read_peak, reset_peak
from model_loader.precision import PRECISIONS, resolve_precision

if TYPE_CHECKING:
    from model_loader.engine import Engine

MIB = 2**20
REQUEST_TOKENS = 32
"""Of a request: about four seconds of speech, long enough to outweigh the encoder, short enough for 100 ms a token."""
REPEATS = 3

COLUMNS: tuple[tuple[str, str], ...] = (
    ("row", "precision"),
    ("load_s", "load s"),
    ("weights_mib", "weights"),
    ("allocated_after_load_mib", "loaded, torch"),
    ("process_after_load_mib", "loaded, process"),
    ("process_after_warm_up_mib", "warm, process"),
    ("peak_load_mib", "peak to warm"),
    ("peak_request_mib", "peak in use"),
    ("left_process_mib", "left after"),
    ("warm_up_s", "warm-up s"),
    ("first_over_steady", "first/steady"),
    ("encoder_ms", "encoder ms/window"),
    ("token_ms", "ms/token"),
)
"""Key in the JSON, heading in the table. Memory in MiB; 'left after' counts from before the load."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.model, arguments)))
        return 0
    device = describe_device(arguments.device)
    rows = [resolve_precision(name).name for name in arguments.rows.split(",")] if arguments.rows else list(PRECISIONS)
    shape = arguments.shape or ("large-v3" if device.kind == "cuda" else "base")
    with tempfile.TemporaryDirectory(prefix="sotto-") as folder:
        model = arguments.model
        if model is None:
            say(f"writing a checkpoint of shape {shape}")
            model = str(make_checkpoint(shape, Path(folder) / shape))
        results = [_run_row(row, model, device, arguments) for row in rows]
    print(table(results))
    sizes = {"batch": arguments.batch, "tokens": arguments.tokens, "request_tokens": REQUEST_TOKENS}
    print(json.dumps({**circumstances("memory", device, arguments.model or shape), **sizes, "rows": results}))
    return 1 if any("error" in result for result in results) else 0


def measure(row: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row in this process: figures by the names of COLUMNS and more."""
    engine = load_engine(model, row, device=arguments.device, offline=True)
    reset_peak(engine.device)
    times = _times(engine, arguments.batch, arguments.tokens)
    peak = read_peak(engine.device)
    engine.close()
    report, phases = engine.report, engine.report.phases
    assert phases.after_warm_up is not None and phases.after_unload is not None
    return {
        "row": row,
        "effective": report.effective,
        "proof": report.census.summary,
        "census": [asdict(line) for line in report.census.lines],
        "attention": report.attention,
        "load_s": round(report.load_s, 2),
        "weights_mib": mib(report.weights_bytes),
        "allocated_after_load_mib": mib(phases.after_load.allocated_bytes),
        "process_after_load_mib": mib(process_bytes(phases.after_load)),
        "process_after_warm_up_mib": mib(process_bytes(phases.after_warm_up)),
        "peak_load_mib": mib(allocated_or_process(phases.peak)),
        "peak_request_mib": mib(allocated_or_process(peak)),
        "left_torch_mib": mib(phases.after_unload.allocated_bytes),
        "left_process_mib": mib(process_bytes(phases.after_unload) - process_bytes(phases.before)),
        "warm_up_s": round(report.warm_up_s or 0.0, 2),
        **times,
        "phases": asdict(phases),
        "peak_in_use": asdict(peak),
    }


def _times(engine: Engine, n_windows: int, n_tokens: int) -> dict[str, float]:
    """First and later requests of one window; encoder and tokens of a batch, the tokens' prefill included."""
    place = engine.device
    first_s, *later_s = [timed(lambda: _request(engine, 1, REQUEST_TOKENS), place) for _ in range(REPEATS + 1)]
    features = random_features(engine, n_windows)
    encoded = engine.encode(features)  # also the first batch of this size
    encode_s = [timed(lambda: engine.encode(features), place) for _ in range(REPEATS)]
    decode_s = timed(lambda: engine.generate(encoded, request_of(engine, n_windows, n_tokens)), place)
    steady_s = statistics.median(later_s)
    return {
        "first_request_s": round(first_s, 4),
        "steady_request_s": round(steady_s, 4),
        "first_over_steady": round(first_s / steady_s, 2),
        "encoder_ms": round(1000 * statistics.median(encode_s) / n_windows, 2),
        "token_ms": round(1000 * decode_s / n_tokens, 2),
    }


def table(results: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]] = COLUMNS) -> str:
    """Aligned columns; a refused row shows its reason."""
    lines = [[heading for _, heading in columns]]
    lines += [[_cell(result.get(key)) for key, _ in columns] for result in results if "load_s" in result]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text += [f"{result['row']}: {result['proof']}" for result in results if "proof" in result]
    text += [f"{result['row']}: {result['error']}" for result in results if "error" in result]
    text += [f"{result['row']}: skipped. {result['skipped']}" for result in results if "skipped" in result]
    return "\n".join(text)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _run_row(row: str, model: str, device: DeviceInfo, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--one", row, "--model", model, "--device", arguments.device]
    options += ["--batch", str(arguments.batch), "--tokens", str(arguments.tokens)]
    return run_apart("benchmarks.memory", row, device, options)


def run_apart(module: str, row: str, device: DeviceInfo, options: Sequence[str]) -> dict[str, Any]:
    """Measure one row in a fresh process that prints JSON as its last line; a refusal or an error is a result too."""
    reason = PRECISIONS[row].unavailable(device)
    if reason is not None:
        return {"row": row, "skipped": reason}
    say(row)
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"row": row, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _request(engine: Engine, n_windows: int, n_tokens: int) -> None:
    encoded = engine.encode(random_features(engine, n_windows))
    engine.first_logits(encoded)
    engine.generate(encoded, request_of(engine, n_windows, n_tokens))


def random_features(engine: Engine, n_windows: int) -> torch.Tensor:
    return torch.randn(n_windows, engine.dims.n_mels, 3000, generator=torch.Generator().manual_seed(0))


def request_of(engine: Engine, n_windows: int, n_tokens: int) -> GenerateRequest:
    """Exactly n_tokens for every window: <|endoftext|> is forbidden. Ids as at the end of every Whisper vocabulary."""
    begin = engine.dims.n_vocab - 1501
    eot = begin - 107
    rules = TokenRules(eot, no_timestamps=begin - 1, timestamp_begin=begin, suppress=(eot,))
    return GenerateRequest([[eot + 1, eot + 2, begin - 6]] * n_windows, n_tokens, rules)


def run(main: Callable[[], int]) -> NoReturn:
    """A benchmark as a program: a mistake is a sentence and its exit code."""
    try:
        sys.exit(main())
    except SottoError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)


def timed(work: Callable[[], object], place: torch.device) -> float:
    """Seconds from the call to its last kernel's end."""
    started_s = time.perf_counter()
    work()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - started_s


def process_bytes(point: MemoryPoint) -> int:
    """This process's memory; where the driver hides it, all programs' (the benchmark should be alone then)."""
    return point.device_used_bytes if point.process_bytes is None else point.process_bytes


def allocated_or_process(point: MemoryPoint) -> int:
    return process_bytes(point) if point.allocated_bytes is None else point.allocated_bytes


def mib(n_bytes: int | None) -> int | None:
    return None if n_bytes is None else round(n_bytes / MIB)


def circumstances(name: str, device: DeviceInfo, model: str) -> dict[str, Any]:
    """Of a run: what its figures hold for."""
    gpus = read_memory().gpus
    return {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "model": model,
        "device": device.label,
        "driver": gpus[0].driver if gpus else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(text: str) -> None:
    print(f"benchmarks: {text} ...", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="default: large-v3 on a GPU, base on a CPU")
    parser.add_argument("--model", help="a checkpoint (name or folder) instead of random weights")
    parser.add_argument("--rows", default="", help="precisions, with commas between; default: all")
    parser.add_argument("--batch", type=int, default=1, help="windows per batch for encoder and tokens; default: 1")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded per window; default: 128")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run(main)
