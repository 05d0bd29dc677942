# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""One decoder projection for R rows (windows decoded together), its weights streamed once from memory.

linear_row serves up to four rows with one warp a program; linear_tile serves up to 32 on the matrix units. Both take
weights as floats, as uint8 (value + 128, a scale for each output) or as two 4-bit values a byte (a scale for each 128
columns), and both end with the same epilogue: LayerNorm, bias, GELU, residual, or keys and values into the cache.

LayerNorm is folded into the projection behind it. With W' = W * gamma, b' = b + W beta, c_n = sum_k W'_nk:
    LN(x) W^T + b = (x W'^T - mean(x) c) / std(x) + b'
so one pass over x serves the product and the statistics.

Programmatic dependent launch (compute capability 9.0, PDL): a program of linear_row asks for its whole weight tile
before it waits for the kernel in front, so that memory keeps moving across kernel borders. H200, large-v3 shape, one
row: 1.32 ms a token without, 0.97 with; in linear_tile it costs more than it gives (3.8 -> 4.0 to 5.9 ms).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOAT = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)


@triton.jit
def gelu(x):
    """Exact, as in Whisper: x * Phi(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def bytes_to_float(w):
    """uint8 -> float32 less 128, each byte put into the mantissa of 2**23: conversions run at a quarter of the rate."""
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, 0x4B000000, 0x7540;
        prmt.b32 $1, $4, 0x4B000000, 0x7541;
        prmt.b32 $2, $4, 0x4B000000, 0x7542;
        prmt.b32 $3, $4, 0x4B000000, 0x7543;
        add.f32 $0, $0, 0fCB000080;
        add.f32 $1, $1, 0fCB000080;
        add.f32 $2, $2, 0fCB000080;
        add.f32 $3, $3, 0fCB000080;
        """,
        "=r,=r,=r,=r,r",
        [w],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def bytes_to_half(w):
    """uint8 -> float16 less 128, through the mantissa of 1024."""
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 offset;
        prmt.b32 $0, $2, 0x64646464, 0x4140;
        prmt.b32 $1, $2, 0x64646464, 0x4342;
        mov.b32 offset, 0x64806480;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset; }
        """,
        "=r,=r,r",
        [w],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def nibbles_to_float(w):
    """uint8 -> (1 + low / 128, 1 + high / 128) in float32: a 4-bit value in the mantissa of 1 needs no subtraction."""
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 low, high;
        lop3.b32 low, $8, 0x0F0F0F0F, 0x80808080, 0xEA;
        shr.u32 high, $8, 4;
        lop3.b32 high, high, 0x0F0F0F0F, 0x80808080, 0xEA;
        prmt.b32 $0, low, 0x3F000000, 0x7044;
        prmt.b32 $1, low, 0x3F000000, 0x7144;
        prmt.b32 $2, low, 0x3F000000, 0x7244;
        prmt.b32 $3, low, 0x3F000000, 0x7344;
        prmt.b32 $4, high, 0x3F000000, 0x7044;
        prmt.b32 $5, high, 0x3F000000, 0x7144;
        prmt.b32 $6, high, 0x3F000000, 0x7244;
        prmt.b32 $7, high, 0x3F000000, 0x7344; }
        """,
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        [w],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def nibbles_to_half(w):
    """uint8 -> (low - 8, high - 8) in float16."""
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 low, high, offset;
        and.b32 low, $4, 0x0F0F0F0F;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0F0F0F0F;
        mov.b32 offset, 0x64086408;
        prmt.b32 $0, low, 0x64646464, 0x4140;
        prmt.b32 $1, low, 0x64646464, 0x4342;
        prmt.b32 $2, high, 0x64646464, 0x4140;
        prmt.b32 $3, high, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        sub.f16x2 $2, $2, offset;
        sub.f16x2 $3, $3, offset; }
        """,
        "=r,=r,=r,=r,r",
        [w],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _load_weights(w_ptr, offs_n, mask_n, k0: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """Columns k0 .. k0 + WIDTH: [BN, WIDTH]; 4-bit values [BN, WIDTH / 32, 16 bytes], what a thread holds innermost."""
    if FORMAT == INT4:
        offs = k0 // 2 + tl.arange(0, WIDTH // 32)[:, None] * 16 + tl.arange(0, 16)[None, :]
        return tl.load(w_ptr + offs_n[:, None, None] * (K // 2) + offs[None], mask=mask_n[:, None, None], other=0)
    else:
        offs = k0 + tl.arange(0, WIDTH)
        return tl.load(w_ptr + offs_n[:, None] * K + offs[None, :], mask=mask_n[:, None], other=0)


@triton.jit
def _load_scales(
    scale_ptr, offs_n, mask_n, k0: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr
):
    """4-bit weights: the scale of every 16 bytes, [BN, WIDTH / 32]; a group of 128 columns is 64 bytes."""
    if FORMAT == INT4:
        group = k0 // 128 + tl.arange(0, WIDTH // 32) // 4
        return tl.load(scale_ptr + offs_n[:, None] * (K // 128) + group[None, :], mask=mask_n[:, None], other=0.0)
    else:
        return offs_n


@triton.jit
def _products(w, scales, x_ptr, gamma_ptr, k0: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr,
              NORM: tl.constexpr, GAMMA: tl.constexpr):  # fmt: skip
    """Sums over columns k0 .. k0 + WIDTH of (w * x [BN], x, x * x)."""
    s1 = 0.0
    s2 = 0.0
    if FORMAT == INT4:
        byte = k0 // 2 + tl.arange(0, WIDTH // 32)[:, None] * 16 + tl.arange(0, 16)[None, :]
        column = byte + byte // 64 * 64  # byte j of a group holds columns j and j + 64
        x_low = tl.load(x_ptr + column).to(tl.float32)
        x_high = tl.load(x_ptr + column + 64).to(tl.float32)
        low, high = nibbles_to_float(w)
        part = tl.sum(low * x_low[None] + high * x_high[None], 2)  # [BN, WIDTH / 32]
        # (1 + q / 128) x, summed, holds q x / 128 and the sum of x: the stored value is q, the weight (q - 8) * scale.
        both = tl.sum(x_low + x_high, 1)[None, :]
        acc = tl.sum((128.0 * part - 136.0 * both) * scales.to(tl.float32), 1)
        if NORM:
            s1 = tl.sum(tl.sum(x_low + x_high, 1), 0)
            s2 = tl.sum(tl.sum(x_low * x_low + x_high * x_high, 1), 0)
    else:
        offs = k0 + tl.arange(0, WIDTH)
        x = tl.load(x_ptr + offs).to(tl.float32)
        scaled = x
        if GAMMA:
            scaled = x * tl.load(gamma_ptr + offs).to(tl.float32)
        if FORMAT == INT8:
            acc = tl.sum(bytes_to_float(w) * scaled[None, :], 1)
        else:
            acc = tl.sum(w.to(tl.float32) * scaled[None, :], 1)
        if NORM:
            s1 = tl.sum(x, 0)
            s2 = tl.sum(x * x, 0)
    return acc, s1, s2


@triton.jit
def linear_row(
    x_ptr, w_ptr, scale_ptr, bias_ptr, colsum_ptr, gamma_ptr, out_ptr, k_cache_ptr, v_cache_ptr, pos_ptr,
    N, D, T, EPS,
    K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BN: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr,
    GAMMA: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r, n] = epilogue(x[r] . w[n]), x and out float32; a program for every (tile of BN outputs, row).

    K = K1 + K2, both powers of two; K2 may be 0. The whole tile is asked for before the wait: nothing else is in flight
    at that moment. A loop over columns was slower (1.24 ms a token against 0.97), for its loads came one by one.
    """
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1)
    mask_n = offs_n < N
    if PDL:
        gdc_launch_dependents()
    w1 = _load_weights(w_ptr, offs_n, mask_n, 0, K, K1, FORMAT)
    scales1 = _load_scales(scale_ptr, offs_n, mask_n, 0, K, K1, FORMAT)
    if K2 > 0:
        w2 = _load_weights(w_ptr, offs_n, mask_n, K1, K, K2, FORMAT)
        scales2 = _load_scales(scale_ptr, offs_n, mask_n, K1, K, K2, FORMAT)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    acc, s1, s2 = _products(w1, scales1, x_ptr + row * K, gamma_ptr, 0, K1, FORMAT, NORM, GAMMA)
    if K2 > 0:
        acc2, t1, t2 = _products(w2, scales2, x_ptr + row * K, gamma_ptr, K1, K2, FORMAT, NORM, GAMMA)
        acc += acc2
        s1 += t1
        s2 += t2
    if FORMAT == INT8:
        acc = acc * tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if GAMMA:
        acc = acc * tl.load(scale_ptr)
    if NORM:
        mean = s1 / K
        rstd = 1.0 / tl.sqrt(s2 / K - mean * mean + EPS)
        colsum = tl.load(colsum_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc = (acc - mean * colsum) * rstd
    acc += bias
    if GELU:
        acc = gelu(acc)
    if RESIDUAL:
        acc += tl.load(out_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if QKV:
        pos = tl.load(pos_ptr + row)
        part = offs_n // D
        inner = offs_n % D
        cache = ((row * (D // 64) + inner // 64) * T + pos) * 64 + inner % 64
        tl.store(out_ptr + row * D + inner, acc, mask=mask_n & (part == 0))
        tl.store(k_cache_ptr + cache, acc.to(k_cache_ptr.dtype.element_ty), mask=mask_n & (part == 1))
        tl.store(v_cache_ptr + cache, acc.to(v_cache_ptr.dtype.element_ty), mask=mask_n & (part == 2))
    else:
        tl.store(out_ptr + row * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def linear_tile(
    x_ptr, stats_in_ptr, w_ptr, scale_ptr, bias_ptr, colsum_ptr, gamma_ptr, out_ptr, copy_ptr, stats_out_ptr,
    work_ptr, count_ptr, k_cache_ptr, v_cache_ptr, pos_ptr,
    R, N, D, T, EPS,
    K: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    NT: tl.constexpr, BT: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same for up to BR rows at once on the matrix units. x: [R, K] in the compute format.

    NORM: stats_in float32 [2, BR, 128]: sums of x and x * x over the NT column tiles of the kernel that made x.
    EARLY: they are asked for before the products. RESIDUAL: out (float32) += result; a rounded copy goes to copy_ptr,
    its sums to stats_out. SPLITS > 1: columns are shared out; a tile's last program adds the parts in a fixed order.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = tile * BN + tl.arange(0, BN)
    offs_r = tl.arange(0, BR)
    mask_n = offs_n < N
    mask_r = offs_r < R
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if NORM and EARLY:
        sums, squares = _load_stats(stats_in_ptr, offs_r, BR, NT, BT)
    acc = _tile_products(x_ptr, w_ptr, scale_ptr, gamma_ptr, offs_n, offs_r, mask_n, mask_r, split,
                         K, BR, BN, BK, SPLITS, STAGES, FORMAT, GAMMA)  # fmt: skip
    last = True
    cell = offs_r[:, None] * N + offs_n[None, :]
    mask = mask_r[:, None] & mask_n[None, :]
    if SPLITS > 1:
        tl.store(work_ptr + split * BR * N + cell, acc, mask=mask)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.load(work_ptr + cell, mask=mask, other=0.0, cache_modifier=".cg")
            for i in tl.static_range(1, SPLITS):
                acc += tl.load(work_ptr + i * BR * N + cell, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
        if FORMAT == INT8:
            acc = acc * tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GAMMA:
            acc = acc * tl.load(scale_ptr)
        if NORM:
            if not EARLY:
                sums, squares = _load_stats(stats_in_ptr, offs_r, BR, NT, BT)
            acc = _norm_tile(acc, sums, squares, colsum_ptr, offs_n, mask_n, EPS, K)
        acc += bias[None, :]
        if GELU:
            acc = gelu(acc)
        if RESIDUAL:
            acc += tl.load(out_ptr + cell, mask=mask, other=0.0)
            _leave_copy(acc, copy_ptr + cell, stats_out_ptr + offs_r * 128 + tile, mask, BR)
        if QKV:
            pos = tl.load(pos_ptr + offs_r, mask=mask_r, other=0)
            _store_qkv(acc, out_ptr, k_cache_ptr, v_cache_ptr, pos, offs_n, offs_r, mask, D, T)
        else:
            tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_products(
    x_ptr, w_ptr, scale_ptr, gamma_ptr, offs_n, offs_r, mask_n, mask_r, split,
    K: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """x w^T over this program's share of the columns: float32 [BR, BN]."""
    DOT: tl.constexpr = x_ptr.dtype.element_ty
    KS: tl.constexpr = K // SPLITS
    acc = tl.zeros((BR, BN), dtype=tl.float32)
    if FORMAT == INT4:
        for g in tl.range(split * (KS // 128), (split + 1) * (KS // 128), num_stages=STAGES):
            offs = tl.arange(0, 64)
            w = tl.load(w_ptr + offs_n[:, None] * (K // 2) + g * 64 + offs[None, :], mask=mask_n[:, None], other=0)
            scale = tl.load(scale_ptr + offs_n * (K // 128) + g, mask=mask_n, other=0.0).to(tl.float32)
            at = x_ptr + offs_r[:, None] * K + g * 128 + offs[None, :]
            x_low = tl.load(at, mask=mask_r[:, None], other=0.0)
            x_high = tl.load(at + 64, mask=mask_r[:, None], other=0.0)
            low, high = nibbles_to_half(w)
            part = tl.dot(x_low, tl.trans(low.to(DOT)))
            part = tl.dot(x_high, tl.trans(high.to(DOT)), part)
            acc += part * scale[None, :]
    else:
        for k0 in tl.range(split * KS, (split + 1) * KS, BK, num_stages=STAGES):
            offs = k0 + tl.arange(0, BK)
            w = tl.load(w_ptr + offs_n[:, None] * K + offs[None, :], mask=mask_n[:, None], other=0)
            x = tl.load(x_ptr + offs_r[:, None] * K + offs[None, :], mask=mask_r[:, None], other=0.0)
            if GAMMA:
                x = (x.to(tl.float32) * tl.load(gamma_ptr + offs).to(tl.float32)[None, :]).to(DOT)
            if FORMAT == INT8:
                w = bytes_to_half(w)
            acc = tl.dot(x, tl.trans(w.to(DOT)), acc)
    return acc


@triton.jit
def _load_stats(stats_ptr, offs_r, BR: tl.constexpr, NT: tl.constexpr, BT: tl.constexpr):
    """Sums of x and of x * x over every column tile: [BR, BT] each. Summing x anew cost 1 ms of a step's 6.9."""
    offs_t = tl.arange(0, BT)
    at = stats_ptr + offs_r[:, None] * 128 + offs_t[None, :]
    mask = (offs_t < NT)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + BR * 128, mask=mask, other=0.0)


@triton.jit
def _norm_tile(acc, sums, squares, colsum_ptr, offs_n, mask_n, EPS, K: tl.constexpr):
    """Bring the folded LayerNorm into the products [BR, BN]."""
    mean = tl.sum(sums, 1) / K
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / K - mean * mean + EPS)
    colsum = tl.load(colsum_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return (acc - mean[:, None] * colsum[None, :]) * rstd[:, None]


@triton.jit
def _leave_copy(acc, copy_ptr, stats_ptr, mask, BR: tl.constexpr):
    """The residual [BR, BN], rounded for the matrix units, and the sums of what was rounded: one column of stats."""
    rounded = acc.to(copy_ptr.dtype.element_ty)
    tl.store(copy_ptr, rounded, mask=mask)
    rounded = tl.where(mask, rounded.to(tl.float32), 0.0)
    tl.store(stats_ptr, tl.sum(rounded, 1))
    tl.store(stats_ptr + BR * 128, tl.sum(rounded * rounded, 1))


@triton.jit
def _store_qkv(acc, q_ptr, k_ptr, v_ptr, pos, offs_n, offs_r, mask, D, T):
    """Queries to [R, D], keys and values to the rows' positions of the caches [R, H, T, 64]."""
    part = offs_n // D
    inner = offs_n % D
    head = offs_r[:, None] * (D // 64) + (inner // 64)[None, :]
    cache = (head * T + pos[:, None]) * 64 + (inner % 64)[None, :]
    query = offs_r[:, None] * D + inner[None, :]
    tl.store(q_ptr + query, acc.to(q_ptr.dtype.element_ty), mask=mask & (part == 0)[None, :])
    tl.store(k_ptr + cache, acc.to(k_ptr.dtype.element_ty), mask=mask & (part == 1)[None, :])
    tl.store(v_ptr + cache, acc.to(v_ptr.dtype.element_ty), mask=mask & (part == 2)[None, :])
