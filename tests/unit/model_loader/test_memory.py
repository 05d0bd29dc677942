"""Readings with and without a GPU. The card is played by a small stand-in for NVML, with readings it refuses."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from model_loader import memory
from model_loader.engine import release
from model_loader.memory import read_memory, read_peak, read_point, reset_peak


class NvmlError(Exception):
    pass


def stand_in(**changes: object) -> SimpleNamespace:
    """NVML with one card of 16 GiB: 6 GiB used, 2 of them by this process."""

    def refuse(*args: object) -> object:
        raise NvmlError("Not Supported")

    own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=2 * 2**30)
    hidden = SimpleNamespace(pid=2**22 - 1, usedGpuMemory=None)
    answers = {
        "NVMLError": NvmlError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlMemory_v2": 2,
        "nvmlSystemGetDriverVersion": lambda: b"580.1",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: "GPU-1",
        "nvmlDeviceGetName": lambda handle: b"NVIDIA Test",
        "nvmlDeviceGetMemoryInfo": lambda handle, version=1: SimpleNamespace(used=6 * 2**30, total=16 * 2**30),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [own, hidden],
        "nvmlDeviceGetTemperature": lambda handle, kind: 41,
        "nvmlDeviceGetPowerUsage": lambda handle: 70_500,
        "nvmlDeviceGetEnforcedPowerLimit": refuse,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345_000,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=93),
    }
    return SimpleNamespace(**{**answers, **changes})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    nvml = stand_in()
    monkeypatch.setattr(memory, "_nvml", lambda: (nvml, None))
    return nvml


def test_main_memory_and_this_process_are_always_read() -> None:
    reading = read_memory()
    assert 0 < reading.ram_used_bytes < reading.ram_total_bytes
    assert reading.rss_bytes and 0 < reading.rss_bytes < reading.ram_total_bytes
    assert reading.n_cores >= 1 and reading.cpu_percent is not None
    own = [process for process in reading.processes if process.is_self and process.gpu_index is None]
    assert [(process.pid, process.used_bytes) for process in own] == [(os.getpid(), reading.rss_bytes)]


def test_without_a_driver_a_note_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_nvml", lambda: (None, "There are no GPU readings: no driver."))
    reading = read_memory()
    assert reading.gpus == () and reading.notes == ("There are no GPU readings: no driver.",)


def test_a_card_is_read_like_nvidia_smi(card: SimpleNamespace) -> None:
    reading = read_memory()
    (gpu,) = reading.gpus
    assert (gpu.index, gpu.name, gpu.driver, gpu.temperature_c, gpu.power_w) == (0, "NVIDIA Test", "580.1", 41.0, 70.5)
    assert (gpu.utilisation_percent, gpu.energy_j, gpu.free_bytes) == (93.0, 12_345.0, 10 * 2**30)
    assert gpu.power_limit_w is None and "GPU 0 gives no power limit: Not Supported." in reading.notes
    assert [(p.is_self, p.used_bytes) for p in reading.processes if p.gpu_index == 0] == [
        (True, 2 * 2**30),
        (False, None),
    ]


def test_used_memory_is_split_into_ours_and_others(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(memory, "_cuda_indices", lambda: {"GPU-1": 0})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3 * gib // 2)
    memory.note_weights(1, "cuda:0", 3 * gib // 4)
    try:
        (gpu,) = read_memory().gpus
    finally:
        memory.forget_weights(1)
    parts = (gpu.weights_bytes, gpu.working_bytes, gpu.cached_bytes, gpu.context_bytes, gpu.other_bytes)
    assert parts == (3 * gib // 4, gib // 4, gib // 2, gib // 2, 4 * gib)
    assert sum(part or 0 for part in parts) == gpu.used_bytes


def test_where_the_driver_hides_our_process_its_context_is_unknown(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.nvmlDeviceGetComputeRunningProcesses = lambda handle: []
    monkeypatch.setattr(memory, "_cuda_indices", lambda: {"GPU-1": 0})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 2**30)
    (gpu,) = read_memory().gpus
    assert gpu.context_bytes is None and gpu.other_bytes == 5 * 2**30


def test_a_card_that_stops_answering_is_a_note(card: SimpleNamespace) -> None:
    def lost(index: int) -> object:
        raise NvmlError("GPU is lost")

    card.nvmlDeviceGetHandleByIndex = lost
    reading = read_memory()
    assert reading.gpus == () and reading.notes == ("GPU readings broke off: GPU is lost.",)


def test_an_engine_in_main_memory_counts_as_weights(toy_folder: object) -> None:
    from model_loader.loader import load_engine

    before = read_memory().weights_bytes
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False)
    assert read_memory().weights_bytes - before == engine.report.weights_bytes
    engine.close()
    assert read_memory().weights_bytes == before


def test_workspaces_stay_as_long_as_an_engine_on_a_gpu_may_have_captured_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[str] = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append("all"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    memory.note_weights(1, "cpu", 1)
    memory.note_weights(2, "cuda:1", 1)
    try:
        release(torch.device("cuda:0"))
        assert not cleared
        engine = object()
        memory.note_weights(id(engine), "cuda:0", 1)
        release(torch.device("cuda:0"), fresh=engine)
        assert not cleared, "the other one may have captured it"
        memory.forget_weights(2)
        release(torch.device("cuda:0"), fresh=engine)
        assert cleared.pop() == "all" and not cleared
        memory.forget_weights(id(engine))
        memory.note_weights(2, "cuda:1", 1)
        memory.forget_weights(2)
        release(torch.device("cuda:0"))
        assert cleared == ["all"]
    finally:
        memory.forget_weights(1)


def test_the_peak_is_seen_after_it_is_over() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = read_point(device).process_bytes
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    peak = read_peak(device).process_bytes
    assert before is not None and peak is not None
    assert peak - before > 48 * 2**20


def test_a_container_limit_bounds_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"memory.max": 2**30, "memory.current": 2**29}
    monkeypatch.setattr(memory, "_cgroup_bytes", figures.get)
    monkeypatch.setattr(memory, "_cgroup_file_pages", lambda: 2**28)
    assert memory.main_memory_bytes() == (2**30, 2**28)


def test_a_reading_takes_less_than_20_ms() -> None:
    read_memory()
    times_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        read_memory()
        times_s.append(time.perf_counter() - started_s)
    assert min(times_s) < 0.02
