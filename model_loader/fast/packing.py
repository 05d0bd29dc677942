"""Linear layers packed for the decoder step: floats, 8 bits an output, or 4 bits a group of 128 inputs.

In: a weight [n_out, n_in] and its bias. Out: a Packed, and PackedLinear, the same as a module of a Whisper model.
Formats (rounding to nearest, symmetric; no activation is ever quantised here):
    float   the weight itself, [n_out, n_in]
    int8    uint8 value + 128, [n_out, n_in]; float32 scale for each output
    int4    two values a byte, [n_out, n_in / 2]; float16 scale for each output and group of 128 inputs. In a group's
            64 bytes, byte j holds input j in its low and input j + 64 in its high half, each as value + 8.
    modules none of these: modules of the model compute it (modules.py)
The offsets let a kernel make floats by putting bits into a mantissa; signed integers would need a slow conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from model_loader.fast.modules import Joined

GROUP = 128
"""Inputs that share a 4-bit scale."""

_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a group's largest magnitude tried as its 4-bit range; the one with the least squared error is taken."""


class Format(IntEnum):
    """How a weight is stored; the kernels know the numbers."""

    FLOAT = 0
    INT8 = 1
    INT4 = 2
    MODULES = 3


@dataclass(slots=True)
class Packed:
    """One projection, ready for the step."""

    weight: torch.Tensor
    """[n_out, n_in] floats or uint8, [n_out, n_in / 2] uint8 at 4 bits."""
    scale: torch.Tensor
    """float32 [n_out], float16 [n_out, n_in / 128], or float32 [1] beside floats."""
    bias: torch.Tensor
    """float32 [n_out]."""
    format: Format
    n_in: int
    n_out: int
    colsum: torch.Tensor | None = None
    """float32 [n_out], sums over the inputs of the weights as stored; where a LayerNorm is folded in."""
    gamma: torch.Tensor | None = None
    """float32 [n_in], at most 1, multiplied with the input; scale [1] undoes its division. Only the output head."""
    joined: Joined | None = None
    """What computes it; only beside MODULES. weight, scale and bias are then empty."""
    affine: tuple[torch.Tensor, torch.Tensor] | None = None
    """Gain and offset of the LayerNorm in front, float32 [n_in]; beside MODULES, into which nothing can be folded."""
    is_laid_out: bool = False
    """weight and scale are as torch's products on a processor take them (processor.py)."""

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights that are computed with: [n_out, n_in]. Not for what computes in ways of its own: MODULES, and
        what is laid out for a processor."""
        assert self.format is not Format.MODULES and not self.is_laid_out
        if self.format is Format.FLOAT:
            return self.weight.to(dtype)
        if self.format is Format.INT8:
            return self.weight.to(dtype).sub_(128).mul_(self.scale.to(dtype)[:, None])
        values = self.levels_4bit().to(dtype).sub_(8).view(self.n_out, -1, GROUP)
        return values.mul_(self.scale.to(dtype)[..., None]).view(self.n_out, self.n_in)

    def levels_4bit(self) -> torch.Tensor:
        """uint8 [n_out, n_in]: value + 8 of each 4-bit weight, in its place."""
        groups = self.weight.view(self.n_out, -1, GROUP // 2)
        return torch.cat([groups & 15, groups >> 4], dim=-1).view(self.n_out, self.n_in)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        if self.joined is not None:
            return (*self.joined.tensors(), *(self.affine or ()))
        return tuple(t for t in (self.weight, self.scale, self.bias, self.colsum, self.gamma) if t is not None)


class PackedLinear(torch.nn.Module):
    """A linear layer of packed weights in a Whisper model: what the reference engine runs and what the proof counts."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.n_in, packed.n_out
        self._format = packed.format
        self.register_buffer("weight", packed.weight)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", packed.bias)

    @property
    def stored_dtype(self) -> str:
        """Read off the tensor: bytes in memory over weights."""
        bits = 8 * self.weight.numel() * self.weight.element_size() // (self.in_features * self.out_features)
        return f"int{bits}" if self.weight.dtype == torch.uint8 else str(self.weight.dtype).removeprefix("torch.")

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.scale, self.bias, self._format, self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_in] -> [..., n_out] in x's format, by unpacking the weights at every call."""
        return linear(x, self.packed.dense(x.dtype), self.bias.to(x.dtype))


def pack(weight: torch.Tensor, bias: torch.Tensor | None, form: Format, dtype: torch.dtype) -> Packed:
    """weight: [n_out, n_in], any floats. dtype: of the weights where form is FLOAT.

    A width that is no multiple of 128 cannot hold 4-bit groups and takes 8 bits.
    """
    n_out, n_in = weight.shape
    weight = weight.detach().float()
    bias = torch.zeros(n_out, device=weight.device) if bias is None else bias.detach().float()
    if form is Format.INT4 and n_in % GROUP:
        form = Format.INT8
    if form is Format.INT8:
        stored, scale = _quantise_8bit(weight)
    elif form is Format.INT4:
        stored, scale = _quantise_4bit(weight)
    else:
        stored, scale = weight.to(dtype), torch.ones(1, device=weight.device)
    return Packed(stored.contiguous(), scale.contiguous(), bias.contiguous(), form, n_in, n_out)


def fold_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, float32, of a projection that takes the normalised input without the norm's gain and offset."""
    weight, gamma, beta = (t.detach().float() for t in (weight, norm.weight, norm.bias))
    offset = weight @ beta
    return weight * gamma, offset if bias is None else offset + bias.detach().float()


def join(parts: list[Packed]) -> Packed:
    """Projections of the same input and format as one, outputs behind each other."""
    first = parts[0]
    scale = first.scale if first.format is Format.FLOAT else torch.cat([p.scale for p in parts])
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    return Packed(weight, scale, bias, first.format, first.n_in, sum(p.n_out for p in parts))


def scaled(packed: Packed, factor: float) -> Packed:
    """The same projection with its outputs times a power of two, which is exact."""
    weight, scale = packed.weight, packed.scale
    if packed.format is Format.FLOAT:
        weight = weight * factor
    else:
        scale = scale * factor
    return Packed(weight, scale, packed.bias * factor, packed.format, packed.n_in, packed.n_out)


def pack_modules(joined: Joined, norm: torch.nn.LayerNorm | None = None) -> Packed:
    """A projection that modules compute behind this LayerNorm."""
    affine = None if norm is None else (norm.weight.detach().float(), norm.bias.detach().float())
    empty = joined.nothing
    return Packed(empty, empty, empty, Format.MODULES, joined.n_in, joined.n_out, joined=joined, affine=affine)


def _quantise_8bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).add(128).to(torch.uint8), scale


def _quantise_4bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales are rounded to float16 before the values are, so that the values fit the scale that is kept."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    top = groups.abs().amax(dim=2).clamp(min=1e-6)
    best_error = torch.full_like(top, torch.inf)
    best = top
    for part in _CANDIDATES:
        scale = (top * part / 7.5).half().float()
        error = (_nearest_4bit(groups, scale) * scale[..., None] - groups).square().sum(dim=2)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    values = (_nearest_4bit(groups, best) + 8).to(torch.uint8)
    stored = values[..., : GROUP // 2] | (values[..., GROUP // 2 :] << 4)
    return stored.view(weight.shape[0], -1), best.half()


def _nearest_4bit(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / scale[..., None]).round().clamp(-8, 7)
