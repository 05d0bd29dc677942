"""One decoder step over all rows, in nine kinds of operations. The order of a layer is written here once.

Ops has three implementations: torch_ops (any device, any format; the yardstick) and triton_ops' two (a kernel or two
each, with our own products or between those of modules). All read and write the same Slots, so that each operation of
one can be held against the other's; between modules, what is added to x waits for the LayerNorm or head behind it.
All layers are an operation too: cuda/layers.cu does them in one launch, for a kernel border costs 2-3 us, as much as
reading 10 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from model_loader.fast.packing import Packed
from model_loader.fast.slots import RuleTensors, Slots
from model_loader.fast.weights import DecoderLayer, DecoderWeights


class Ops(Protocol):
    """Operations on one Slots, on all its rows."""

    slots: Slots

    def embed(self) -> None:
        """Token at the row's position -> x."""
        ...

    def qkv(self, packed: Packed, layer: int) -> None:
        """LN(x) -> query, and keys and values at the row's position of the text cache."""
        ...

    def self_attention(self, layer: int) -> None:
        """query over the text cache up to the row's position -> attended."""
        ...

    def cross_query(self, packed: Packed) -> None:
        """LN(x) -> query."""
        ...

    def cross_attention(self, layer: int) -> None:
        """query over the audio cache -> attended."""
        ...

    def add_attended(self, packed: Packed) -> None:
        """x += attended, projected."""
        ...

    def expand(self, packed: Packed) -> None:
        """gelu(LN(x), projected) -> inner."""
        ...

    def add_inner(self, packed: Packed) -> None:
        """x += inner, projected."""
        ...

    def head(self, packed: Packed) -> None:
        """LN(x) -> logits."""
        ...

    def choose(self, rules: RuleTensors) -> None:
        """logits -> next token, and the row's state."""
        ...

    def layers(self, layers: Sequence[DecoderLayer]) -> None:
        """All of the above from qkv to add_inner, layer by layer (each_layer), or at once."""
        ...


class WindowOps(Protocol):
    """Operations of the audio cache."""

    def store_cross(self, projected: torch.Tensor, slots: Slots, row: int) -> None:
        """projected [S, L * 2 * D]: keys and values of one window -> the row's audio cache."""
        ...


def decoder_step(weights: DecoderWeights, ops: Ops, rules: RuleTensors, *, in_prompt: bool = False) -> None:
    """Read one token of every row, and choose the next where the prompt is over.

    in_prompt: it is over nowhere, so the head need not be computed; for steps that are not captured.
    """
    ops.embed()
    ops.layers(weights.layers)
    if in_prompt:
        ops.slots.advance()
        return
    ops.head(weights.head)
    ops.choose(rules)


def each_layer(ops: Ops, layers: Sequence[DecoderLayer]) -> None:
    """The operations one by one, in their order."""
    for index, layer in enumerate(layers):
        ops.qkv(layer.qkv, index)
        ops.self_attention(index)
        ops.add_attended(layer.out)
        ops.cross_query(layer.cross_query)
        ops.cross_attention(index)
        ops.add_attended(layer.cross_out)
        ops.expand(layer.fc1)
        ops.add_inner(layer.fc2)
