"""One large file over HTTP, continued where it stopped: after a broken line, and after the program was ended.

In: a URL, a path, the size and the checksum. Out: the whole file at the path, or an error and a `.part` beside it that
the next call goes on with. Why not huggingface_hub's own: it drops the part of a file when the program ends (1.33).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

RETRIES = 5
"""In a row, without a single new byte."""
PAUSE_S = 1.0
"""Before a retry."""
TIMEOUT_S = 20.0
"""Without any byte from the server."""


def fetch(
    url: str,
    path: Path,
    *,
    n_bytes: int,
    checksum: str,
    headers: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    """Put the file at `path`, whole; at once if it is there.

    checksum: SHA-256 in hexadecimal digits; another kind of etag is not checked. on_bytes: told of bytes as they are
    there, those of earlier calls first. Raises httpx.HTTPError, OSError (disk full, wrong checksum).
    """
    import httpx
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with FileLock(f"{part}.lock"):
        if path.exists():
            on_bytes(n_bytes)
            return
        done = part.stat().st_size if part.exists() else 0
        if done > n_bytes:
            part.unlink()
            done = 0
        on_bytes(done)
        retries = RETRIES
        while done < n_bytes:
            try:
                _append(url, part, done, headers, on_bytes)
            except httpx.TransportError as error:
                now = part.stat().st_size if part.exists() else 0
                retries = RETRIES if now > done else retries - 1
                if retries == 0:
                    raise
                logger.info("event=transfer_broken_off path=%s at_bytes=%d error=%r", path.name, now, error)
                time.sleep(PAUSE_S)
            done = part.stat().st_size if part.exists() else 0
        _check(part, checksum)
        os.replace(part, path)


def _append(url: str, part: Path, done: int, headers: Mapping[str, str], on_bytes: Callable[[int], None]) -> None:
    """Ask for the rest and write it behind what is there."""
    import httpx

    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    with httpx.stream("GET", url, headers=wanted, timeout=TIMEOUT_S, follow_redirects=True) as response:
        response.raise_for_status()
        continues = response.status_code == 206
        if done and not continues:
            on_bytes(-done)  # the server sends everything again
        with part.open("ab" if continues else "wb") as file:
            for block in response.iter_raw():  # as it arrives: a block that is being filled would be lost with the line
                file.write(block)
                on_bytes(len(block))


def sha256_of(path: Path) -> str:
    """In hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(part: Path, checksum: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", checksum):
        return
    found = sha256_of(part)
    if found != checksum:
        part.unlink()
        raise OSError(f"the file that arrived is damaged: SHA-256 {found[:8]}..., not {checksum[:8]}...")
