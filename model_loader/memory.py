"""Memory as it is now: per GPU from NVML (what nvidia-smi reads), our own share from torch, main memory from psutil.

In: nothing. Out: a MemoryReading for people, a MemoryPoint for the phases of a load. Never raises, with or without a
GPU; a reading that cannot be had is None, and `notes` says why. A call costs a few milliseconds: NVML is opened once.

What a GPU's memory is made of, from left to right: weights (what the census of our engines counted), working set
(allocated by torch beyond them: caches, activations), cached (reserved by torch, free for its next request), context
(what the driver holds for our process: CUDA's own code and state; NVML's figure for the process less torch's), other
processes, free.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One card."""

    index: int
    """As nvidia-smi numbers it."""
    cuda_index: int | None
    """As this process numbers it; None while it does not use CUDA, or where CUDA_VISIBLE_DEVICES hides the card."""
    name: str
    driver: str | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    energy_j: float | None
    """Since the driver was loaded."""
    utilisation_percent: float | None
    used_bytes: int
    total_bytes: int
    weights_bytes: int | None
    working_bytes: int | None
    cached_bytes: int | None
    context_bytes: int | None
    """None where the driver does not say what our process uses; it is then part of other_bytes."""
    other_bytes: int | None

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One program that holds memory of a card, and always this one."""

    pid: int
    name: str
    gpu_index: int | None
    """As nvidia-smi numbers it; None for main memory."""
    used_bytes: int | None
    is_self: bool


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The machine at one moment."""

    gpus: tuple[GpuReading, ...]
    processes: tuple[ProcessReading, ...]
    ram_total_bytes: int
    """Main memory, or the container's limit on it."""
    ram_used_bytes: int
    rss_bytes: int | None
    """Resident main memory of this process."""
    weights_bytes: int
    """Weights of our engines in main memory."""
    n_cores: int
    cpu_percent: float | None
    """Of all cores, since the reading before; 0 in the first."""
    load_1min: float | None
    notes: tuple[str, ...] = ()
    """Why readings are missing, a sentence each."""


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """Memory of one device at one phase of a load. None: not to be had."""

    process_bytes: int | None
    """NVML's figure for this process on the GPU (its CUDA context included); on a CPU resident main memory."""
    allocated_bytes: int | None
    """torch's allocator: tensors alive. None on a CPU, where torch keeps no account."""
    reserved_bytes: int | None
    """torch's allocator: taken from the driver."""
    device_used_bytes: int
    """All programs together, on the device."""


# --- what our engines hold -------------------------------------------------------------------------------------------

_weights: dict[int, tuple[str, int]] = {}
"""Weights of the engines in memory, by engine: (device as torch writes it, bytes)."""


def note_weights(engine_id: int, device: str, n_bytes: int) -> None:
    """Remember an engine's weights, so that readings can tell them from the working set."""
    _weights[engine_id] = (device, n_bytes)


def forget_weights(engine_id: int) -> None:
    _weights.pop(engine_id, None)


def engines_on_gpus(*, but: int = 0) -> int:
    """How many engines of this process are on a GPU, without the one of this id."""
    return sum(place.startswith("cuda") for engine_id, (place, _) in list(_weights.items()) if engine_id != but)


def _weights_on(device: str) -> int:
    return sum(n_bytes for place, n_bytes in list(_weights.values()) if place == device)


# --- readings --------------------------------------------------------------------------------------------------------


def read_memory() -> MemoryReading:
    """All cards, the programs on them, main memory and cores."""
    notes: list[str] = []
    gpus, processes = _read_gpus(notes)
    rss_bytes = _rss_bytes()
    own = ProcessReading(os.getpid(), _process_name(os.getpid()), None, rss_bytes, True)
    total_bytes, used_bytes = main_memory_bytes()
    return MemoryReading(
        gpus=gpus,
        processes=(*processes, own),
        ram_total_bytes=total_bytes,
        ram_used_bytes=used_bytes,
        rss_bytes=rss_bytes,
        weights_bytes=_weights_on("cpu"),
        n_cores=n_cores(),
        cpu_percent=float(psutil.cpu_percent(interval=None)),
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def read_point(device: torch.device) -> MemoryPoint:
    """One device now."""
    if device.type != "cuda":
        return MemoryPoint(_rss_bytes(), None, None, main_memory_bytes()[1])
    import torch

    torch.cuda.synchronize(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return MemoryPoint(
        process_bytes=_own_gpu_bytes(device.index or 0),
        allocated_bytes=torch.cuda.memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        device_used_bytes=total_bytes - free_bytes,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a new load could take: free on the device, and what torch holds in reserve there."""
    if device.type != "cuda":
        total_bytes, used_bytes = main_memory_bytes()
        return total_bytes - used_bytes
    import torch

    cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached_bytes


def reset_peak(device: torch.device) -> None:
    """Start counting the peak anew."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux only: 5 resets the process's high-water mark (proc(5), clear_refs).
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak(device: torch.device) -> MemoryPoint:
    """The highest use since reset_peak. NVML keeps no peak; its figure here is the context and the allocator's peak."""
    now = read_point(device)
    if device.type != "cuda":
        return MemoryPoint(_peak_rss_bytes() or now.process_bytes, None, None, now.device_used_bytes)
    import torch

    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    assert now.reserved_bytes is not None
    grown = reserved - now.reserved_bytes
    process = None if now.process_bytes is None else now.process_bytes + grown
    return MemoryPoint(process, allocated, reserved, now.device_used_bytes + grown)


def main_memory_bytes() -> tuple[int, int]:
    """(total, used) of the machine, or of the container where that has a lower limit."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None and limit < memory.total:
        # Pages of files count as used until somebody needs the room.
        return limit, max(0, used - _cgroup_file_pages())
    return int(memory.total), int(memory.total - memory.available)


# --- NVML ------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()


@lru_cache(maxsize=1)
def _nvml() -> tuple[Any, str | None]:
    """(pynvml opened, or None; why not)."""
    try:
        import pynvml
    except ImportError:
        return None, "GPU readings are missing: the package nvidia-ml-py is not installed."
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"There are no GPU readings: {error}."
    return pynvml, None


def _read_gpus(notes: list[str]) -> tuple[tuple[GpuReading, ...], tuple[ProcessReading, ...]]:
    nvml, reason = _nvml()
    if nvml is None:
        notes.append(str(reason))
        return (), ()
    gpus, processes = list[GpuReading](), list[ProcessReading]()
    with _lock:
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            cuda_indices = _cuda_indices()
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                own = tuple(_read_processes(nvml, handle, index, notes))
                processes += own
                gpus.append(_read_gpu(nvml, handle, index, driver, own, cuda_indices, notes))
        except nvml.NVMLError as error:  # a card that fell off the bus, a driver being updated
            notes.append(f"GPU readings broke off: {error}.")
    return tuple(gpus), tuple(processes)


def _read_gpu(
    nvml: Any,
    handle: Any,
    index: int,
    driver: str,
    processes: tuple[ProcessReading, ...],
    cuda_indices: dict[str, int],
    notes: list[str],
) -> GpuReading:
    def reading(what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except nvml.NVMLError as error:
            notes.append(f"GPU {index} gives no {what}: {error}.")
            return None

    memory = _memory_info(nvml, handle)
    cuda_index = cuda_indices.get(_text(nvml.nvmlDeviceGetUUID(handle)))
    process_bytes = next((p.used_bytes for p in processes if p.is_self), None)
    milliwatts = reading("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    limit = reading("power limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    millijoules = reading("energy", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    weights, working, cached, context, other = _split(cuda_index, process_bytes, int(memory.used))
    return GpuReading(
        index=index,
        cuda_index=cuda_index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=driver,
        temperature_c=reading(
            "temperature", lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        ),
        power_w=None if milliwatts is None else milliwatts / 1000,
        power_limit_w=None if limit is None else limit / 1000,
        energy_j=None if millijoules is None else millijoules / 1000,
        utilisation_percent=reading("utilisation", lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
        weights_bytes=weights,
        working_bytes=working,
        cached_bytes=cached,
        context_bytes=context,
        other_bytes=other,
    )


def _split(
    cuda_index: int | None, process_bytes: int | None, used_bytes: int
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """(weights, working set, cached, context, other processes) of the used bytes of one card."""
    if cuda_index is None:
        return (
            (0, 0, 0, 0, used_bytes) if process_bytes is None else (0, 0, 0, process_bytes, used_bytes - process_bytes)
        )
    import torch

    allocated, reserved = torch.cuda.memory_allocated(cuda_index), torch.cuda.memory_reserved(cuda_index)
    weights = min(_weights_on(f"cuda:{cuda_index}"), allocated)
    context = None if process_bytes is None else max(0, process_bytes - reserved)
    other = max(0, used_bytes - reserved - (context or 0))
    return weights, allocated - weights, reserved - allocated, context, other


def _memory_info(nvml: Any, handle: Any) -> Any:
    """Version 2 leaves out what the driver reserves for itself, as nvidia-smi does; old drivers lack it."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _read_processes(nvml: Any, handle: Any, index: int, notes: list[str]) -> Iterator[ProcessReading]:
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} does not list its processes: {error}.")
        return
    for process in running:
        pid, used = int(process.pid), process.usedGpuMemory
        is_self = pid == os.getpid()
        yield ProcessReading(pid, _process_name(pid), index, None if used is None else int(used), is_self)


def _own_gpu_bytes(cuda_index: int) -> int | None:
    """NVML's figure for this process on one card; None where the driver hides it (some containers and Windows)."""
    nvml, _ = _nvml()
    if nvml is None:
        return None
    with _lock:
        try:
            for uuid, index in _cuda_indices().items():
                if index == cuda_index:
                    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                    own = [p for p in _read_processes(nvml, handle, 0, []) if p.is_self]
                    return own[0].used_bytes if own else None
        except nvml.NVMLError:
            return None
    return None


def _cuda_indices() -> dict[str, int]:
    """CUDA's index by NVML's UUID, for the cards this process sees; empty before its first use of CUDA."""
    # Asking torch for its cards would create a context on one, so we ask only once there is one.
    torch_module = sys.modules.get("torch")
    if torch_module is None or not torch_module.cuda.is_initialized():
        return {}
    return _uuids(torch_module.cuda.device_count())


@lru_cache(maxsize=4)
def _uuids(count: int) -> dict[str, int]:
    import torch

    return {f"GPU-{torch.cuda.get_device_properties(index).uuid}": index for index in range(count)}


# --- main memory -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _self_process() -> psutil.Process:
    return psutil.Process()


def _rss_bytes() -> int | None:
    try:
        return int(_self_process().memory_info().rss)
    except psutil.Error:
        return None


def _peak_rss_bytes() -> int | None:
    """The high-water mark since the last reset (Linux), else None."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _process_name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "outside this container" if Path("/.dockerenv").exists() else "unknown"


def n_cores() -> int:
    """Cores this process may use: fewer than the machine has, where it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_bytes(name: str) -> int | None:
    """A figure of the container's own account (cgroup v2)."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_file_pages() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "inactive_file")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
