"""The operations of a step as Triton kernels: which kernel, which tile, how many warps (TritonOps), and those between
products that modules compute (ModuleOps).

Tuning holds every choice that was made by measurement. Up to ROW_PATH_LIMIT rows, and always in float32, projections
run a warp a program (linear_row); above, on the matrix units (linear_tile).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import gelu

from model_loader.fast.one_launch import OneLaunch
from model_loader.fast.packing import Format, Packed
from model_loader.fast.slots import MAX_ROWS, MAX_SPLITS, RuleTensors, Slots
from model_loader.fast.step import each_layer
from model_loader.fast.torch_ops import TorchOps
from model_loader.fast.weights import QUERY_SCALE, DecoderLayer, DecoderWeights

ROW_PATH_LIMIT = 4
_VOCABULARY_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Tile:
    """How linear_tile cuts a projection."""

    outputs: int
    splits: int
    columns: int
    stages: int
    warps: int


_TILES: dict[tuple[int, int], Tile] = {
    (3, 1): Tile(16, 1, 128, 4, 4),  # queries, keys and values
    (1, 1): Tile(16, 1, 256, 3, 4),
    (4, 1): Tile(32, 1, 128, 4, 4),  # fc1
    (1, 4): Tile(16, 4, 256, 3, 4),  # fc2
}
"""By (n_out, n_in) in widths of the model; H200, 32 rows, large-v3 shape."""

_HEAD_TILE = Tile(128, 1, 128, 3, 4)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices of one GPU generation; the values are the best on an H200."""

    row_bytes: int = 10240
    """Weights a program of linear_row asks for at once."""
    row_bytes_4bit: int = 10240
    row_warps: int = 1
    row_programs: int = 128
    """At least this many, with smaller tiles if needed: the GPU has 132 multiprocessors."""
    tiles: dict[tuple[int, int], Tile] = field(default_factory=dict)
    """Replaces entries of the table above."""
    head_tile: Tile = _HEAD_TILE
    self_block: int = 64
    """Text positions read at once."""
    self_warps: int = 4
    cross_block: int = 128
    """Audio positions read at once."""
    cross_warps: int = 4
    cross_stages: int = 1
    cross_programs: int = 264
    """Audio positions are shared out until this many programs run."""
    pdl: bool = True
    """Programmatic dependent launch for few rows, where the GPU knows it."""


class Attending:
    """Attention and the choice of tokens: what neither projects nor adds."""

    def __init__(self, weights: DecoderWeights, slots: Slots, tuning: Tuning, *, pdl: bool) -> None:
        """pdl: launch attention early, behind projections that allow it."""
        from model_loader.fast.kernels import attention, choice

        self._attention, self._choice = attention, choice
        self.slots = slots
        self._weights, self._tuning = weights, tuning
        rows, device = slots.n_rows, weights.device
        self._pdl = pdl
        self._early = tuning.pdl and torch.cuda.get_device_capability(device) >= (9, 0)
        cells = rows * weights.n_heads
        self._cells_done = torch.zeros(cells, dtype=torch.int32, device=device)
        self._parts = torch.zeros(cells * MAX_SPLITS * 64, device=device)
        self._part_stats = torch.zeros(cells * MAX_SPLITS * 2, device=device)
        self._chunks = -(-weights.n_vocab // _VOCABULARY_CHUNK)
        self._summaries = torch.zeros(rows, _power_of_two(self._chunks), 16, device=device)

    def self_attention(self, layer: int, attended: torch.Tensor) -> None:
        s, w, t = self.slots, self._weights, self._tuning
        self._attention.self_attention[(w.n_heads, s.n_rows)](
            s.query, s.self_keys[layer], s.self_values[layer], s.position, s.finished, attended,
            w.n_text_ctx, w.d_model, BT=t.self_block, SKIP=not self._pdl, PDL=self._pdl,
            num_warps=t.self_warps, launch_pdl=self._pdl,
        )  # fmt: skip

    def cross_attention(self, layer: int, attended: torch.Tensor) -> None:
        s, w, t = self.slots, self._weights, self._tuning
        n_tiles = -(-w.n_audio_ctx // t.cross_block)
        wanted = min(MAX_SPLITS, -(-t.cross_programs // (s.n_rows * w.n_heads)))
        tiles = max(1, n_tiles // wanted)
        splits = -(-n_tiles // tiles)
        self._attention.cross_attention[(splits, w.n_heads, s.n_rows)](
            s.query, s.cross_keys[layer], s.cross_values[layer], s.cross_scale[layer], s.finished,
            self._parts, self._part_stats, self._cells_done, attended, w.d_model, w.n_audio_ctx,
            BS=t.cross_block, TILES=tiles, SPLITS=splits, BSPLIT=_power_of_two(splits), STAGES=t.cross_stages,
            QUANTISED=s.quantised, SKIP=not self._pdl, PDL=self._pdl, num_warps=t.cross_warps, launch_pdl=self._pdl,
        )  # fmt: skip

    def choose(self, rules: RuleTensors) -> None:
        s, w = self.slots, self._weights
        n_columns = self._summaries.shape[1]
        self._choice.choose_parts[(self._chunks, s.n_rows)](
            s.logits, rules.flags, rules.ids, s.tokens, s.position, s.prompt_length, s.last_timestamp, s.timed,
            self._summaries, s.inv_temperature, s.seed, w.n_vocab, w.n_text_ctx,
            CHUNKS=self._chunks, BV=_VOCABULARY_CHUNK, PDL=self._early, num_warps=4, launch_pdl=self._early,
        )  # fmt: skip
        self._choice.choose[(s.n_rows,)](
            self._summaries, rules.ids, s.tokens, s.position, s.prompt_length, s.limit, s.last_timestamp, s.timed,
            s.finished, s.logprob, w.n_text_ctx,
            CHUNKS=self._chunks, CH=n_columns, PDL=self._early, num_warps=1, launch_pdl=self._early,
        )  # fmt: skip


class TritonOps:
    """Ops (step.py) on these slots. float32 activations for few rows, copies in the compute format for many."""

    def __init__(self, weights: DecoderWeights, slots: Slots, tuning: Tuning | None = None,
                 one_launch: OneLaunch | None = None) -> None:  # fmt: skip
        from model_loader.fast.kernels import choice, linear

        self._choice, self._linear_kernels = choice, linear
        self.slots = slots
        self._weights = weights
        self._tuning = tuning or Tuning()
        rows, device = slots.n_rows, weights.device
        self._by_row = rows <= ROW_PATH_LIMIT or weights.dtype == torch.float32
        capable = torch.cuda.get_device_capability(device) >= (9, 0)
        self._pdl = self._tuning.pdl and capable and rows <= ROW_PATH_LIMIT
        self._attending = Attending(weights, slots, self._tuning, pdl=self._pdl)
        self._tile_rows = 16 if rows <= 16 else MAX_ROWS
        self._stats = [torch.zeros(2, MAX_ROWS, 128, device=device) for _ in range(2)]
        """Sums of x_copy and its squares by column tile; the newest first."""
        self._stats_tiles = 1
        widest = max(packed.n_out for layer in weights.layers for packed in (layer.qkv, layer.fc1))
        self._work = torch.zeros(8 * self._tile_rows * widest, device=device)
        self._tiles_done = torch.zeros(8192, dtype=torch.int32, device=device)
        self._one_launch = one_launch
        if one_launch is not None:
            self._stats = [one_launch.memory.last_stats.view(2, MAX_ROWS, 128)] * 2
            self._tile_rows = MAX_ROWS

    def embed(self) -> None:
        if self._one_launch is not None:
            return  # the first thing that it does
        s, w = self.slots, self._weights
        self._stats_tiles = 1
        self._choice.embed[(s.n_rows,)](
            s.tokens, s.position, w.tokens, w.positions, s.x, s.x_copy, self._stats[0], w.n_text_ctx, w.d_model,
            BD=_power_of_two(w.d_model), BR=self._tile_rows,
        )  # fmt: skip

    def qkv(self, packed: Packed, layer: int) -> None:
        self._linear(self._x, packed, self.slots.query, norm=True, layer=layer)

    def self_attention(self, layer: int) -> None:
        self._attending.self_attention(layer, self._attended)

    def cross_query(self, packed: Packed) -> None:
        self._linear(self._x, packed, self.slots.query, norm=True)

    def cross_attention(self, layer: int) -> None:
        self._attending.cross_attention(layer, self._attended)

    def add_attended(self, packed: Packed) -> None:
        self._linear(self._attended, packed, self.slots.x, residual=True)

    def expand(self, packed: Packed) -> None:
        self._linear(self._x, packed, self._inner, norm=True, gelu=True)

    def add_inner(self, packed: Packed) -> None:
        self._linear(self._inner, packed, self.slots.x, residual=True)

    def layers(self, layers: Sequence[DecoderLayer]) -> None:
        if self._one_launch is None:
            each_layer(self, layers)
        else:
            self._one_launch()
            self._stats_tiles = self._one_launch.n_parts

    def head(self, packed: Packed) -> None:
        self._linear(self._x, packed, self.slots.logits, norm=True)

    def choose(self, rules: RuleTensors) -> None:
        self._attending.choose(rules)

    @property
    def _x(self) -> torch.Tensor:
        return self.slots.x if self._by_row else self.slots.x_copy

    @property
    def _attended(self) -> torch.Tensor:
        return self.slots.attended if self._by_row else self.slots.attended_copy

    @property
    def _inner(self) -> torch.Tensor:
        return self.slots.inner if self._by_row else self.slots.inner_copy

    def _linear(self, x: torch.Tensor, packed: Packed, out: torch.Tensor, *, norm: bool = False, gelu: bool = False,
                residual: bool = False, layer: int | None = None) -> None:  # fmt: skip
        s = self.slots
        caches = (out, out) if layer is None else (s.self_keys[layer], s.self_values[layer])
        flags = {
            "FORMAT": int(packed.format),
            "NORM": norm,
            "GAMMA": packed.gamma is not None,
            "GELU": gelu,
            "RESIDUAL": residual,
            "QKV": layer is not None,
        }
        if self._by_row:
            self._linear_row(x, packed, out, caches, flags)
        else:
            self._linear_tile(x, packed, out, caches, flags)

    def _linear_row(self, x: torch.Tensor, packed: Packed, out: torch.Tensor,
                    caches: tuple[torch.Tensor, torch.Tensor], flags: dict[str, Any]) -> None:  # fmt: skip
        s, w, t = self.slots, self._weights, self._tuning
        row_bytes = packed.weight.shape[1] * packed.weight.element_size()
        budget = t.row_bytes_4bit if packed.format is Format.INT4 else t.row_bytes
        outputs = max(1, min(64, _power_of_two(budget // row_bytes + 1) // 2))
        while outputs > 2 and -(-packed.n_out // outputs) < t.row_programs:
            outputs //= 2
        first = _power_of_two(packed.n_in + 1) // 2
        self._linear_kernels.linear_row[(-(-packed.n_out // outputs), s.n_rows)](
            x, packed.weight, packed.scale, packed.bias, _or(packed.colsum, packed.bias),
            _or(packed.gamma, packed.bias), out, *caches, s.position,
            packed.n_out, w.d_model, w.n_text_ctx, w.eps,
            K=packed.n_in, K1=first, K2=packed.n_in - first, BN=outputs,
            PDL=self._pdl, num_warps=t.row_warps, launch_pdl=self._pdl, **flags,
        )  # fmt: skip

    def _linear_tile(self, x: torch.Tensor, packed: Packed, out: torch.Tensor,
                     caches: tuple[torch.Tensor, torch.Tensor], flags: dict[str, Any]) -> None:  # fmt: skip
        s, w = self.slots, self._weights
        tile = self._tile_of(packed)
        columns = tile.columns
        while (packed.n_in // tile.splits) % columns:
            columns //= 2
        n_tiles = -(-packed.n_out // tile.outputs)
        self._linear_kernels.linear_tile[(n_tiles, tile.splits)](
            x, self._stats[0], packed.weight, packed.scale, packed.bias, _or(packed.colsum, packed.bias),
            _or(packed.gamma, packed.bias), out, s.x_copy, self._stats[1], self._work, self._tiles_done,
            *caches, s.position, s.n_rows, packed.n_out, w.d_model, w.n_text_ctx, w.eps,
            K=packed.n_in, BR=self._tile_rows, BN=tile.outputs, BK=columns, SPLITS=tile.splits, STAGES=tile.stages,
            NT=self._stats_tiles, BT=_power_of_two(self._stats_tiles), EARLY=False, num_warps=tile.warps, **flags,
        )  # fmt: skip
        if flags["RESIDUAL"]:
            self._stats.reverse()
            self._stats_tiles = n_tiles

    def _tile_of(self, packed: Packed) -> Tile:
        width = self._weights.d_model
        shape = packed.n_out // width, packed.n_in // width
        if shape[0] > 8:
            return self._tuning.head_tile
        tile = self._tuning.tiles.get(shape) or _TILES.get(shape, _TILES[3, 1])
        splits = tile.splits
        # A share of the columns must hold whole groups of 4-bit weights.
        while packed.n_in // splits % 128:
            splits //= 2
        return Tile(tile.outputs, splits, tile.columns, tile.stages, tile.warps)


class ModuleOps(TorchOps):
    """Ops on modules' projections (modules.py), with our kernels between them: about twenty launches a layer.

    What a projection adds to the residual waits for the LayerNorm behind it, which adds, normalises and rounds in one.
    """

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        from model_loader.fast.kernels import activation, attention, norm

        super().__init__(weights, slots)
        self._attention, self._norm = attention, norm
        self._attending = Attending(weights, slots, Tuning(), pdl=False)
        self._via = activation.DTYPES[weights.dtype]
        self._addend: torch.Tensor | None = None
        self._inner: torch.Tensor = slots.inner_copy

    def embed(self) -> None:
        self._addend = None
        super().embed()

    def qkv(self, packed: Packed, layer: int) -> None:
        s = self.slots
        self._store(self._projected(packed), s.self_keys[layer], s.self_values[layer])

    def self_attention(self, layer: int) -> None:
        self._attending.self_attention(layer, self.slots.attended_copy)

    def cross_query(self, packed: Packed) -> None:
        self._store(self._projected(packed))

    def cross_attention(self, layer: int) -> None:
        self._attending.cross_attention(layer, self.slots.attended_copy)

    def add_attended(self, packed: Packed) -> None:
        self._addend = self._project(self.slots.attended_copy, packed)

    def expand(self, packed: Packed) -> None:
        self._inner = gelu(self._projected(packed))

    def add_inner(self, packed: Packed) -> None:
        self._addend = self._project(self._inner, packed)

    def head(self, packed: Packed) -> None:
        if self._addend is not None:
            self.slots.x.add_(self._addend)
            self._addend = None
        super().head(packed)

    def choose(self, rules: RuleTensors) -> None:
        self._attending.choose(rules)

    def _projected(self, packed: Packed) -> torch.Tensor:
        """LN(x + what waits) as the projection takes it, projected."""
        assert packed.affine is not None and packed.joined is not None
        s, w, addend = self.slots, self._weights, self._addend
        rounding = packed.joined.rounding
        scale, zero = rounding or (s.x, s.x)
        out = torch.empty_like(s.x, dtype=w.dtype if rounding is None else torch.int8)
        self._norm.add_norm[(s.n_rows,)](
            s.x, s.x if addend is None else addend, s.x, *packed.affine, out, scale, zero, w.d_model, w.eps, 0.0,
            BD=_power_of_two(w.d_model), ADD=addend is not None, OFFSET=False, CLAMP=False,
            ROUND=0 if rounding is None else 2, VIA=self._via, num_warps=4,
        )  # fmt: skip
        self._addend = None
        return packed.joined(out)

    def _store(self, projected: torch.Tensor, *caches: torch.Tensor) -> None:
        """projected [R, D] or [R, 3 D], compute format -> query, scaled; and a layer's text caches if given."""
        s, w = self.slots, self._weights
        keys, values = caches or (s.x, s.x)
        self._attention.store_step[(w.n_heads, s.n_rows)](
            projected, s.query, keys, values, s.position, w.n_text_ctx, w.d_model, QUERY_SCALE,
            CACHES=len(caches) > 0, num_warps=1,
        )  # fmt: skip


class TritonWindowOps:
    """WindowOps (step.py) as Triton kernels."""

    def __init__(self) -> None:
        from model_loader.fast.kernels import attention

        self._attention = attention

    def store_cross(self, projected: torch.Tensor, slots: Slots, row: int) -> None:
        n_layers, _, n_heads, n_positions, _ = slots.cross_keys.shape
        self._attention.store_cross[(n_heads, 2, n_layers)](
            projected, slots.cross_keys, slots.cross_values, slots.cross_scale, row, n_heads, n_positions,
            slots.cross_keys.stride(0), slots.cross_scale.stride(0), BS=128, QUANTISED=slots.quantised, num_warps=4,
        )  # fmt: skip


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow must still be one."""
    return stand_in if tensor is None else tensor
