"""LLM.int8() without its outliers inside the captured step: is it a candidate for bnb-int8 on the fast engine?

    python -m benchmarks.llm_int8                       large-v3 shape on a GPU, and the demo model's word errors
    python -m benchmarks.llm_int8 --shape tiny --limit 1     the same on a CPU, small

bitsandbytes looks in every input for columns beyond a threshold and multiplies those in 16 bits. The look makes the
host wait, so a layer with a threshold cannot be captured; with threshold 0 it can. What is then left of LLM.int8() is
8-bit weights per output and 8-bit inputs per row, which is int8-dynamic. Prints times of both beside bnb-int8 as it is
and int8, the word errors of each on the held-out recordings, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy
from benchmarks.memory import circumstances, run, say, table
from benchmarks.precision import times
from benchmarks.shapes import SHAPES, make_checkpoint
from model_loader.convert.bnb import load_bnb_8bit
from model_loader.device import describe_device
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision

CANDIDATE = "bnb-int8-no-outliers"
COLUMNS = (
    ("row", "precision"),
    ("engine", "engine"),
    ("token_1_ms", "ms/token b1"),
    ("token_n_ms", "ms/token bN"),
    ("encoder_1_ms", "encoder ms b1"),
    ("encoder_n_ms", "ms/window bN"),
    ("wer", "WER %"),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    device = describe_device(arguments.device)
    on_gpu = device.kind == "cuda"
    shape, batch = arguments.shape or ("large-v3" if on_gpu else "tiny"), 32 if on_gpu else 4
    with candidate(), tempfile.TemporaryDirectory(prefix="sotto-") as place:
        say(f"writing a checkpoint of shape {shape}")
        folder = make_checkpoint(shape, Path(place) / shape)
        names = ["bnb-int8", CANDIDATE, "int8-dynamic", "int8"]
        results = [_measure(name, str(folder), batch, arguments) for name in names]
        recordings = accuracy.find_recordings(arguments.windows, accuracy.HELDOUT, arguments.limit)
        errors = accuracy.run(
            "demo",
            ["fp32", *names],
            device=arguments.device,
            recordings=recordings,
            batch_size=16,
            calibrated=None,
            engine="auto",
        )
        texts = {result.precision: result for result in errors}
        words = accuracy.table(list(texts.values()))
    for result in results:
        result["wer"] = texts[result["row"]].wer
    print(f"{device.label} · {shape} · N = {batch}")
    print(table(results, COLUMNS), words, sep="\n")
    errors_of = [accuracy.as_record(result) for result in texts.values()]
    print(json.dumps({**circumstances("llm_int8", device, shape), "rows": results, "accuracy": errors_of}))
    return 0


@contextmanager
def candidate() -> Iterator[None]:
    """A row of the table for as long as this runs."""
    PRECISIONS[CANDIDATE] = replace(
        PRECISIONS["bnb-int8"], name=CANDIDATE, aliases=(), fast=True, convert=_load_without_outliers
    )
    try:
        yield
    finally:
        del PRECISIONS[CANDIDATE]


def _load_without_outliers(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    model: Any = load_bnb_8bit(row, folder, device)
    for module in model.modules():
        if type(module).__name__ == row.linear_class:
            module.state.threshold = 0.0
    result: torch.nn.Module = model
    return result


def _measure(name: str, model: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    engine = load_engine(model, name, engine="auto", device=arguments.device, offline=True)
    figures: dict[str, Any] = {"row": name, "engine": engine.report.engine, "load_s": round(engine.report.load_s, 2)}
    for mark, n_windows, n_tokens in (("1", 1, 64), ("n", batch, 32)):
        figures |= {f"{key}_{mark}_ms": value for key, value in times(engine, n_windows, n_tokens).items()}
    engine.close()
    say(", ".join(f"{key} {value}" for key, value in figures.items()))
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="bitsandbytes' LLM.int8() with and without its search for outliers.")
    parser.add_argument("--shape", choices=[*SHAPES], help="default: large-v3 on a GPU, tiny on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--limit", type=int, default=0, help="recordings per language; 0 for all (default)")
    parser.add_argument("--windows", type=Path, metavar="FILE", help="as in benchmarks.accuracy: no ffmpeg is needed")
    return parser


if __name__ == "__main__":
    run(main)
