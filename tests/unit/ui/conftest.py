"""Machines that this one is not, as values: a GPU with readings, a GPU without, a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model_loader.memory import GpuReading, MemoryReading, ProcessReading
from tests.fakes import FakeTranscriber
from transcription.interface import Status

GIB = 2**30


@pytest.fixture
def gpu() -> GpuReading:
    return GpuReading(
        index=0, cuda_index=0, name="NVIDIA H200", driver="575.57", temperature_c=41.0, power_w=312.4,
        power_limit_w=700.0, energy_j=None, utilisation_percent=63.0, used_bytes=20 * GIB, total_bytes=140 * GIB,
        weights_bytes=3 * GIB, working_bytes=6 * GIB, cached_bytes=2 * GIB, context_bytes=1 * GIB, other_bytes=8 * GIB,
    )  # fmt: skip


@pytest.fixture
def cpu_memory() -> MemoryReading:
    return MemoryReading(
        gpus=(), processes=(ProcessReading(7, "python", None, 2 * GIB, True),), ram_total_bytes=16 * GIB,
        ram_used_bytes=5 * GIB, rss_bytes=2 * GIB, weights_bytes=GIB // 2, n_cores=2, cpu_percent=33.0, load_1min=1.0,
    )  # fmt: skip


@pytest.fixture
def cpu_status(cpu_memory: MemoryReading) -> Status:
    return replace(FakeTranscriber().status(), device_label="CPU, 2 cores", memory=cpu_memory)


@pytest.fixture
def gpu_status(cpu_status: Status, cpu_memory: MemoryReading, gpu: GpuReading) -> Status:
    memory = replace(cpu_memory, gpus=(gpu,))
    return replace(cpu_status, device_kind="cuda", device_label="NVIDIA H200 (GPU 0)", memory=memory)
