# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""A product of many rows with everything that follows it: scales, bias, GELU, rounding to float8.

A library product leaves GELU to a second pass, which reads and writes 492 MB each for one layer of 32 windows of
large-v3: 0.23 ms beside a product of 1.0 ms (H200, by bytes). Here it is done on the sums before they are stored.
Tiles are fetched by the memory engine (TMA, compute capability 9.0) through tensor descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model_loader.fast.kernels.activation import gelu, to_float8


@triton.jit
def product(
    x_desc, w_desc, bias_ptr, out_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr, FLOAT8: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = f(x[m] . w[n] * scales + bias[n]); x [M, K], w [N, K] in 16-bit floats or float8, sums in float32.

    f: GELU if GELU, then rounding to float8 by out_scale if FLOAT8. SCALED: float32 scalars x_scale and w_scale apply.
    PROGRAMS: how many run; each takes every PROGRAMS-th tile, so that with as many as the GPU holds, the next tile is
    being fetched while this one is finished (FLATTEN: both loops as one). N and K are multiples of BN and BK.
    """
    n_m, n_n = tl.cdiv(M, BM), N // BN
    n_tiles = n_m * n_n
    scale = 1.0
    if SCALED:
        scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
    inverse = 1.0
    if FLOAT8:
        inverse = 1.0 / tl.load(out_scale_ptr)
    for tile in tl.range(tl.program_id(0), n_tiles, PROGRAMS, flatten=FLATTEN):
        # Neighbouring programs share rows of x and w, so that both stay in L2.
        first = tile // (GROUP * n_n) * GROUP
        group = tl.minimum(n_m - first, GROUP)
        m0 = (first + tile % (GROUP * n_n) % group) * BM
        n0 = tile % (GROUP * n_n) // group * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            x = x_desc.load([m0, k0])
            w = w_desc.load([n0, k0])
            acc = tl.dot(x, w.T, acc)
        offs_m = m0 + tl.arange(0, BM)
        offs_n = n0 + tl.arange(0, BN)
        y = acc * scale + tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
        if GELU:
            y = gelu(y, EXACT)
        at = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_m < M)[:, None]
        if FLOAT8:
            tl.store(at, to_float8(y, inverse), mask=mask)
        else:
            tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)
