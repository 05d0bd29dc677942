"""Triton kernels of Int8Linear: round the input to int8, multiply, and apply scales and bias, in two launches.

The second kernel adds up in int32 on the matrix units and writes the 16-bit result at once: a library product writes
int32 to memory, and a second pass reads it back for the scales, which costs more than the product saves (by bytes and
arithmetic, fc1 of large-v3 at 32 windows: 0.40 ms of product, 0.57 ms of that pass; the whole layer in bf16 0.80 ms).
Where the operation in front has rounded the input already (fast/kernels/), the first is left out.
Needs a GPU; imported on first use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _round_static_kernel(x_ptr, out_ptr, scale_ptr, zero_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = clamp(round(x / scale) + zero) as int8, over n values."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, to_int8(x, tl.load(scale_ptr), tl.load(zero_ptr)), mask=mask)


@triton.jit
def to_int8(x, scale, zero):  # type: ignore[no-untyped-def]
    """round(x / scale) + zero, kept inside int8. float32 in; scale, zero: float32 scalars."""
    levels = _nearest(x / scale) + zero
    return tl.minimum(tl.maximum(levels, -128.0), 127.0).to(tl.int8)


@triton.jit
def _nearest(x):  # type: ignore[no-untyped-def]
    """Round half to even, as torch.round: adding 1.5 * 2**23 leaves no room for a fraction in float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _round_rows_kernel(x_ptr, out_ptr, scale_ptr, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: scale = max |x| / 127, out = round(x / scale)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < K
    x = tl.load(x_ptr + row * K + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-8 * 127) / 127.0
    tl.store(out_ptr + row * K + offsets, _nearest(x / scale).to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    w_ptr,
    row_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """out[m, n] = (a[m] . w[n]) * row_scale * weight_scale[n] + bias[n]; a int8 [M, K], w int8 [N, K]."""
    # Neighbouring programs share rows of a and w, so that both stay in L2.
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first_m = pid // (GROUP * n_n) * GROUP
    group = tl.minimum(n_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * n_n) % group
    pid_n = pid % (GROUP * n_n) // group
    offs_m = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    offs_n = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    offs_k = tl.arange(0, BK)
    a_at = a_ptr + tl.minimum(offs_m, M - 1)[:, None] * K + offs_k[None, :]
    w_at = w_ptr + tl.minimum(offs_n, N - 1)[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(0, K, BK):
        inside = offs_k < K - k
        a = tl.load(a_at + k, mask=inside[None, :], other=0)
        w = tl.load(w_at + k, mask=inside[:, None], other=0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
    if PER_ROW:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    else:
        row_scale = tl.load(row_scale_ptr)
    scale = tl.load(weight_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    y = acc.to(tl.float32) * row_scale * scale + bias
    at = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def round_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x [M, K], one scale and zero point (float32 scalars on the device) -> int8 [M, K]."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    block = 4096
    _round_static_kernel[(triton.cdiv(x.numel(), block),)](x, out, scale, zero, x.numel(), BLOCK=block, num_warps=8)
    return out


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> int8 [M, K] and a float32 scale for each row, [M]."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _round_rows_kernel[(rows,)](x, out, scale, width, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return out, scale


def multiply(
    a: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """a int8 [M, K], weight int8 [N, K], row_scale scalar or [M], weight_scale and bias float32 [N] -> dtype [M, N]."""
    rows, width = a.shape
    n = weight.shape[0]
    out = torch.empty((rows, n), dtype=dtype, device=a.device)
    bm, bn, bk, warps, stages = _tile(rows)
    grid = (triton.cdiv(rows, bm) * triton.cdiv(n, bn),)
    _multiply_kernel[grid](
        *(a, weight, row_scale, weight_scale, bias, out, rows, n, width),
        *(bm, bn, bk, 8, row_scale.ndim > 0),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _tile(rows: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a program's tile, warps and pipeline stages, by the number of rows.

    The last line: best of seven on an H200 (fc1 and fc2 of large-v3 at 32 windows: 635 and 518 us, fp16 995 and 973).
    """
    if rows <= 16:
        return 16, 32, 256, 4, 4
    if rows <= 64:
        return 64, 32, 256, 4, 3
    if rows <= 1024:
        return 64, 128, 128, 4, 4
    return 128, 128, 128, 4, 3
