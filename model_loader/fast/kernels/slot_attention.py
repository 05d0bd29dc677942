# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The attentions of attention.py with a softmax for every slot of positions, joined at the end.

A slot is what the threads that share a position's 64 values hold: one of 8 in a warp at 8 bits, of 4 at 16. Each keeps
its own maximum and sums, so no block of positions waits for another warp: 10 barriers in a program instead of 10 for
every block (counted in the machine code for compute capability 9.0; 78-80 registers, nothing spilled).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from model_loader.fast.kernels.attention import as_float, join_splits


@triton.jit
def _load_positions(k_ptr, v_ptr, base, position, seen, QUANTISED: tl.constexpr):
    """Keys and values [SLOTS, N, 64] as stored; what is not seen reads as 0."""
    offs_d = tl.arange(0, 64)
    at = base + position[:, :, None] * 64 + offs_d[None, None, :]
    if QUANTISED:
        k = tl.load(k_ptr + at, mask=seen[:, :, None], other=128)
        v = tl.load(v_ptr + at, mask=seen[:, :, None], other=128)
    else:
        k = tl.load(k_ptr + at, mask=seen[:, :, None], other=0.0)
        v = tl.load(v_ptr + at, mask=seen[:, :, None], other=0.0)
    return k, v


@triton.jit
def _fold_in(k, v, seen, q, top, total, acc, QUANTISED: tl.constexpr):
    """Positions [SLOTS, N, 64] into every slot's running softmax: top, total [SLOTS], acc [SLOTS, 64].

    A slot is what some threads of one warp hold, so nothing here waits for another warp, and only the products with q
    are added up between threads. (Triton gives the first axis to threads and the second to registers.) A position not
    seen weighs nothing as soon as the slot has seen one.
    """
    score = tl.where(seen, tl.sum(as_float(k, QUANTISED) * q[None, None, :], 2), -1.0e30)
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp(score - new_top[:, None])
    keep = tl.exp(top - new_top)
    total = total * keep + tl.sum(weight, 1)
    acc = acc * keep[:, None] + tl.sum(weight[:, :, None] * as_float(v, QUANTISED), 1)
    return new_top, total, acc


@triton.jit
def _join_slots(top, total, acc):
    """The softmax of all slots: (largest score, sum, sum of values [64])."""
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    return highest, tl.sum(total * share, 0), tl.sum(acc * share[:, None], 0)


@triton.jit
def self_attention(
    q_ptr, k_ptr, v_ptr, pos_ptr, finished_ptr, out_ptr, T, D,
    N: tl.constexpr, SLOTS: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query a (head, row) over its keys 0 .. pos, N * SLOTS at once. q is already scaled. out: [R, D]."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    base = (row * (D // 64) + head) * T * 64
    if SKIP:  # noqa: SIM102 - decided while compiling, the next while running
        if tl.load(finished_ptr + row) != 0:
            return
    if PDL:
        gdc_wait()
    offs_d = tl.arange(0, 64)
    position = tl.arange(0, SLOTS)[:, None] + tl.arange(0, N)[None, :] * SLOTS
    # The first block is inside the cache for any row, so it is read before the row's length is known.
    k, v = _load_positions(k_ptr, v_ptr, base, position, position < T, False)
    pos = tl.load(pos_ptr + row)
    q = tl.load(q_ptr + row * D + head * 64 + offs_d).to(tl.float32)
    top = tl.full((SLOTS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    acc = tl.zeros((SLOTS, 64), dtype=tl.float32)
    seen = position <= pos
    v = tl.where(seen[:, :, None], v, 0.0)  # what a window before has left there may not be a number
    top, total, acc = _fold_in(k, v, seen, q, top, total, acc, False)
    for t0 in tl.range(N * SLOTS, pos + 1, N * SLOTS):
        seen = t0 + position <= pos
        k, v = _load_positions(k_ptr, v_ptr, base, t0 + position, seen, False)
        top, total, acc = _fold_in(k, v, seen, q, top, total, acc, False)
    _, total, acc = _join_slots(top, total, acc)
    tl.store(out_ptr + row * D + head * 64 + offs_d, (acc / total).to(out_ptr.dtype.element_ty))


@triton.jit
def cross_attention(
    q_ptr, k_ptr, v_ptr, scale_ptr, finished_ptr, part_ptr, stat_ptr, count_ptr, out_ptr, D, S,
    N: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, BSPLIT: tl.constexpr,
    STAGES: tl.constexpr, QUANTISED: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query a (head, row) over S audio positions, shared out over SPLITS programs of TILES * N * SLOTS positions.

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
    position = tl.arange(0, SLOTS)[:, None] + tl.arange(0, N)[None, :] * SLOTS + split * (N * SLOTS * TILES)
    k, v = _load_positions(k_ptr, v_ptr, base, position, position < S, QUANTISED)
    k_scale = 1.0
    v_scale = 1.0
    if QUANTISED:
        k_scale = tl.load(scale_ptr + cell * 2)
        v_scale = tl.load(scale_ptr + cell * 2 + 1)
    if PDL:
        gdc_wait()
    q = tl.load(q_ptr + row * D + head * 64 + offs_d).to(tl.float32) * k_scale
    top = tl.full((SLOTS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    acc = tl.zeros((SLOTS, 64), dtype=tl.float32)
    top, total, acc = _fold_in(k, v, position < S, q, top, total, acc, QUANTISED)
    for i in tl.range(1, TILES, num_stages=STAGES):
        seen = position + i * (N * SLOTS) < S
        k, v = _load_positions(k_ptr, v_ptr, base, position + i * (N * SLOTS), seen, QUANTISED)
        top, total, acc = _fold_in(k, v, seen, q, top, total, acc, QUANTISED)
    highest, total, acc = _join_slots(top, total, acc)
    join_splits(acc * v_scale, highest, total, part_ptr, stat_ptr, count_ptr, out_ptr + row * D + head * 64,
                 cell, split, offs_d, SPLITS, BSPLIT)  # fmt: skip
