"""A linear layer that multiplies float8 by float8 (e4m3: 4 bits of exponent, 3 of mantissa) and adds up in float32.

In: activations [..., in_features] in the layer's 16-bit format, or already rounded. Out: [..., out_features] in that
format.

    x ~ input_scale * x8      one scale for the layer, known before anything runs
    W ~ weight_scale * W8     one scale for the layer
    y = input_scale * weight_scale * (x8 W8^T) + bias

One scale each is enough here, and what the matrix units are fastest with: e4m3 keeps its 4 significant bits over 14
powers of two (2^-6 to 448), so a channel a hundred times smaller than the largest loses nothing. For the same reason
the input's scale need not be measured: fit to an upper bound that follows from the weights (convert/fp8.py), it wastes
one to three of those powers (demo checkpoint) and no mantissa, and nothing is ever clipped.
On a GPU of compute capability 8.9 or newer the product is cuBLAS's, through torch._scaled_mm. Elsewhere the rounded
numbers are multiplied in float32, which is the same arithmetic but for the order of sums; that is how it is tested.
Source of the format: Micikevicius et al., FP8 formats for deep learning (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3; there is no infinity behind it, only NaN, so a cast must clamp."""


class Float8Linear(torch.nn.Module):
    """Weights float8 [out_features, in_features]; scales float32 scalars; bias [out_features] in the output format."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    input_scale: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor, input_scale: torch.Tensor
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = to_float8(x, self.input_scale)
        return multiply(rounded, self.weight, self.input_scale, self.weight_scale, self.bias)


def to_float8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, rounded to nearest and kept inside +-448. scale: float32 scalar on x's device."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)


def scale_for(largest: torch.Tensor) -> torch.Tensor:
    """The scale, a float32 scalar, at which this magnitude is the largest float8."""
    return (largest.detach().float() / LARGEST).clamp(min=1e-12).reshape(())


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """x float8 [..., n_in], weight float8 [n_out, n_in] -> [..., n_out] in the bias's format."""
    rows = x.reshape(-1, x.shape[-1])
    if has_float8_products(x.device):
        # use_fast_accum: sums stay in the matrix units, with fewer bits than float32, instead of being moved out every
        # few steps. benchmarks/encoder.py measures both.
        y = torch._scaled_mm(
            rows, weight.t(), input_scale, weight_scale, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
        )
    else:
        product = linear(rows.float(), weight.float()) * (input_scale * weight_scale)
        y = (product + bias.float()).to(bias.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def has_float8_products(device: torch.device) -> bool:
    """Whether this device multiplies float8 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
