# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Residual and LayerNorm in one pass over memory, rounded to 8 bits where a layer that takes those comes next."""

from __future__ import annotations

import triton
import triton.language as tl

from model_loader.fast.kernels.activation import store_rounded


@triton.jit
def add_norm(
    x_ptr, y_ptr, offset_ptr, gamma_ptr, beta_ptr, out_ptr, scale_ptr, zero_ptr, D, EPS, LIMIT,
    BD: tl.constexpr, ADD: tl.constexpr, OFFSET: tl.constexpr, CLAMP: tl.constexpr, ROUND: tl.constexpr,
    VIA: tl.constexpr,
):  # fmt: skip
    """out[r] = LayerNorm(x[r]); a program a row. x: [rows, D] floats, y in the compute format; out as ROUND says.

    ADD: x[r] += y[r] first, and x is written back. OFFSET: LayerNorm sees x + offset, float32 [D] (the residual's
    biases, which the products that add to x leave out); x takes it in where it is written back, else stays as it is.
    CLAMP: what LayerNorm sees, and what x is left with, is kept inside +-LIMIT, as transformers does in fp16.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BD)
    mask = offs < D
    at = row * D + offs
    total = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    offset = tl.zeros((BD,), dtype=tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr + offs, mask=mask, other=0.0)
    total += offset
    if CLAMP:
        kept = tl.minimum(tl.maximum(total, -LIMIT), LIMIT)
        if not ADD:  # x is written where it is too large, hardly ever
            tl.store(x_ptr + at, (kept - offset).to(x_ptr.dtype.element_ty), mask=mask & (kept != total))
        total = kept
    if ADD:
        rounded = total.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, rounded, mask=mask)
        total = rounded.to(tl.float32)  # LayerNorm sees what is kept
    mean = tl.sum(total, 0) / D
    centred = tl.where(mask, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    normed = centred * rstd * gamma + beta
    store_rounded(out_ptr, at, normed, scale_ptr, zero_ptr, mask, ROUND, VIA)
