"""The memory of a batch being decoded: caches, tokens and the state of every row, all on the device, at fixed places.

A row is one window. Rows know nothing of each other: each has its own position, prompt, limit, seed, temperature and
rules, and one that has finished stands still until it is given a new window. Nothing is allocated while decoding, so a
captured graph finds everything where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from model_loader.engine import TokenRules
from model_loader.fast.weights import HEAD_WIDTH, DecoderWeights

MAX_ROWS = 32
"""Rows decoded together; the kernels' tiles hold no more."""

MAX_SPLITS = 32
"""Programs that share the audio positions of one head."""


@dataclass(slots=True)
class Slots:
    """R rows. L layers, H heads of 64, D = 64 H, T text positions, S audio positions, V tokens."""

    n_rows: int
    # Activations. The residual is float32; 16-bit copies serve the matrix units.
    x: torch.Tensor  # float32 [R, D]
    x_copy: torch.Tensor  # [R, D]
    query: torch.Tensor  # float32 [R, D]
    attended: torch.Tensor  # float32 [R, D]
    attended_copy: torch.Tensor  # [R, D]
    inner: torch.Tensor  # float32 [R, 4 D]
    inner_copy: torch.Tensor  # [R, 4 D]
    logits: torch.Tensor  # float32 [R, V]
    # Caches.
    self_keys: torch.Tensor  # [L, R, H, T, 64]
    self_values: torch.Tensor
    cross_keys: torch.Tensor  # [L, R, H, S, 64], uint8 (value + 128) if quantised
    cross_values: torch.Tensor
    cross_scale: torch.Tensor  # float32 [L, R, H, 2]: of keys and of values
    # State of the rows.
    state: torch.Tensor  # int32 [R (T + 9)]: the memory of the next ten, so that one copy reads it
    tokens: torch.Tensor  # int32 [R, T]: prompt and new tokens
    position: torch.Tensor  # int32 [R]: of the token to be read next
    finished: torch.Tensor  # int32 [R]: 1 = stands still
    logprob: torch.Tensor  # float32 [R]: sum over the new tokens
    prompt_length: torch.Tensor  # int32 [R]
    limit: torch.Tensor  # int32 [R]: new tokens at most
    last_timestamp: torch.Tensor  # int32 [R]: the newest, 0 = none
    timed: torch.Tensor  # int32 [R]: 1 = Whisper's timestamp rules apply
    inv_temperature: torch.Tensor  # float32 [R]: 0 = take the likeliest
    seed: torch.Tensor  # int32 [R]

    def first(self, n_rows: int) -> Slots:
        """The first rows as Slots of their own, in the same memory."""
        changes: dict[str, torch.Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and value is not self.state:
                changes[field.name] = value[:, :n_rows] if field.name in _BY_LAYER else value[:n_rows]
        return replace(self, n_rows=n_rows, **changes)

    def begin(self, row: int, prompt: Sequence[int], *, max_new_tokens: int, temperature: float, seed: int,
              timestamps: bool) -> None:  # fmt: skip
        """Set a row to the beginning of this prompt. The host does not wait for the device."""
        length = len(prompt)
        limit = min(max_new_tokens, self.tokens.shape[1] - length)
        # Together, for nine copies of one number took a third of a millisecond.
        values = {"prompt_length": length, "limit": limit, "timed": timestamps, "seed": mix_seed(seed, temperature)}
        numbers = torch.tensor([int(values.get(name, 0)) for name in _NUMBERS], dtype=torch.int32)
        if temperature > 0:
            numbers.view(torch.float32)[_NUMBERS.index("inv_temperature")] = 1.0 / temperature
        tokens = torch.tensor(prompt, dtype=torch.int32)
        if self.tokens.device.type == "cuda":
            tokens, numbers = tokens.pin_memory(), numbers.pin_memory()
        self.tokens[row, :length].copy_(tokens, non_blocking=True)
        _, places = _parts(self.state, self.n_rows)
        places[:, row].copy_(numbers, non_blocking=True)

    def forget_text(self, row: int) -> None:
        """Clear a row's text cache: NaN in it would reach the row's next window, as nothing times NaN is NaN."""
        self.self_keys[:, row].zero_()
        self.self_values[:, row].zero_()

    def advance(self) -> None:
        """Move rows inside their prompt on to its next token."""
        self.position.add_(self.finished == 0)

    @property
    def quantised(self) -> bool:
        """The audio cache holds 8-bit values."""
        return self.cross_keys.dtype == torch.uint8

    @property
    def n_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self) if field.name not in _VIEWS)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


_NUMBERS = ("position", "finished", "logprob", "prompt_length", "limit", "last_timestamp", "timed", "inv_temperature",
            "seed")  # fmt: skip
"""Of a row, as they lie in Slots.state behind the tokens."""
_FLOATS = frozenset({"logprob", "inv_temperature"})
_VIEWS = frozenset({"tokens", *_NUMBERS})
_BY_LAYER = frozenset({"self_keys", "self_values", "cross_keys", "cross_values", "cross_scale"})


def make_slots(weights: DecoderWeights, n_rows: int, *, quantised: bool) -> Slots:
    """Memory for n_rows. quantised: keep keys and values of the audio in 8 bits."""
    device, dtype = weights.device, weights.dtype
    n_layers, d_model, n_heads = len(weights.layers), weights.d_model, weights.n_heads
    n_inner = weights.layers[0].fc1.n_out

    def floats(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    def copies(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=torch.int32)

    text = (n_layers, n_rows, n_heads, weights.n_text_ctx, HEAD_WIDTH)
    audio = (n_layers, n_rows, n_heads, weights.n_audio_ctx, HEAD_WIDTH)
    cross_dtype = torch.uint8 if quantised else dtype
    state = numbers(n_rows * (weights.n_text_ctx + len(_NUMBERS)))
    views = split_state(state, n_rows)
    views["finished"].fill_(1)
    views["prompt_length"].fill_(1)
    return Slots(
        n_rows=n_rows,
        x=floats(n_rows, d_model),
        x_copy=copies(n_rows, d_model),
        query=floats(n_rows, d_model),
        attended=floats(n_rows, d_model),
        attended_copy=copies(n_rows, d_model),
        inner=floats(n_rows, n_inner),
        inner_copy=copies(n_rows, n_inner),
        logits=floats(n_rows, weights.n_vocab),
        self_keys=copies(*text),
        self_values=copies(*text),
        cross_keys=torch.zeros(audio, device=device, dtype=cross_dtype),
        cross_values=torch.zeros(audio, device=device, dtype=cross_dtype),
        cross_scale=floats(n_layers, n_rows, n_heads, 2),
        state=state,
        **views,
    )


def split_state(state: torch.Tensor, n_rows: int) -> dict[str, torch.Tensor]:
    """Slots.state or a copy of it -> tokens [R, T] and every number [R] by name, in the same memory."""
    tokens, numbers = _parts(state, n_rows)
    each = {name: numbers[i].view(torch.float32) if name in _FLOATS else numbers[i] for i, name in enumerate(_NUMBERS)}
    return {"tokens": tokens, **each}


def _parts(state: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int32 [R, T] and numbers int32 [9, R]"""
    n = len(_NUMBERS) * n_rows
    return state[:-n].view(n_rows, -1), state[-n:].view(-1, n_rows)


@dataclass(slots=True)
class RuleTensors:
    """TokenRules on the device, at fixed places too."""

    flags: torch.Tensor
    """uint8 [n_vocab]: bit 0 = never, bit 1 = not as the first token."""
    ids: torch.Tensor
    """int32 [4]: <|endoftext|>, <|notimestamps|>, first timestamp, latest timestamp allowed as first token."""
    loaded: TokenRules | None = None

    @classmethod
    def on(cls, device: torch.device, n_vocab: int) -> RuleTensors:
        """Nothing is loaded, and no token forbidden."""
        flags = torch.zeros(n_vocab, dtype=torch.uint8, device=device)
        return cls(flags, torch.tensor([0, 0, 0, n_vocab], dtype=torch.int32, device=device))

    def load(self, rules: TokenRules) -> None:
        """Nothing is copied if they are there already."""
        if rules == self.loaded:
            return
        flags = torch.zeros(self.flags.shape, dtype=torch.uint8)
        if rules.begin_suppress:
            flags[list(rules.begin_suppress)] |= 2
        if rules.suppress:
            flags[list(rules.suppress)] |= 1
        index = rules.max_initial_timestamp_index
        latest = self.flags.numel() if index is None else rules.timestamp_begin + index
        ids = [rules.eot, rules.no_timestamps, rules.timestamp_begin, latest]
        self.flags.copy_(flags)
        self.ids.copy_(torch.tensor(ids, dtype=torch.int32))
        self.loaded = rules


def mix_seed(seed: int, temperature: float) -> int:
    """A seed of 31 bits. Each temperature draws afresh; batch and row do not enter, so neighbours change nothing."""
    return (seed * 0x9E3779B1 + round(temperature * 1000) * 0x85EBCA77 + 0x27D4EB2F) & 0x7FFFFFFF
