"""A checkpoint that says one text whatever it hears: for what is done with a text, without a model that can listen.

Random weights, but for the decoder's positions: each is the token that follows, so much larger than all that the layers
add that every precision says the same. It takes a hundredth of the demo checkpoint's time.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.shapes import make_checkpoint
from transcription.tokenizer import WhisperTokens

FIRMNESS = 10.0
"""Factor of the last LayerNorm: how sure the model is of each token."""
LOUDNESS = 200.0
"""How far a position outweighs the layers."""


def make_saying(text: str, folder: Path, *, language: str = "en", seconds: float = 2.6, shape: str = "deep") -> Path:
    """Write the checkpoint, whose speech lasts from 0 s to `seconds` of every window, and return its folder."""
    make_checkpoint(shape, folder)
    tokens = WhisperTokens.from_folder(folder)
    begin = tokens.timestamp_begin
    said = [
        *tokens.prompt(language, "transcribe"),
        begin,
        *tokens.encode(text),
        begin + round(seconds / 0.02),
        tokens.eot,
    ]
    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.decoder.embed_tokens.weight"]
    embedding[tokens.eot] = -embedding[tokens.sot]  # as the padding it has none of its own
    weights["model.decoder.embed_positions.weight"][: len(said) - 1] = LOUDNESS * embedding[said[1:]]
    weights["model.decoder.layer_norm.weight"] *= FIRMNESS
    save_file(weights, file, metadata={"format": "pt"})
    return folder
