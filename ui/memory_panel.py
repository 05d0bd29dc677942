"""The panel that is always in sight: device, model, precision, and memory that explains itself. Pure functions to HTML.

On a GPU the bar splits the card's memory into this program's weights, working set, cached blocks and CUDA context,
other programs, and what is free. On a CPU it splits main memory into the weights, the rest of this program, other
programs and what is free. The parts are measured; a part without a reading is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from transcription.interface import Status
from ui.page import HISTORY_S, Moment
from ui.render import size
from ui.texts import say

if TYPE_CHECKING:
    from model_loader.memory import GpuReading, MemoryReading


N_PROCESSES = 4
"""Rows of the panel's list of programs."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of a memory bar: a class of style.css, a key of ui/texts.py, bytes."""

    style: str
    text: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A device's memory: its used parts in drawing order, all that is used, and its size."""

    title: str
    parts: tuple[Part, ...]
    used_bytes: int
    total_bytes: int


def panel(status: Status, history: Sequence[Moment], locale: str) -> str:
    """The whole panel. On a narrow page style.css shows the parts marked narrow instead of those marked wide."""
    bars = memory_bars(status, locale)
    return (
        f'<section class="card memory" aria-label="{escape(say("memory_title", locale))}">'
        f'<div class="wide">{_facts(status, locale)}</div>'
        f"{_narrow(status, bars[0], locale)}"
        f'<div class="wide stacked">{"".join(_bar(bar, locale) for bar in bars)}</div>'
        f'<div class="wide">{_sensors(status, locale)}</div>'
        f'<div class="wide">{_processes(status.memory, locale)}</div>'
        f'<div class="wide">{history_plot(history, status.device_kind, locale)}</div>'
        "</section>"
    )


def memory_bars(status: Status, locale: str) -> tuple[Bar, ...]:
    """One bar per GPU that this program uses; on a CPU one for main memory."""
    gpus = used_gpus(status.memory) if status.device_kind == "cuda" else ()
    return tuple(_gpu_bar(gpu) for gpu in gpus) or (_ram_bar(status.memory, locale),)


def used_gpus(memory: MemoryReading) -> tuple[GpuReading, ...]:
    """The cards with something of ours on them; before the first load the first card. System shows all of them."""
    ours = tuple(gpu for gpu in memory.gpus if gpu.weights_bytes or gpu.working_bytes)
    return ours or memory.gpus[:1]


def stack(bar: Bar) -> str:
    """The coloured stretches; free memory is the bar's own ground."""
    stretches = "".join(
        f'<i class="{part.style}" style="width:{100 * part.n_bytes / bar.total_bytes:.2f}%"></i>'
        for part in bar.parts
        if part.n_bytes > 0
    )
    return f'<div class="stack" aria-hidden="true">{stretches}</div>'


def _bar(bar: Bar, locale: str) -> str:
    """Title, used of total, the stack, and a legend with every part's size."""
    used = say("memory_used_of", locale, used=size(bar.used_bytes), total=size(bar.total_bytes))
    items = "".join(
        f'<li class="{part.style}">{escape(say(part.text, locale))}<b>{size(part.n_bytes)}</b></li>'
        for part in bar.parts
    )
    free = f"<li>{escape(say('memory_free', locale))}<b>{size(bar.total_bytes - bar.used_bytes)}</b></li>"
    return (
        f'<div class="head"><span>{escape(bar.title)}</span><b>{used}</b></div>{stack(bar)}'
        f'<ul class="legend">{items}{free}</ul>'
    )


def _gpu_bar(gpu: GpuReading) -> Bar:
    parts = (
        ("weights", "memory_weights", gpu.weights_bytes),
        ("working", "memory_working", gpu.working_bytes),
        ("cached", "memory_cached", gpu.cached_bytes),
        ("context", "memory_context", gpu.context_bytes),
        ("other", "memory_other", gpu.other_bytes),
    )
    known = tuple(Part(style, text, n_bytes) for style, text, n_bytes in parts if n_bytes is not None)
    return Bar(f"GPU {gpu.index} · {gpu.name}", known, gpu.used_bytes, gpu.total_bytes)


def _ram_bar(memory: MemoryReading, locale: str) -> Bar:
    """Main memory. The resident size holds the weights too; what it has beyond them is the program."""
    weights = memory.weights_bytes
    program = max(0, (memory.rss_bytes or 0) - weights)
    parts = (
        Part("weights", "memory_weights", weights),
        Part("working", "memory_program", program),
        Part("other", "memory_other", max(0, memory.ram_used_bytes - weights - program)),
    )
    return Bar(say("memory_main", locale), parts, memory.ram_used_bytes, memory.ram_total_bytes)


def _facts(status: Status, locale: str) -> str:
    """Device, model, precision requested and found in memory."""
    report = status.loaded[-1] if status.loaded else None
    if report is None:
        precision = f"{status.precision_requested} · {say('memory_not_loaded', locale)}"
    elif report.effective == report.requested:
        precision = report.effective
    else:
        requested = f"{report.requested} {say('memory_requested', locale)}"
        precision = f"{requested} → {report.effective} {say('memory_effective', locale)}"
    rows = (
        ("memory_device", escape(status.device_label)),
        ("memory_model", escape(status.model)),
        ("memory_precision", escape(precision)),
    )
    pairs = "".join(f"<dt>{escape(say(key, locale))}</dt><dd>{value}</dd>" for key, value in rows)
    message = f'<p class="line">{escape(status.message)}</p>' if status.message else ""
    head = f'<div class="head"><b>{escape(say("memory_title", locale))}</b>{_pill(status, locale)}</div>'
    return f'{head}<dl class="facts">{pairs}</dl>{message}'


def _pill(status: Status, locale: str) -> str:
    phase = "busy" if status.phase == "ready" and status.is_busy else status.phase
    return f'<span class="pill {escape(phase)}">{escape(say(f"phase_{phase}", locale))}</span>'


def _narrow(status: Status, bar: Bar, locale: str) -> str:
    """Two lines for a phone: what runs where, and the bar."""
    precision = status.loaded[-1].effective if status.loaded else status.precision_requested
    used = say("memory_used_of", locale, used=size(bar.used_bytes), total=size(bar.total_bytes))
    line = " · ".join((status.device_label.split(",")[0], precision, used))
    head = f'<div class="head"><span>{escape(line)}</span>{_pill(status, locale)}</div>'
    return f'<div class="narrow">{head}{stack(bar)}</div>'


def _sensors(status: Status, locale: str) -> str:
    """What the hardware says of itself: per GPU as nvidia-smi does, else cores and load."""
    memory = status.memory
    lines = [gpu_sensors(gpu, locale) for gpu in used_gpus(memory)] or [cpu_sensors(memory, locale)]
    return "".join(
        f'<p class="sensors">{"".join(f"<span>{escape(reading)}</span>" for reading in line)}</p>' for line in lines
    )


def gpu_sensors(gpu: GpuReading, locale: str) -> list[str]:
    """Temperature, power, utilisation, driver; those that the driver does not report are left out."""
    readings = []
    if gpu.temperature_c is not None:
        readings.append(f"{gpu.temperature_c:.0f} °C")
    if gpu.power_w is not None:
        limit = f" / {gpu.power_limit_w:.0f}" if gpu.power_limit_w else ""
        readings.append(f"{gpu.power_w:.0f}{limit} W")
    if gpu.utilisation_percent is not None:
        readings.append(f"{say('memory_utilisation', locale)} {gpu.utilisation_percent:.0f} %")
    if gpu.driver:
        readings.append(f"{say('memory_driver', locale)} {gpu.driver}")
    return readings


def cpu_sensors(memory: MemoryReading, locale: str) -> list[str]:
    readings = [f"{say('memory_cores', locale)} {memory.n_cores}"]
    if memory.cpu_percent is not None:
        readings.append(f"{say('memory_utilisation', locale)} {memory.cpu_percent:.0f} %")
    return readings


def _processes(memory: MemoryReading, locale: str) -> str:
    """The largest programs on the cards, as nvidia-smi lists them; System lists all. Nothing on a CPU."""
    on_cards = [process for process in memory.processes if process.gpu_index is not None]
    largest = sorted(on_cards, key=lambda process: process.used_bytes or 0, reverse=True)[:N_PROCESSES]
    if not largest:
        return ""
    ours = say("system_this_process", locale)
    items = "".join(
        f"<li>{process.pid} {escape(ours if process.is_self else process.name)}<b>{size(process.used_bytes)}</b></li>"
        for process in largest
    )
    more = len(on_cards) - len(largest)
    rest = f"<li>{escape(say('memory_more_processes', locale, n=str(more)))}</li>" if more else ""
    return f'<ul class="legend processes">{items}{rest}</ul>'


# History

PLOT_WIDTH, PLOT_HEIGHT = 600, 100
PLOT_POINTS = 120
"""At most so many: the plot is sent every second, and is hardly wider than 300 pixels."""


def history_plot(history: Sequence[Moment], device_kind: str, locale: str, *, large: bool = False) -> str:
    """Stacked areas of the last minutes; the plot's height is the whole memory of the first device."""
    if len(history) < 2:
        return ""
    now_s = history[-1].at_s
    span_s = max(60.0, min(HISTORY_S, now_s - history[0].at_s))
    moments = _peaks(history, span_s / PLOT_POINTS)
    bars = [(PLOT_WIDTH * (1 - (now_s - moment.at_s) / span_s), _first_bar(moment, device_kind)) for moment in moments]
    # Each area reaches down to the ground, and the lower ones are drawn over the higher ones.
    layers = "".join(_layer(bars, index) for index in reversed(range(len(bars[-1][1].parts))))
    size_class = "history large" if large else "history"
    return (
        f'<svg class="{size_class}" viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(say("memory_history", locale))}">{layers}</svg>'
        f'<div class="axis"><span>{escape(say("memory_history_ago", locale, minutes=f"{span_s / 60:.0f}"))}</span>'
        f"<span>{escape(say('memory_history_height', locale, total=size(bars[-1][1].total_bytes)))}</span>"
        f"<span>{escape(say('memory_history_now', locale))}</span></div>"
    )


def _peaks(history: Sequence[Moment], step_s: float) -> list[Moment]:
    """The fullest reading of each step, and the newest. Steps lie fixed in time, so that a peak stays where it is."""
    fullest: dict[int, Moment] = {}
    for moment in history:
        step = int(moment.at_s // step_s)
        if step not in fullest or _fullness(moment) > _fullness(fullest[step]):
            fullest[step] = moment
    return [*(moment for moment in fullest.values() if moment is not history[-1]), history[-1]]


def _fullness(moment: Moment) -> int:
    memory = moment.memory
    return sum(gpu.used_bytes for gpu in memory.gpus) or memory.ram_used_bytes


def _layer(bars: Sequence[tuple[float, Bar]], index: int) -> str:
    """The parts up to this one over time: a closed path along their top, then down and back along the ground."""

    def top(bar: Bar) -> float:
        return PLOT_HEIGHT * (1 - sum(part.n_bytes for part in bar.parts[: index + 1]) / bar.total_bytes)

    points = [f"{x:.0f},{top(bar):.1f}" for x, bar in bars]
    ground = [f"{bars[-1][0]:.0f},{PLOT_HEIGHT}", f"{bars[0][0]:.0f},{PLOT_HEIGHT}"]
    return f'<path class="{bars[-1][1].parts[index].style}" d="M{" ".join(points + ground)}Z"/>'


def _first_bar(moment: Moment, device_kind: str) -> Bar:
    memory = moment.memory
    gpus = used_gpus(memory) if device_kind == "cuda" else ()
    return _gpu_bar(gpus[0]) if gpus else _ram_bar(memory, "en")
