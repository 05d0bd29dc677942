"""A training checkpoint -> a Hugging Face checkpoint that any Whisper program loads.

In: <work>/checkpoint.pt. Out: a folder with the running mean of the weights in fp16 (shards under 14 MB, so that each
file of a repository stays small), config.json, the recipe's tokenizer, generation_config.json with the taught heads as
alignment heads, and a short model card. The CTC head is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from errors import UnknownModelError
from training.model import ModelSize, build_model, taught_layers
from training.speech import DEMO
from training.train import CHECKPOINT
from transcription.tokenizer import WhisperTokens

logger = logging.getLogger(__name__)

_SHARD_SIZE = "14MB"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_CARD = """---
language: [en, es, fr, de, ru, zh]
pipeline_tag: automatic-speech-recognition
tags: [whisper, synthetic-data]
---
# A small Whisper-architecture model trained on synthetic speech

Not one of OpenAI's Whisper models and without any of their weights: {parameters:.1f} million parameters of the same
architecture, trained from random weights for {steps} steps on {hours:.0f} hours of speech made by eSpeak NG and Flite.
It has never heard a person speak; replace it with a real checkpoint for real work.
"""


def export(work: Path, folder: Path) -> None:
    """Write the checkpoint folder. Raises UnknownModelError if nothing has been trained in `work`."""
    file = work / CHECKPOINT
    if not file.exists():
        raise UnknownModelError(
            f"There is no {CHECKPOINT} in {work}; run python -m training.train --work {work} first."
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    words = WhisperTokens.from_folder(DEMO)
    size = ModelSize(**state["size"])
    model = build_model(size, words, n_vocab=words.timestamp_begin + 1501)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter, mean in zip(trained, state["mean"], strict=False):  # the mean goes on with the CTC head's
            parameter.copy_(mean)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    model.half().save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)
    _write_generation_config(folder, size)
    _write_card(folder, model, work, int(state["step"]))
    logger.info("event=exported folder=%s bytes=%d", folder, sum(f.stat().st_size for f in folder.iterdir()))


def _write_generation_config(folder: Path, size: ModelSize) -> None:
    """The demo model's settings belong to the vocabulary; only the alignment heads depend on the size."""
    config: dict[str, Any] = json.loads((DEMO / "generation_config.json").read_text(encoding="utf8"))
    config["alignment_heads"] = [[layer, 0] for layer in taught_layers(size.decoder_layers)]
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def _write_card(folder: Path, model: Any, work: Path, steps: int) -> None:
    hours: dict[str, float] = json.loads((work / "speech" / "speech.json").read_text(encoding="utf8"))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    card = _CARD.format(parameters=parameters, steps=steps, hours=sum(hours.values()))
    (folder / "README.md").write_text(card, encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Write a Hugging Face checkpoint.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced if it exists")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    export(options.work, options.out)


if __name__ == "__main__":
    main()
