"""What the fast engine holds, counted from its own tensors after packing: the same Census as of a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from errors import EffectivePrecisionError
from model_loader.census import Census, CensusLine, stored_format
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
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "out_proj": "out", "fc1": "fc1", "fc2": "fc2"}
"""Where a layer of transformers' encoder went."""


def take_packed_census(encoder: EncoderWeights, decoder: DecoderWeights, attention: str) -> Census:
    """A tensor that two places share counts once. attention: what computes it in a step."""
    seen: set[int] = set()
    lines = [_line(kind, dtype, parts, seen) for (kind, dtype), parts in _groups(encoder, decoder).items()]
    devices = {str(tensor.device) for tensor in tensors_of([encoder, decoder])}
    is_laid_out = any(packed.is_laid_out for layer in decoder.layers for packed in projections(layer))
    return Census(
        lines=tuple(sorted(lines, key=lambda line: -line.n_bytes)),
        devices=tuple(sorted(devices)),
        attention=attention,
        compute_dtype=_dtype_name(decoder.dtype) + (", packed weights in bfloat16" if is_laid_out else ""),
    )


def refuse_mixture(encoder: EncoderWeights, decoder: DecoderWeights, row: Precision) -> None:
    """Raises EffectivePrecisionError unless every projection of encoder and decoder is stored as the row says.

    A calibration may have left layers of either side in 16 bits, even all of them.
    """
    kept = row.kept_dtype_on(decoder.device.type)
    is_packed = row.linear_class == "PackedLinear"  # our own format, in the decoder alone
    encoder_claim = row.encoder_dtype or kept if is_packed else row.stored_dtype
    kept_parts = {_FUSED[name] for name in row.encoder_kept}
    found = []
    for part in dict.fromkeys(_FUSED.values()):
        claim = kept if part in kept_parts else encoder_claim
        found.append(("encoder", claim, _formats(getattr(layer, part) for layer in encoder.layers)))
    both = [part for layer in decoder.layers for part in projections(layer)]
    found.append(("decoder", row.stored_dtype, _formats(both if is_packed else [*both, decoder.cross])))
    allowed = {kept} if row.needs_calibration else set()
    for side, claim, formats in found:
        if formats - allowed - {claim} or not formats & (allowed | {claim}):
            raise EffectivePrecisionError(
                f"The {side} was to be {claim}, but after packing it is {', '.join(sorted(formats))}. Nothing "
                "was transcribed; choose another precision."
            )


def encoder_projections(layer: EncoderLayer) -> tuple[Projection, ...]:
    """The four of a layer, in the order of their use."""
    return layer.qkv, layer.out, layer.fc1, layer.fc2


def projections(layer: DecoderLayer) -> tuple[Packed, ...]:
    """The six of a layer, in the order of their use."""
    return layer.qkv, layer.out, layer.cross_query, layer.cross_out, layer.fc1, layer.fc2


def _formats(whole: Iterable[Packed | Projection]) -> set[str]:
    """Stored formats of these projections."""
    return {_stored(part) for projection in whole for part in _parts(projection)}


def _parts(projection: Any) -> tuple[Any, ...]:
    """Its modules where modules compute it, else itself."""
    joined = getattr(projection, "joined", None)
    return (projection,) if joined is None else joined.modules


def _stored(part: Any) -> str:
    """Format of a projection's or a module's weight."""
    if isinstance(part, torch.nn.Module):
        return stored_format(part, part.weight)  # type: ignore[arg-type]
    if isinstance(part, Packed) and part.format in _NAMES:
        return _NAMES[part.format]
    return _dtype_name(next(tensors_of(part)).dtype)


def _groups(encoder: EncoderWeights, decoder: DecoderWeights) -> dict[tuple[str, str], list[Any]]:
    """Parts by (what they are, format), in an order where shared tensors belong to the first. Modules go by class."""
    groups: dict[tuple[str, str], list[Any]] = {}

    def add(kind: str, whole: Any) -> None:
        for part in _parts(whole):
            own_kind = type(part).__name__ if isinstance(part, torch.nn.Module) else kind
            groups.setdefault((own_kind, _stored(part)), []).append(part)
        if isinstance(whole, Packed) and whole.affine is not None:
            groups.setdefault(("LayerNorm", "float32"), []).append(whole.affine)

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
                n_weights += _n_weights(part, tensor)
    is_linear = kind.endswith("projection") or isinstance(parts[0], torch.nn.Module)
    return CensusLine(kind, dtype, len(parts), n_weights, n_bytes, is_linear=is_linear)


def _n_weights(part: Any, first: torch.Tensor) -> int:
    if isinstance(part, Packed):
        return part.n_in * part.n_out
    if isinstance(part, torch.nn.Module):
        return int(part.in_features * part.out_features)  # type: ignore[operator]
    return first.numel()


def _norms(encoder: EncoderWeights) -> Iterator[Any]:
    for layer in encoder.layers:
        yield from (layer.norm1, layer.norm2)
    yield encoder.norm


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
