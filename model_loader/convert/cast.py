"""fp32, fp16-autocast, fp16, bf16: the checkpoint's weights cast to one floating-point format while they are read.

In: a row, a checkpoint folder, a device. Out: a Whisper model on that device. Each tensor goes from the file to the
device and is cast there, so the peak is the model plus one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model_loader.convert.reading import read_whisper

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.precision import Precision


def load_cast(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """All weights in the row's stored format."""
    import torch

    model = read_whisper(folder, device, getattr(torch, row.stored_dtype))
    # Autocast keeps its 16-bit copies of weights only for parameters that require a gradient (torch 2.13,
    # autocast_mode.cpp, cached_cast); without it every call casts all weights again. Nothing computes gradients.
    model.requires_grad_(row.autocast)
    return model
