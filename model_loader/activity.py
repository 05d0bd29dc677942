"""What a piece of work asks of host and GPU: operators called, kernels launched, waits for a result.

In: a function. Out: an Activity, counted by torch's profiler, never estimated. On a CPU there are no kernels and nobody
waits: those two are None there. Profiling slows the work down several times, so nothing is timed here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""CUDA runtime calls in which the host stands still; `.item()`, `.any()` in an `if`, nonzero and copies to main memory
all end in one."""
_LAUNCH = "LaunchKernel"
"""Part of cudaLaunchKernel, cudaLaunchKernelExC and cuLaunchKernel."""

_MARK = "profiler::_record_function"
_MARKS = (f"{_MARK}_enter", f"{_MARK}_enter_new", f"{_MARK}_exit")
_UNCOUNTED = frozenset(["aten::is_leaf", "aten::output_nr", "aten::_version", *_MARKS])
"""What torch's own tables leave out: the profiler's marks and looks at a tensor's fields."""


@dataclass(frozen=True, slots=True)
class Activity:
    """Counts of one piece of work."""

    n_operators: int
    """torch operators that the host called, inner ones included."""
    n_kernels: int | None
    """Kernels launched; those inside a replayed CUDA graph are not among them."""
    n_waits: int | None
    """Times that the host waited for the GPU."""


def count_activity(work: Callable[[], object], device: torch.device) -> Activity:
    """Run `work` once under the profiler; run it before, so that no first-time compilation is counted."""
    # The profiler's library (libkineto) writes a line to standard error whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # The events as they were recorded: profiler.key_averages() builds a tree of them first, 40 times the work.
    events = profiler.profiler.kineto_results.events()
    counts = Counter(event.name() for event in events if event.name() not in _UNCOUNTED)
    n_operators = sum(count for name, count in counts.items() if "::" in name)
    if not on_gpu:
        return Activity(n_operators, None, None)
    n_kernels = sum(count for name, count in counts.items() if _LAUNCH in name)
    return Activity(n_operators, n_kernels, sum(counts.get(name, 0) for name in _WAITS))
