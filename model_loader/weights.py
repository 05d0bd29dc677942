"""A model's name -> a checkpoint folder on disk that is a Whisper, complete and of known revision.

In: 'auto', 'demo', a folder, or a Hub name (openai/whisper-large-v3, large-v3, name@revision). Out: a Checkpoint.
A checkpoint in the cache is used without asking the Hub: starts are fast, work without a network, and repeat.
'auto' is decided within seconds; see _automatic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import DiskFullError, ModelError, ModelUnavailableError, UnknownModelError
from model_loader.device import DeviceInfo
from model_loader.files import Sizes, read_config, read_object, read_tensors, weight_names
from model_loader.hub import DownloadProgress, ask_ahead, download, find_cached, is_reachable, missing_files
from model_loader.memory import free_bytes
from model_loader.names import AUTOMATIC, DEMO, DEMO_FOLDER, MODELS, KnownModel, read_name

logger = logging.getLogger(__name__)

__all__ = ["DEMO", "DEMO_FOLDER", "MODELS", "Checkpoint", "DownloadProgress", "resolve_checkpoint"]

_MANY_CORES = 8
"""From here on a CPU keeps up with speech at 'small'; below, 'base' is the choice."""


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
    is_calibrated_demo: bool = False
    """A folder with the demo checkpoint's own weights in 8 bits: it hears no better than they do."""

    @property
    def is_demo(self) -> bool:
        return self.source == "demo" or self.is_calibrated_demo


def resolve_checkpoint(
    model: str,
    *,
    device: DeviceInfo,
    offline: bool = False,
    on_progress: Callable[[DownloadProgress], None] | None = None,
    token: str | None = None,
    mirror: str | None = None,
    cache_dir: Path | None = None,
    on_sizes: Callable[[str, Sizes], None] | None = None,
) -> Checkpoint:
    """Find or fetch a checkpoint, and check that it is a whole Whisper.

    device: for 'auto', which takes what fits. offline: never contact the Hub. mirror: its address, if not the default.
    on_sizes: told the name and the sizes of what is about to be fetched, once config.json is here and no weights are.
    Raises UnknownModelError, ModelUnavailableError, NotWhisperError, DiskFullError.
    """
    shelf = _Shelf(offline, on_progress, token, mirror, cache_dir, on_sizes)
    asked = read_name(model)
    if asked.is_automatic:
        return _automatic(device, shelf)
    if asked.folder is not None:
        return _from_folder(asked.folder)
    return shelf.take(asked.name, asked.revision)


@dataclass(frozen=True, slots=True)
class _Shelf:
    """Where Hub checkpoints come from."""

    offline: bool
    on_progress: Callable[[DownloadProgress], None] | None
    token: str | None
    mirror: str | None
    cache_dir: Path | None
    on_sizes: Callable[[str, Sizes], None] | None

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
            check_config=lambda config: self._tell(name, Sizes.from_config(config, name)),
            on_progress=self.on_progress,
        )
        return Checkpoint(folder, name, folder.name, "hub", _checked(folder, name))

    def _tell(self, name: str, sizes: Sizes) -> None:
        if self.on_sizes is not None:
            self.on_sizes(name, sizes)

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
    try:
        if not read_name(model).is_automatic:
            return
    except UnknownModelError:  # said when it is loaded
        return
    wanted = fitting(device)[0].name
    if find_cached(wanted, "main", cache_dir) is None:
        ask_ahead(wanted, mirror)


def fitting(device: DeviceInfo) -> list[KnownModel]:
    """What 'auto' may take on this device, best first; never empty."""
    if device.kind == "cpu":
        names = ("small", "base", "tiny") if device.n_cores >= _MANY_CORES else ("base", "tiny")
        return [known for name in names for known in AUTOMATIC if known.short_name == name]
    free = free_bytes(device.torch_device)
    return [known for known in AUTOMATIC if (known.needs_bytes or 0) <= free] or [AUTOMATIC[-1]]


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
    config, revision = _checked(folder, str(folder)), folder.name if in_cache else None
    return Checkpoint(folder, name, revision, "folder", config, is_calibrated_demo=_is_calibrated_demo(folder))


def _is_calibrated_demo(folder: Path) -> bool:
    """Raises ModelUnavailableError if it holds a calibration whose manifest is damaged."""
    from model_loader.calibration import MANIFEST, CalibrationReport  # which brings torch

    if not (folder / MANIFEST).exists():
        return False
    report = CalibrationReport.load(folder)
    return report.model == DEMO and report.is_of(DEMO_FOLDER)


def _checked(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a folder that is a whole Whisper checkpoint."""
    config, generation = read_config(folder, name), folder / "generation_config.json"
    if generation.is_file():  # it may be missing
        read_object(generation)
    missing = missing_files(folder)
    if missing:
        raise ModelUnavailableError(
            f"The checkpoint {name} is not complete: {', '.join(missing)} is missing from {folder}. Fetch it again, or "
            "choose another model."
        )
    for file in weight_names(folder):
        _require_whole(folder / file)
    return config


def _require_whole(path: Path) -> None:
    """Compare a safetensors file's size with its header: 8 bytes of header length, the header, then the tensors."""
    if not path.is_file():
        return  # weights in another format
    size, table = path.stat().st_size, read_tensors(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    expected = start + max((tensor.end for tensor in table.values()), default=0)
    if size < expected:
        raise ModelUnavailableError(
            f"{path} is cut off: {size / 1e6:.1f} of {expected / 1e6:.1f} MB are there. Delete it and fetch the model "
            "again."
        )
