"""The plan: which precision of which model fits this machine, and the GPUs people ask about. No weights, no GPU needed.

In: headers, a device or a card's name. Out: tables as lines of text, and the same as plain values for JSON.
Memory of a card is what nvidia-smi shows as its total, less the CUDA context; a desktop takes some more.
Sources: NVIDIA's data sheets; CUDA GPUs, compute capability (developer.nvidia.com/cuda-gpus).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from errors import OptionError
from model_loader.device import DeviceInfo
from model_loader.fit import (
    DEFAULT_BATCHES,
    FAST_ROWS,
    MAX_BATCH,
    MIB,
    choose_precision,
    fit_rows,
    max_batch,
    predict,
    size,
    unavailable,
    verdict,
)
from model_loader.header import Header, known_headers
from model_loader.precision import PRECISIONS, Precision


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card by its usual name."""

    name: str
    capability: tuple[int, int]
    total_mib: int
    """As nvidia-smi shows it."""

    @property
    def device(self) -> DeviceInfo:
        return DeviceInfo("cuda", 0, self.name, self.capability, self.total_mib * MIB, 8)

    @property
    def memory(self) -> str:
        """As sold."""
        return f"{self.name} ({_SOLD_GB[self.total_mib]} GB)"


GPUS: tuple[Gpu, ...] = (
    Gpu("RTX 4060", (8, 9), 8188),
    Gpu("RTX 3060", (8, 6), 12288),
    Gpu("T4", (7, 5), 15360),
    Gpu("RTX 3090", (8, 6), 24576),
    Gpu("RTX 4090", (8, 9), 24564),
    Gpu("A10G", (8, 6), 23028),
    Gpu("L4", (8, 9), 23034),
    Gpu("A100", (8, 0), 40960),
    Gpu("A100", (8, 0), 81920),
    Gpu("H100", (9, 0), 81559),
    Gpu("H200", (9, 0), 143771),
)
"""Smallest memory first."""

_SOLD_GB = {
    8188: 8, 12288: 12, 15360: 16, 24576: 24, 24564: 24, 23028: 24, 23034: 24, 40960: 40, 81920: 80, 81559: 80,
    143771: 141,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MatrixCell:
    """One model on one card."""

    gpu: str
    model: str
    precision: str | None
    """What `auto` takes there, or the one that was asked for; None where it does not fit."""
    max_batch: int
    """Windows at a time that it has room for; the fast engine decodes FAST_ROWS at most."""
    fitting: dict[str, int]
    """Largest batch of every precision that fits, by name."""


def parse_batches(text: str) -> tuple[int, ...]:
    """'1,8,32' -> (1, 8, 32). Raises OptionError."""
    try:
        batches = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        batches = ()
    if not batches or not all(1 <= batch <= 256 for batch in batches):
        raise OptionError(f"--batch is '{text}'; give numbers from 1 to 256 with commas between, for example 1,8,32.")
    return batches


def selection_matrix(
    headers: Sequence[Header] = (), *, engine: str = "auto", only: Precision | None = None
) -> tuple[MatrixCell, ...]:
    """Every card with every model (none given: OpenAI's sizes). only: the precision that was asked for."""
    return tuple(_cell(gpu, header, engine, only) for gpu in GPUS for header in headers or known_headers())


def _cell(gpu: Gpu, header: Header, engine: str, only: Precision | None) -> MatrixCell:
    device, free_bytes = gpu.device, usable_bytes(gpu)
    rows = fit_rows(header, device, free_bytes, engine=engine)
    fitting = {row.precision: row.max_batch for row in rows if row.max_batch and _is_meant(row.precision, only)}
    row = only or choose_precision(header, device, free_bytes, engine=engine).row
    name = row.name
    return MatrixCell(gpu.memory, header.name, name if name in fitting else None, fitting.get(name, 0), fitting)


def usable_bytes(gpu: Gpu) -> int:
    """What a program's tensors can take of an empty card."""
    context = predict(known_headers()[0], PRECISIONS["fp32"], device=gpu.device).context_bytes
    return gpu.total_mib * MIB - context


# --- as text ----------------------------------------------------------------------------------------------------------


def plan_lines(
    header: Header,
    device: DeviceInfo,
    free_bytes: int,
    batches: Sequence[int],
    *,
    engine: str = "auto",
    batch: int = 0,
    only: Precision | None = None,
) -> list[str]:
    """This machine, this model on common cards, and all sizes on common cards, with this engine.

    batch: that auto keeps room for; 0 for the device's usual one. only: the precision that was asked for; None: auto.
    """
    origin = {"file": "its header", "hub": "its header on the Hub", "config": "its published sizes"}[header.source]
    taken = only.name if only else f"what auto takes for batches of {DEFAULT_BATCHES['cuda']}"
    legend = "(-: does not fit, no: the card cannot run it)"
    return [
        f"{header.name} on {device.label}, {size(free_bytes)} free; predicted from {origin}, before loading:",
        *_aligned(_machine_table(header, device, free_bytes, batches, engine, only)),
        *(f"  {sentence}" for sentence in _reasons(header, device, only)),
        f"largest batch: what fits, up to {_most(engine)}.",
        *([] if only else [_choice_line(header, device, free_bytes, batch, engine)]),
        "",
        f"{header.name} on common GPUs, the largest batch per precision, up to {_most(engine)} {legend}:",
        *_aligned(_card_table(header, engine, only)),
        "",
        f"All sizes on common GPUs: {taken}, and its largest batch:",
        *_aligned(matrix_table(engine, only)),
        *([] if only else ["", f"All sizes on common GPUs: every precision, and its largest batch {legend}:"]),
        *([] if only else _aligned(_whole_table(engine))),
        *(f"  {sentence}" for sentence in refusals(only)),
    ]


def plan_values(
    header: Header,
    device: DeviceInfo,
    free_bytes: int,
    batches: Sequence[int],
    *,
    engine: str = "auto",
    batch: int = 0,
    only: Precision | None = None,
) -> dict[str, Any]:
    """The same for JSON."""
    choice = choose_precision(header, device, free_bytes, batch=batch, engine=engine)
    rows: list[dict[str, Any]] = []
    for row in _meant(only):
        reason = unavailable(header, row, device)
        largest = 0 if reason else max_batch(header, row, free_bytes, device=device, engine=engine)
        entry: dict[str, Any] = {"precision": row.name, "unavailable": reason, "max_batch": largest, "batches": []}
        for batch in () if reason else batches:
            prediction = predict(header, row, batch, device=device, engine=engine)
            entry["batches"].append({**asdict(prediction), **asdict(verdict(prediction, free_bytes))})
        rows.append(entry)
    return {
        "model": header.name,
        "source": header.source,
        "n_weights": header.n_weights,
        "device": device.label,
        "free_bytes": free_bytes,
        "auto": {"precision": choice.row.name, "reason": choice.reason},
        "precisions": rows,
        "gpus": [asdict(cell) for cell in selection_matrix((header,), engine=engine, only=only)],
        "matrix": [asdict(cell) for cell in selection_matrix(engine=engine, only=only)],
    }


def _meant(only: Precision | None) -> list[Precision]:
    """The rows to show."""
    return [row for row in PRECISIONS.values() if _is_meant(row.name, only)]


def _is_meant(name: str, only: Precision | None) -> bool:
    return only is None or only.name == name


def _choice_line(header: Header, device: DeviceInfo, free_bytes: int, batch: int, engine: str) -> str:
    choice = choose_precision(header, device, free_bytes, batch=batch, engine=engine)
    return f"--precision auto, for its batches of {batch or DEFAULT_BATCHES[device.kind]}: {choice.row.name}. " + (
        choice.reason
    )


def _machine_table(
    header: Header,
    device: DeviceInfo,
    free_bytes: int,
    batches: Sequence[int],
    engine: str,
    only: Precision | None,
) -> list[list[str]]:
    lines = [["precision", "engine", "weights", *(f"batch {batch}" for batch in batches), "largest batch"]]
    for row in _meant(only):
        if unavailable(header, row, device):
            lines.append([row.name, "", "no", *("" for _ in batches), ""])
            continue
        predictions = [predict(header, row, batch, device=device, engine=engine) for batch in batches]
        cells = [f"{size(p.needed_bytes)} {verdict(p, free_bytes).colour}" for p in predictions]
        largest = max_batch(header, row, free_bytes, device=device, engine=engine)
        first = predictions[0]
        lines.append([row.name, first.engine, size(first.weights_bytes), *cells, str(largest or "-")])
    return lines


def _reasons(header: Header, device: DeviceInfo, only: Precision | None) -> list[str]:
    """Why a row of the machine's table says no, a sentence each."""
    said = (unavailable(header, row, device) for row in _meant(only))
    return list(dict.fromkeys(sentence for sentence in said if sentence))


def _most(engine: str) -> str:
    """What is the most that an engine decodes at once."""
    if engine == "reference":
        return f"{MAX_BATCH} windows on the reference engine"
    return f"the {FAST_ROWS} windows that the fast engine decodes at once, or {MAX_BATCH} on the reference engine"


def _card_table(header: Header, engine: str, only: Precision | None) -> list[list[str]]:
    lines = [["GPU", *(row.name for row in _meant(only))]]
    return lines + [[gpu.memory, *_largest(gpu, header, engine, only)] for gpu in GPUS]


def _whole_table(engine: str) -> list[list[str]]:
    """A line for every card and size: the largest batch of every precision."""
    lines = [["GPU", "model", *PRECISIONS]]
    return lines + [
        [gpu.memory, header.name, *_largest(gpu, header, engine, None)] for gpu in GPUS for header in known_headers()
    ]


def _largest(gpu: Gpu, header: Header, engine: str, only: Precision | None) -> list[str]:
    """Of every precision on one card."""
    rows = fit_rows(header, gpu.device, usable_bytes(gpu), engine=engine)
    return ["no" if row.unavailable else str(row.max_batch or "-") for row in rows if _is_meant(row.precision, only)]


def matrix_table(engine: str = "auto", only: Precision | None = None) -> list[list[str]]:
    """Cards down, models across; 'fp32 64' is the row that auto takes (or the one asked for) and its largest batch."""
    names = [header.name for header in known_headers()]
    lines, cells = [["GPU", *names]], iter(selection_matrix(engine=engine, only=only))
    for gpu in GPUS:
        found = [next(cells) for _ in names]
        lines.append([gpu.memory, *(f"{cell.precision} {cell.max_batch}" if cell.precision else "-" for cell in found)])
    return lines


def refusals(only: Precision | None = None) -> list[str]:
    """What the cards of the table cannot run, a sentence each."""
    said = (row.unavailable(gpu.device) for gpu in GPUS for row in _meant(only))
    return list(dict.fromkeys(sentence for sentence in said if sentence))


def _aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(line) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
