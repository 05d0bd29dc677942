"""The memory panel and the System tab: every part is a reading, a missing reading is left out, sums are right."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from model_loader.fast.graph import CaptureCost
from model_loader.loader import MemoryPhases, load_engine
from model_loader.memory import GpuReading, MemoryPoint, ProcessReading
from tests.fakes import FakeTranscriber
from transcription.interface import Status
from ui import memory_panel, system_view
from ui.page import FRESH_S, HISTORY_S, Moment, Pulse


def test_a_gpu_bar_explains_all_that_is_used(gpu_status: Status, gpu: GpuReading) -> None:
    (bar,) = memory_panel.memory_bars(gpu_status, "en")
    assert [part.style for part in bar.parts] == ["weights", "working", "cached", "context", "other"]
    assert sum(part.n_bytes for part in bar.parts) == bar.used_bytes == gpu.used_bytes
    html = memory_panel.panel(gpu_status, (), "en")
    assert "20.0 GiB of 140.0 GiB" in html
    for part in ("3.0 GiB", "6.0 GiB", "CUDA context", "120.0 GiB", "41 °C", "312 / 700 W", "63 %", "575.57"):
        assert part in html


def test_only_the_cards_in_use_are_in_the_panel_and_all_are_in_the_table(gpu_status: Status, gpu: GpuReading) -> None:
    idle = replace(gpu, index=1, name="Idle", weights_bytes=0, working_bytes=0, cached_bytes=0, context_bytes=0)
    status = replace(gpu_status, memory=replace(gpu_status.memory, gpus=(idle, gpu)))
    assert "Idle" not in memory_panel.panel(status, (), "en")
    assert "Idle" in system_view.gpus(status.memory, "en")
    alone = replace(gpu_status, memory=replace(gpu_status.memory, gpus=(idle, replace(idle, index=2, name="Other"))))
    assert [bar.title for bar in memory_panel.memory_bars(alone, "en")] == ["GPU 1 · Idle"]


def test_a_missing_reading_is_left_out(gpu_status: Status, gpu: GpuReading) -> None:
    silent = replace(gpu, context_bytes=None, temperature_c=None, power_w=None, utilisation_percent=None, driver=None)
    status = replace(gpu_status, memory=replace(gpu_status.memory, gpus=(silent,)))
    html = memory_panel.panel(status, (), "en")
    assert "CUDA context" not in html
    assert "None" not in html
    assert "°C" not in html
    assert "–" in system_view.gpus(status.memory, "en")


def test_a_cpu_bar_splits_main_memory(cpu_status: Status) -> None:
    (bar,) = memory_panel.memory_bars(cpu_status, "en")
    assert sum(part.n_bytes for part in bar.parts) == bar.used_bytes == cpu_status.memory.ram_used_bytes
    html = memory_panel.panel(cpu_status, (), "en")
    assert "Cores 2" in html
    assert "5.0 GiB of 16.0 GiB" in html


def test_the_bar_never_overflows(cpu_status: Status) -> None:
    (bar,) = memory_panel.memory_bars(cpu_status, "en")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", memory_panel.stack(bar))]
    assert sum(widths) == pytest.approx(100 * bar.used_bytes / bar.total_bytes, abs=0.1)


def reported(requested: str, effective: str) -> Any:
    return SimpleNamespace(requested=requested, effective=effective)


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [
        ((), "fp32 · not loaded"),
        ((reported("fp32", "fp32"),), "<dd>fp32</dd>"),
        ((reported("fp16", "fp32"),), "fp16 requested → fp32 in memory"),
    ],
)
def test_precision_is_what_was_found_in_memory(cpu_status: Status, loaded: Any, expected: str) -> None:
    assert expected in memory_panel.panel(replace(cpu_status, loaded=loaded), (), "en")


def test_the_largest_programs_on_the_cards_are_always_in_sight(gpu_status: Status, cpu_status: Status) -> None:
    others = tuple(ProcessReading(100 + i, f"program{i}", 0, i * 2**30, is_self=False) for i in range(6))
    html = memory_panel.panel(replace(gpu_status, memory=replace(gpu_status.memory, processes=others)), (), "en")
    assert "<li>105 program5<b>5.0 GiB</b></li>" in html and "program1" not in html and "and 2 more" in html
    assert 'class="legend processes"' in html
    assert 'class="legend processes"' not in memory_panel.panel(cpu_status, (), "en")


@pytest.mark.parametrize("phase", ["starting", "loading", "ready", "failed"])
def test_each_phase_is_shown_with_its_sentence(cpu_status: Status, phase: str) -> None:
    html = memory_panel.panel(replace(cpu_status, phase=phase, message="Loading <demo>."), (), "zh")
    assert f'class="pill {phase}"' in html
    assert "&lt;demo&gt;" in html


def test_the_history_draws_one_area_per_part(gpu_status: Status) -> None:
    history = [Moment(float(i), gpu_status.memory) for i in range(120)]
    html = memory_panel.history_plot(history, "cuda", "en")
    assert html.count("<path") == 5
    assert "2 min ago" in html
    numbers = [float(y) for y in re.findall(r",(-?[\d.]+)", html)]
    assert min(numbers) >= 0
    assert max(numbers) <= memory_panel.PLOT_HEIGHT


def test_a_long_history_is_sent_short_and_keeps_its_peak(gpu_status: Status, gpu: GpuReading) -> None:
    peak = replace(gpu, used_bytes=gpu.used_bytes + gpu.working_bytes, working_bytes=2 * gpu.working_bytes)
    readings = [gpu_status.memory] * 600
    readings[301] = replace(gpu_status.memory, gpus=(peak,))
    moments = [Moment(float(i), memory) for i, memory in enumerate(readings)]
    for n_moments in (400, 600):
        html = memory_panel.history_plot(moments[:n_moments], "cuda", "en")
        assert len(html) < 8000
        top = 100 * (1 - (peak.used_bytes / peak.total_bytes))
        assert min(float(y) for y in re.findall(r",(-?[\d.]+)", html)) == pytest.approx(top, abs=0.06)


def test_the_history_survives_a_reading_that_comes_and_goes(gpu_status: Status, gpu: GpuReading) -> None:
    without = replace(gpu_status.memory, gpus=(replace(gpu, context_bytes=None),))
    gone = replace(gpu_status.memory, gpus=())
    for readings in ((without, gpu_status.memory), (gpu_status.memory, without), (gone, gpu_status.memory)):
        history = [Moment(float(i), memory) for i, memory in enumerate(readings)]
        assert "<path" in memory_panel.history_plot(history, "cuda", "en")


def test_one_reading_is_no_history(cpu_status: Status) -> None:
    assert memory_panel.history_plot([Moment(0.0, cpu_status.memory)], "cpu", "en") == ""


def test_the_pulse_reads_once_a_second_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ui.page.time", SimpleNamespace(monotonic=lambda: now[0]))
    transcriber = FakeTranscriber()
    pulse = Pulse(transcriber)
    first = pulse.status()
    assert pulse.status() is first
    now[0] += FRESH_S + 0.01
    assert pulse.status() is not first
    assert len(pulse.history()) == 2
    now[0] += HISTORY_S + 1
    pulse.status()
    assert len(pulse.history()) == 1


def test_the_system_tab_shows_processes_and_precisions(gpu_status: Status) -> None:
    parts = (system_view.hardware(gpu_status, (), "en"), system_view.software(gpu_status, "en"))
    html = "".join((*parts, system_view.choices(gpu_status, "en")))
    assert "python (this program)" in html
    assert "NVIDIA H200" in html
    assert "No engine is loaded" in html
    for row in gpu_status.precisions:
        assert row.name in html


def test_an_engine_card_proves_its_precision(cpu_status: Status) -> None:
    engine = load_engine("demo", "bf16", device="cpu", offline=True, warm_up=False)
    try:
        html = system_view.software(replace(cpu_status, loaded=(engine.report,)), "en")
    finally:
        engine.close()
    for part in ("demo", "bf16", "bfloat16", "After load", "Linear", "sdpa", "reference", "Whole process"):
        assert part in html
    assert html.count("<dt>Engine</dt>") == 1
    assert "Tensors (torch)" not in html, "torch keeps no account of main memory"
    assert "CUDA graphs" not in html


def test_on_a_gpu_driver_and_allocator_are_shown_and_named_apart(cpu_status: Status) -> None:
    engine = load_engine("demo", "bf16", device="cpu", offline=True, warm_up=False)
    engine.close()
    point = MemoryPoint(process_bytes=700 * 2**20, allocated_bytes=33 * 2**20, reserved_bytes=0, device_used_bytes=0)
    phases = MemoryPhases(point, point, None, replace(point, allocated_bytes=34 * 2**20))
    cost = CaptureCost(n_graphs=10, seconds=3.2, n_bytes=9 * 2**30)
    report = replace(engine.report, phases=phases, kernels_reason="Triton needs a C compiler.", captured=cost)
    html = system_view.software(replace(cpu_status, loaded=(report,)), "en")
    process, torch = html.index("Whole process (driver)"), html.index("Tensors (torch)")
    assert process < html.index("700 MiB") < torch < html.index("33 MiB") < html.index("34 MiB")
    assert "<dt>CUDA graphs</dt><dd>10 captured in 3.20 s; with the caches of all rows 9.0 GiB</dd>" in html
    chinese = system_view.software(replace(cpu_status, loaded=(report,)), "zh")
    assert "<dt>CUDA 图</dt><dd>捕获 10 个，用时 3.20 s；连同全部行的缓存占 9.0 GiB</dd>" in chinese
    assert "Torch&#x27;s operations stand in for our kernels: Triton needs a C compiler." in html
