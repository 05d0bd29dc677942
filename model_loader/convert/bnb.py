"""bnb-int8, bnb-nf4, bnb-fp4: bitsandbytes' linear layers, quantised while the checkpoint is read.

In: a row, a checkpoint folder, a device. Out: a Whisper model on that device whose linear layers, except the output
head (tied to the token embedding), are bitsandbytes modules. Everything else stays at 16 bits; at 4 bits on a processor
at 32, in which bitsandbytes multiplies there without rounding every input to bfloat16's 8 bits.
Sources: Dettmers et al., LLM.int8() (arXiv 2208.07339) and QLoRA (arXiv 2305.14314, section 3, double quantisation).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from model_loader.convert.reading import read_whisper

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.precision import Precision

HEAD = "proj_out"
"""The output head: quantising it with the embedding it is tied to costs accuracy and saves 4 % of large-v3."""


def load_bnb_8bit(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """LLM.int8() with bitsandbytes' own outlier threshold of 6.0."""
    return _load(row, folder, device, config_8bit(HEAD))


def load_bnb_4bit(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """NF4 or FP4, as the row says."""
    return _load(row, folder, device, config_4bit(row, device, HEAD))


def config_8bit(head: str) -> Any:
    """transformers' BitsAndBytesConfig; head: the layer to leave alone."""
    from transformers import BitsAndBytesConfig

    _quiet()
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[head])


def config_4bit(row: Precision, device: torch.device, head: str) -> Any:
    """transformers' BitsAndBytesConfig. Type and arithmetic are always said: the defaults are fp4 and fp32."""
    import torch
    from transformers import BitsAndBytesConfig

    _quiet()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=row.stored_dtype,
        bnb_4bit_compute_dtype=getattr(torch, row.compute_dtype_on(device.type)),
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[head],
    )


def _quiet() -> None:
    """On a CPU it says with every matrix product which format it casts to, and which kernels it could download."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _load(row: Precision, folder: Path, device: torch.device, config: Any) -> torch.nn.Module:
    import torch

    dtype = getattr(torch, row.kept_dtype_on(device.type))
    model = read_whisper(folder, device, dtype, quantization_config=config)
    model.requires_grad_(False)
    return model
