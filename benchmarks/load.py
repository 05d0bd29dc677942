"""What many callers at once get from one engine, and how time and memory grow with the length of a recording.

    python -m benchmarks.load                                     large-v3 shape on a GPU: a minute on an H200
    python -m benchmarks.load --shape tiny --clients 1,4 --windows 2,20,120 --tokens 16      on a CPU

Weights are random; every window gets exactly --tokens tokens, and a random window's features, so that neither ffmpeg
nor the speech detector is in the figures.
    clients    each sends --each windows, one after the other, the next when the last one's text is there
    RTF        seconds of sound (30 a window) over seconds, all clients together
    p50, p95   milliseconds from a window's submission to its tokens
    windows    one job of so many windows (2 a minute, 1,200 in ten hours), twice as many ahead as there are rows
Growth is linear if s_a_window stays the same, and memory flat if MiB does. Prints two tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import circumstances, process_bytes, random_features, request_of, run, say
from benchmarks.peers import WINDOW_S
from benchmarks.shapes import SHAPES, make_checkpoint
from model_loader.device import describe_device
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.memory import read_point
from model_loader.orders import WindowOrder, WindowOutcome

MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    device = describe_device(arguments.device)
    on_gpu = device.kind == "cuda"
    shape, row = arguments.shape or ("large-v3" if on_gpu else "tiny"), arguments.row or ("fp16" if on_gpu else "fp32")
    with tempfile.TemporaryDirectory(prefix="sotto-") as place:
        say(f"writing a checkpoint of shape {shape}")
        folder = make_checkpoint(shape, Path(place) / shape)
        engine = load_engine(str(folder), row, engine="fast", device=arguments.device, offline=True)
    assert isinstance(engine, FastEngine)
    engine.capture()
    orders = make_orders(engine, arguments.tokens)
    together(engine, orders, engine.max_rows, 1)  # every size of batch is warm from here on
    clients = [_told(together(engine, orders, n, arguments.each)) for n in _numbers(arguments.clients)]
    growth = [_told(alone(engine, orders, n)) for n in _numbers(arguments.windows)]
    rows = engine.max_rows
    engine.close()
    print(table(clients), "", table(growth), sep="\n")
    figures = {"row": row, "rows": rows, "tokens": arguments.tokens, "clients": clients, "growth": growth}
    print(json.dumps({**circumstances("load", device, shape), **figures}))
    return 0


def make_orders(engine: FastEngine, n_tokens: int) -> list[WindowOrder]:
    """Eight windows of random features on the device, to be sent again and again."""
    request = request_of(engine, 1, n_tokens)
    features = random_features(engine, 8).to(engine.device)
    return [
        WindowOrder(request.rules, tuple(request.prompts[0]), features=f, max_new_tokens=n_tokens) for f in features
    ]


def together(engine: FastEngine, orders: Sequence[WindowOrder], n_clients: int, n_each: int) -> dict[str, Any]:
    """Clients at once, each with a window on the way at any time."""
    say(f"{n_clients} clients")
    latencies: list[float] = []

    def client(number: int) -> None:
        for index in range(n_each):
            started_s = time.perf_counter()
            order = orders[(number + index) % len(orders)]
            engine.submit(order, job=number).result()
            latencies.append(time.perf_counter() - started_s)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started_s
    assert len(latencies) == n_clients * n_each, "a client failed"
    return {
        "clients": n_clients,
        "windows": len(latencies),
        "rtf": round(len(latencies) * WINDOW_S / seconds, 1),
        "windows_per_s": round(len(latencies) / seconds, 2),
        "p50_ms": round(1000 * statistics.median(latencies), 1),
        "p95_ms": round(1000 * sorted(latencies)[math.ceil(0.95 * len(latencies)) - 1], 1),
    }


def alone(engine: FastEngine, orders: Sequence[WindowOrder], n_windows: int) -> dict[str, Any]:
    """One job of so many windows, sent ahead as a run does it, results taken in order."""
    say(f"{n_windows} windows")
    waiting: deque[Future[WindowOutcome]] = deque()
    started_s, highest, n_tokens = time.perf_counter(), 0, 0
    for index in range(n_windows):
        waiting.append(engine.submit(orders[index % len(orders)], job="alone"))
        if len(waiting) >= 2 * engine.max_rows or index == n_windows - 1:
            while len(waiting) >= 2 * engine.max_rows or (index == n_windows - 1 and waiting):
                n_tokens += waiting.popleft().result().sequence.n_tokens
        if index % 16 == 0 or index == n_windows - 1:
            highest = max(highest, process_bytes(read_point(engine.device)))
    seconds = time.perf_counter() - started_s
    allocated = torch.cuda.max_memory_allocated(engine.device) if engine.device.type == "cuda" else None
    return {
        "windows": n_windows,
        "sound": f"{n_windows * WINDOW_S / 60:.0f} min",
        "seconds": round(seconds, 2),
        "s_a_window": round(seconds / n_windows, 4),
        "rtf": round(n_windows * WINDOW_S / seconds, 1),
        "tokens": n_tokens,
        "MiB": round(highest / MIB),
        "peak_torch_MiB": None if allocated is None else round(allocated / MIB),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Aligned columns, the keys as headings."""
    lines = [list(results[0])] + [[str(value) for value in result.values()] for result in results]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """Said at once too: a run that is cut off has not been for nothing."""
    say(", ".join(f"{key} {value}" for key, value in result.items()))
    return result


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="default: large-v3 on a GPU, tiny on a CPU")
    parser.add_argument("--row", default="", help="a precision of the fast engine; default: fp16 on a GPU, else fp32")
    parser.add_argument("--clients", default="1,8,32,128", help="callers at once; default: 1,8,32,128")
    parser.add_argument("--each", type=int, default=4, help="windows that each client sends; default: 4")
    parser.add_argument("--windows", default="2,120,1200", help="windows of one job; default: 2,120,1200 (ten hours)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens for every window; default: 128")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run(main)
