"""Which device computes, and whether it really can: a GPU is called one only after it has multiplied and encoded.

In: auto, cpu, cuda or cuda:N. Out: a DeviceInfo, or a PreflightReport with a sentence per check.
The order of the checks is that of their usual failures: no driver, a torch build without CUDA, a build without kernels
for this card, a card that computes wrongly or not at all.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import conv1d, gelu, layer_norm, linear, scaled_dot_product_attention

from errors import NoSuchDeviceError, OptionError
from model_loader.memory import main_memory_bytes, n_cores

logger = logging.getLogger(__name__)

_CHECK_SIZE = 256
"""Side of the matrices multiplied in the preflight."""
_ENCODER_SHAPES = ((64, 80, 3), (64, 64, 3), (192, 64), (64, 64))
"""Of the preflight's encoder: two convolutions, queries with keys and values, output."""
_TRITON_CAPABILITY = (8, 0)
"""What Triton supports; older GPUs run torch's operations."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Where an engine runs."""

    kind: str
    """cuda or cpu."""
    index: int
    """CUDA's index, which CUDA_VISIBLE_DEVICES may have renumbered; 0 on a CPU."""
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability (major, minor); None on a CPU."""
    total_bytes: int
    """Memory of the device; on a CPU main memory, or the container's limit on it."""
    n_cores: int
    """Processor cores this process may use."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    @property
    def label(self) -> str:
        """For users: 'NVIDIA H200 (GPU 0)' or 'CPU, 2 cores'."""
        if self.kind == "cuda":
            return f"{self.name} (GPU {self.index})"
        return f"CPU, {self.n_cores} core{'s' if self.n_cores != 1 else ''}"


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What the checks found. `reason` says why there is no GPU; None where it works or none was wanted."""

    device: DeviceInfo
    lines: tuple[str, ...]
    """One sentence per check, in order."""
    reason: str | None = None


def describe_device(requested: str = "auto") -> DeviceInfo:
    """The device a request means. 'auto' is the first GPU that passes the preflight, else the CPU.

    Raises OptionError for another word, DeviceError for a GPU that is asked for by name and does not work.
    """
    return preflight(requested).device


def preflight(requested: str = "auto") -> PreflightReport:
    """Check driver, torch build, a real matrix product and a real encoding. Kept for the life of the process.

    Raises OptionError for another word than auto, cpu, cuda, cuda:N; DeviceError if a GPU asked for by name fails.
    """
    word = requested.strip().lower() or "auto"
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", word)
    if match is None:
        raise OptionError(f"There is no device '{requested}'; choose auto, cpu, cuda or cuda:N (for example cuda:0).")
    if word == "cpu":
        cpu = _cpu()
        return PreflightReport(cpu, (f"Device: {cpu.label}, as requested.",))
    lines, device, reason = _check_gpu(int(match.group(1) or 0))
    if device is not None:
        return PreflightReport(device, lines)
    assert reason is not None
    if word != "auto":
        raise NoSuchDeviceError(f"{requested} cannot be used: {reason} Mend that, or choose --device cpu.")
    cpu = _cpu()
    return PreflightReport(cpu, (*lines, f"Device: {cpu.label}. No GPU is used: {reason}"), reason)


@lru_cache(maxsize=16)
def _check_gpu(index: int) -> tuple[tuple[str, ...], DeviceInfo | None, str | None]:
    """(a sentence per check passed, the GPU or None, why not)."""
    lines: list[str] = []
    driver, reason = _check_driver()
    if reason is None:
        lines.append(f"Driver: NVIDIA {driver}.")
        reason = _check_build(index)
    if reason is None:
        gpu = _gpu(index)
        lines.append(f"PyTorch {torch.__version__}: built for CUDA {torch.version.cuda}, sees {gpu.name}.")
        reason = _check_kernels(gpu) or _check_product(gpu) or _check_encode(gpu)
        if reason is None:
            lines.append(
                f"Device: {gpu.label}, {gpu.total_bytes / 2**30:.0f} GiB; products and encodings on it are right."
            )
            return tuple(lines), gpu, None
    logger.info("event=preflight_failed index=%d reason=%r", index, reason)
    return tuple(lines), None, reason


def _check_driver() -> tuple[str, str | None]:
    """(driver version, why there is none)."""
    if platform.system() == "Darwin":
        return "", "this is macOS, where CUDA does not exist."
    try:
        import pynvml
    except ImportError:
        return "of unknown version", None  # torch finds out by itself
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            return "", f"the NVIDIA driver does not answer ({error}); `nvidia-smi` shows more."
        return "", "no NVIDIA driver was found."
    version = version.decode() if isinstance(version, bytes) else str(version)
    return version, None if count else f"the NVIDIA driver {version} finds no GPU."


def _check_build(index: int) -> str | None:
    """Why torch cannot see the GPU."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA; install a CUDA build of it."
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        return f"CUDA does not start: {_first_line(error)}"
    if count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"PyTorch sees no GPU{f' (CUDA_VISIBLE_DEVICES is {hidden!r})' if hidden is not None else ''}."
    if index >= count:
        return f"there is no GPU {index}; PyTorch sees {count}, numbered from 0."
    return None


def _check_kernels(gpu: DeviceInfo) -> str | None:
    """Why this torch build has no machine code for this card."""
    assert gpu.capability is not None
    if runs_on(gpu.capability, torch.cuda.get_arch_list()):
        return None
    version = ".".join(map(str, gpu.capability))
    return (
        f"this PyTorch ({torch.__version__}) holds no kernels for {gpu.name} (compute capability {version}), only for "
        f"{', '.join(torch.cuda.get_arch_list())}; install a build that has them."
    )


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code built for these targets runs on a card of this capability.

    sm_XY is machine code: it runs on the same major version with a minor of at least Y. compute_XY is PTX, which the
    driver compiles for anything newer (CUDA C++ programming guide, binary and PTX compatibility).
    """
    for target in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", target)
        if match is None:
            continue
        major, minor = int(match.group(2)), int(match.group(3))
        if match.group(1) == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if match.group(1) == "compute" and (major, minor) <= capability:
            return True
    return False


@lru_cache(maxsize=16)
def lacks_triton(device: torch.device) -> str | None:
    """Why our Triton kernels do not run on this GPU, a sentence; None where they do. Torch's operations then stand in.

    Triton compiles a launcher in C for every kernel at its first use, so the package alone is not enough: a slim image
    without a compiler would fail in the middle of a transcription.
    """
    reason = _check_triton(torch.cuda.get_device_capability(device))
    if reason is not None:
        logger.warning("event=no_triton device=%s reason=%r", device, reason)
    return reason


def has_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on this GPU."""
    return lacks_triton(device) is None


def _check_triton(capability: tuple[int, int]) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (PyTorch's CUDA builds for Linux bring it)."
    if capability < _TRITON_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, _TRITON_CAPABILITY))
        return f"Triton needs a GPU of compute capability {need} or newer; this one has {have}."
    if not _c_compiler():
        return "Triton needs a C compiler, and there is none (install gcc or clang, or name one in CC)."
    if not _python_headers().is_file():
        return f"Triton needs Python's headers, and {_python_headers()} is missing (on Debian: install python3-dev)."
    return None


def _c_compiler() -> str | None:
    """The one that Triton takes (triton/runtime/build.py): the one it is told of, else what is found."""
    named = _named_compiler()
    return shutil.which(named.split()[0]) if named else shutil.which("gcc") or shutil.which("clang")


def _named_compiler() -> str | None:
    """What Triton was told by CC."""
    try:
        from triton import knobs
    except ImportError:  # before 3.4
        return None
    return knobs.build.cc or None


def _python_headers() -> Path:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder below /usr/local, where its package does not put them.
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return Path(folder) / "Python.h"


def _check_product(gpu: DeviceInfo) -> str | None:
    """Multiply two matrices on the GPU and on the CPU and compare."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_CHECK_SIZE, _CHECK_SIZE, generator=generator) for _ in range(2))
    try:
        product = (left.to(gpu.torch_device) @ right.to(gpu.torch_device)).cpu()
    except RuntimeError as error:  # torch.OutOfMemoryError and CUDA errors are RuntimeErrors
        return f"a matrix product on {gpu.name} failed: {_first_line(error)}"
    # 1 % of the largest value: room for TF32, none for a card that computes nonsense.
    wrong = float((product - left @ right).abs().max() / (left @ right).abs().max())
    return None if wrong < 0.01 else f"a matrix product on {gpu.name} is wrong by {wrong:.0%}."


def _check_encode(gpu: DeviceInfo) -> str | None:
    """Encode on the GPU and on the CPU, in float32 and on a GPU in 16 bits too, and compare: convolutions and attention
    come from other libraries (cuDNN) than products do."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 80, 100, generator=generator)
    weights = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in _ENCODER_SHAPES]
    expected = _encode(features, weights)
    for dtype in (torch.float32, torch.float16) if gpu.kind == "cuda" else (torch.float32,):
        try:
            found = _encode(features.to(gpu.torch_device, dtype), [w.to(gpu.torch_device, dtype) for w in weights])
            wrong = float((found.float().cpu() - expected).abs().max() / expected.abs().max())
        except RuntimeError as error:
            return f"encoding on {gpu.name} failed: {_first_line(error)}"
        if not wrong < 0.02:  # nor may it be no number at all
            return f"encoding on {gpu.name} is wrong by {wrong:.0%}."
    return None


def _encode(features: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, 80, n] -> [1, n / 2, 64]: a Whisper encoder of one layer and one head, without its feed-forward half."""
    x = gelu(conv1d(features, weights[0], padding=1))
    x = gelu(conv1d(x, weights[1], stride=2, padding=1)).transpose(1, 2)
    query, key, value = linear(layer_norm(x, x.shape[-1:]), weights[2]).chunk(3, dim=-1)
    return x + linear(scaled_dot_product_attention(query, key, value), weights[3])


def _gpu(index: int) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(index)
    return DeviceInfo(
        kind="cuda",
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
        n_cores=n_cores(),
    )


@lru_cache(maxsize=1)
def _cpu() -> DeviceInfo:
    return DeviceInfo("cpu", 0, platform.processor() or platform.machine(), None, main_memory_bytes()[0], n_cores())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") + "."
