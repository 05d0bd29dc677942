"""What the System tab shows, as pure functions from the status to HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from transcription.interface import PrecisionStatus, Status
from ui import fit_view, memory_panel, render
from ui.page import Moment
from ui.texts import say

if TYPE_CHECKING:
    from model_loader.loader import LoadReport, MemoryPhases
    from model_loader.memory import MemoryReading


def hardware(status: Status, history: Sequence[Moment], locale: str) -> str:
    """Devices, processes and memory over time."""
    return "".join(
        (
            gpus(status.memory, locale),
            title("system_history", locale),
            memory_panel.history_plot(history, status.device_kind, locale, large=True),
            title("system_processes", locale),
            processes(status.memory, locale),
            *(render.line(note) for note in status.memory.notes),
        )
    )


def software(status: Status, locale: str) -> str:
    """What is loaded."""
    return title("system_engines", locale) + engines(status.loaded, locale)


def choices(status: Status, locale: str) -> str:
    """What could be loaded: the prediction and the availability of every precision."""
    return (
        title("system_fit", locale)
        + fit_view.fits(status.fits, locale)
        + title("system_precisions", locale)
        + precisions(status.precisions, locale)
    )


def title(key: str, locale: str) -> str:
    return f'<h2 class="panel-title">{escape(say(key, locale))}</h2>'


def gpus(memory: MemoryReading, locale: str) -> str:
    """One row per GPU, with nvidia-smi's columns; nothing on a machine without one."""
    if not memory.gpus:
        return ""
    headers = [
        "",
        *(say(f"memory_{name}", locale) for name in ("driver", "temperature", "power", "utilisation", "title")),
    ]
    rows = [
        (
            f"{gpu.index} · {gpu.name}",
            gpu.driver or "–",
            "–" if gpu.temperature_c is None else f"{gpu.temperature_c:.0f} °C",
            "–" if gpu.power_w is None else f"{gpu.power_w:.0f} W",
            "–" if gpu.utilisation_percent is None else f"{gpu.utilisation_percent:.0f} %",
            f"{render.size(gpu.used_bytes)} / {render.size(gpu.total_bytes)}",
        )
        for gpu in memory.gpus
    ]
    return title("system_gpus", locale) + render.table(headers, rows, numeric=frozenset({2, 3, 4, 5}))


def processes(memory: MemoryReading, locale: str) -> str:
    if not memory.processes:
        return render.empty(escape(say("system_no_processes", locale)))
    headers = ["PID", say("column_name", locale), say("column_gpu", locale), say("column_memory", locale)]
    rows = [
        (
            str(process.pid),
            f"{process.name} ({say('system_this_process', locale)})" if process.is_self else process.name,
            "–" if process.gpu_index is None else str(process.gpu_index),
            render.size(process.used_bytes),
        )
        for process in memory.processes
    ]
    return render.table(headers, rows, numeric=frozenset({3}))


def engines(reports: Sequence[LoadReport], locale: str) -> str:
    """What each load asked for and what was found in memory afterwards."""
    if not reports:
        return render.empty(escape(say("system_no_engines", locale)))
    return "".join(engine(report, locale) for report in reports)


def engine(report: LoadReport, locale: str) -> str:
    """One engine's card: identity, proof of its precision, times, memory by phase, and what the census counted."""
    state = "good" if report.effective == report.requested else "failed"
    facts = [
        ("engine_checkpoint", report.model if report.revision is None else f"{report.model} @ {report.revision[:12]}"),
        ("engine_device", report.device.label),
        ("engine_kind", f"{report.engine}. {report.engine_reason}" if report.engine_reason else report.engine),
        ("engine_requested", report.requested),
        ("engine_effective", report.effective),
        ("engine_layers", report.census.summary),
        ("engine_attention", report.attention),
        ("engine_weights", render.size(report.weights_bytes)),
        ("engine_load", render.seconds(report.load_s)),
        ("engine_warm_up", render.seconds(report.warm_up_s)),
    ]
    if cost := report.captured:
        values = {"n_graphs": cost.n_graphs, "seconds": render.seconds(cost.seconds), "size": render.size(cost.n_bytes)}
        facts.append(("engine_graphs", say("engine_graphs_cost", locale, **values)))
    pairs = "".join(f"<dt>{escape(say(key, locale))}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    reason = report.kernels_reason
    missing = render.notice(say("engine_no_kernels", locale, reason=reason)) if reason else ""
    counted = f"<summary>{escape(say('engine_census', locale))}</summary>{census(report, locale)}"
    return (
        f'<article class="engine {state}"><dl class="facts">{pairs}</dl>{missing}{phases(report.phases, locale)}'
        f"{fit_view.predicted(report, locale)}"
        f"<details>{counted}</details></article>"
    )


def phases(measured: MemoryPhases, locale: str) -> str:
    """Memory on the engine's device through the load: of the process as the driver counts it, and of torch's tensors.

    torch keeps no account of main memory: on a CPU there is one line.
    """
    points = (
        ("engine_phase_before", measured.before),
        ("engine_phase_after_load", measured.after_load),
        ("engine_phase_after_warm_up", measured.after_warm_up),
        ("engine_phase_peak", measured.peak),
    )
    on_gpu = measured.before.allocated_bytes is not None
    process = "engine_of_process_gpu" if on_gpu else "engine_of_process"
    rows = [(say(process, locale), *(render.size(p.process_bytes if p else None) for _, p in points))]
    if on_gpu:
        rows.append(
            (say("engine_of_torch", locale), *(render.size(p.allocated_bytes if p else None) for _, p in points))
        )
    headers = ["", *(say(key, locale) for key, _ in points)]
    return render.table(headers, rows, numeric=frozenset(range(1, len(headers))))


def census(report: LoadReport, locale: str) -> str:
    """Every kind of module in memory, with its format."""
    headers = [say(f"census_{name}", locale) for name in ("class", "format", "modules", "weights", "bytes")]
    rows = [
        (line.module_class, line.dtype, str(line.n_modules), f"{line.n_weights:,}", render.size(line.n_bytes))
        for line in report.census.lines
    ]
    return render.table(headers, rows, numeric=frozenset({2, 3, 4}))


def precisions(rows: Iterable[PrecisionStatus], locale: str) -> str:
    """The precision table as this machine sees it, with the reason beside each row it cannot run."""
    headers = [say("column_name", locale), "", say("column_state", locale)]
    # A label is 'name · what it means'; the name has a column of its own.
    body = [
        (row.name, row.label.partition(" · ")[2] or row.label, row.unavailable or say("system_available", locale))
        for row in rows
    ]
    return render.table(headers, body)
