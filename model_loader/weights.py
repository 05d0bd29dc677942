"""A model's name -> a checkpoint folder on disk that is a Whisper, complete and of known revision.

In: 'auto', 'demo', a folder, or a Hub name (openai/whisper-large-v3, large-v3, name@revision). Out: a Checkpoint.
A checkpoint in the cache is used without asking the Hub: starts are fast, work without a network, and repeat.
'auto' is decided within seconds; see _automatic.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import DiskFullError, ModelError, ModelUnavailableError, NotWhisperError, UnknownModelError
from model_loader.device import DeviceInfo
from model_loader.hub import DownloadProgress, ask_ahead, download, find_cached, is_reachable, missing_files, shards
from model_loader.memory import free_bytes

logger = logging.getLogger(__name__)

__all__ = ["DEMO", "DEMO_FOLDER", "MODELS", "Checkpoint", "DownloadProgress", "resolve_checkpoint"]

AUTO = "auto"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "models" / "demo"
"""The checkpoint that ships in the repository: a small Whisper trained on synthetic speech."""

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A checkpoint that 'auto' may choose, and the short name it goes by."""

    name: str
    short_name: str
    needs_bytes: int
    """Free GPU memory for fp16 weights, one batch and the CUDA context."""


MODELS: tuple[KnownModel, ...] = (
    KnownModel("openai/whisper-large-v3", "large-v3", 6 * _GIB),
    KnownModel("openai/whisper-large-v3-turbo", "large-v3-turbo", 4 * _GIB),
    KnownModel("openai/whisper-medium", "medium", 4 * _GIB),
    KnownModel("openai/whisper-small", "small", 2 * _GIB),
    KnownModel("openai/whisper-base", "base", _GIB),
    KnownModel("openai/whisper-tiny", "tiny", _GIB),
)
"""Best first."""

_MANY_CORES = 8
"""From here on a CPU keeps up with speech at 'small'; below, 'base' is the choice."""


_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights on disk."""

    folder: Path
    name: str
    """Hub name, 'demo', or the folder's name."""
    revision: str | None
    """Commit on the Hub; None for a folder that does not come from its cache."""
    source: str
    """folder, hub (just fetched), cache or demo."""
    config: dict[str, Any] = field(repr=False)
    """config.json"""
    choice: str | None = None
    """Why this one, in a sentence, where 'auto' chose it."""

    @property
    def is_demo(self) -> bool:
        return self.source == "demo"


def resolve_checkpoint(
    model: str,
    *,
    device: DeviceInfo,
    offline: bool = False,
    on_progress: Callable[[DownloadProgress], None] | None = None,
    token: str | None = None,
    mirror: str | None = None,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """Find or fetch a checkpoint, and check that it is a whole Whisper.

    device: for 'auto', which takes what fits. offline: never contact the Hub. mirror: its address, if not the default.
    Raises UnknownModelError, ModelUnavailableError, NotWhisperError, DiskFullError.
    """
    shelf = _Shelf(offline, on_progress, token, mirror, cache_dir)
    word = model.strip()
    if word == AUTO:
        return _automatic(device, shelf)
    if word == DEMO:
        return _demo()
    path = Path(word).expanduser()
    if word and path.is_dir():
        return _from_folder(path)
    name, _, revision = word.partition("@")
    name = next((known.name for known in MODELS if name in (known.short_name, f"whisper-{known.short_name}")), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or path.is_file():
        raise UnknownModelError(
            f"There is no model '{model}': it is no folder and no name on the Hub (like openai/whisper-large-v3). "
            f"Short names are {', '.join(known.short_name for known in MODELS)}, demo and auto."
        )
    return shelf.take(name, revision or "main")


@dataclass(frozen=True, slots=True)
class _Shelf:
    """Where Hub checkpoints come from."""

    offline: bool
    on_progress: Callable[[DownloadProgress], None] | None
    token: str | None
    mirror: str | None
    cache_dir: Path | None

    def find(self, name: str, revision: str = "main") -> Checkpoint | None:
        """From the cache; None if it is not there, or not whole."""
        folder = find_cached(name, revision, self.cache_dir)
        if folder is None:
            return None
        return Checkpoint(folder, name, folder.name, "cache", _checked(folder, name))

    def fetch(self, name: str, revision: str = "main") -> Checkpoint:
        folder = download(
            name,
            revision,
            cache_dir=self.cache_dir,
            mirror=self.mirror,
            token=self.token,
            check_config=lambda config: _require_whisper(config, name),
            on_progress=self.on_progress,
        )
        return Checkpoint(folder, name, folder.name, "hub", _checked(folder, name))

    def take(self, name: str, revision: str) -> Checkpoint:
        found = self.find(name, revision)
        if found is not None:
            return found
        if self.offline:
            raise ModelUnavailableError(
                f"{name} is not complete in the cache and --offline forbids to fetch it. Start once without --offline, "
                "give a checkpoint folder, or choose --model demo."
            )
        return self.fetch(name, revision)


def _automatic(device: DeviceInfo, shelf: _Shelf) -> Checkpoint:
    """The best checkpoint that fits the device and can be had within seconds, and why.

    In this order: the wanted one from the cache; from the Hub, if it answers in 3 s; another one from the cache, the
    largest that fits; the demo checkpoint.
    """
    candidates = fitting(device)
    wanted = candidates[0]
    found = shelf.find(wanted.name)
    if found is not None:
        return replace(found, choice=f"{wanted.name} is the best fit for {device.label} and is on this disk.")
    reason = "--offline was given"
    if not shelf.offline:
        reason = "the Hub does not answer"
        if is_reachable(wanted.name, shelf.mirror):
            try:
                fetched = shelf.fetch(wanted.name)
                return replace(fetched, choice=f"{wanted.name} is the best fit for {device.label}.")
            except (ModelError, DiskFullError) as error:
                reason = f"fetching it failed: {str(error).rstrip('.')}"
    for known in candidates[1:]:
        found = shelf.find(known.name)
        if found is not None:
            return replace(found, choice=f"{known.name} is on this disk; {wanted.name} is not, and {reason}.")
    return replace(_demo(), choice=f"{wanted.name} is not on this disk and {reason}, so the demo model is used.")


def ask_hub_ahead(model: str, device: DeviceInfo, *, mirror: str | None, cache_dir: Path | None) -> None:
    """Where 'auto' will have to ask the Hub, ask it now: a silent one takes three seconds."""
    if model.strip() != AUTO:
        return
    wanted = fitting(device)[0].name
    if find_cached(wanted, "main", cache_dir) is None:
        ask_ahead(wanted, mirror)


def fitting(device: DeviceInfo) -> list[KnownModel]:
    """What 'auto' may take on this device, best first; never empty."""
    if device.kind == "cpu":
        names = ("small", "base", "tiny") if device.n_cores >= _MANY_CORES else ("base", "tiny")
        return [known for name in names for known in MODELS if known.short_name == name]
    free = free_bytes(device.torch_device)
    return [known for known in MODELS if known.needs_bytes <= free] or [MODELS[-1]]


def _demo() -> Checkpoint:
    if not (DEMO_FOLDER / "config.json").is_file():
        raise ModelUnavailableError(
            f"The demo model is missing from {DEMO_FOLDER}; restore it from the repository, or choose a model by name."
        )
    return Checkpoint(DEMO_FOLDER, DEMO, None, "demo", _checked(DEMO_FOLDER, DEMO))


def _from_folder(folder: Path) -> Checkpoint:
    folder = folder.resolve()
    if folder == DEMO_FOLDER:
        return _demo()
    # A snapshot of Hugging Face's cache: models--openai--whisper-tiny/snapshots/<commit>
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    name = folder.parent.parent.name.removeprefix("models--").replace("--", "/") if in_cache else folder.name
    return Checkpoint(folder, name, folder.name if in_cache else None, "folder", _checked(folder, str(folder)))


def _checked(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a folder that is a whole Whisper checkpoint."""
    config = _read_config(folder, name)
    _require_whisper(config, name)
    missing = missing_files(folder)
    if missing:
        raise ModelUnavailableError(
            f"The checkpoint {name} is not complete: {', '.join(missing)} is missing from {folder}. Fetch it again, or "
            "choose another model."
        )
    index = folder / "model.safetensors.index.json"
    for file in shards(index) if index.is_file() else ["model.safetensors"]:
        _require_whole(folder / file)
    return config


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotWhisperError(
            f"{folder} is not a Whisper checkpoint: it has no config.json. Give a folder in Hugging Face's format."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"config.json of {name} cannot be read ({error}); fetch the model again."
        ) from error
    return config if isinstance(config, dict) else {}


def _require_whisper(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind != "whisper":
        raise NotWhisperError(
            f"{name} is {f'a {kind} model' if kind else 'of unknown type'}, not a Whisper. Choose a Whisper checkpoint "
            "in Hugging Face's format, for example openai/whisper-large-v3."
        )


def _require_whole(path: Path) -> None:
    """Compare a safetensors file's size with its header: 8 bytes of header length, the header, then the tensors."""
    if not path.is_file():
        return  # weights in another format
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length)) if length < size else {}
        expected = (
            8
            + length
            + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        )
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ModelUnavailableError(f"{path} is not a safetensors file; fetch the model again.") from error
    if size < expected:
        raise ModelUnavailableError(
            f"{path} is cut off: {size / 1e6:.1f} of {expected / 1e6:.1f} MB are there. Delete it and fetch the model "
            "again."
        )
