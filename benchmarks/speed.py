"""How fast each precision decodes on the fast engine, beside transformers in the same run.

    python -m benchmarks.speed                                      large-v3 shape on a GPU: 5 minutes on an H200
    python -m benchmarks.speed --rows fp16,int8 --skip compiled     less of it
    python -m benchmarks.speed --shape tiny --batches 1 --tokens 32 on a CPU

Weights are random, sizes and arithmetic those of the real checkpoint; every window gets exactly --tokens tokens.
    ms/token   generate() for --tokens tokens after a prompt of three, encoder output given, over --tokens
    floor      bytes a step must read (projections, head, caches) over --bandwidth; share = floor / ms a step
    encoder    ms a window, features on the device
    RTF        seconds of sound (30 a window) over seconds from features to tokens: encoder, language logits, tokens
Peers, both in fp16 (fp32 on a CPU): transformers' generate as it is, and with a static cache and torch.compile. Prints
a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import circumstances, random_features, request_of, say, timed
from benchmarks.shapes import SHAPES, make_checkpoint
from errors import SottoError
from model_loader.device import describe_device
from model_loader.engine import ReferenceEngine
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS

SECTIONS = ("fast", "transformers", "compiled")
WINDOW_S = 30.0
COLUMNS = (
    ("engine", "engine"),
    ("row", "precision"),
    ("batch", "batch"),
    ("token_ms", "ms/token"),
    ("token_spread_ms", "+-"),
    ("floor_ms", "floor"),
    ("floor_share", "share"),
    ("encoder_ms", "encoder ms/window"),
    ("encoder_spread_ms", "+-"),
    ("rtf", "RTF"),
    ("window_ms", "features to text, ms"),
)
"""Key in the JSON, heading in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    device = describe_device(arguments.device)
    on_gpu = device.kind == "cuda"
    shape = arguments.shape or ("large-v3" if on_gpu else "tiny")
    rows = arguments.rows.split(",") if arguments.rows else ["fp16", "int8", "int4"] if on_gpu else ["fp32", "int8"]
    skipped = set(arguments.skip.split(",")) | (set() if on_gpu else {"compiled"})
    results: list[dict[str, Any]] = []
    captures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="sotto-") as place:
        say(f"writing a checkpoint of shape {shape}")
        folder = make_checkpoint(shape, Path(place) / shape)
        for row in rows if "fast" not in skipped else ():
            say(f"fast {row}")
            found, captures[row] = measure_fast(folder, row, arguments)
            results += found
        peer = "fp16" if on_gpu else "fp32"
        if "transformers" not in skipped:
            say(f"transformers {peer}")
            results += measure_transformers(folder, peer, arguments)
        if "compiled" not in skipped:
            say(f"transformers {peer}, static cache and compile")
            results += measure_transformers(folder, peer, arguments, compiled=True)
    print(table(results))
    for line in comparisons(results):
        print(line)
    sizes = {"tokens": arguments.tokens, "bandwidth_tb_s": arguments.bandwidth, "repeats": arguments.repeats}
    print(json.dumps({**circumstances("speed", device, shape), **sizes, "rows": results, "captures": captures}))
    return 0


def measure_fast(folder: Path, row: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Any]]:
    """A result per batch size, and what every graph cost."""
    engine = load_engine(str(folder), row, engine="fast", device=arguments.device, offline=True)
    assert isinstance(engine, FastEngine)
    results = []
    for n in _batches(arguments):
        features = random_features(engine, n).to(engine.device)
        encoded = engine.encode(features)
        request = request_of(engine, n, arguments.tokens)

        def decode(encoded: Any = encoded, request: Any = request) -> None:
            engine.generate(encoded, request)

        def encode(features: Any = features) -> None:
            engine.encode(features)

        def whole(features: Any = features, request: Any = request) -> None:
            encoded = engine.encode(features)
            engine.first_logits(encoded)
            engine.generate(encoded, request)

        timings = _timings(decode, encode, whole, n, engine.device, arguments)
        n_steps = arguments.tokens + 2  # the prompt's first two tokens are steps as well
        floor_ms = engine.step_bytes(n, n_steps // 2) / arguments.bandwidth / 1e9
        step_ms = timings["token_ms"] * arguments.tokens / n_steps
        floors = {"floor_ms": round(floor_ms, 3), "floor_share": round(floor_ms / step_ms, 3)}
        results.append({"engine": "fast", "row": row, "batch": n, **timings, **floors})
    captures = [{"name": c.name, "capture_s": round(c.capture_s, 3), "n_bytes": c.n_bytes} for c in engine.captures]
    engine.close()
    return results, captures


def measure_transformers(
    folder: Path, row: str, arguments: argparse.Namespace, *, compiled: bool = False
) -> list[dict[str, Any]]:
    """transformers' own generate, greedy and without any rule for tokens. compiled: static cache, torch.compile."""
    engine = load_engine(str(folder), row, engine="reference", device=arguments.device, offline=True, warm_up=False)
    assert isinstance(engine, ReferenceEngine)
    model = engine.network
    results = []
    batches = _numbers(arguments.compiled_batches) if compiled else _batches(arguments)
    for n in batches:
        features = random_features(engine, n).to(engine.device, model.dtype)
        hidden = engine.encode(features).hidden
        generate = _generate(model, request_of(engine, n, arguments.tokens).prompts, arguments.tokens, compiled)

        def decode(hidden: Any = hidden, generate: Any = generate) -> None:
            generate(hidden)

        def encode(features: Any = features) -> None:
            engine.encode(features)

        def whole(features: Any = features, generate: Any = generate) -> None:
            generate(engine.encode(features).hidden)

        timings = _timings(decode, encode, whole, n, engine.device, arguments)
        name = "transformers, compiled" if compiled else "transformers"
        results.append({"engine": name, "row": row, "batch": n, **timings})
    engine.close()
    return results


def _generate(model: Any, prompts: list[list[int]], n_tokens: int, compiled: bool) -> Callable[[torch.Tensor], Any]:
    """A function of the encoder's output that decodes exactly n_tokens."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    tokens = torch.tensor(prompts, device=model.device)
    static = {"cache_implementation": "static"} if compiled else {}
    settings = GenerationConfig(
        max_length=tokens.shape[1] + n_tokens,
        do_sample=False,
        eos_token_id=None,  # nothing ends a row
        pad_token_id=prompts[0][0],
        bos_token_id=prompts[0][0],
        decoder_start_token_id=prompts[0][0],
        use_cache=True,
        **static,
    )

    def generate(hidden: torch.Tensor) -> Any:
        with torch.no_grad():
            output = GenerationMixin.generate(
                model,
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                decoder_input_ids=tokens,
                generation_config=settings,
            )
        assert output.shape[1] == tokens.shape[1] + n_tokens
        return output

    return generate


def _timings(
    decode: Callable[[], None],
    encode: Callable[[], None],
    whole: Callable[[], None],
    n_windows: int,
    place: torch.device,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Medians and half the range of --repeats runs, after two that load, compile and capture."""

    def repeat(work: Callable[[], None]) -> tuple[float, float]:
        for _ in range(2):
            work()
        times = [timed(work, place) for _ in range(arguments.repeats)]
        return statistics.median(times), (max(times) - min(times)) / 2

    (decode_s, decode_spread), (encode_s, encode_spread), (whole_s, _) = map(repeat, (decode, encode, whole))
    return {
        "token_ms": round(1000 * decode_s / arguments.tokens, 4),
        "token_spread_ms": round(1000 * decode_spread / arguments.tokens, 4),
        "encoder_ms": round(1000 * encode_s / n_windows, 3),
        "encoder_spread_ms": round(1000 * encode_spread / n_windows, 3),
        "rtf": round(n_windows * WINDOW_S / whole_s, 1),
        "window_ms": round(1000 * whole_s, 1),
    }


def comparisons(results: Sequence[dict[str, Any]]) -> list[str]:
    """How often faster than transformers in this run, batch by batch."""
    lines = []
    for peer in (r for r in results if r["engine"] != "fast"):
        for ours in (r for r in results if r["engine"] == "fast" and r["batch"] == peer["batch"]):
            times = peer["token_ms"] / ours["token_ms"]
            lines.append(
                f"batch {peer['batch']}: {ours['row']} takes {ours['token_ms']:.3f} ms a token, {peer['engine']} "
                f"{peer['row']} {peer['token_ms']:.3f}: {times:.1f} times as fast; from features to text "
                f"{ours['rtf'] / peer['rtf']:.1f} times."
            )
    return lines


def table(results: Sequence[dict[str, Any]]) -> str:
    """Aligned columns."""
    lines = [[heading for _, heading in COLUMNS]]
    lines += [[str(result.get(key, "-")) for key, _ in COLUMNS] for result in results]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def _batches(arguments: argparse.Namespace) -> list[int]:
    return _numbers(arguments.batches)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="default: large-v3 on a GPU, tiny on a CPU")
    fast = ", ".join(name for name, row in PRECISIONS.items() if row.fast)
    parser.add_argument("--rows", default="", help=f"of {fast}; default: fp16,int8,int4 on a GPU, fp32,int8 on a CPU")
    parser.add_argument("--batches", default="1,32", help="windows decoded together; default: 1,32")
    parser.add_argument("--compiled-batches", default="1", help="the same for the compiled peer, 70 s each; default: 1")
    parser.add_argument("--tokens", type=int, default=128, help="tokens for every window; default: 128")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each figure; default: 5")
    parser.add_argument("--skip", default="", help=f"sections left out, of {','.join(SECTIONS)}")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="of the floor, in TB/s; default: 4.3, an H200's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SottoError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
