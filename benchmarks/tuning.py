"""Try other tiles for the fast engine's kernels on this GPU, and print the best for triton_ops.Tuning.

    python -m benchmarks.tuning                              every kernel, fp16, int8, int4, 1 and 32 rows: 6 minutes
    python -m benchmarks.tuning --formats int8 --rows 32 --kernels cross

Each candidate runs on the layers of a large-v3 decoder of random weights, captured as one graph, so that weights come
from memory and not from the L2 cache. Candidates are compiled beforehand by --workers processes. A kernel beside its
neighbours can behave otherwise than among its like: the whole step is measured at the end, before and after.
Prints a line for every kernel, the table's entries to copy, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks.memory import circumstances, say
from benchmarks.shapes import SHAPES
from model_loader.device import describe_device
from model_loader.engine import TokenRules
from model_loader.fast.packing import Format, pack
from model_loader.fast.slots import RuleTensors, Slots, make_slots
from model_loader.fast.step import decoder_step
from model_loader.fast.triton_ops import ROW_PATH_LIMIT, RowTile, Tile, TritonOps, Tuning
from model_loader.fast.weights import DecoderLayer, DecoderWeights

FORMATS = {"fp16": Format.FLOAT, "int8": Format.INT8, "int4": Format.INT4}
KERNELS = ("qkv", "square", "fc1", "fc2", "head", "self", "cross")
N_LAYERS = 16
"""int4's smallest projection is 0.9 MB, sixteen of them 14; the L2 cache holds 50, so each replay also clears it."""
REPEATS = 12
N_PAST = 96
"""Text positions behind each row: the middle of a window's text."""


@dataclass(frozen=True, slots=True)
class Result:
    """One candidate of one kernel."""

    kernel: str
    candidate: str
    us: float


class Bench:
    """Random weights of one format, slots for so many rows."""

    def __init__(self, form: Format, n_rows: int, shape: str, n_layers: int) -> None:
        self.form, self.n_rows = form, n_rows
        self.weights = _random_weights(form, shape, n_layers)
        self.slots = make_slots(self.weights, n_rows, quantised=form is not Format.FLOAT)
        self.rules = RuleTensors.on(self.weights.device, self.weights.n_vocab)
        begin = self.weights.n_vocab - 1501
        self.rules.load(TokenRules(begin - 107, begin - 1, begin, suppress=(begin - 107,)))
        for cache in (self.slots.cross_keys, self.slots.cross_values):
            _ = cache.random_(1, 255) if cache.dtype == torch.uint8 else cache.normal_()
        self.slots.cross_scale.fill_(0.01)
        self._flood = torch.zeros(64 * 2**20, dtype=torch.uint8, device=self.weights.device)
        """Written between replays: nothing of the one before is left in the L2 cache."""

    def start(self) -> Slots:
        self.slots.start([[1]] * self.n_rows, max_new_tokens=400, temperature=0.0, seed=0, timestamps=True)
        self.slots.position.fill_(N_PAST)
        return self.slots

    def us(self, run: Callable[[TritonOps], None], tuning: Tuning, n_launches: int, *, replays: int = REPEATS) -> float:
        """Microseconds of one launch. replays 0: only compile."""
        ops = TritonOps(self.weights, self.start(), tuning)
        run(ops)
        if not replays:
            return 0.0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(ops)
        times: list[float] = []
        for _ in range(replays):
            self._flood.add_(1)
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1000 * begin.elapsed_time(end) / n_launches)
        return statistics.median(times)

    def kernel(self, name: str) -> tuple[Callable[[TritonOps], None], int]:
        """The kernel on every layer, and its launches."""
        layers, head = self.weights.layers, self.weights.head

        def square(ops: TritonOps) -> None:
            for layer in layers:
                ops.add_attended(layer.out)
                ops.cross_query(layer.cross_query)

        runs: dict[str, tuple[Callable[[TritonOps], None], int]] = {
            "qkv": (lambda ops: _each(layers, lambda i, x: ops.qkv(x.qkv, i)), len(layers)),
            "square": (square, 2 * len(layers)),
            "fc1": (lambda ops: _each(layers, lambda i, x: ops.expand(x.fc1)), len(layers)),
            "fc2": (lambda ops: _each(layers, lambda i, x: ops.add_inner(x.fc2)), len(layers)),
            "head": (lambda ops: ops.head(head), 1),
            "self": (lambda ops: _each(layers, lambda i, x: ops.self_attention(i)), len(layers)),
            "cross": (lambda ops: _each(layers, lambda i, x: ops.cross_attention(i)), len(layers)),
        }
        return runs[name]

    def step_ms(self, tuning: Tuning) -> float:
        """A whole step, scaled from the layers here to large-v3's 32."""

        def run(ops: TritonOps) -> None:
            decoder_step(self.weights, ops, self.rules)

        def run_ends(ops: TritonOps) -> None:
            ops.embed()
            ops.head(self.weights.head)
            ops.choose(self.rules)

        whole = self.us(run, tuning, 1)
        ends = self.us(run_ends, tuning, 1)
        return (ends + (whole - ends) * 32 / len(self.weights.layers)) / 1000


def candidates(form: Format, n_rows: int, kernel: str) -> Iterator[tuple[str, Tuning]]:
    """Name and tuning; the first is the present one."""
    now = Tuning()
    yield "present", now
    if kernel == "self":
        for slots, block, warps in product((False, True), (16, 32, 64, 128), (1, 2, 4)):
            name = f"{'slots, ' if slots else ''}block {block}, {warps} warps"
            yield name, replace(now, self_slots=slots, self_block=block, self_warps=warps)
    elif kernel == "cross":
        shares = (132, 264, 528) if n_rows <= ROW_PATH_LIMIT else (264, 1280)
        for slots, block, warps, stages in product((False, True), (64, 128, 256), (2, 4, 8), (1, 3)):
            for programs in shares:
                name = f"{'slots, ' if slots else ''}block {block}, {warps} warps, {stages} stages, {programs} programs"
                yield name, replace(now, cross_slots=slots, cross_block=block, cross_warps=warps, cross_stages=stages,
                                    cross_programs=programs)  # fmt: skip
    elif n_rows <= ROW_PATH_LIMIT:
        for n_bytes, warps in product((1280, 2560, 5120, 10240, 20480), (1, 2, 4)):
            row_tile = RowTile(n_bytes, warps)
            yield str(row_tile), replace(now, row_tiles={**now.row_tiles, (form, kernel): row_tile})
    else:
        depths = [(128, 3), (128, 5)] if form is Format.INT4 else [(128, 3), (128, 5), (256, 3)]
        for (outputs, splits), (columns, stages), warps in product(_CUTS[kernel], depths, (2, 4, 8)):
            tile = Tile(outputs, splits, columns, stages, warps)
            yield str(tile), replace(now, tiles={**now.tiles, (form, kernel): tile})


_CUTS: dict[str, list[tuple[int, int]]] = {
    "qkv": [(16, 1), (32, 1), (64, 2), (32, 2)],
    "square": [(16, 1), (16, 2), (32, 2), (32, 4), (64, 4)],
    "fc1": [(16, 1), (32, 1), (64, 1), (64, 2)],
    "fc2": [(16, 2), (16, 4), (32, 4), (32, 8), (64, 8)],
    "head": [(32, 1), (64, 1), (128, 1)],
}
"""(outputs, splits) of linear_tile worth trying: between 80 and 480 programs."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    part = arguments.prepare
    if part:
        return _prepare(arguments, *map(int, part.split("/")))
    say(f"compiling with {arguments.workers} processes")
    _compile_apart(arguments, list(argv) if argv is not None else sys.argv[1:])
    found: list[dict[str, Any]] = []
    for name, n_rows in _runs(arguments):
        bench = Bench(FORMATS[name], n_rows, arguments.shape, N_LAYERS)
        best = Tuning()
        for kernel in arguments.kernels.split(","):
            results = _measure(bench, kernel)
            present, chosen = results[0], min(results, key=lambda r: r.us)
            best = _with(best, dict(candidates(bench.form, n_rows, kernel))[chosen.candidate], bench.form, kernel)
            print(f"{name} {n_rows:2d} rows {kernel:7s} {present.us:7.2f} -> {chosen.us:7.2f} us  {chosen.candidate}")
            found.append({"format": name, "rows": n_rows, "kernel": kernel, "present_us": round(present.us, 2),
                          "best_us": round(chosen.us, 2), "best": chosen.candidate,
                          "next": [[r.candidate, round(r.us, 2)] for r in sorted(results, key=lambda r: r.us)[1:4]],
                          })  # fmt: skip
        for label, tuning in (
            ("present", Tuning()),
            ("best", best),
            ("best, sums early", replace(best, early_sums=True)),
        ):
            ms = bench.step_ms(tuning)
            print(f"{name} {n_rows:2d} rows step    {ms:7.3f} ms  {label}", flush=True)
            found.append({"format": name, "rows": n_rows, "step_ms": round(ms, 4), "tuning": label})
        del bench
        torch.cuda.empty_cache()
    print(json.dumps({**circumstances("tuning", describe_device("cuda"), arguments.shape), "results": found}))
    return 0


def _measure(bench: Bench, kernel: str) -> list[Result]:
    run, n_launches = bench.kernel(kernel)
    results = []
    for name, tuning in candidates(bench.form, bench.n_rows, kernel):
        try:
            results.append(Result(kernel, name, bench.us(run, tuning, n_launches)))
        except Exception as error:  # too much shared memory or too many registers for one candidate
            if not results:
                raise
            say(f"{kernel} {name}: {str(error).splitlines()[0][:80]}")
    return results


def _with(best: Tuning, chosen: Tuning, form: Format, kernel: str) -> Tuning:
    """best, with what was chosen for this kernel."""
    if kernel == "self":
        return replace(best, self_slots=chosen.self_slots, self_block=chosen.self_block, self_warps=chosen.self_warps)
    if kernel == "cross":
        names = ("cross_slots", "cross_block", "cross_warps", "cross_stages", "cross_programs")
        return replace(best, **{name: getattr(chosen, name) for name in names})
    key = form, kernel
    row_tiles, tiles = {**best.row_tiles, key: chosen.row_tiles[key]}, {**best.tiles, key: chosen.tiles[key]}
    return replace(best, row_tiles=row_tiles, tiles=tiles)


def _compile_apart(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Fill Triton's cache on disk; a worker that fails leaves its part to be compiled while measuring."""
    command = [sys.executable, "-m", "benchmarks.tuning", *options]
    workers = [
        subprocess.Popen([*command, "--prepare", f"{i}/{arguments.workers}"], stderr=subprocess.DEVNULL)
        for i in range(arguments.workers)
    ]
    for worker in workers:
        worker.wait()


def _prepare(arguments: argparse.Namespace, index: int, n_workers: int) -> int:
    """Run every n-th candidate once, on one layer."""
    number = 0
    for name, n_rows in _runs(arguments):
        bench = Bench(FORMATS[name], n_rows, arguments.shape, 1)
        for kernel in arguments.kernels.split(","):
            run, n_launches = bench.kernel(kernel)
            for _, tuning in candidates(bench.form, n_rows, kernel):
                number += 1
                if number % n_workers == index:
                    try:
                        bench.us(run, tuning, n_launches, replays=0)
                    except Exception:  # said while measuring
                        continue
    return 0


def _runs(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    return [(name, int(n)) for name in arguments.formats.split(",") for n in arguments.rows.split(",")]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _each(layers: list[DecoderLayer], work: Callable[[int, DecoderLayer], None]) -> None:
    for index, layer in enumerate(layers):
        work(index, layer)


def _random_weights(form: Format, shape: str, n_layers: int) -> DecoderWeights:
    width, n_vocab = SHAPES[shape].d_model, SHAPES[shape].n_vocab
    torch.manual_seed(0)

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.float16) * 0.02

    def projection(n_out: int, n_in: int, *, norm: bool = False) -> Any:
        packed = pack(tensor(n_out, n_in), tensor(n_out), form, torch.float16)
        packed.colsum = torch.zeros(n_out, device="cuda") if norm else None
        return packed

    layers = [
        DecoderLayer(
            qkv=projection(3 * width, width, norm=True),
            out=projection(width, width),
            cross_query=projection(width, width, norm=True),
            cross_out=projection(width, width),
            fc1=projection(4 * width, width, norm=True),
            fc2=projection(width, 4 * width),
        )
        for _ in range(n_layers)
    ]
    tokens = tensor(n_vocab, width)
    head = pack(tokens, None, Format.FLOAT, torch.float16)
    head.weight, head.gamma = tokens, torch.full((width,), 0.5, device="cuda")
    head.colsum = torch.zeros(n_vocab, device="cuda")
    cross = tensor(1, width), tensor(1)
    return DecoderWeights(layers, cross, head, tokens, tensor(448, width), 1e-5, torch.float16, 1500)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="large-v3", help="default: large-v3")
    parser.add_argument("--formats", default="fp16,int8,int4", help=f"of {','.join(FORMATS)}")
    parser.add_argument("--rows", default="1,32", help="windows decoded together; default: 1,32")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"of {','.join(KERNELS)}")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile; default: 12")
    parser.add_argument("--prepare", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
