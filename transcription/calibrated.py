"""Calibrated folders that somebody names: what is refused before any work.

In: the folder that a calibration shall be written to or read from. Out: nothing or its report, else a sentence. A
calibration takes minutes and a comparison too: neither may end at a path that could have been looked at first.
"""

from __future__ import annotations

from pathlib import Path

from errors import OptionError
from model_loader.calibration import MANIFEST, WEIGHTS, CalibrationReport
from transcription.files import check_folder, explain


def check_target(out: Path, *, is_own: bool = False) -> None:
    """Whether a calibration can be written to this folder, which is not made yet.

    is_own: a place of Sotto's own, where what an interrupted run left may be written over. Any other folder must be
    new, empty or hold a calibration: a checkpoint's files have the same names. Raises OptionError, DiskFullError.
    """
    option = "--work-dir" if is_own else "--out"
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise OptionError(f"{out} cannot be a folder, because {there} is a file; choose another {option}.")
        if there == out and not is_own and not (out / MANIFEST).exists() and any(out.iterdir()):
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{folder / MANIFEST} cannot be read ({error}); calibrate again: ./start.sh calibrate --out DIR."
        ) from error
