"""The operations of a step in plain torch: any device, any format. A CPU runs these; so does a GPU without Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from model_loader.fast.choosing import choose
from model_loader.fast.packing import Packed
from model_loader.fast.processor import multiply
from model_loader.fast.slots import RuleTensors, Slots
from model_loader.fast.step import each_layer
from model_loader.fast.weights import HEAD_WIDTH, QUERY_SCALE, DecoderLayer, DecoderWeights


class TorchOps:
    """Ops (step.py) on these slots. Arithmetic in the weights' compute format; residual and logits in float32."""

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        self.slots = slots
        self._weights = weights
        self._rows = torch.arange(slots.n_rows, device=weights.device)
        self._ids = torch.arange(weights.n_text_ctx, device=weights.device)
        self._span = weights.n_text_ctx
        """Text positions that attention looks at; all where looking at the rows' positions would make a GPU wait."""

    def embed(self) -> None:
        s, w = self.slots, self._weights
        position = s.position.long()
        token = s.tokens.gather(1, position[:, None])[:, 0].long()
        s.x.copy_(w.tokens[token].float() + w.positions[position].float())
        if s.x.device.type == "cpu":
            self._span = int(position.max()) + 1

    def qkv(self, packed: Packed, layer: int) -> None:
        s = self.slots
        query, key, value = self._project(self._normed(packed), packed).chunk(3, dim=1)
        position = s.position.long()
        self._keep_query(query, packed)
        s.self_keys[layer][self._rows, :, position] = self._heads(key).to(s.self_keys.dtype)
        s.self_values[layer][self._rows, :, position] = self._heads(value).to(s.self_values.dtype)

    def self_attention(self, layer: int) -> None:
        s = self.slots
        seen = (self._ids[: self._span] <= s.position[:, None])[:, None, None]  # [R, 1, 1, span]
        keys, values = s.self_keys[layer][:, :, : self._span], s.self_values[layer][:, :, : self._span]
        self._attend(keys, values, seen)

    def cross_query(self, packed: Packed) -> None:
        self._keep_query(self._project(self._normed(packed), packed), packed)

    def cross_attention(self, layer: int) -> None:
        s = self.slots
        keys, values = s.cross_keys[layer], s.cross_values[layer]
        if not s.quantised:
            self._attend(keys, values, None)
        elif keys.device.type == "cpu" and self._weights.dtype == torch.float32:
            # One pass each makes floats of them. What all keys have in common leaves the softmax as it is, and what
            # all values have in common comes out as it went in: offsets and scales go to what is 1,500 times smaller.
            # Taking 128 from a mean costs bits: an error of 2e-5 of the output, beside 3e-3 by 8 bits.
            self._attend(keys.float(), values.float(), None, s.cross_scale[layer][:, :, None, None])
        else:  # in 16 bits the offset would take away too many bits, and a GPU gains no time
            scale = s.cross_scale[layer].to(self._weights.dtype)[..., None, None, :]  # [R, H, 1, 1, 2]
            keys = keys.to(self._weights.dtype).sub_(128).mul_(scale[..., 0])
            values = values.to(self._weights.dtype).sub_(128).mul_(scale[..., 1])
            self._attend(keys, values, None)

    def add_attended(self, packed: Packed) -> None:
        self.slots.x.add_(self._project(self.slots.attended, packed))

    def expand(self, packed: Packed) -> None:
        self.slots.inner.copy_(gelu(self._project(self._normed(packed), packed)))

    def add_inner(self, packed: Packed) -> None:
        self.slots.x.add_(self._project(self.slots.inner, packed))

    def layers(self, layers: Sequence[DecoderLayer]) -> None:
        each_layer(self, layers)

    def head(self, packed: Packed) -> None:
        normed = self._normed(packed)
        if packed.gamma is not None:
            normed = normed * (packed.gamma * packed.scale)
        self.slots.logits.copy_(self._project(normed, packed))

    def choose(self, rules: RuleTensors) -> None:
        choose(self.slots, rules)

    def _normed(self, packed: Packed) -> torch.Tensor:
        """LN(x); without gain and offset where these are folded into the projection."""
        gamma, beta = packed.affine or (None, None)
        return layer_norm(self.slots.x, (packed.n_in,), gamma, beta, self._weights.eps)

    def _project(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        dtype = self._weights.dtype
        if packed.joined is not None:
            return packed.joined(x.to(dtype))
        if packed.is_laid_out:
            return multiply(x, packed).to(dtype)
        return linear(x.to(dtype), packed.dense(dtype), packed.bias.to(dtype))

    def _keep_query(self, query: torch.Tensor, packed: Packed) -> None:
        """Weights of our own have the scale already."""
        self.slots.query.copy_(query)
        if packed.joined is not None:
            self.slots.query.mul_(QUERY_SCALE)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[R, D] -> [R, H, 64]."""
        return x.view(self.slots.n_rows, -1, HEAD_WIDTH)

    def _attend(self, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None,
                scales: torch.Tensor | None = None) -> None:  # fmt: skip
        """scales [R, H, 1, 1, 2]: of keys and of values, where these are as stored in 8 bits."""
        query = self._heads(self.slots.query)[:, :, None].to(keys.dtype)  # [R, H, 1, 64]; already scaled
        if scales is not None:
            query = query * scales[..., 0]
        found = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=1.0)
        if scales is not None:
            found = (found - 128) * scales[..., 1]
        self.slots.attended.copy_(found.reshape(self.slots.n_rows, -1))


class TorchWindowOps:
    """WindowOps (step.py) in plain torch."""

    def store_cross(self, projected: torch.Tensor, slots: Slots, row: int) -> None:
        n_layers, _, n_heads, n_positions, width = slots.cross_keys.shape
        both = projected.view(n_positions, n_layers, 2, n_heads, width).permute(2, 1, 3, 0, 4)  # [2, L, H, S, 64]
        for kind, cache in enumerate((slots.cross_keys, slots.cross_values)):
            if slots.quantised:
                # In its own memory, in the cache's order, and from there on in place: new memory is what takes time.
                values = torch.empty(both[kind].shape, device=projected.device).copy_(both[kind])
                low, high = torch.aminmax(values.view(n_layers, n_heads, -1), dim=2)
                scale = torch.maximum(high, -low).clamp(min=1e-8) * (1 / 127)  # [L, H]: no value is beyond 127 of it
                slots.cross_scale[:, row, :, kind] = scale
                cache[:, row] = values.div_(scale[..., None, None]).round_().add_(128)
            else:
                cache[:, row] = both[kind]
