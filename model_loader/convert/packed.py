"""int8 and int4: the decoder's weights packed for our own step, everything else in 16 bits.

In: a row, a checkpoint folder, a device. Out: a Whisper model on that device whose decoder projections are
PackedLinear; the fast engine runs them in its kernels, the reference engine by unpacking them at every call.
Packed: what every token reads anew. Keys and values of the audio are projected once a window, so they stay in 16 bits,
as do the encoder, embeddings and the head. The LayerNorm in front of a projection is folded into it before rounding
(its gain becomes 1, its offset 0): the kernels need it so, and the scales follow the weights that are really used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_loader.convert.reading import read_whisper

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.fast.packing import Format
    from model_loader.precision import Precision


def load_packed(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """Weights as row.stored_dtype says: int8 or int4."""
    import torch

    from model_loader.fast.packing import Format

    model: Any = read_whisper(folder, device, getattr(torch, row.kept_dtype_on(device.type)))
    model.requires_grad_(False)
    pack_decoder(model, {"int8": Format.INT8, "int4": Format.INT4}[row.stored_dtype])
    result: torch.nn.Module = model
    return result


def pack_decoder(model: Any, form: Format) -> None:
    """Replace the decoder's projections, a layer at a time. model: a Whisper model without gradients."""
    for layer in model.model.decoder.layers:
        own, cross = layer.self_attn, layer.encoder_attn
        _pack_behind(layer.self_attn_layer_norm, own, ("q_proj", "k_proj", "v_proj"), form)
        _pack_behind(layer.encoder_attn_layer_norm, cross, ("q_proj",), form)
        _pack_behind(layer.final_layer_norm, layer, ("fc1",), form)
        for parent, name in ((own, "out_proj"), (cross, "out_proj"), (layer, "fc2")):
            _pack_behind(None, parent, (name,), form)


def _pack_behind(norm: Any, parent: Any, names: tuple[str, ...], form: Format) -> None:
    """Replace these layers of parent by packed ones, the LayerNorm in front folded in and made neutral."""
    import torch

    from model_loader.fast.packing import PackedLinear, fold_norm, pack

    for name in names:
        layer = getattr(parent, name)
        weight, bias = layer.weight, layer.bias
        if norm is not None:
            weight, bias = fold_norm(weight, bias, norm)
        setattr(parent, name, PackedLinear(pack(weight, bias, form, torch.float32)))
    if norm is not None:
        norm.weight.fill_(1.0)
        norm.bias.zero_()
