"""Compile a CUDA kernel when it is needed, and launch it. Knows nothing of Whisper.

NVRTC, NVIDIA's run-time compiler, comes with PyTorch's CUDA build, as does cuda-bindings; no toolkit and no C compiler
are needed. What it made is kept on disk by the text it was made from, so that a later start takes milliseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from errors import DeviceError

logger = logging.getLogger(__name__)

_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


class Kernel:
    """A function on one GPU, launched on the current stream; may be captured in a graph."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        self._function, self._shared_bytes = function, shared_bytes

    def launch(self, n_blocks: int, n_threads: int, arguments: ctypes.Structure) -> None:
        """arguments: the kernel's only parameter. All blocks run at once, or the launch fails: they may wait for each
        other."""
        from cuda.bindings import driver

        places = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream().cuda_stream
        _checked(driver.cuLaunchCooperativeKernel(
            self._function, n_blocks, 1, 1, n_threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(places)
        ))  # fmt: skip


@lru_cache(maxsize=64)
def _load(cubin: bytes, name: str, device_index: int, shared_bytes: int) -> Kernel:
    """The module stays loaded for the life of the process: a captured graph may hold the function."""
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # the context exists from here on
        (module,) = _checked(driver.cuModuleLoadData(cubin))
        (function,) = _checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return Kernel(function, shared_bytes)


def compile_kernel(
    source: Path, name: str, macros: Mapping[str, str], device: torch.device, *, shared_bytes: int
) -> Kernel:
    """name: an extern "C" function in source. Raises DeviceError with the compiler's words."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load(compiled(expanded(source), options_for(macros, device)), name, index, shared_bytes)


def expanded(source: Path) -> str:
    """The text of a file with what it includes from its own folder in place, each file once."""
    seen: set[Path] = set()

    def text_of(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        return _INCLUDE.sub(lambda found: text_of(path.parent / found[1]), path.read_text(encoding="utf-8"))

    return text_of(source).replace("#pragma once\n", "")


def options_for(macros: Mapping[str, str], device: torch.device) -> tuple[str, ...]:
    """The compiler's, for this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return ("--std=c++17", f"--gpu-architecture=sm_{major}{minor}", *(f"-D{k}={v}" for k, v in macros.items()))


@lru_cache(maxsize=64)
def compiled(text: str, options: tuple[str, ...]) -> bytes:
    """Machine code, from the disk if this text was compiled before. Raises DeviceError with the compiler's words."""
    kept = _cache_folder() / f"{hashlib.sha256(chr(0).join((*options, text)).encode()).hexdigest()[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    started_s = time.perf_counter()
    cubin = _compile(text, options)
    logger.info("event=kernel_compiled seconds=%.1f n_bytes=%d", time.perf_counter() - started_s, len(cubin))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(cubin)
        partial.replace(kept)  # at once, so that another process never reads half of it
    except OSError as error:
        logger.info("event=kernel_not_kept reason='%s'", error)
    return cubin


@lru_cache(maxsize=1)
def is_available() -> bool:
    """The compiler and the way to the driver are there."""
    try:
        from cuda.bindings import driver, nvrtc

        driver.cuDriverGetVersion()
        nvrtc.nvrtcVersion()
    except Exception as error:  # whatever a missing or foreign library makes of it
        logger.info("event=nvrtc_missing reason='%s'", error)
        return False
    return True


def _compile(text: str, options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    (program,) = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        words = b" " * size
        _checked(nvrtc.nvrtcGetProgramLog(program, words))
        raise DeviceError(f"A GPU kernel could not be compiled. The compiler says: {words.decode(errors='replace')}")
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    cubin: bytes = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of cuda-bindings returned behind its status. Raises DeviceError."""
    if int(answer[0]) != 0:
        raise DeviceError(f"The GPU's driver refused a kernel: {answer[0].name}.")
    return answer[1:]


def _cache_folder() -> Path:
    return Path.home() / ".cache" / "sotto" / "kernels"
