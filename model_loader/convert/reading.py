"""The one call that reads a checkpoint into a Whisper model, and refuses one with holes.

transformers fills weights that a file lacks with random numbers and mentions it in a log; the text would be noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from errors import ModelUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def read_whisper(folder: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """WhisperForConditionalGeneration on the device. options: for from_pretrained.

    The dtype is always said: transformers' default is the checkpoint's own, fp16 for large-v3.
    Raises ModelUnavailableError if weights are missing or of another shape than config.json says.
    """
    from transformers import WhisperForConditionalGeneration

    model, found = WhisperForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": str(device)},
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, as one of ours
        **options,
    )
    holes = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if holes:
        raise ModelUnavailableError(
            f"The checkpoint in {folder} lacks {len(holes)} of its weights ({holes[0]}, ...) or they do not fit its "
            "config.json. Fetch the complete checkpoint, or choose another model."
        )
    result: torch.nn.Module = model
    return result
