"""A Whisper model's weights as the fast engine wants them: fused, one copy of each.

In: transformers' WhisperForConditionalGeneration on its device, in floats, with PackedLinear in its decoder, with
Float8Linear in its encoder as well, or with linear layers that have kernels of their own (modules.py).
Out: EncoderWeights and DecoderWeights. The model is used up layer by layer, so that both never sit in memory together.
For our own kernels the decoder's LayerNorms are folded into the projections behind them, and its queries get their 1/8.
Fused: queries, keys and values of a layer in one projection (keys get a bias of zero), keys and values for
cross-attention of all layers in one. A head of the same numbers as the token embedding shares its memory: the last
LayerNorm's gain is then multiplied with the head's input instead of its weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import linear

from model_loader.census import module_tensors
from model_loader.fast.modules import Joined, has_kernels_of_its_own
from model_loader.fast.packing import Format, Packed, PackedLinear, fold_norm, join, pack, pack_modules, scaled
from model_loader.float8_linear import Float8Linear, multiply

HEAD_WIDTH = 64
"""Of every Whisper's attention heads; the kernels know no other."""

QUERY_SCALE = HEAD_WIDTH**-0.5
"""Of the queries; 1/8, so multiplying weights with it loses nothing."""


@dataclass(slots=True)
class Norm:
    """A LayerNorm: gamma, beta [d_model]."""

    gamma: torch.Tensor
    beta: torch.Tensor
    eps: float


@dataclass(slots=True)
class Projection:
    """Linear layers of the encoder, and keys and values of the audio: in the compute format, in float8, or modules."""

    weight: torch.Tensor
    """[n_out, n_in]."""
    bias: torch.Tensor
    """[n_out], in the compute format, which is also the output's."""
    weight_scale: torch.Tensor | None = None
    """float32 scalar; only beside float8."""
    input_scale: torch.Tensor | None = None
    """float32 scalar; given, the layer takes float8 inputs, to_float8(x, input_scale), or int8 beside input_zero."""
    input_zero: torch.Tensor | None = None
    """float32 scalar; given, the layer takes int8 inputs: round(x / input_scale) + input_zero."""
    joined: Joined | None = None
    """Modules that compute it; weight and bias are then empty."""


@dataclass(slots=True)
class EncoderLayer:
    """The four projections of a layer and the LayerNorms in front of the first and the third."""

    norm1: Norm
    qkv: Projection
    out: Projection
    norm2: Norm
    fc1: Projection
    fc2: Projection


@dataclass(slots=True)
class EncoderWeights:
    """The whole encoder."""

    conv1: tuple[torch.Tensor, torch.Tensor]
    """[d_model, n_mels, 3] and [d_model]."""
    conv2: tuple[torch.Tensor, torch.Tensor]
    """[d_model, d_model, 3] and [d_model]."""
    positions: torch.Tensor
    """[1500, d_model]."""
    layers: list[EncoderLayer]
    norm: Norm
    n_heads: int


@dataclass(slots=True)
class DecoderLayer:
    """The six projections of a step, in the order of their use."""

    qkv: Packed
    out: Packed
    cross_query: Packed
    cross_out: Packed
    fc1: Packed
    fc2: Packed


@dataclass(slots=True)
class DecoderWeights:
    """The whole decoder."""

    layers: list[DecoderLayer]
    cross: Projection
    """Keys and values of all layers: weight [n_layers * 2 * d_model, d_model]."""
    head: Packed
    tokens: torch.Tensor
    """[n_vocab, d_model]."""
    positions: torch.Tensor
    """[n_text_ctx, d_model]."""
    eps: float
    dtype: torch.dtype
    """Of the arithmetic, and of everything that is not packed."""
    n_audio_ctx: int
    """Positions of the encoder's output: 1500."""

    @property
    def runs_modules(self) -> bool:
        """Modules of the model compute the projections, not our kernels."""
        return self.layers[0].qkv.format is Format.MODULES

    @property
    def packs_audio(self) -> bool:
        """Keys and values of the audio are kept in 8 bits: with weights of 8 and 4 bits in our own kernels."""
        return self.layers[0].qkv.format in (Format.INT8, Format.INT4)

    @property
    def d_model(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def n_heads(self) -> int:
        return self.d_model // HEAD_WIDTH

    @property
    def n_vocab(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_text_ctx(self) -> int:
        return int(self.positions.shape[0])

    @property
    def device(self) -> torch.device:
        return self.tokens.device


def project(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """[..., n_in] in the compute format or as the projection takes it -> [..., n_out] in the compute format."""
    if projection.joined is not None:
        return projection.joined(x)
    weight_scale, input_scale = projection.weight_scale, projection.input_scale
    if weight_scale is None or input_scale is None:
        return linear(x, projection.weight, projection.bias)
    return multiply(x, projection.weight, input_scale, weight_scale, projection.bias)


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why the fast engine cannot run a checkpoint with this config.json, as a clause; None where it can."""
    width = config["d_model"]
    heads = {width // config["encoder_attention_heads"], width // config["decoder_attention_heads"]}
    if heads != {HEAD_WIDTH}:
        return f"its attention heads are {min(heads)} wide, and the fast engine's kernels know only {HEAD_WIDTH}"
    activation = config.get("activation_function", "gelu")
    if activation != "gelu":
        return f"its activation function is {activation}, and the fast engine knows only gelu"
    return None


def take_encoder(model: Any) -> EncoderWeights:
    """Move the encoder's weights out of the model; fused ones are copied a layer at a time."""
    encoder = model.model.encoder
    layers = []
    for index, layer in enumerate(encoder.layers):
        attention = layer.self_attn
        layers.append(
            EncoderLayer(
                norm1=_norm(layer.self_attn_layer_norm),
                qkv=_projection(attention.q_proj, attention.k_proj, attention.v_proj),
                out=_projection(attention.out_proj),
                norm2=_norm(layer.final_layer_norm),
                fc1=_projection(layer.fc1),
                fc2=_projection(layer.fc2),
            )
        )
        encoder.layers[index] = torch.nn.Identity()
    weights = EncoderWeights(
        conv1=_pair(encoder.conv1),
        conv2=_pair(encoder.conv2),
        positions=encoder.embed_positions.weight.detach(),
        layers=layers,
        norm=_norm(encoder.layer_norm),
        n_heads=int(model.config.encoder_attention_heads),
    )
    model.model.encoder = torch.nn.Identity()
    return weights


def take_decoder(model: Any, dtype: torch.dtype) -> DecoderWeights:
    """Move the decoder's weights out of the model, folded and fused a layer at a time. dtype: of the arithmetic."""
    decoder, config = model.model.decoder, model.config
    has_own = any(has_kernels_of_its_own(module) for module in _linears(decoder))
    layers, cross = [], []
    for index, layer in enumerate(decoder.layers):
        cross += [layer.encoder_attn.k_proj, layer.encoder_attn.v_proj]
        layers.append(_module_layer(layer) if has_own else _decoder_layer(layer, dtype))
        decoder.layers[index] = torch.nn.Identity()
    tokens = decoder.embed_tokens.weight.detach().to(dtype)
    weights = DecoderWeights(
        layers=layers,
        cross=_projection(*cross, dtype=dtype),
        head=_head(model.proj_out, decoder.layer_norm, tokens),
        tokens=tokens,
        positions=decoder.embed_positions.weight.detach().to(dtype),
        eps=float(decoder.layer_norm.eps),
        dtype=dtype,
        n_audio_ctx=int(config.max_source_positions),
    )
    model.model.decoder = model.proj_out = torch.nn.Identity()
    gc.collect()
    return weights


def tensors_of(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of weights, each once for every place that holds it."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, Packed):
        yield from part.tensors
    elif isinstance(part, Joined):
        yield from part.tensors()
    elif isinstance(part, torch.nn.Module):
        yield from module_tensors(part)
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from tensors_of(inner)
    elif hasattr(part, "__dataclass_fields__"):
        for field in fields(part):
            yield from tensors_of(getattr(part, field.name))


def _decoder_layer(layer: Any, dtype: torch.dtype) -> DecoderLayer:
    own, cross = layer.self_attn, layer.encoder_attn
    norm1, norm2, norm3 = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm
    qkv = join(
        [
            scaled(_packed(own.q_proj, dtype, norm1), QUERY_SCALE),
            _packed(own.k_proj, dtype, norm1),
            _packed(own.v_proj, dtype, norm1),
        ]
    )
    made = DecoderLayer(
        qkv=qkv,
        out=_packed(own.out_proj, dtype),
        cross_query=scaled(_packed(cross.q_proj, dtype, norm2), QUERY_SCALE),
        cross_out=_packed(cross.out_proj, dtype),
        fc1=_packed(layer.fc1, dtype, norm3),
        fc2=_packed(layer.fc2, dtype),
    )
    for packed in (made.qkv, made.cross_query, made.fc1):
        packed.colsum = packed.dense().sum(dim=1)
    return made


def _module_layer(layer: Any) -> DecoderLayer:
    own, cross = layer.self_attn, layer.encoder_attn
    return DecoderLayer(
        qkv=pack_modules(Joined([own.q_proj, own.k_proj, own.v_proj]), layer.self_attn_layer_norm),
        out=pack_modules(Joined([own.out_proj])),
        cross_query=pack_modules(Joined([cross.q_proj]), layer.encoder_attn_layer_norm),
        cross_out=pack_modules(Joined([cross.out_proj])),
        fc1=pack_modules(Joined([layer.fc1]), layer.final_layer_norm),
        fc2=pack_modules(Joined([layer.fc2])),
    )


def _linears(decoder: Any) -> list[Any]:
    """All linear layers of the decoder's layers."""
    return [module for module in decoder.layers.modules() if hasattr(module, "in_features")]


def _packed(module: Any, dtype: torch.dtype, norm: torch.nn.LayerNorm | None = None) -> Packed:
    """A linear layer's weights, the LayerNorm in front of it folded in."""
    if isinstance(module, PackedLinear):
        if norm is not None and not (norm.weight.eq(1).all() and norm.bias.eq(0).all()):
            raise ValueError("packed weights are made with the LayerNorm in front of them folded in; this one is not")
        return module.packed
    weight, bias = module.weight, module.bias
    if norm is not None:
        weight, bias = fold_norm(weight, bias, norm)
    return pack(weight, bias, Format.FLOAT, dtype)


def _head(module: Any, norm: torch.nn.LayerNorm, tokens: torch.Tensor) -> Packed:
    """LN(x) E^T = ((x - mean) / std * gamma) E^T + E beta, with E shared with the token embedding where it is the same.

    gamma is divided by the power of two that brings it below 1, so that x * gamma cannot overflow 16 bits.
    """
    weight = module.weight.detach().to(tokens.dtype)
    weight = tokens if torch.equal(weight, tokens) else weight
    gamma, beta = norm.weight.detach().float(), norm.bias.detach().float()
    factor = torch.exp2(gamma.abs().amax().clamp(min=1e-8).log2().ceil())
    gamma = gamma / factor
    # In pieces: all of it in float32 would take 265 MB for large-v3.
    bias = torch.cat([piece.float() @ beta for piece in weight.split(4096)])
    colsum = torch.cat([piece.float() @ gamma for piece in weight.split(4096)])
    n_out, n_in = weight.shape
    return Packed(weight, factor.reshape(1), bias, Format.FLOAT, n_in, n_out, colsum * factor, gamma)


def _projection(*modules: Any, dtype: torch.dtype | None = None) -> Projection:
    """Linear layers of one input as one, outputs behind each other; float8 ones share their scales already.

    dtype: of the weights where they are floats; None: as they are.
    """
    first = modules[0]
    if any(has_kernels_of_its_own(module) for module in modules):
        joined = Joined(modules)
        scale, zero = joined.rounding or (None, None)
        return Projection(joined.nothing, joined.nothing, input_scale=scale, input_zero=zero, joined=joined)
    if not isinstance(first, Float8Linear):
        pairs = [_pair(module) for module in modules]
        if len(pairs) == 1:
            return Projection(*pairs[0])
        weight, bias = torch.cat([w for w, _ in pairs]), torch.cat([b for _, b in pairs])
        return Projection(weight.to(dtype or weight.dtype), bias.to(dtype or bias.dtype))
    if any(module.weight_scale is not first.weight_scale for module in modules):
        raise ValueError("float8 layers of one input must share the scale of their weights; these do not")
    weight = torch.cat([module.weight.view(torch.uint8) for module in modules]).view(first.weight.dtype)
    return Projection(weight, torch.cat([m.bias for m in modules]), first.weight_scale, first.input_scale)


def _pair(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias; zeros where a layer has none (keys)."""
    weight = module.weight.detach()
    bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach()
    return weight, bias


def _norm(module: torch.nn.LayerNorm) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), float(module.eps))
