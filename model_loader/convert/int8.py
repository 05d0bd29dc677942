"""int8-static and int8-dynamic: our own int8 x int8 linear layers.

int8-dynamic quantises the checkpoint's weights after reading; the input's scale is computed for each row at run time.
int8-static reads a calibrated folder (calibration.py): int8 weights and scales straight onto the device, with no
floating-point copy of a linear weight at any moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from errors import ModelUnavailableError
from model_loader.convert.reading import read_whisper

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.precision import Precision


def load_int8_dynamic(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """Weights int8 per output channel, a scale for each row of the input at run time."""
    import torch

    from model_loader.calibration import linear_layers, replace_layer
    from model_loader.int8_linear import Int8Linear

    dtype = getattr(torch, row.kept_dtype_on(device.type))
    model: Any = read_whisper(folder, device, dtype)
    model.requires_grad_(False)
    layers = linear_layers(model)
    for name in list(layers):
        layer = layers.pop(name)  # named once more here, all of them would stay in memory to the end
        replace_layer(model, name, Int8Linear.from_weights(layer.weight, layer.bias, dtype=dtype))
    result: torch.nn.Module = model
    return result


def load_int8_static(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """A calibrated folder. Raises ModelUnavailableError if its tensors do not fit its config.json."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from model_loader.calibration import WEIGHTS, CalibrationReport, linear_layers, replace_layer
    from model_loader.int8_linear import Int8Linear

    dtype = getattr(torch, row.kept_dtype_on(device.type))
    kept = {layer.name for layer in CalibrationReport.load(folder).layers if layer.kept_16_bit}
    config = WhisperConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=True):
        model: Any = WhisperForConditionalGeneration(config)
        for name, layer in linear_layers(model).items():
            if name not in kept:
                new = Int8Linear(layer.in_features, layer.out_features, is_static=True, dtype=dtype)
                replace_layer(model, name, new)
    read = load_file(folder / WEIGHTS, device=str(device))
    # What is not quantised is stored in 16 bits; a processor is slow in those.
    tensors = {name: x.to(dtype) if x.dtype == torch.float16 else x for name, x in read.items()}
    del read
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in missing if name != "proj_out.weight"]
    if missing or unexpected:
        raise ModelUnavailableError(
            f"The calibrated folder {folder} does not fit its config.json ({(missing or unexpected)[0]}). Calibrate "
            "again: ./start.sh calibrate."
        )
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.fold()
    model.kept_linears = tuple(sorted(kept))  # for the proof, which asks the row about every other precision
    result: torch.nn.Module = model.requires_grad_(False)
    return result
