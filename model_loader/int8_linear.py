"""A linear layer that multiplies int8 by int8 and adds up in int32.

In: activations [..., in_features] in the layer's floating-point format, or rounded already (static scales).
Out: [..., out_features] in the same format.

    x ~ input_scale * (xq - input_zero)      int8, one scale for the layer (static) or one for each row (dynamic)
    W ~ weight_scale[n] * Wq[n]              int8 per output channel, symmetric
    y = input_scale * weight_scale * (xq Wq^T - input_zero * sum_k Wq) + bias

Static scales were measured on calibration windows (calibration.py), so at run time nothing waits for a maximum, and a
zero point costs nothing: its product with the weights' sums is folded into the bias. Source of the scheme: Jacob et
al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (arXiv 1712.05877).
The product runs in Triton where there is a GPU and Triton can compile, with the input rounded in front and the scales
and bias applied behind inside the same kernels; else in torch._int_mm (cuBLASLt on a GPU, oneDNN on a CPU). A CPU
without int8 instructions (VNNI) multiplies the same whole numbers in float32, as exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from model_loader.device import has_triton

LEVELS = 127
"""Largest magnitude of a weight: symmetric, so that 0 stays 0."""

EXACT_INPUTS = 1024
"""Sums of so many products of int8 (each at most 128 x 127) stay below 2^24: float32 holds them exactly."""

ROWS_A_SUM = 256

OUTPUTS_A_PASS = 5120
"""Held in 32 bits at once where a library multiplies."""

MIN_INT_MM_ROWS = 32
"""torch._int_mm on a GPU refuses 16 rows and fewer."""


class Int8Linear(torch.nn.Module):
    """Weights int8 [out_features, in_features]; scales float32 [out_features]; computes int8 x int8 -> int32."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    input_scale: torch.Tensor
    input_zero: torch.Tensor
    folded_bias: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, is_static: bool, dtype: torch.dtype) -> None:
        """dtype: of the output. The buffers are empty until a checkpoint or fill() gives them values."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.is_static, self.dtype = is_static, dtype
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("input_scale", torch.ones(()) if is_static else None)
        self.register_buffer("input_zero", torch.zeros(()) if is_static else None)
        self.register_buffer("folded_bias", torch.zeros(out_features), persistent=False)

    @classmethod
    def from_weights(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        input_range: tuple[float, float] | None = None,
    ) -> Int8Linear:
        """Quantise weight [out, in]. input_range: lowest and highest input (static), None for a scale per row."""
        out_features, in_features = weight.shape
        with torch.device(weight.device):
            layer = cls(in_features, out_features, is_static=input_range is not None, dtype=dtype)
        layer.weight, layer.weight_scale = quantise_weight(weight)
        if bias is not None:
            layer.bias = bias.detach().float().clone()
        if input_range is not None:
            scale, zero = static_scale(*input_range)
            layer.input_scale.fill_(scale)
            layer.input_zero.fill_(zero)
        layer.fold()
        return layer

    @classmethod
    def joined(cls, layers: Sequence[Int8Linear]) -> Int8Linear | None:
        """Layers of one input as one, in new memory, outputs behind each other; None where they round it otherwise."""
        first = layers[0]
        roundings = {layer.rounding_values for layer in layers}
        if len(roundings) > 1 or len({layer.dtype for layer in layers}) > 1:
            return None
        n_out = sum(layer.out_features for layer in layers)
        with torch.device("meta"):
            made = cls(first.in_features, n_out, is_static=first.is_static, dtype=first.dtype)
        for name in ("weight", "weight_scale", "bias"):
            setattr(made, name, torch.cat([getattr(layer, name) for layer in layers]))
        made.input_scale, made.input_zero = first.input_scale, first.input_zero
        made.fold()
        return made

    @property
    def rounding_values(self) -> tuple[float, float] | None:
        """Scale and zero point of the input; None where each row has a scale of its own."""
        return (float(self.input_scale), float(self.input_zero)) if self.is_static else None

    def fold(self) -> None:
        """Bring the zero point into the bias; after new values came into the buffers."""
        self.folded_bias = self.bias
        if self.is_static:
            # sum() makes an int32 copy of all that it is given, whether asked to or not: four times the weight's bytes.
            starts = range(0, self.out_features, ROWS_A_SUM)
            parts = [self.weight[start : start + ROWS_A_SUM].sum(dim=1, dtype=torch.int32) for start in starts]
            sums = torch.cat(parts).float()
            self.folded_bias = self.bias - self.input_scale * self.input_zero * self.weight_scale * sums

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x in floats, or rounded already as round_input does (int8; static scales alone)."""
        rows = x.reshape(-1, self.in_features)
        y = self._on_triton(rows) if rows.is_cuda and has_triton(rows.device) else self._on_int_mm(rows)
        return y.view(*x.shape[:-1], self.out_features)

    def _on_triton(self, rows: torch.Tensor) -> torch.Tensor:
        from model_loader.int8_kernels import multiply, round_rows, round_static

        if self.is_static:
            is_rounded = rows.dtype == torch.int8
            quantised = rows if is_rounded else round_static(rows, self.input_scale, self.input_zero)
            row_scale = self.input_scale
        else:
            quantised, row_scale = round_rows(rows)
        return multiply(quantised, self.weight, row_scale, self.weight_scale, self.folded_bias, self.dtype)

    def _on_int_mm(self, rows: torch.Tensor) -> torch.Tensor:
        n_rows = rows.shape[0]
        if rows.is_cuda and n_rows < MIN_INT_MM_ROWS:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, MIN_INT_MM_ROWS - n_rows))
        quantised, row_scale = self.round_input(rows)
        out = torch.empty(n_rows, self.out_features, dtype=self.dtype, device=rows.device)
        # In pieces: keys and values of all layers as one product would take gigabytes in 32 bits.
        for start in range(0, self.out_features, OUTPUTS_A_PASS):
            piece = slice(start, start + OUTPUTS_A_PASS)
            total = integer_product(quantised, self.weight[piece])[:n_rows]
            scale = self.weight_scale[piece]
            if row_scale.ndim:
                total.mul_(row_scale[:n_rows])
            else:
                scale = scale * row_scale
            out[:, piece] = torch.addcmul(self.folded_bias[piece], total, scale)  # one pass over what is largest
        return out

    def round_input(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [n, in] -> int8 [n, in], and its scale: a scalar (static) or [n, 1] (dynamic)."""
        if rows.dtype == torch.int8:
            return rows, self.input_scale
        if self.is_static:
            return to_int8(rows, self.input_scale, self.input_zero), self.input_scale
        scale = rows.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / LEVELS
        return torch.round(rows.float() / scale).to(torch.int8), scale

    def extra_repr(self) -> str:
        scales = "static" if self.is_static else "dynamic"
        return f"in_features={self.in_features}, out_features={self.out_features}, {scales} input scale"


def to_int8(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """round(x / scale) + zero, kept inside int8. scale, zero: float32 scalars on x's device."""
    levels = x.float() / scale
    return levels.round_().add_(zero).clamp_(-LEVELS - 1, LEVELS).to(torch.int8)


def integer_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [n, in] times int8 [out, in] -> float32 [n, out]; each EXACT_INPUTS inputs without any rounding.

    Processors without instructions for int8 take 20 times as long in torch._int_mm as in float32 (LOG.md, 2026-11-25).
    """
    if rows.is_cuda or (has_int8_instructions() and rows.shape[1] > 1):  # oneDNN reads astray at a width of one
        return torch._int_mm(rows, weight.t()).float()
    parts = [slice(start, start + EXACT_INPUTS) for start in range(0, rows.shape[1], EXACT_INPUTS)]
    with torch.autocast("cpu", enabled=False):
        return torch.stack([rows[:, part].float() @ weight[:, part].float().t() for part in parts]).sum(dim=0)


@cache
def has_int8_instructions() -> bool:
    """Whether this CPU multiplies int8 faster than one by one (AVX512 VNNI, which oneDNN's int8 product needs)."""
    asked = getattr(torch.cpu, "_is_avx512_vnni_supported", None) or getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(asked()) if asked is not None else True


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [out, in] -> int8 [out, in] and its scale, float32 [out]: symmetric, a scale for each output channel."""
    values = weight.detach().float()
    scale = values.abs().amax(dim=1).clamp(min=1e-8) / LEVELS
    return torch.round(values / scale[:, None]).to(torch.int8), scale


def static_scale(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that spread [low, high] (widened to hold 0) over the 256 levels of int8."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-8) / (2 * LEVELS + 1)
    return scale, round(-LEVELS - 1 - low / scale)
