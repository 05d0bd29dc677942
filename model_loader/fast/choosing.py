"""Whisper's token rules and the choice of the next token as tensor operations: what the Triton kernels must equal.

Rules: openai/whisper, decoding.py, ApplyTimestampRules; transformers' WhisperTimeStampLogitsProcessor (a test compares
masks). Timestamps come in pairs, except before <|endoftext|>, and never run backwards; the first token is one; when all
timestamps together are likelier than the best text token, it must be one.
Noise: Philox 4x32-10 (Salmon et al. 2011) as in Triton's tl.rand, keyed by seed, position and token alone: the same on
every device, whatever else is in the batch.
"""

from __future__ import annotations

import math

import torch

from model_loader.fast.slots import RuleTensors, Slots

_WORD = 0xFFFFFFFF


def mask_logits(logits: torch.Tensor, slots: Slots, rules: RuleTensors) -> torch.Tensor:
    """float32 [R, V] with -inf where a token must not come next. For rows behind their prompt."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    eot, no_timestamps, begin, latest_first = rules.ids.unbind()
    made = (slots.position + 1 - slots.prompt_length)[:, None]  # tokens chosen so far
    is_time = (ids >= begin)[None]
    position = slots.position[:, None].long()
    newest = slots.tokens.gather(1, position)
    before = slots.tokens.gather(1, (position - 1).clamp(min=0))
    after_timestamp = (made >= 1) & (newest >= begin)
    after_pair = after_timestamp & ((made < 2) | (before >= begin))
    after_single = after_timestamp & ~after_pair
    latest = slots.last_timestamp[:, None]
    earliest = torch.where(after_single, latest, latest + 1)
    timed_ban = (
        (ids == no_timestamps)[None]
        | (after_pair & is_time)
        | (after_single & (ids < eot))
        | ((latest >= begin) & is_time & (ids < earliest))
        | ((made == 0) & (~is_time | (ids > latest_first)))
    )
    timed = slots.timed[:, None] != 0
    never, not_first = (rules.flags & 1).bool(), (rules.flags & 2).bool()
    ban = never | (not_first & (made == 0)) | (timed & timed_ban)
    masked = logits.masked_fill(ban, -math.inf)
    total = masked.masked_fill(~is_time, -math.inf).logsumexp(dim=1, keepdim=True)
    best_text = masked.masked_fill(is_time, -math.inf).amax(dim=1, keepdim=True)
    return masked.masked_fill(timed & (total > best_text) & ~is_time, -math.inf)


def choose(slots: Slots, rules: RuleTensors) -> None:
    """Choose from slots.logits, write the token behind the others and advance; a finished row stands still.

    A row with a logit that is not a number ends at once, and its log-probability is not one either.
    """
    broken = slots.logits.isnan().any(dim=1)
    masked = mask_logits(slots.logits, slots, rules)
    token = _pick(masked, slots)
    logprob = masked.log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    eot, begin = rules.ids[0], rules.ids[2]
    token = torch.where(broken, eot, token.int())
    logprob = torch.where(broken, math.nan, logprob)
    made = slots.position + 1 - slots.prompt_length
    alive = slots.finished == 0
    choosing = alive & (made >= 0)
    behind = (slots.position + 1).clamp(max=slots.tokens.shape[1] - 1)[:, None].long()
    written = torch.where(choosing, token, slots.tokens.gather(1, behind)[:, 0])
    slots.tokens.scatter_(1, behind, written[:, None])
    slots.logprob.add_(torch.where(choosing, logprob, 0.0))
    slots.last_timestamp.copy_(torch.where(choosing & (token >= begin), token, slots.last_timestamp))
    ended = (token == eot) | (made + 1 >= slots.limit)
    slots.finished.copy_(slots.finished | (choosing & ended))
    slots.position.add_(alive)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, n_vocab: int) -> torch.Tensor:
    """float32 [R, V] for int32 seeds and positions [R]."""
    ids = torch.arange(n_vocab, device=seed.device)
    counter = position.long()[:, None] * n_vocab + ids
    bits = _philox(seed.long()[:, None], counter)
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return -torch.log(-torch.log(uniform.clamp(min=1e-9)) + 1e-20)


def _pick(masked: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Token ids [R]: the likeliest, or a draw from softmax(masked / temperature) by the Gumbel trick."""
    greedy = masked.argmax(dim=1)
    # Python may look on a CPU; on a GPU that would make the host wait, and a capture fail.
    if slots.inv_temperature.device.type == "cpu" and not slots.inv_temperature.any():
        return greedy
    heat = slots.inv_temperature[:, None]
    noise = gumbel_noise(slots.seed, slots.position, masked.shape[1])
    return torch.where(heat[:, 0] > 0, (masked * heat.clamp(min=1e-6) + noise).argmax(dim=1), greedy)


def _philox(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """The first of the four 32-bit words, int64 [R, V]."""
    c0, c1 = counter & _WORD, counter >> 32
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def _multiply(factor: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit words, in int64 without overflow."""
    low_half = (factor & 0xFFFF) * word
    high_half = (factor >> 16) * word + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)
