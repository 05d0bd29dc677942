"""What the fast engine holds, counted from its own tensors after packing: the same Census as of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from errors import EffectivePrecisionError
from model_loader.census import Census, CensusLine
from model_loader.fast.packing import Format, Packed
from model_loader.fast.weights import (
    DecoderLayer,
    DecoderWeights,
    EncoderLayer,
    EncoderWeights,
    Projection,
    tensors_of,
)

if TYPE_CHECKING:
    from model_loader.precision import Precision

_NAMES = {Format.INT8: "int8", Format.INT4: "int4"}


def take_packed_census(encoder: EncoderWeights, decoder: DecoderWeights, attention: str) -> Census:
    """A tensor that two places share counts once. attention: what computes it in a step."""
    seen: set[int] = set()
    lines = [_line(kind, dtype, parts, seen) for (kind, dtype), parts in _groups(encoder, decoder).items()]
    devices = {str(tensor.device) for tensor in tensors_of([encoder, decoder])}
    return Census(
        lines=tuple(sorted(lines, key=lambda line: -line.n_bytes)),
        devices=tuple(sorted(devices)),
        attention=attention,
        compute_dtype=_dtype_name(decoder.dtype),
    )


def refuse_mixture(encoder: EncoderWeights, decoder: DecoderWeights, row: Precision) -> None:
    """Raises EffectivePrecisionError unless every projection of encoder and decoder is stored as the row says."""
    kept = row.kept_dtype_on(decoder.device.type)
    found = {
        "encoder": {_dtype_name(part.weight.dtype) for layer in encoder.layers for part in encoder_projections(layer)},
        "decoder": {format_name(packed) for layer in decoder.layers for packed in projections(layer)},
    }
    claimed = {"encoder": row.encoder_dtype or kept, "decoder": row.stored_dtype}
    for side, formats in found.items():
        if formats != {claimed[side]}:
            raise EffectivePrecisionError(
                f"The {side} was to be {claimed[side]}, but after packing it is {', '.join(sorted(formats))}. Nothing "
                "was transcribed; choose another precision."
            )


def encoder_projections(layer: EncoderLayer) -> tuple[Projection, ...]:
    """The four of a layer, in the order of their use."""
    return layer.qkv, layer.out, layer.fc1, layer.fc2


def projections(layer: DecoderLayer) -> tuple[Packed, ...]:
    """The six of a layer, in the order of their use."""
    return layer.qkv, layer.out, layer.cross_query, layer.cross_out, layer.fc1, layer.fc2


def format_name(packed: Packed) -> str:
    return _NAMES.get(packed.format) or _dtype_name(packed.weight.dtype)


def _groups(encoder: EncoderWeights, decoder: DecoderWeights) -> dict[tuple[str, str], list[Any]]:
    """Parts by (what they are, format), in an order where shared tensors belong to the first."""
    groups: dict[tuple[str, str], list[Any]] = {}

    def add(kind: str, part: Any) -> None:
        first = next(tensors_of(part))
        dtype = format_name(part) if isinstance(part, Packed) else _dtype_name(first.dtype)
        groups.setdefault((kind, dtype), []).append(part)

    for table in (decoder.tokens, decoder.positions, encoder.positions):
        add("embedding", table)
    for layer in decoder.layers:
        for packed in projections(layer):
            add("decoder projection", packed)
    add("cross projection", decoder.cross)
    add("output head", decoder.head)
    add("convolution", encoder.conv1)
    add("convolution", encoder.conv2)
    for block in encoder.layers:
        for part in encoder_projections(block):
            add("encoder projection", part)
    for norm in _norms(encoder):
        add("LayerNorm", norm)
    return groups


def _line(kind: str, dtype: str, parts: list[Any], seen: set[int]) -> CensusLine:
    n_bytes = n_weights = 0
    for part in parts:
        for index, tensor in enumerate(tensors_of(part)):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            n_bytes += tensor.numel() * tensor.element_size()
            if index == 0:
                n_weights += part.n_in * part.n_out if isinstance(part, Packed) else tensor.numel()
    return CensusLine(kind, dtype, len(parts), n_weights, n_bytes, is_linear=kind.endswith("projection"))


def _norms(encoder: EncoderWeights) -> Iterator[Any]:
    for layer in encoder.layers:
        yield from (layer.norm1, layer.norm2)
    yield encoder.norm


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
