"""What a person sees on the terminal, and the log file that everything else goes to.

Results are printed on standard output, everything about them on standard error. Libraries' warnings and log lines never
reach the terminal: they are in the log file.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from settings import Settings

if TYPE_CHECKING:
    from model_loader.fit import Foresight
    from model_loader.weights import DownloadProgress
    from transcription.interface import TranscriptionRun


class Download:
    """A checkpoint's download on standard error: one line that counts on a terminal, else a line per tenth."""

    def __init__(self) -> None:
        self._tenth = -1

    def __call__(self, progress: DownloadProgress) -> None:
        done, total = progress.done_bytes, max(progress.total_bytes, 1)
        line = f"Downloading {progress.model}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif 10 * done // total != self._tenth:
            self._tenth = 10 * done // total
            complain(line)


class FitWarning:
    """On standard error, before a byte of weights is read: that they may not fit. Each sentence once."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, seen: Foresight) -> None:
        warning = seen.verdict.warning
        if warning and warning != self._said:
            complain(warning)
        self._said = warning


class Bar:
    """Progress on standard error while a run is iterated, where that is a terminal."""

    WIDTH = 30

    def __init__(self) -> None:
        self._is_drawn = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write("")

    def above(self, line: str) -> None:
        """A line of text on standard output; the bar moves down."""
        self._write("")
        say(line)

    def show(self, run: TranscriptionRun) -> None:
        progress = run.progress
        total_s = progress.total_s or 0.0
        n_full = min(round(self.WIDTH * progress.done_s / total_s), self.WIDTH) if total_s else 0
        length = f"{progress.done_s:.0f}/{total_s:.0f} s" if total_s else f"{progress.done_s:.0f} s"
        rest = f", {progress.eta_s:.0f} s left" if progress.eta_s else ""
        self._write(f"[{'#' * n_full}{'.' * (self.WIDTH - n_full)}] {length}{rest}")

    def _write(self, line: str) -> None:
        if self._is_drawn:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)  # erase the line, then draw


def say(line: str) -> None:
    print(line, flush=True)


def complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_utf8(*streams: TextIO) -> None:
    """Text in any language, wherever the output goes; a file name that is not text is shown escaped."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@contextmanager
def log_to_file(settings: Settings) -> Iterator[Path]:
    """Every logger and warning of this process into one rotating file; nothing on the terminal."""
    path = _log_path(settings.work_dir)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=5_000_000, backupCount=3, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"))
    root, before = logging.getLogger(), (logging.getLogger().level, logging.getLogger().handlers[:])
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    if settings.log_level != "debug":
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    logging.captureWarnings(True)
    try:
        yield path
    finally:
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        handler.close()


def _log_path(work_dir: Path) -> Path:
    """work_dir/sotto.log, or one in the temporary folder where work_dir cannot be written."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        path = work_dir / "sotto.log"
        with path.open("a", encoding="utf-8"):
            return path
    except OSError:
        return Path(tempfile.gettempdir()) / f"sotto-{os.getuid()}.log"


def quiet_libraries() -> None:
    """Libraries that print or set up their own handlers are told to use the log like everybody else."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
