# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Attention of one query a row, over the text so far and over the 1500 audio positions; the audio cache's writer.

Heads are 64 wide, as in every Whisper. Caches: text [R, H, T, 64], audio [R, H, S, 64] in the compute format or as
uint8 (value + 128) with a float32 scale for keys and one for values of each row and head.
Few rows leave most of a GPU idle, so the audio positions are then shared out over SPLITS programs, and the last one to
finish joins their parts (flash-decoding; Dao et al. 2023).
SKIP: rows that have finished are left out, which saves their share of the memory traffic; not under programmatic
dependent launch, where it would put one more load in front of all others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

from model_loader.fast.kernels.linear import bytes_to_float


@triton.jit
def self_attention(
    q_ptr, k_ptr, v_ptr, pos_ptr, finished_ptr, out_ptr, T, D,
    BT: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query a (head, row) over its keys 0 .. pos. q is already scaled. out: [R, D]."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    offs_d = tl.arange(0, 64)
    base = (row * (D // 64) + head) * T * 64
    if SKIP:  # noqa: SIM102 - decided while compiling, the next while running
        if tl.load(finished_ptr + row) != 0:
            return
    if PDL:
        gdc_wait()
    first = tl.arange(0, BT)  # inside the cache for any row, so it is read before the row's length is known
    at = base + first[:, None] * 64 + offs_d[None, :]
    k = tl.load(k_ptr + at).to(tl.float32)
    v = tl.load(v_ptr + at).to(tl.float32)
    pos = tl.load(pos_ptr + row)
    q = tl.load(q_ptr + row * D + head * 64 + offs_d).to(tl.float32)
    score = tl.where(first <= pos, tl.sum(k * q[None, :], 1), -1.0e30)
    top = tl.max(score, 0)
    weight = tl.exp(score - top)
    total = tl.sum(weight, 0)
    acc = tl.sum(weight[:, None] * tl.where((first <= pos)[:, None], v, 0.0), 0)
    for t0 in tl.range(BT, pos + 1, BT):
        offs_t = t0 + first
        mask = offs_t <= pos
        at = base + offs_t[:, None] * 64 + offs_d[None, :]
        k = tl.load(k_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
        score = tl.where(mask, tl.sum(k * q[None, :], 1), -1.0e30)
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        keep = tl.exp(top - new_top)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(weight[:, None] * v, 0)
        top = new_top
    tl.store(out_ptr + row * D + head * 64 + offs_d, (acc / total).to(out_ptr.dtype.element_ty))


@triton.jit
def _load_positions(k_ptr, v_ptr, at, mask, QUANTISED: tl.constexpr):
    """Keys and values of some positions as stored; what lies behind the end reads as 0."""
    if QUANTISED:
        k = tl.load(k_ptr + at, mask=mask[:, None], other=128)
        v = tl.load(v_ptr + at, mask=mask[:, None], other=128)
    else:
        k = tl.load(k_ptr + at, mask=mask[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=mask[:, None], other=0.0)
    return k, v


@triton.jit
def _as_float(x, QUANTISED: tl.constexpr):
    if QUANTISED:
        return bytes_to_float(x)
    else:
        return x.to(tl.float32)


@triton.jit
def cross_attention(
    q_ptr, k_ptr, v_ptr, scale_ptr, finished_ptr, part_ptr, stat_ptr, count_ptr, out_ptr, D, S,
    BS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, BSPLIT: tl.constexpr, STAGES: tl.constexpr,
    QUANTISED: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query a (head, row) over S audio positions, shared out over SPLITS programs of TILES * BS positions.

    scale: float32 [R, H, 2], keys' and values', read only if QUANTISED.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    if SKIP:  # noqa: SIM102 - decided while compiling, the next while running
        if tl.load(finished_ptr + row) != 0:
            return
    offs_d = tl.arange(0, 64)
    cell = row * (D // 64) + head
    base = cell.to(tl.int64) * S * 64
    first = split * (BS * TILES) + tl.arange(0, BS)
    at = base + first[:, None] * 64 + offs_d[None, :]
    k, v = _load_positions(k_ptr, v_ptr, at, first < S, QUANTISED)
    k_scale = 1.0
    v_scale = 1.0
    if QUANTISED:
        k_scale = tl.load(scale_ptr + cell * 2)
        v_scale = tl.load(scale_ptr + cell * 2 + 1)
    if PDL:
        gdc_wait()
    q = tl.load(q_ptr + row * D + head * 64 + offs_d).to(tl.float32) * k_scale
    score = tl.where(first < S, tl.sum(_as_float(k, QUANTISED) * q[None, :], 1), -1.0e30)
    top = tl.max(score, 0)
    weight = tl.exp(score - top)
    total = tl.sum(weight, 0)
    acc = tl.sum(weight[:, None] * _as_float(v, QUANTISED), 0)
    for i in tl.range(1, TILES, num_stages=STAGES):
        offs_s = first + i * BS
        mask = offs_s < S
        at = base + offs_s[:, None] * 64 + offs_d[None, :]
        k, v = _load_positions(k_ptr, v_ptr, at, mask, QUANTISED)
        score = tl.where(mask, tl.sum(_as_float(k, QUANTISED) * q[None, :], 1), -1.0e30)
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        keep = tl.exp(top - new_top)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(weight[:, None] * _as_float(v, QUANTISED), 0)
        top = new_top
    _join_splits(acc * v_scale, top, total, part_ptr, stat_ptr, count_ptr, out_ptr + row * D + head * 64,
                 cell, split, offs_d, SPLITS, BSPLIT)  # fmt: skip


@triton.jit
def _join_splits(
    acc, top, total, part_ptr, stat_ptr, count_ptr, out_ptr, cell, split, offs_d,
    SPLITS: tl.constexpr, BSPLIT: tl.constexpr,
):  # fmt: skip
    """Write acc / total; or leave this part for the last program of the cell, which joins all parts in order."""
    if SPLITS == 1:
        tl.store(out_ptr + offs_d, (acc / total).to(out_ptr.dtype.element_ty))
    else:
        at = cell * SPLITS
        tl.store(part_ptr + (at + split) * 64 + offs_d, acc)
        tl.store(stat_ptr + (at + split) * 2, top)
        tl.store(stat_ptr + (at + split) * 2 + 1, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + cell, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            offs_p = tl.arange(0, BSPLIT)
            mask_p = offs_p < SPLITS
            all_at = at + offs_p
            tops = tl.load(stat_ptr + all_at * 2, mask=mask_p, other=-1.0e30, cache_modifier=".cg")
            totals = tl.load(stat_ptr + all_at * 2 + 1, mask=mask_p, other=0.0, cache_modifier=".cg")
            parts_at = part_ptr + all_at[:, None] * 64 + offs_d[None, :]
            parts = tl.load(parts_at, mask=mask_p[:, None], other=0.0, cache_modifier=".cg")
            share = tl.exp(tops - tl.max(tops, 0))
            out = tl.sum(parts * share[:, None], 0) / tl.sum(totals * share, 0)
            tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty))
            tl.store(count_ptr + cell, 0)


@triton.jit
def store_step(
    projected_ptr, q_ptr, k_ptr, v_ptr, pos_ptr, T, D, FACTOR, CACHES: tl.constexpr,
):  # fmt: skip
    """What a step's projection made of each row -> query, float32 [R, D], times FACTOR; a program a (head, row).

    projected: [R, D] in the compute format, or with CACHES [R, 3 D]: keys and values too, to the row's position in the
    text caches, of rows that have finished as well.
    """
    head = tl.program_id(0)
    row = tl.program_id(1)
    lane = head * 64 + tl.arange(0, 64)
    source = projected_ptr + row * D * (3 if CACHES else 1) + lane
    tl.store(q_ptr + row * D + lane, tl.load(source).to(tl.float32) * FACTOR)
    if CACHES:
        at = ((row * (D // 64) + head) * T + tl.load(pos_ptr + row)) * 64 + tl.arange(0, 64)
        tl.store(k_ptr + at, tl.load(source + D))
        tl.store(v_ptr + at, tl.load(source + 2 * D))


@triton.jit
def store_cross(
    kv_ptr, k_ptr, v_ptr, scale_ptr, row, H, S, layer_stride, scale_stride,
    BS: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Keys and values of one window, [S, L, 2, H, 64] as the projection makes them, into row `row` of the cache.

    Cache [L, R, H, S, 64], layers layer_stride apart; scale float32 [L, R, H, 2], layers scale_stride apart: the
    largest magnitude / 127, found in a first pass whose reads the second finds in the L2 cache.
    """
    head = tl.program_id(0)
    is_value = tl.program_id(1)
    layer = tl.program_id(2)
    offs_d = tl.arange(0, 64)
    step = tl.num_programs(2) * 2 * H * 64
    source = kv_ptr + ((layer * 2 + is_value) * H + head) * 64
    target = layer.to(tl.int64) * layer_stride + (row * H + head).to(tl.int64) * S * 64
    scale = 1.0
    if QUANTISED:
        top = tl.zeros((BS,), dtype=tl.float32)
        for s0 in tl.range(0, S, BS):
            offs_s = s0 + tl.arange(0, BS)
            at = source + offs_s[:, None] * step + offs_d[None, :]
            x = tl.load(at, mask=(offs_s < S)[:, None], other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.max(tl.abs(x), 1))
        scale = tl.maximum(tl.max(top, 0), 1e-8) * (1.0 / 127.0)
        tl.store(scale_ptr + layer * scale_stride + (row * H + head) * 2 + is_value, scale)
    for s0 in tl.range(0, S, BS):
        offs_s = s0 + tl.arange(0, BS)
        mask = (offs_s < S)[:, None]
        x = tl.load(source + offs_s[:, None] * step + offs_d[None, :], mask=mask, other=0.0)
        if QUANTISED:
            # Divided and rounded as torch does, to the last bit: among 16-bit values many lie halfway.
            x = (libdevice.rint(tl.div_rn(x.to(tl.float32), scale)) + 128.0).to(tl.uint8)
        at = target + offs_s[:, None] * 64 + offs_d[None, :]
        if is_value == 0:
            tl.store(k_ptr + at, x, mask=mask)
        else:
            tl.store(v_ptr + at, x, mask=mask)
