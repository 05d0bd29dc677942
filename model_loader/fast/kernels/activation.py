# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""What stands between two of the encoder's products, in one pass: GELU, positions, rounding to 8 bits.

ROUND: 0 to the output's own format, 1 to float8, 2 to int8 (round(x / scale) + zero). VIA: the compute format, through
which values reach int8, as two operations would do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model_loader.int8_kernels import to_int8

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Triton's names of the compute formats, for VIA."""


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x * Phi(x), as in Whisper; float32 in and out.

    EXACT: by the library's erf, for float32. Otherwise Phi is off by at most 7.5e-8 (Abramowitz and Stegun 7.1.26),
    hundreds of times less than the steps of 16-bit floats around 1, and takes no branches: a layer of 32 windows of
    large-v3 has 246 million values, so that a pass may be bound by arithmetic instead of memory.
    """
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * poly * tl.exp(-z * z)
        return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def to_float8(x, inverse_scale):
    """float32 -> float8 (e4m3), rounded to nearest and kept inside its range."""
    return tl.minimum(tl.maximum(x * inverse_scale, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def store_rounded(out_ptr, at, x, scale_ptr, zero_ptr, mask, ROUND: tl.constexpr, VIA: tl.constexpr):
    """x, float32, to out_ptr + at as ROUND says. scale_ptr, zero_ptr: to float32 scalars, read where it rounds."""
    if ROUND == 1:
        tl.store(out_ptr + at, to_float8(x, 1.0 / tl.load(scale_ptr)), mask=mask)
    elif ROUND == 2:
        rounded = to_int8(x.to(VIA).to(tl.float32), tl.load(scale_ptr), tl.load(zero_ptr))
        tl.store(out_ptr + at, rounded, mask=mask)
    else:
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate(
    x_ptr, add_ptr, out_ptr, scale_ptr, zero_ptr, n, period,
    BLOCK: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr, VIA: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out[i] = gelu(x[i]) + add[i % period], over n values; each part if its flag is set. out may be x.

    GELU is rounded to x's format before anything is added, as two operations would do.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        y = gelu(y, EXACT)
    if ADD:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(add_ptr + at % period, mask=mask, other=0.0).to(tl.float32)
    store_rounded(out_ptr, at, y, scale_ptr, zero_ptr, mask, ROUND, VIA)
