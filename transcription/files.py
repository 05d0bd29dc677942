"""Where transcripts are written: one file per recording and format, never over a recording, never half a file.

In: recordings, formats and the path a user gave. Out: a path for each pair, checked before any work starts, so that an
hour of transcription does not end in "permission denied".
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from errors import DiskFullError, OptionError
from transcription.formats import FORMATS, Format


def plan_files(sources: Sequence[Path], formats: Sequence[Format], output: str) -> dict[tuple[Path, str], Path]:
    """(recording, format name) -> file. One recording in one format may name the file itself; else output is a folder.

    The folder is made and tried out. Raises OptionError, DiskFullError.
    """
    path = Path(output).expanduser()
    is_folder = len(sources) * len(formats) > 1 or path.is_dir() or output.endswith(("/", os.sep))
    folder = path if is_folder else path.parent
    if is_folder:
        check_folder(folder)
    elif not _is_special(path):
        check_folder(_real(path).parent)
    elif not os.access(path, os.W_OK):
        raise OptionError(f"{path} cannot be written (no permission); choose another --output.")
    taken = {_real(source) for source in sources}
    files: dict[tuple[Path, str], Path] = {}
    for source in sources:
        for row in formats:
            file = folder / row.file_name(source.name) if is_folder else path
            if is_folder and _real(file) in taken:  # two recordings of one name, or a recording called .txt
                file = folder / f"{source.name}.{row.extension}"
            if _real(file) in taken:
                raise OptionError(
                    f"{file} would overwrite a recording or another result; give --output another name or folder."
                )
            taken.add(_real(file))
            files[source, row.name] = file
    return files


def format_of(output: str) -> Format | None:
    """The format that the ending of a file name asks for, if it is one."""
    ending = Path(output).suffix.lower().lstrip(".")
    return next((row for row in FORMATS.values() if row.extension == ending), None)


def write_file(path: Path, text: str) -> None:
    """Write UTF-8 beside the file, then move it there; a link stays a link. Raises OptionError, DiskFullError.

    A pipe or a device is written into: put in its place, a file would end it for every program.
    """
    try:
        if _is_special(path):
            path.write_bytes(text.encode("utf-8"))
            return
        path = _real(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".sotto-", delete=False) as temporary:
            try:
                temporary.write(text.encode("utf-8"))
                temporary.close()
                os.chmod(temporary.name, 0o666 & ~_umask())
                os.replace(temporary.name, path)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except OSError as error:
        raise explain(path, error) from error


def check_folder(folder: Path, option: str = "--output") -> None:
    """Make the folder and try it out. option: which one named it. Raises OptionError, DiskFullError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise explain(folder, error, option) from error


def _is_special(path: Path) -> bool:
    """What is there and is neither file nor folder; or what a program has opened already, be it a file."""
    is_opened = any(path.is_relative_to(name) for name in ("/dev/stdout", "/dev/stderr", "/dev/fd", "/proc/self/fd"))
    return is_opened or (path.exists() and not path.is_file() and not path.is_dir())


def explain(path: Path, error: OSError, option: str = "--output") -> OptionError | DiskFullError:
    """Why nothing can be written there, for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"There is no room left to write {path}; free some space or choose another {option}.")
    return OptionError(f"{path} cannot be written ({error.strerror}); choose another {option}.")


def _real(path: Path) -> Path:
    return path.expanduser().resolve()


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
