"""Checkpoints on the Hugging Face Hub or a mirror: what is cached, what is reachable, and downloads that resume.

In: a repository name. Out: a snapshot folder in Hugging Face's own cache, complete or an error. Only the files that a
load needs are fetched: safetensors where the repository has them, never the same weights twice in another format.

Large files are fetched by transfer.py, which continues them at any later start, and are put where huggingface_hub
finds them; it fetches the small ones and lays out the snapshot.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import DiskFullError, ModelUnavailableError, UnknownModelError
from model_loader.files import read_index, read_object
from model_loader.transfer import fetch

logger = logging.getLogger(__name__)

REACHABLE_TIMEOUT_S = 3.0
"""How long `auto` waits for the Hub before it takes what is on disk."""

_LARGE_BYTES = 8_000_000
"""From here on a file is worth continuing."""

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
    """The complete snapshot of a repository in the cache, or None. No network.

    Raises UnknownModelError for a name that the Hub does not allow.
    """
    with hub_errors(name, None):
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
            return missing + [shard for shard in read_index(index) if not (folder / shard).is_file()]
    return [*missing, WEIGHTS[0]]


class _Question:
    """Whether a URL answers, asked on a thread: a name server that does not answer blocks beyond any timeout."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._answers: list[bool] = []
        self._until_s = time.monotonic() + timeout_s
        self._thread = threading.Thread(target=self._ask, args=(url, timeout_s), name="hub-reachable", daemon=True)
        self._thread.start()

    def answer(self) -> bool:
        """Waits until it is there or the time is up."""
        self._thread.join(max(self._until_s - time.monotonic(), 0.0))
        return bool(self._answers and self._answers[0])

    def _ask(self, url: str, timeout_s: float) -> None:
        import httpx

        try:
            self._answers.append(httpx.head(url, timeout=timeout_s, follow_redirects=True).status_code < 400)
        except httpx.HTTPError as error:
            logger.info("event=hub_unreachable url=%s error=%r", url, error)


_asked: dict[str, _Question] = {}
"""By URL: asked ahead, and not taken yet."""


def ask_ahead(name: str, mirror: str | None, timeout_s: float = REACHABLE_TIMEOUT_S) -> None:
    """Ask now what is_reachable will be asked, so that a Hub that keeps silent is waited for beside other work."""
    url = _repository_url(name, mirror)
    _asked[url] = _Question(url, timeout_s)


def is_reachable(name: str, mirror: str | None, timeout_s: float = REACHABLE_TIMEOUT_S) -> bool:
    """Whether the Hub (or the mirror) answers for this repository, decided within timeout_s."""
    url = _repository_url(name, mirror)
    question = _asked.pop(url, None) or _Question(url, timeout_s)
    return question.answer()


def _repository_url(name: str, mirror: str | None) -> str:
    return f"{_endpoint(mirror)}/api/models/{name}"


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

    with hub_errors(name, mirror):
        info = HfApi(endpoint=mirror, token=token).model_info(name, revision=revision, files_metadata=True, timeout=30)
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
        commit = str(info.sha)
        bar = _silent_bar()
        common: dict[str, Any] = {
            "revision": commit,
            "cache_dir": cache_dir,
            "endpoint": mirror,
            "token": token,
            "tqdm_class": bar,
        }
        folder = (cache_dir or Path(constants.HF_HUB_CACHE)) / f"models--{name.replace('/', '--')}"
        if "config.json" in sizes:
            check_config(read_object(Path(hf_hub_download(name, "config.json", **common))))
        wanted = _wanted(sizes, name)
        total_bytes = sum(sizes[file] for file in wanted)
        _require_room(folder, total_bytes, name)
        logger.info("event=download_started model=%s commit=%s total_bytes=%d", name, commit, total_bytes)
        counter = _Counter(name, total_bytes, on_progress)
        large = [file for file in wanted if sizes[file] >= _LARGE_BYTES]
        for file in large:
            _fetch_blob(name, file, commit, folder, mirror, token, counter.add)
        snapshot = snapshot_download(name, **common, allow_patterns=wanted)
        counter.add(sum(sizes[file] for file in wanted if file not in large))
        # The branch's name leads to this commit from now on, so that a start without a network finds it.
        _remember_branch(Path(snapshot), revision, commit)
    missing = missing_files(Path(snapshot))
    if missing:
        raise ModelUnavailableError(f"{name} on the Hub lacks {', '.join(missing)}; choose another model.")
    return Path(snapshot)


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
    have_bytes = sum(path.stat().st_size for path in (folder / "blobs").glob("*"))  # whole or begun
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes + have_bytes < total_bytes:
        raise DiskFullError(
            f"{name} takes {total_bytes / 1e9:.1f} GB and the disk of {folder} has {free_bytes / 1e9:.1f} GB free. "
            "Make room, or choose another --cache-dir or a smaller model."
        )


@dataclass(slots=True)
class _Counter:
    """Adds up the bytes of all files for one listener."""

    name: str
    total_bytes: int
    on_progress: Callable[[DownloadProgress], None] | None
    done_bytes: int = 0

    def add(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        if self.on_progress is not None:
            self.on_progress(DownloadProgress(self.name, self.done_bytes, self.total_bytes))


def _fetch_blob(
    name: str,
    file: str,
    commit: str,
    folder: Path,
    mirror: str | None,
    token: str | None,
    on_bytes: Callable[[int], None],
) -> None:
    """Put one file of a commit among the blobs of the repository's folder in the cache, which are named by etag."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(name, file, revision=commit, endpoint=mirror)
    metadata = get_hf_file_metadata(url, token=token, endpoint=mirror)
    if metadata.etag is None or metadata.size is None:
        return  # an unusual server: left to huggingface_hub
    path = folder / "blobs" / metadata.etag
    headers = build_hf_headers(token=token)
    fetch(url, path, n_bytes=metadata.size, checksum=metadata.etag, headers=headers, on_bytes=on_bytes)


def _silent_bar() -> Any:
    """A tqdm class that draws nothing: progress is the caller's to show."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


@contextmanager
def hub_errors(name: str, mirror: str | None) -> Iterator[None]:
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
