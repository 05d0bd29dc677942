# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Residual and LayerNorm of the encoder in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x_ptr, y_ptr, gamma_ptr, beta_ptr, out_ptr, D, EPS, LIMIT,
    BD: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """x[r] += y[r], out[r] = LayerNorm(x[r]); a program a row. x, y, out: [rows, D] in the compute format.

    CLAMP: x is kept inside +-LIMIT, as transformers does after each layer in fp16.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BD)
    mask = offs < D
    x = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0)
    y = tl.load(y_ptr + row * D + offs, mask=mask, other=0.0)
    total = x.to(tl.float32) + y.to(tl.float32)
    if CLAMP:
        total = tl.minimum(tl.maximum(total, -LIMIT), LIMIT)
    rounded = total.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row * D + offs, rounded, mask=mask)
    total = rounded.to(tl.float32)  # LayerNorm sees what is kept
    mean = tl.sum(total, 0) / D
    centred = tl.where(mask, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + offs, (centred * rstd * gamma + beta).to(out_ptr.dtype.element_ty), mask=mask)
