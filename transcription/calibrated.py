"""Calibrated folders that somebody names: what is refused before any work.

In: the folder that a calibration shall be written to or read from. Out: nothing or its report, else a sentence. A
calibration takes minutes and a comparison too: neither may end at a path that could have been looked at first.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from errors import ModelUnavailableError, OptionError
from model_loader.calibration import MANIFEST, STAGING, WEIGHTS, CalibrationReport
from model_loader.precision import is_automatic, resolve_precision
from transcription.files import check_folder, explain


def check_target(out: Path, *, is_own: bool = False) -> None:
    """Whether a calibration can be written to this folder, which is not made yet.

    is_own: a place of Sotto's own, where anything may be written over. Any other folder must be new, empty or hold a
    calibration, or what one left that was killed: a checkpoint's files have the same names. Raises OptionError,
    DiskFullError.
    """
    option = "--work-dir" if is_own else "--out"
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise OptionError(f"{out} cannot be a folder, because {there} is a file; choose another {option}.")
        is_ours = is_own or any((out / name).exists() for name in (MANIFEST, STAGING))
        if there == out and not is_ours and any(out.iterdir()):
            raise OptionError(
                f"{out} holds other files and no calibration. Choose a new or an empty folder with {option}, or one "
                "with a calibration, which is then replaced."
            )
    except OSError as error:
        raise explain(out, error, option) from error
    check_folder(there, option)


def read_calibrated(folder: Path) -> CalibrationReport:
    """The manifest of a calibrated folder. Raises OptionError if it is none."""
    if not folder.is_dir():
        raise OptionError(f"There is no folder {folder}; give one that './start.sh calibrate --out DIR' wrote.")
    lacking = [name for name in (MANIFEST, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise OptionError(
            f"{folder} holds no calibration ({lacking[0]} is missing); give a folder that './start.sh calibrate "
            "--out DIR' wrote."
        )
    try:
        return CalibrationReport.load(folder)
    except ModelUnavailableError as error:
        raise OptionError(str(error)) from error


def is_made(precision: str) -> bool:
    """Whether a calibration makes what this word asks for; 'auto' agrees too. Raises UnknownPrecisionError."""
    return is_automatic(precision) or resolve_precision(precision).needs_calibration


def made_at(folder: Path) -> datetime:
    """When this calibration was made, local time. Raises OSError."""
    return datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime)
