"""What many callers at once get from one engine, and how time and memory grow with the length of a recording.

    python -m benchmarks.load                                     large-v3 shape on a GPU: two minutes on an H200
    python -m benchmarks.load --shape tiny --windows 2,12 --clients 1,4 --behind 40 --tokens 8      on a CPU

Weights are random; every window gets exactly so many tokens, and a random window's features, so that neither ffmpeg nor
the speech detector is in the figures.
    windows    one job of so many windows (2 a minute, 1,200 in ten hours) of --tokens tokens, as many on the way as a
               run keeps there. Before each the cache is emptied and the peak is counted anew; shortest first
    MiB        of the process on the device, highest; RSS_MiB: resident in main memory
    clients    each sends windows of a quarter, half, three quarters and all of --tokens tokens, the next when the last
               one's text is there; they begin one after the other, within the time of a window in a full batch
    RTF        seconds of sound (30 a window) over seconds, all clients together
    p50, p95   milliseconds from a window's submission to its tokens, nearest rank, of 40 windows at least
    fairness   milliseconds for a clip of one window and for an urgent (a microphone's) one, of --tokens tokens, alone
               and behind a job of --behind windows that are all in the engine already; times: over a full batch's
Growth is linear if s_a_window stays the same, and memory flat if MiB does. Prints three tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.memory import circumstances, process_bytes, random_features, request_of, run, say
from benchmarks.peers import WINDOW_S
from benchmarks.shapes import SHAPES, make_checkpoint
from model_loader.device import describe_device
from model_loader.engine import release
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.memory import read_point, reset_peak
from model_loader.orders import WindowOrder, WindowOutcome
from transcription.flow import windows_ahead

MIB = 2**20
MIN_SAMPLES = 40
"""Of a line's percentiles."""
FAIR_SAMPLES = 10
"""Of a line on fairness: a job of 360 windows lasts for about as many at large-v3 on an H200."""


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
    full_s = in_full_batch(engine, orders)  # every size of batch is warm from here on
    growth = [_told(alone(engine, orders, n)) for n in sorted(_numbers(arguments.windows))]
    clients = [_told(together(engine, orders, n, arguments.each, full_s)) for n in _numbers(arguments.clients)]
    waits = fairness(engine, orders[0], arguments.behind, full_s)
    rows = engine.max_rows
    engine.close()
    print(table(growth), "", table(clients), "", table(waits), sep="\n")
    figures = {"row": row, "rows": rows, "tokens": arguments.tokens, "full_batch_ms": _ms(full_s)}
    figures |= {"growth": growth, "clients": clients, "fairness": waits}
    print(json.dumps({**circumstances("load", device, shape), **figures}))
    return 0


def make_orders(engine: FastEngine, n_tokens: int) -> list[WindowOrder]:
    """Eight windows of random features on the device, to be sent again and again."""
    request = request_of(engine, 1, n_tokens)
    features = random_features(engine, 8).to(engine.device)
    return [
        WindowOrder(request.rules, tuple(request.prompts[0]), features=f, max_new_tokens=n_tokens) for f in features
    ]


def in_full_batch(engine: FastEngine, orders: Sequence[WindowOrder]) -> float:
    """Seconds from the submission of as many windows as there are rows to the last one's tokens; the second time."""
    for _ in range(2):
        started_s = time.perf_counter()
        futures = [engine.submit(orders[i % len(orders)], job="full") for i in range(engine.max_rows)]
        for future in futures:
            future.result()
    return time.perf_counter() - started_s


def together(
    engine: FastEngine, orders: Sequence[WindowOrder], n_clients: int, n_each: int, window_s: float
) -> dict[str, Any]:
    """Clients at once, each with a window on the way at any time. n_each: windows of each at least. window_s: within
    which they begin."""
    n_each = max(n_each, math.ceil(MIN_SAMPLES / n_clients))
    say(f"{n_clients} clients")
    latencies: list[float] = []

    def client(number: int) -> None:
        time.sleep(window_s * number / n_clients)
        for index in range(n_each):
            order = orders[(number + index) % len(orders)]
            share = 1 + (number + index) % 4
            order = replace(order, max_new_tokens=max(1, order.max_new_tokens * share // 4))
            latencies.append(_latency(engine, order, job=number))

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
        "p50_ms": _ms(nearest_rank(latencies, 0.5)),
        "p95_ms": _ms(nearest_rank(latencies, 0.95)),
    }


def alone(engine: FastEngine, orders: Sequence[WindowOrder], n_windows: int) -> dict[str, Any]:
    """One job of so many windows, sent ahead as a run does it, results taken in order."""
    say(f"{n_windows} windows")
    release(engine.device)
    reset_peak(engine.device)
    waiting: deque[Future[WindowOutcome]] = deque()
    ahead = windows_ahead(engine.max_rows)
    started_s, highest, resident, n_tokens = time.perf_counter(), 0, 0, 0
    for index in range(n_windows):
        waiting.append(engine.submit(orders[index % len(orders)], job="alone"))
        while len(waiting) >= ahead or (index == n_windows - 1 and waiting):
            n_tokens += waiting.popleft().result().sequence.n_tokens
        if index % 16 == 0 or index == n_windows - 1:
            highest = max(highest, process_bytes(read_point(engine.device)))
            resident = max(resident, psutil.Process().memory_info().rss)
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
        "RSS_MiB": round(resident / MIB),
    }


def fairness(engine: FastEngine, order: WindowOrder, n_long: int, full_s: float) -> list[dict[str, Any]]:
    """How long one window waits for its text, alone and while a job of n_long windows has them all in the engine."""
    lines = []
    for urgent in (False, True):
        latencies = [_latency(engine, order, job="clip", urgent=urgent) for _ in range(FAIR_SAMPLES)]
        lines.append(_told(_wait(latencies, urgent, "alone", full_s)))
    for urgent in (False, True):
        latencies = behind(engine, order, n_long, urgent=urgent)
        lines.append(_told(_wait(latencies, urgent, f"behind {n_long} windows", full_s)))
    return lines


def behind(engine: FastEngine, order: WindowOrder, n_long: int, *, urgent: bool) -> list[float]:
    """Seconds for one window after the other, for as long as the long job has windows that wait."""
    say(f"{'an urgent window' if urgent else 'a clip'} behind {n_long} windows")
    is_enough = threading.Event()
    unwanted = replace(order, should_stop=is_enough.is_set)
    long = [engine.submit(unwanted, job="long") for _ in range(n_long)]
    long[0].result()  # every row is taken
    latencies: list[float] = []
    while len(latencies) < FAIR_SAMPLES:
        latency_s = _latency(engine, order, job="clip", urgent=urgent)
        if latencies and long[-1].done():
            break  # this one had the engine for itself in the end
        latencies.append(latency_s)
    is_enough.set()
    wait(long)
    return latencies


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def _latency(engine: FastEngine, order: WindowOrder, *, job: Hashable, urgent: bool = False) -> float:
    """Seconds from submission to tokens."""
    started_s = time.perf_counter()
    engine.submit(order, job=job, urgent=urgent).result()
    return time.perf_counter() - started_s


def _wait(latencies: Sequence[float], urgent: bool, where: str, full_s: float) -> dict[str, Any]:
    median_s, worst_s = nearest_rank(latencies, 0.5), max(latencies)
    return {
        "window": "urgent" if urgent else "clip",
        "where": where,
        "samples": len(latencies),
        "p50_ms": _ms(median_s),
        "worst_ms": _ms(worst_s),
        "p50_times": round(median_s / full_s, 2),
        "worst_times": round(worst_s / full_s, 2),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


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
    parser.add_argument("--each", type=int, default=4, help="windows of each client at least; default: 4")
    parser.add_argument("--windows", default="2,120,1200", help="windows of one job; default: 2,120,1200 (ten hours)")
    parser.add_argument("--behind", type=int, default=360, help="windows of the job in a clip's way; default: 360")
    parser.add_argument("--tokens", type=int, default=128, help="tokens for every window; default: 128")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run(main)
