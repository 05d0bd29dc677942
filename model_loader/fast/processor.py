"""8- and 4-bit weights on a processor: torch's own products of bfloat16 with them, where those are fast.

In: projections as packing.py packs them. Out: the same in the layout of these products, in as many bytes, and
multiply(). Unpacking to float32 at every step costs more than reading float32 would; these products unpack in
registers. On two cores with AVX512, one row by 1280 x 1280: 115 us in float32, 256 unpacked, 51 in 8 and 107 in 4 bits
(one core). Inputs and sums are rounded to bfloat16: 0.25 % of an output's length, where the rounding of 8-bit weights
makes 0.6. Sums are float32 inside.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import torch
from torch.nn.functional import linear

from model_loader.fast.packing import GROUP, Format, Packed, pack

_FORMATS = (Format.INT8, Format.INT4)


def lay_out(projections: Iterable[Packed]) -> None:
    """Turn 8- and 4-bit weights into the products' layout, each in its place, where this processor gains by it."""
    for packed in projections:
        if packed.format in _FORMATS and is_faster(packed.format):
            _lay_out(packed)


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[R, n_in] -> float32 [R, n_out], bias added. packed: laid out."""
    x = x.bfloat16()
    if packed.format is Format.INT8:  # the scale is applied behind it, in float32: the product would want it rounded
        product = torch._weight_int8pack_mm(x, packed.weight, _ones(packed.n_out))
        return torch.addcmul(packed.bias, product.float(), packed.scale)
    return torch._weight_int4pack_mm_for_cpu(x, packed.weight, GROUP, packed.scale).float() + packed.bias


@cache
def _ones(n: int) -> torch.Tensor:
    """Scales that change nothing; of the few widths that a model has."""
    return torch.ones(n, dtype=torch.bfloat16)


@cache
def is_faster(form: Format) -> bool:
    """Than unpacking, on this processor: tried once, in a few milliseconds. Without vector instructions it is not."""
    packed = pack(torch.ones(512, 512), None, form, torch.float32)
    laid, x = replace(packed, weight=packed.weight.clone()), torch.ones(1, 512)

    def fastest_s(work: Callable[[], object]) -> float:
        return min(timeit.repeat(work, number=3, repeat=5))

    try:
        _lay_out(laid)
        return fastest_s(lambda: multiply(x, laid)) < fastest_s(lambda: linear(x, packed.dense()))
    except (AttributeError, RuntimeError, NotImplementedError):  # the products are torch's own business
        return False


def _lay_out(packed: Packed) -> None:
    """int8: value + 128 becomes the value. int4: value + 8, in torch's order; scale bfloat16 [n_in / 128, n_out, 2],
    beside each the zero point behind the middle, which is none."""
    if packed.format is Format.INT8:
        packed.weight = packed.weight.bitwise_xor_(128).view(torch.int8)
    else:
        packed.weight = torch._convert_weight_to_int4pack_for_cpu(packed.levels_4bit().int(), 1)
        scale = packed.scale.t().to(torch.bfloat16)
        packed.scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    packed.is_laid_out = True
