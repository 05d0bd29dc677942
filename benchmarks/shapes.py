"""Checkpoints of Whisper's sizes with random weights: what speed and memory need, without a download.

In: the name of a size and a folder. Out: a checkpoint folder in Hugging Face's format, fp16. Its text is noise, but its
layers, bytes and arithmetic are those of the real one. The tokenizer files are the demo checkpoint's and do not fit the
larger vocabulary: benchmarks use ids only.
Sizes: openai/whisper, model card, table 1; large-v3 and turbo from their config.json on the Hub.
"""

from __future__ import annotations

import io
import shutil
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "models" / "demo"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one Whisper."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    n_heads: int
    n_mels: int = 80
    n_vocab: int = 51865


SHAPES: dict[str, Shape] = {
    "least": Shape(128, 1, 1, 2, n_vocab=6004),
    "toy": Shape(64, 2, 2, 2, n_vocab=6004),
    "deep": Shape(128, 1, 4, 2, n_vocab=6004),
    "tiny": Shape(384, 4, 4, 6),
    "base": Shape(512, 6, 6, 8),
    "small": Shape(768, 12, 12, 12),
    "medium": Shape(1024, 24, 24, 16),
    "large-v3": Shape(1280, 32, 32, 20, n_mels=128, n_vocab=51866),
    "large-v3-turbo": Shape(1280, 32, 4, 20, n_mels=128, n_vocab=51866),
}
"""toy, least and deep are for tests: the demo checkpoint's vocabulary and little to compute. least and deep suit the
fast engine; deep's linear layers outweigh its embedding, as a large model's do."""


def make_checkpoint(shape: str, folder: Path, *, seed: int = 0, max_shard_size: str = "5GB") -> Path:
    """Write a checkpoint of this shape and return its folder. Uses a GPU where there is one: 2 s instead of 20."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = SHAPES[shape]
    eot = sizes.n_vocab - 1501 - 107  # before <|startoftranscript|>, 99 or 100 languages and six more special tokens
    config = WhisperConfig(
        d_model=sizes.d_model,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_attention_heads=sizes.n_heads,
        decoder_attention_heads=sizes.n_heads,
        encoder_ffn_dim=4 * sizes.d_model,
        decoder_ffn_dim=4 * sizes.d_model,
        num_mel_bins=sizes.n_mels,
        vocab_size=sizes.n_vocab,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
        decoder_start_token_id=eot + 1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = WhisperForConditionalGeneration(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder, max_shard_size=max_shard_size)
    for name in _TOKENIZER_FILES:
        shutil.copy(DEMO_FOLDER / name, folder / name)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def wav_bytes(samples: npt.NDArray[np.float32], rate: int = 16_000) -> bytes:
    """float32 [n_samples] as a WAV file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()
