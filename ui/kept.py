"""The last comparison of each browser, on disk after every row: a closed or reloaded page loses no measured row.

In: the browser's name (128 random bits that page.js makes and keeps: nobody can guess another one's) and a run card.
Out: the card again, and the recording that it was measured on, if that is still there. Files are deleted after a week.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from errors import SottoError
from transcription.run_card import RunCard, read_card, to_json
from ui.recording import Chosen

logger = logging.getLogger(__name__)

KEEP_S = 7 * 24 * 3600
_NAME = re.compile(r"[0-9a-f]{32}")
"""What comes back from a browser is anybody's text, and becomes a file's name."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A folder of them. None: nothing is kept."""

    folder: Path | None = None

    def put(self, browser: str, card: RunCard, recording: Chosen) -> None:
        """Replace what this browser had. A disk that is full is logged: the page still holds what was measured."""
        path = self._path(browser)
        if path is None:
            return
        content = {"card": to_json(card), "path": str(recording.path), "name": recording.name}
        half = path.with_suffix(f".{secrets.token_hex(4)}.half")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps(content), encoding="utf-8")
            os.replace(half, path)
            self._clear()
        except OSError as error:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            logger.warning("event=comparison_not_kept reason=%s", error)

    def get(self, browser: str) -> tuple[RunCard, Chosen | None] | None:
        """(card, its recording where that still exists); None where nothing is kept."""
        path = self._path(browser)
        try:
            if path is None or not path.is_file():
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            chosen = Chosen(Path(content["path"]), content["name"])
            return read_card(content["card"], path.name), chosen if chosen.path.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, SottoError) as error:
            logger.warning("event=kept_comparison_unreadable reason=%s", error)
            return None

    def _path(self, browser: str) -> Path | None:
        is_name = isinstance(browser, str) and _NAME.fullmatch(browser)
        return self.folder / f"{browser}.json" if self.folder is not None and is_name else None

    def _clear(self) -> None:
        assert self.folder is not None
        for file in self.folder.iterdir():
            with suppress(OSError):  # another page's row, just moved to its place
                if time.time() - file.stat().st_mtime > KEEP_S:
                    file.unlink(missing_ok=True)
