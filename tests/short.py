"""A checkpoint for shorter windows: the same text of short recordings, for a fifth of the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SHORT_S = 8
"""Of a window, instead of 30."""
POSITIONS = "model.encoder.embed_positions.weight"


def make_short(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint again, which then lacks the encoder's positions after SHORT_S, and return its folder."""
    from safetensors.torch import load_file, save_file  # not for the process that only hands out the tests

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights[POSITIONS] = weights[POSITIONS][: 50 * SHORT_S].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_source_positions": 50 * SHORT_S}))
    return folder
