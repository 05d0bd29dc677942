"""What one decoder step takes on a GPU, without the engine around it: all layers in one launch, the head, the choice.

    python -m benchmarks.step                                   large-v3 shape, half a minute on an H200
    python -m benchmarks.step --shape tiny --batches 1,8

Weights and audio caches are random; every row stands at the same text position, and no row ends. Each figure is the
best of three rounds of 20 replays of a CUDA graph, in milliseconds. floor: bytes that the layers must read over
--bandwidth. The kernel is first held to plain torch: error is the relative one of x behind the last layer. Prints a
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import table
from benchmarks.memory import circumstances, run, say
from benchmarks.shapes import SHAPES, make_checkpoint
from errors import DeviceError
from model_loader.device import describe_device
from model_loader.engine import ReferenceEngine, TokenRules
from model_loader.fast.census import projections
from model_loader.fast.one_launch import OneLaunch, why_not_one_launch
from model_loader.fast.slots import RuleTensors, Slots, make_slots
from model_loader.fast.step import decoder_step
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.triton_ops import TritonOps
from model_loader.fast.weights import DecoderWeights, take_decoder
from model_loader.loader import load_engine

ROUNDS, REPLAYS = 3, 20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = describe_device(arguments.device)
    if device.kind != "cuda":
        raise DeviceError("A step in one launch needs an NVIDIA GPU, and none is here. benchmarks.speed runs on a CPU.")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sotto-") as place, torch.no_grad():
        folder = make_checkpoint(arguments.shape, Path(place) / arguments.shape)
        for row in arguments.rows.split(","):
            engine = load_engine(str(folder), row, engine="reference", device=arguments.device, offline=True)
            assert isinstance(engine, ReferenceEngine)
            weights = take_decoder(engine.network, torch.float16)
            for n_rows in map(int, arguments.batches.split(",")):
                results.append({"row": row, **measure(weights, n_rows, arguments, quantised=row != "fp16")})
                say(str(results[-1]))
            engine.close()
    print(table(results))
    print(
        json.dumps({**circumstances("step", device, arguments.shape), "position": arguments.position, "rows": results})
    )
    return 0


def measure(weights: DecoderWeights, n_rows: int, arguments: argparse.Namespace, *, quantised: bool) -> dict[str, Any]:
    """Raises DeviceError where the layers do not run in one launch."""
    reason = why_not_one_launch(weights, n_rows, quantised=quantised)
    if reason is not None:
        raise DeviceError(f"The layers do not run in one launch here: {reason}.")
    slots, position = _filled(weights, n_rows, quantised=quantised), arguments.position
    rules = RuleTensors.on(weights.device, weights.n_vocab)
    rules.load(TokenRules(weights.n_vocab - 1502, weights.n_vocab - 1501, weights.n_vocab - 1500))
    one_launch = OneLaunch(weights, slots)
    ops = TritonOps(weights, slots, one_launch=one_launch)
    error = _error(weights, slots, one_launch, position)
    timed = {}
    for name, work in (
        ("layers", one_launch),
        ("head", lambda: ops.head(weights.head)),
        ("choice", lambda: ops.choose(rules)),
        ("step", lambda: decoder_step(weights, ops, rules)),
    ):
        slots.position.fill_(position)
        timed[f"{name}_ms"] = round(_replayed_ms(work), 4)
    floor_ms = _layer_bytes(weights, slots, position) / arguments.bandwidth / 1e9
    return {"batch": n_rows, **timed, "floor_ms": round(floor_ms, 3), "error": f"{error:.0e}"}


def _filled(weights: DecoderWeights, n_rows: int, *, quantised: bool) -> Slots:
    slots = make_slots(weights, n_rows, quantised=quantised)
    for row in range(n_rows):
        shape = weights.n_audio_ctx, 2 * len(weights.layers) * weights.d_model
        projected = torch.randn(shape, device=weights.device, dtype=weights.dtype)
        TorchWindowOps().store_cross(projected, slots, row)
    slots.self_keys.normal_()
    slots.self_values.normal_()
    slots.finished.zero_()
    slots.prompt_length.fill_(slots.tokens.shape[1])  # nobody's prompt is over, so nobody ends
    return slots


def _error(weights: DecoderWeights, slots: Slots, one_launch: OneLaunch, position: int) -> float:
    """One step of plain torch against the kernel's, from the same caches."""
    slots.position.fill_(position)
    plain = TorchOps(weights, slots)
    plain.embed()
    plain.layers(weights.layers)
    expected = slots.x.clone()
    one_launch()
    return float((slots.x - expected).norm() / expected.norm())


def _replayed_ms(work: Callable[[], object]) -> float:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return float(min(times))


def _layer_bytes(weights: DecoderWeights, slots: Slots, position: int) -> int:
    packed = [part for layer in weights.layers for part in projections(layer)]
    read = sum(tensor.numel() * tensor.element_size() for part in packed for tensor in part.tensors)
    audio = 2 * slots.cross_keys.numel() * slots.cross_keys.element_size()
    text = 2 * slots.self_keys[:, :, :, : position + 1].numel() * slots.self_keys.element_size()
    return read + audio + text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="large-v3", help="default: large-v3")
    parser.add_argument("--rows", default="fp16,int8,int4", help="precisions; default: fp16,int8,int4")
    parser.add_argument("--batches", default="1,8,32", help="windows decoded together; default: 1,8,32")
    parser.add_argument("--position", type=int, default=66, help="text position of every row; default: 66")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="of the floor, in TB/s; default: 4.3, an H200's")
    parser.add_argument("--device", default="auto", help="auto or cuda:N")
    return parser


if __name__ == "__main__":
    run(main)
