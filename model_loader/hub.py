"""Checkpoints on the Hugging Face Hub or a mirror: what is cached, what is reachable, and downloads that resume.

In: a repository name. Out: a snapshot folder in Hugging Face's own cache, complete or an error. Only the files that a
load needs are fetched: safetensors where the repository has them, never the same weights twice in another format.

Resume: huggingface_hub keeps finished files from one start to the next and continues a broken transfer while the
program runs, but drops the part of a file when the program ends. Large files are therefore fetched here, beside its
cache, and continued at any later start; then they are handed to it. Mirrors and plain HTTP servers can do it (Range).
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import DiskFullError, ModelUnavailableError, UnknownModelError

logger = logging.getLogger(__name__)

REACHABLE_TIMEOUT_S = 3.0
"""How long `auto` waits for the Hub before it takes what is on disk."""

_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab.json",
    "merges.txt",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files, in order of preference; shards are listed in <name>.index.json."""


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """Bytes of one checkpoint on their way."""

    model: str
    done_bytes: int
    total_bytes: int


def find_cached(name: str, revision: str, cache_dir: Path | None) -> Path | None:
    """The complete snapshot of a repository in the cache, or None. No network."""
    folder = _cached_folder(name, revision, cache_dir)
    return folder if folder is not None and not missing_files(folder) else None


def missing_files(folder: Path) -> list[str]:
    """What a load needs and the folder lacks; broken links of an interrupted download count as missing."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / "tokenizer.json").is_file():
        missing += [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    for name in WEIGHTS:
        if (folder / name).is_file():
            return missing
        index = folder / f"{name}.index.json"
        if index.is_file():
            return missing + [shard for shard in shards(index) if not (folder / shard).is_file()]
    return [*missing, WEIGHTS[0]]


def shards(index: Path) -> list[str]:
    """File names of a sharded checkpoint. Raises ModelUnavailableError if the index is damaged."""
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(names.values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelUnavailableError(f"{index} is damaged; fetch the checkpoint again.") from error


def is_reachable(name: str, mirror: str | None, timeout_s: float = REACHABLE_TIMEOUT_S) -> bool:
    """Whether the Hub (or the mirror) answers for this repository, decided within timeout_s."""
    import httpx

    answer: list[bool] = []
    url = f"{_endpoint(mirror)}/api/models/{name}"

    def ask() -> None:
        try:
            answer.append(httpx.head(url, timeout=timeout_s, follow_redirects=True).status_code < 400)
        except httpx.HTTPError as error:
            logger.info("event=hub_unreachable url=%s error=%r", url, error)

    # A name server that does not answer blocks beyond any timeout of the request, hence the thread.
    thread = threading.Thread(target=ask, name="hub-reachable", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answer and answer[0])


def download(
    name: str,
    revision: str,
    *,
    cache_dir: Path | None,
    mirror: str | None,
    token: str | None,
    check_config: Callable[[dict[str, Any]], None],
    on_progress: Callable[[DownloadProgress], None] | None,
) -> Path:
    """Fetch one repository and return its snapshot folder, whose name is the commit.

    check_config: called with config.json before any weights are fetched, to refuse other architectures.
    Raises UnknownModelError, ModelUnavailableError, DiskFullError.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    with _hub_errors(name, mirror):
        info = HfApi(endpoint=mirror, token=token).model_info(name, revision=revision, files_metadata=True, timeout=30)
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
        commit = str(info.sha)
        common: dict[str, Any] = {"revision": commit, "cache_dir": cache_dir, "endpoint": mirror, "token": token}
        if "config.json" in sizes:
            path = hf_hub_download(name, "config.json", **common)
            check_config(json.loads(Path(path).read_text(encoding="utf-8")))
        wanted = _wanted(sizes, name)
        total_bytes = sum(sizes[file] for file in wanted)
        _require_room(Path(cache_dir or constants.HF_HUB_CACHE), total_bytes, name)
        logger.info("event=download_started model=%s commit=%s total_bytes=%d", name, commit, total_bytes)
        folder = snapshot_download(
            name,
            **{**common, "revision": commit},
            allow_patterns=wanted,
            tqdm_class=_reporting_bar(name, total_bytes, on_progress),
        )
        # The branch's name leads to this commit from now on, so that a start without a network finds it.
        _remember_branch(Path(folder), revision, commit)
    missing = missing_files(Path(folder))
    if missing:
        raise ModelUnavailableError(f"{name} on the Hub lacks {', '.join(missing)}; choose another model.")
    return Path(folder)


def _cached_folder(name: str, revision: str, cache_dir: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision, cache_dir=cache_dir)
    return Path(path).parent if isinstance(path, str) else None


def _remember_branch(folder: Path, revision: str, commit: str) -> None:
    """refs/<branch> in the cache, which huggingface_hub writes only when asked for the branch by name."""
    if revision == commit:
        return
    reference = folder.parent.parent / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit, encoding="ascii")


def _wanted(sizes: dict[str, int], name: str) -> list[str]:
    """The files to fetch: settings, tokenizer and one set of weights."""
    for weights in WEIGHTS:
        stem, suffix = weights.rsplit(".", 1)
        files = [weights] if weights in sizes else []
        if not files and f"{weights}.index.json" in sizes:
            files = [f"{weights}.index.json", *(f for f in sizes if f.startswith(f"{stem}-") and f.endswith(suffix))]
        if files:
            return [*(file for file in _SETTINGS if file in sizes), *files]
    raise ModelUnavailableError(
        f"{name} on the Hub has no weights that can be loaded ({' or '.join(WEIGHTS)}); choose another model."
    )


def _require_room(folder: Path, total_bytes: int, name: str) -> None:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < total_bytes:
        raise DiskFullError(
            f"{name} takes {total_bytes / 1e9:.1f} GB and the disk of {folder} has {free_bytes / 1e9:.1f} GB free. "
            "Make room, or choose another --cache-dir or a smaller model."
        )


def _reporting_bar(name: str, total_bytes: int, on_progress: Callable[[DownloadProgress], None] | None) -> Any:
    """A silent tqdm class that reports the bytes of all files together."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    done = [0]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of its three bars huggingface_hub feeds this one with bytes written, resumed ones included.
            self._counts_bytes = str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes and on_progress is not None:
                with lock:
                    done[0] += int(n or 0)
                    on_progress(DownloadProgress(name, min(done[0], total_bytes), total_bytes))
            return None

    return Bar


@contextmanager
def _hub_errors(name: str, mirror: str | None) -> Iterator[None]:
    """Errors of huggingface_hub and of the network as ours."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = _endpoint(mirror)
    try:
        yield
    except GatedRepoError as error:
        raise ModelUnavailableError(
            f"{name} is gated: accept its conditions on {where}/{name}, then give your access token in HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UnknownModelError(
            f"{where} knows no model '{name}', or keeps it private; check the name (for example "
            "openai/whisper-large-v3), or give your access token in HF_TOKEN."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"The disk became full while {name} was downloaded. Make room, or choose another --cache-dir; the "
                "download goes on where it stopped."
            ) from error
        raise _broken_off(name, where, error) from error
    except httpx.HTTPError as error:
        raise _broken_off(name, where, error) from error


def _broken_off(name: str, where: str, error: Exception) -> ModelUnavailableError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelUnavailableError(
        f"{name} could not be fetched from {where} ({lines[0].rstrip('.')}). Try again to go on where it stopped, name "
        "a mirror (--hub-mirror), or give a checkpoint folder."
    )


def _endpoint(mirror: str | None) -> str:
    from huggingface_hub import constants

    return str(mirror or constants.ENDPOINT).rstrip("/")
