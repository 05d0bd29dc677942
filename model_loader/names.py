"""What a model may be called, and the one table of OpenAI's checkpoints: every command reads names here.

In: what somebody typed after --model. Out: what is meant: auto, demo, a folder, or a repository on the Hub. Upper and
lower case are the same in the names known here; a folder's name and an unknown one on the Hub stay as they are given.
Sizes: openai/whisper, model card, table 1. Short names: openai/whisper, __init__.py (large is large-v3 there).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from errors import UnknownModelError
from model_loader.files import Sizes

AUTO = "auto"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "models" / "demo"
"""The checkpoint that ships in the repository: a small Whisper trained on synthetic speech."""

_GIB = 2**30
_ENGLISH_ONLY = 51864
"""Size of the vocabulary of English-only checkpoints."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One of OpenAI's checkpoints, and the short names it goes by."""

    name: str
    short_names: tuple[str, ...]
    """The usual one first."""
    sizes: Sizes
    needs_bytes: int | None = None
    """Free GPU memory for fp16 weights, one batch and the CUDA context; None: 'auto' never takes it, and tables that
    show all sizes leave it out."""

    @property
    def short_name(self) -> str:
        return self.short_names[0]

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.short_names, *(f"whisper-{short}" for short in self.short_names))


def _large(decoder_layers: int, n_mels: int, n_vocab: int) -> Sizes:
    return Sizes(1280, 32, decoder_layers, 5120, n_mels, n_vocab)


MODELS: tuple[KnownModel, ...] = (
    KnownModel("openai/whisper-large-v3", ("large-v3", "large"), _large(32, 128, 51866), 6 * _GIB),
    KnownModel("openai/whisper-large-v3-turbo", ("large-v3-turbo", "turbo"), _large(4, 128, 51866), 4 * _GIB),
    KnownModel("openai/whisper-medium", ("medium",), Sizes(1024, 24, 24, 4096), 4 * _GIB),
    KnownModel("openai/whisper-small", ("small",), Sizes(768, 12, 12, 3072), 2 * _GIB),
    KnownModel("openai/whisper-base", ("base",), Sizes(512, 6, 6, 2048), _GIB),
    KnownModel("openai/whisper-tiny", ("tiny",), Sizes(384, 4, 4, 1536), _GIB),
    KnownModel("openai/whisper-large-v2", ("large-v2",), _large(32, 80, 51865)),
    KnownModel("openai/whisper-large", ("large-v1",), _large(32, 80, 51865)),
    KnownModel("openai/whisper-medium.en", ("medium.en",), Sizes(1024, 24, 24, 4096, n_vocab=_ENGLISH_ONLY)),
    KnownModel("openai/whisper-small.en", ("small.en",), Sizes(768, 12, 12, 3072, n_vocab=_ENGLISH_ONLY)),
    KnownModel("openai/whisper-base.en", ("base.en",), Sizes(512, 6, 6, 2048, n_vocab=_ENGLISH_ONLY)),
    KnownModel("openai/whisper-tiny.en", ("tiny.en",), Sizes(384, 4, 4, 1536, n_vocab=_ENGLISH_ONLY)),
)
"""Those that 'auto' may take first, the best of them first."""

AUTOMATIC: tuple[KnownModel, ...] = tuple(known for known in MODELS if known.needs_bytes is not None)


def _by_spelling() -> dict[str, KnownModel]:
    """A Hub name belongs to its own checkpoint: openai/whisper-large is the first of that size, large the newest."""
    own = {spelling: known for known in MODELS for spelling in (known.name, known.name.removeprefix("openai/"))}
    return {**{spelling: known for known in MODELS for spelling in known.spellings}, **own}


_BY_SPELLING = _by_spelling()


@dataclass(frozen=True, slots=True)
class ModelName:
    """What is meant by a name."""

    name: str
    """auto, demo, the folder as it was given, or a repository on the Hub."""
    folder: Path | None = None
    """Where it lies, if it is demo or a folder."""
    revision: str = "main"
    known: KnownModel | None = None

    @property
    def is_automatic(self) -> bool:
        return self.name == AUTO and self.folder is None


def read_name(model: str) -> ModelName:
    """auto, demo, a folder, a short name, or name@revision. Raises UnknownModelError. No network."""
    word = model.strip()
    path = Path(os.path.expanduser(word))  # Path's own raises for a user that is not there
    is_folder = bool(word) and path.is_dir()
    if word == AUTO or (word.lower() == AUTO and not is_folder):
        return ModelName(AUTO)
    if word == DEMO or (word.lower() == DEMO and not is_folder):
        return ModelName(DEMO, DEMO_FOLDER)
    if is_folder:
        return ModelName(word, path)
    name, _, revision = word.partition("@")
    known = _BY_SPELLING.get(name.lower())
    name = known.name if known else name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or path.is_file():
        raise UnknownModelError(
            f"There is no model '{model}': it is no folder and no name on the Hub (like openai/whisper-large-v3). "
            f"Short names are {', '.join(short for known in MODELS for short in known.short_names)}, demo and auto."
        )
    return ModelName(name, None, revision or "main", known)
