"""fp8: the encoder's weights and activations in float8, the decoder packed as in int8.

In: a row, a checkpoint folder, a device. Out: a Whisper model on that device whose encoder's linear layers, but for
attention's output projection, are Float8Linear and whose decoder's projections are PackedLinear. The encoder is bound
by arithmetic, which float8 halves; the decoder by bytes, where 8-bit integers with a scale for each output are more
exact than float8 and as small. Attention, convolutions, LayerNorms, embeddings, the head and the audio's keys and
values stay in 16 bits.

So does attention's output projection: it is a twelfth of a layer's products, what attention puts out would need a pass
of its own to be rounded, and a fifth of the variance of the encoder's error comes from there. In 16 bits it costs 2 %
of the encoder's time and takes an eighth off its error (LOG.md).

No recording is needed for the scales of activations, because each input of a linear layer has an upper bound that
follows from the weights. A LayerNorm's output before gain and offset has the length sqrt(n) at most, so by Cauchy and
Schwarz
    |LN(x)_j|        <= sqrt(n) |gain_j| + |offset_j|                       input of queries, keys, values and fc1
    |W LN(x) + b|_j  <= sqrt(n) |W_j * gain| + |W_j . offset + b_j|
The second one bounds fc1's output, and so what GELU leaves of it (the input of fc2). LOG.md compares these scales with
measured ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_loader.convert.reading import read_whisper

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.precision import Precision


def load_fp8(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """The encoder in float8 with one scale a layer, the decoder in int8 with one an output."""
    import torch

    from model_loader.convert.packed import pack_decoder
    from model_loader.fast.packing import Format

    model: Any = read_whisper(folder, device, getattr(torch, row.kept_dtype_on(device.type)))
    model.requires_grad_(False)
    convert_encoder(model)
    pack_decoder(model, Format.INT8)
    result: torch.nn.Module = model
    return result


def convert_encoder(model: Any) -> None:
    """Replace the encoder's linear layers, but for attention's output projection, by Float8Linear, a layer at a time.

    model: a Whisper model without gradients. Queries, keys and values share a weight scale, so that they can be joined
    as they are.
    """
    for layer in model.model.encoder.layers:
        inner = projected_bound(layer.fc1, layer.final_layer_norm)
        _convert(layer.self_attn, ("q_proj", "k_proj", "v_proj"), norm_bound(layer.self_attn_layer_norm))
        _convert(layer, ("fc1",), norm_bound(layer.final_layer_norm))
        _convert(layer, ("fc2",), inner)


def norm_bound(norm: torch.nn.LayerNorm) -> torch.Tensor:
    """The largest magnitude that this LayerNorm can put out, whatever goes in: a float32 scalar."""
    gain, offset = norm.weight.float(), norm.bias.float()
    bound: torch.Tensor = gain.abs().mul(gain.numel() ** 0.5).add(offset.abs()).amax()
    return bound


def projected_bound(layer: torch.nn.Linear, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """The same for a linear layer behind it."""
    weight, gain, offset = layer.weight.float(), norm.weight.float(), norm.bias.float()
    centre = weight @ offset
    if layer.bias is not None:
        centre = centre + layer.bias.float()
    lengths = (weight * gain).square().sum(dim=1).sqrt()
    bound: torch.Tensor = lengths.mul(gain.numel() ** 0.5).add(centre.abs()).amax()
    return bound


def _convert(parent: Any, names: tuple[str, ...], bound: torch.Tensor) -> None:
    """Replace layers of one input; bound: its largest magnitude."""
    import torch

    from model_loader.float8_linear import Float8Linear, scale_for, to_float8

    layers = [getattr(parent, name) for name in names]
    weight_scale = scale_for(torch.stack([layer.weight.abs().amax() for layer in layers]).amax())
    input_scale = scale_for(bound)
    for name, layer in zip(names, layers, strict=True):
        bias = torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias
        new = Float8Linear(to_float8(layer.weight, weight_scale), weight_scale, bias, input_scale)
        setattr(parent, name, new)
