# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The ends of a decoder step: a token's embedding, and the choice of the next token by Whisper's rules.

ids: int32 [4] = <|endoftext|>, <|notimestamps|>, the first timestamp, the latest timestamp allowed as first token.
They are read from memory, as is everything about a row, so that one captured graph serves every request.
Sampling: argmax(logits / temperature + Gumbel noise) is a draw from the softmax (Maddison et al., A* sampling, 2014).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embed(
    tokens_ptr, pos_ptr, token_ptr, position_ptr, x_ptr, copy_ptr, stats_ptr, T, D,
    BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x[r] = token_embedding[tokens[r, pos]] + position_embedding[pos], its rounded copy, and the copy's sums."""
    row = tl.program_id(0)
    offs = tl.arange(0, BD)
    mask = offs < D
    pos = tl.load(pos_ptr + row)
    token = tl.load(tokens_ptr + row * T + pos)
    a = tl.load(token_ptr + token.to(tl.int64) * D + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(position_ptr + pos * D + offs, mask=mask, other=0.0).to(tl.float32)
    rounded = (a + b).to(copy_ptr.dtype.element_ty)
    tl.store(x_ptr + row * D + offs, a + b, mask=mask)
    tl.store(copy_ptr + row * D + offs, rounded, mask=mask)
    rounded = rounded.to(tl.float32)
    tl.store(stats_ptr + row * 128, tl.sum(rounded, 0))
    tl.store(stats_ptr + (BR + row) * 128, tl.sum(rounded * rounded, 0))


@triton.jit
def _summary(out, key, logits, mine, offs, first, sampled):
    """Best key, its id and logit, the largest logit, and the sum of exp(logit - largest) over the entries `mine`."""
    best_key, index = tl.max(tl.where(mine, key, float("-inf")), 0, return_indices=True)
    best = first + index
    logit = best_key  # each reduction is a wait for all warps: a key that is a logit saves two
    top = best_key
    if sampled:
        logit = tl.max(tl.where(mine & (offs == best), logits, float("-inf")), 0)
        top = tl.max(tl.where(mine, logits, float("-inf")), 0)
    top = tl.maximum(top, -1.0e30)
    tl.store(out, best_key)
    tl.store(out + 1, best.to(tl.float32))
    tl.store(out + 2, logit)
    tl.store(out + 3, top)
    tl.store(out + 4, tl.sum(tl.where(mine, tl.exp(logits - top), 0.0), 0))


@triton.jit
def choose_parts(
    logits_ptr, flags_ptr, ids_ptr, tokens_ptr, pos_ptr, prompt_ptr, last_timestamp_ptr, timed_ptr, part_ptr,
    inv_temperature_ptr, seed_ptr, V, T, CHUNKS: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whisper's token rules over one chunk of the vocabulary; text and timestamps are summed up apart.

    part: float32 [R, CHUNKS, 16], text in 0..4, 1 in 5 if a logit is not a number, timestamps in 8..12 (see _summary).
    flags: uint8 [V], bit 0 = never, bit 1 = not as the first token. last_timestamp: the newest, 0 = none yet.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    offs = chunk * BV + tl.arange(0, BV)
    mask = offs < V
    if PDL:
        gdc_launch_dependents()
    flags = tl.load(flags_ptr + offs, mask=mask, other=1)
    if PDL:
        gdc_wait()
    eot = tl.load(ids_ptr)
    no_timestamps = tl.load(ids_ptr + 1)
    begin = tl.load(ids_ptr + 2)
    latest_first = tl.load(ids_ptr + 3)
    pos = tl.load(pos_ptr + row)
    made = pos + 1 - tl.load(prompt_ptr + row)  # tokens chosen so far
    timed = tl.load(timed_ptr + row) != 0
    raw = tl.load(logits_ptr + row * V + offs, mask=mask, other=float("-inf")).to(tl.float32)
    is_time = offs >= begin
    ban = ((flags & 1) != 0) | (((flags & 2) != 0) & (made == 0))
    last = tl.load(tokens_ptr + row * T + pos)
    before = tl.load(tokens_ptr + row * T + tl.maximum(pos - 1, 0))
    last_is_time = (made >= 1) & (last >= begin)
    before_is_time = (made < 2) | (before >= begin)
    closing = last_is_time & (before_is_time == 0)
    last_timestamp = tl.load(last_timestamp_ptr + row)
    floor = tl.where(closing, last_timestamp, last_timestamp + 1)
    ban_timed = offs == no_timestamps
    ban_timed = ban_timed | (last_is_time & before_is_time & is_time)
    ban_timed = ban_timed | (closing & (offs < eot))
    ban_timed = ban_timed | ((last_timestamp >= begin) & is_time & (offs < floor))
    ban_timed = ban_timed | ((made == 0) & ((is_time == 0) | (offs > latest_first)))
    ban = ban | (timed & ban_timed)
    logits = tl.where(ban, float("-inf"), raw)
    key = logits
    inv_temperature = tl.load(inv_temperature_ptr + row)
    if inv_temperature > 0:
        u = tl.rand(tl.load(seed_ptr + row), pos * V + offs)
        key = logits * inv_temperature - tl.log(-tl.log(tl.maximum(u, 1e-9)) + 1e-20)
    out = part_ptr + (row * CHUNKS + chunk) * 16
    sampled = inv_temperature > 0
    _summary(out, key, logits, (is_time == 0) & (ban == 0), offs, chunk * BV, sampled)
    _summary(out + 8, key, logits, is_time & (ban == 0), offs, chunk * BV, sampled)
    tl.store(out + 5, tl.max(tl.where(mask & (raw != raw), 1.0, 0.0), 0))


@triton.jit
def _join(part_ptr, offs, mask):
    """Best key, its id and logit, the largest logit, and log(sum(exp(logits))) over all chunks."""
    key = tl.load(part_ptr + offs * 16, mask=mask, other=float("-inf"))
    top = tl.load(part_ptr + offs * 16 + 3, mask=mask, other=-1.0e30)
    total = tl.load(part_ptr + offs * 16 + 4, mask=mask, other=0.0)
    best = tl.argmax(key, 0)
    token = tl.load(part_ptr + best * 16 + 1)
    logit = tl.load(part_ptr + best * 16 + 2)
    max_top = tl.max(top, 0)
    log_sum = max_top + tl.log(tl.sum(total * tl.exp(top - max_top), 0))
    return tl.max(key, 0), token.to(tl.int32), logit, max_top, log_sum


@triton.jit
def choose(
    part_ptr, ids_ptr, tokens_ptr, pos_ptr, prompt_ptr, limit_ptr, last_timestamp_ptr, timed_ptr, finished_ptr,
    logprob_ptr, T, CHUNKS: tl.constexpr, CH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the chunks, choose the token, write it behind the others and advance the row; a finished row stands still.

    A row with a logit that is not a number ends at once with a log-probability that is not one either.
    """
    row = tl.program_id(0)
    offs = tl.arange(0, CH)
    mask = offs < CHUNKS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    eot = tl.load(ids_ptr)
    begin = tl.load(ids_ptr + 2)
    part = part_ptr + row * CHUNKS * 16
    text_key, text_id, text_logit, text_top, text_log = _join(part, offs, mask)
    time_key, time_id, time_logit, _, time_log = _join(part + 8, offs, mask)
    broken = tl.max(tl.load(part + offs * 16 + 5, mask=mask, other=0.0), 0) > 0
    high = tl.maximum(text_log, time_log)
    log_sum = high + tl.log(tl.exp(text_log - high) + tl.exp(time_log - high))
    # The timestamps together beat the best text token: then it must be a timestamp.
    only_time = (tl.load(timed_ptr + row) != 0) & (time_log > text_top)
    use_time = (time_key > text_key) | only_time
    log_sum = tl.where(only_time, time_log, log_sum)
    token = tl.where(broken, eot, tl.where(use_time, time_id, text_id))
    logprob = tl.where(broken, float("nan"), tl.where(use_time, time_logit, text_logit) - log_sum)
    pos = tl.load(pos_ptr + row)
    made = pos + 1 - tl.load(prompt_ptr + row)
    alive = tl.load(finished_ptr + row) == 0
    choosing = alive & (made >= 0)
    tl.store(tokens_ptr + row * T + pos + 1, token, mask=choosing)
    tl.store(logprob_ptr + row, tl.load(logprob_ptr + row) + logprob, mask=choosing)
    tl.store(last_timestamp_ptr + row, token, mask=choosing & (token >= begin))
    ended = (token == eot) | (made + 1 >= tl.load(limit_ptr + row))
    tl.store(finished_ptr + row, 1, mask=choosing & ended)
    tl.store(pos_ptr + row, pos + 1, mask=alive)
