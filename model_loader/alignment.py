"""Where in the audio each token was heard: the cross-attention of a few heads, in one teacher-forced pass.

In: transformers' model, one window's encoder output, tokens. Out: how much each token looks at each 20 ms of sound.

After openai/whisper, timing.py (find_alignment): softmax over the window's sound, standardised over the tokens, a
median of seven frames, the mean over the heads. Which heads follow the sound is told by the checkpoint (alignment_heads
in generation_config.json); where it is not, all of the upper half of the layers are taken, as openai/whisper does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

MEDIAN_FRAMES = 7


@dataclass(frozen=True, slots=True)
class Attended:
    """What a hypothesis of n_tokens looks at."""

    focus: torch.Tensor
    """float32 [n_tokens, n_frames] on the CPU; a row belongs to the step that reads its token and chooses the next."""
    probabilities: list[float]
    """Of every token after the first, n_tokens - 1, without any rule."""


@cache
def alignment_heads(folder: Path, n_layers: int, n_heads: int) -> list[tuple[int, int]]:
    """(layer, head) of the decoder. Read once: every window asks."""
    file = folder / "generation_config.json"
    told = json.loads(file.read_text(encoding="utf-8")).get("alignment_heads") if file.is_file() else None
    if told:
        return [(int(layer), int(head)) for layer, head in told]
    return [(layer, head) for layer in range(n_layers // 2, n_layers) for head in range(n_heads)]


def attend(
    model: Any, heads: Sequence[tuple[int, int]], hidden: torch.Tensor, tokens: Sequence[int], n_frames: int
) -> Attended:
    """model: WhisperForConditionalGeneration. hidden: [1, n_audio, d_model]. n_frames: of 20 ms that hold sound.

    Queries and keys are computed once more for the few layers in question, from what flows into them, so that the model
    keeps its attention kernel, which never shows its weights.
    """
    decoder, seen = model.model.decoder, list[torch.Tensor]()
    handles = [
        decoder.layers[layer].encoder_attn.register_forward_pre_hook(
            _watch([head for one, head in heads if one == layer], n_frames, seen), with_kwargs=True
        )
        for layer in sorted({layer for layer, _ in heads})
    ]
    ids = torch.tensor([list(tokens)], device=hidden.device)
    try:
        states = decoder(input_ids=ids, encoder_hidden_states=hidden, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    logprobs = model.proj_out(states)[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    focus = torch.stack(seen).sum(0) / len(heads)
    return Attended(focus.cpu(), logprobs.exp().tolist())


def _watch(heads: list[int], n_frames: int, seen: list[torch.Tensor]) -> Callable[..., None]:
    """A hook in front of a cross-attention that adds the sum over these heads to what was seen."""

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments[0] if arguments else named["hidden_states"]
        audio = named["key_value_states"]
        split = (-1, module.num_heads, module.head_dim)
        query = (module.q_proj(states)[0] * module.scaling).view(split)[:, heads].float()  # [n_tokens, heads, 64]
        key = module.k_proj(audio)[0, :n_frames].view(split)[:, heads].float()
        weights = torch.einsum("thd,shd->hts", query, key).softmax(-1)
        spread = weights.std(dim=1, keepdim=True, unbiased=False).clamp(min=1e-8)
        seen.append(_median((weights - weights.mean(dim=1, keepdim=True)) / spread).sum(0))

    return note


def _median(weights: torch.Tensor) -> torch.Tensor:
    """Over MEDIAN_FRAMES neighbours of the last dimension; the same shape."""
    reach = MEDIAN_FRAMES // 2
    if weights.shape[-1] <= reach:
        return weights
    return pad(weights, (reach, reach), mode="reflect").unfold(-1, MEDIAN_FRAMES, 1).median(dim=-1).values
