"""Count what is in memory after a load and hold it against what the row claims. Nothing about a precision is believed.

In: a loaded model. Out: a Census (modules by class and format, bytes, devices, attention), and the differences from a
row as sentences. A layer that a library left unconverted, a fallback to another format, a module on the wrong device:
each is a difference, and prove() makes it an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from errors import EffectivePrecisionError
from model_loader.engine import arithmetic

if TYPE_CHECKING:
    from model_loader.device import DeviceInfo
    from model_loader.precision import Precision

HEADS = ("proj_out", "lm_head")
"""The output head, Whisper's and a language model's: a linear layer that every row keeps with the token embedding it
is tied to."""


@dataclass(frozen=True, slots=True)
class CensusLine:
    """Modules of one class and one format."""

    module_class: str
    dtype: str
    """As torch names it, or nf4/fp4 for packed 4-bit weights."""
    n_modules: int
    n_weights: int
    """Numbers of the weight matrices as the model has them, however many bits each takes."""
    n_bytes: int
    """Weights, biases and scales; a tensor shared by two modules counts once, with the first."""
    is_linear: bool
    """A linear layer of the encoder or decoder: what a precision converts."""


@dataclass(frozen=True, slots=True)
class Census:
    """Everything a model holds."""

    lines: tuple[CensusLine, ...]
    devices: tuple[str, ...]
    attention: str
    """Implementation: transformers' as it is configured (sdpa, eager, flash_attention_2, ...; behind sdpa torch chooses
    a kernel for each call), or the fast engine's own."""
    compute_dtype: str
    """Of what linear layers really returned, inside the engine's own arithmetic; several are joined by 'and'."""
    left_wide: str = ""
    """What a calibration kept out of the row's format: '75 of 76 layers left in float16 by the calibration'."""

    @property
    def n_bytes(self) -> int:
        return sum(line.n_bytes for line in self.lines)

    @property
    def n_weights(self) -> int:
        return sum(line.n_weights for line in self.lines)

    @property
    def summary(self) -> str:
        """The linear layers in words: '80 Linear8bitLt int8, computing in float16'."""
        linears = ", ".join(f"{x.n_modules} {x.module_class} {x.dtype}" for x in self.lines if x.is_linear)
        return "; ".join(filter(None, [f"{linears}, computing in {self.compute_dtype}", self.left_wide]))


def take_census(model: Any, row: Precision) -> Census:
    """model: WhisperForConditionalGeneration or a causal language model, in evaluation mode, on its device."""
    groups: dict[tuple[str, str, bool], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    devices: set[str] = set()
    seen: set[int] = set()
    kept, left_wide = _kept_linears(model, row)
    for name, module in model.named_modules():
        own = list(module_tensors(module))
        if not own:
            continue
        weight = getattr(module, "weight", own[0])
        n_bytes = n_weights = 0
        for tensor in own:
            devices.add(str(tensor.device))
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                n_bytes += tensor.numel() * tensor.element_size()
                n_weights += _n_weights(module, tensor) if tensor is weight else 0
        is_linear = _is_linear(name, module) and name not in kept
        key = (type(module).__name__, stored_format(module, weight), is_linear)
        before = groups[key]
        groups[key] = (before[0] + 1, before[1] + n_weights, before[2] + n_bytes)
    lines = [CensusLine(kind, dtype, *counts, linear) for (kind, dtype, linear), counts in groups.items()]
    return Census(
        lines=tuple(sorted(lines, key=lambda line: -line.n_bytes)),
        devices=tuple(sorted(devices)),
        attention=str(model.config._attn_implementation),
        compute_dtype=_probe(model, row),
        left_wide=left_wide,
    )


def differences(census: Census, row: Precision, device: DeviceInfo) -> list[str]:
    """What the census found that the row does not claim, as clauses; empty where it is what was requested."""
    found: list[str] = []
    kept_dtype = row.kept_dtype_on(device.kind)
    claim = " or ".join(sorted(f"{kind} {dtype}" for kind, dtype in row.linears))
    linears = [line for line in census.lines if line.is_linear]
    if not linears:
        found.append("there is no linear layer in it")
    found += [
        f"{line.n_modules} linear layers are {line.module_class} {line.dtype}, not {claim}"
        for line in linears
        if (line.module_class, line.dtype) not in row.linears
    ]
    if linears and not found:
        missing = row.linears - {(line.module_class, line.dtype) for line in linears}
        found += [f"no linear layer is {kind} {dtype}" for kind, dtype in sorted(missing)]
    found += [
        f"{line.n_modules} {line.module_class} are {line.dtype}, not {kept_dtype}"
        for line in census.lines
        if not line.is_linear and line.dtype != kept_dtype
    ]
    if census.compute_dtype != row.compute_dtype_on(device.kind):
        found.append(f"layers compute in {census.compute_dtype}, not {row.compute_dtype_on(device.kind)}")
    if census.devices != (str(device.torch_device),):
        found.append(f"tensors are on {', '.join(census.devices)}, not on {device.torch_device} alone")
    return found


def prove(census: Census, row: Precision, device: DeviceInfo) -> str:
    """The name of the precision in memory. Raises EffectivePrecisionError naming each difference."""
    found = differences(census, row, device)
    if found:
        raise EffectivePrecisionError(
            f"{row.name} was requested, but {'; '.join(found)}. Nothing was transcribed; choose another precision "
            "(./start.sh precisions), or check the installation of the package that makes this one."
        )
    return row.name


def _probe(model: Any, row: Precision) -> str:
    """Send one position through a linear layer of each class on each side, as the engine would; what comes out."""
    layers: dict[tuple[bool, str], Any] = {}
    for name, module in model.named_modules():
        if _is_linear(name, module):
            layers.setdefault(("encoder" in name.split("."), type(module).__name__), module)
    dtype = model.get_input_embeddings().weight.dtype
    found = set()
    with torch.no_grad(), arithmetic(row, model.device.type):
        for layer in layers.values():
            states = torch.zeros(1, 1, layer.in_features, device=model.device, dtype=dtype)
            found.add(_dtype_name(layer(states).dtype))
    return " and ".join(sorted(found)) or "nothing"


def _is_linear(name: str, module: torch.nn.Module) -> bool:
    """nn.Linear and whatever replaces one (bitsandbytes' classes derive from it; others have its two sizes)."""
    looks_linear = isinstance(module, torch.nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )
    return looks_linear and name not in HEADS


def _kept_linears(model: Any, row: Precision) -> tuple[set[str], str]:
    """(the linear layers that may be in the kept format, how many of them a calibration chose, in words).

    The row names them. A conversion has no say in it, but for the one that reads a calibration's own list.
    """
    linears = [name for name, module in model.named_modules() if _is_linear(name, module)]
    by_row = {name for name in linears if any(fnmatchcase(name, pattern) for pattern in row.kept_linears)}
    if not row.needs_calibration:
        return by_row, ""
    measured = set(linears) & set(getattr(model, "kept_linears", ()))
    kept_dtype = row.kept_dtype_on(model.device.type)
    left = f"{len(measured)} of {len(linears)} layers left in {kept_dtype} by the calibration" if measured else ""
    return by_row | measured, left


def module_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A module's own parameters and buffers, and the scales that bitsandbytes keeps beside them."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor is not None:
            yield from _tensors(tensor)


def stored_format(module: torch.nn.Module, weight: torch.Tensor) -> str:
    """Of a module's weight: as torch names it, or nf4, fp4, int4."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return str(state.quant_type)
    stored = getattr(module, "stored_dtype", None)  # our packed layers, read off their tensor's size
    return str(stored) if stored is not None else _dtype_name(weight.dtype)


def _n_weights(module: Any, weight: torch.Tensor) -> int:
    """Of a packed layer, its two sizes: its tensor has fewer elements."""
    packed = hasattr(weight, "quant_state") or hasattr(module, "stored_dtype")
    return int(module.in_features * module.out_features) if packed else int(weight.numel())


def _tensors(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter and the scales that bitsandbytes keeps beside it."""
    yield parameter
    scales = getattr(parameter, "SCB", None)  # Int8Params: one per output channel
    if scales is not None:
        yield scales
    state = getattr(parameter, "quant_state", None)  # Params4bit
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)  # the quantised scales' own; a CPU's kernels keep none


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
