"""What a comparison is asked for by words that somebody typed: read, and refused in one sentence before any work.

In: names of precisions, a text or its file, options. Out: what is meant, or an error. What every precision would
refuse alike is refused here once, instead of by a process each.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import errors
from errors import CalibrationMissingError, OptionError, SottoError, UnavailablePrecisionError

if TYPE_CHECKING:
    from model_loader.weights import Checkpoint, DownloadProgress
    from transcription.interface import CompareRow, PrecisionStatus, Source
    from transcription.options import TranscribeOptions

TEXT_ENDINGS = (".txt", ".md")
PATH_BEGINNINGS = ("/", "./", "../", "~")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


# --- reading ---------------------------------------------------------------------------------------------------------


def asked_names(given: str | None, rows: Sequence[PrecisionStatus]) -> list[str]:
    """Names with commas; None for all that run here. Raises OptionError for an empty list."""
    if given is None:
        return [row.name for row in rows if row.unavailable is None]
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise OptionError(
            "--precisions names none; give names with commas (fp32,bf16), or leave it out to measure all that run here."
        )
    return names


def reference_text(given: str) -> str:
    """The text itself, or the content of the file that it names. Raises OptionError."""
    path = Path(given).expanduser() if given.startswith("~/") else Path(given)
    try:
        if given and path.is_file():
            return _file_text(path)
    except OSError:  # too long for a path
        return given
    if _is_like_a_path(given):
        what = f"{given} is a folder" if path.is_dir() else f"There is no file {given}"
        raise OptionError(
            f"{what}, so the text that is said cannot be read from it. Give --text the path of a text file, or the "
            "words themselves; words that look like a path go into a file."
        )
    return given


def _is_like_a_path(given: str) -> bool:
    text = given.strip()
    return "\n" not in text and (text.lower().endswith(TEXT_ENDINGS) or text.startswith(PATH_BEGINNINGS))


def _file_text(path: Path) -> str:
    """In UTF-8, or as UTF-16 where its first two bytes say so."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OptionError(f"The text {path} cannot be read ({error.strerror}); choose another file.") from error
    try:
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    if "\0" in text:
        raise _no_text(path)
    return text


def _no_text(path: Path) -> OptionError:
    return OptionError(
        f"{path} is not UTF-8 text. Save it as a plain text file in the encoding UTF-8, or give --text the words "
        "themselves."
    )


# --- refusing --------------------------------------------------------------------------------------------------------


def refuse_if_none_runs(names: Sequence[str], rows: Sequence[PrecisionStatus]) -> None:
    """Raises UnavailablePrecisionError with the first reason where this device runs none of these."""
    from model_loader.precision import is_automatic, resolve_precision

    reasons = {row.name: row.unavailable for row in rows}
    found = [None if is_automatic(name) else reasons.get(resolve_precision(name).name) for name in names]
    if found and all(found):
        raise UnavailablePrecisionError(str(found[0]))


def refuse_unreadable(source: Source, *, max_bytes: int, max_duration_s: float) -> None:
    """The recording, before a checkpoint is fetched for it. Raises AudioError."""
    from audio.decode import decode_blocks

    decode_blocks(source, max_duration_s=max_duration_s, max_bytes=max_bytes).close()


def refuse_alike(
    names: Sequence[str],
    options: TranscribeOptions,
    *,
    model: str,
    device: str,
    offline: bool,
    token: str,
    mirror: str,
    cache_dir: Path | None,
    on_progress: Callable[[DownloadProgress], None],
    calibrations: Path | None,
) -> None:
    """The model, the options and a missing calibration, where no precision would do otherwise.

    calibrations: the folder that they are kept in; None where one was named. Raises ModelError, OptionError,
    CalibrationMissingError.
    """
    from model_loader.device import describe_device
    from model_loader.weights import resolve_checkpoint

    checkpoint = resolve_checkpoint(
        model,
        device=describe_device(device),
        offline=offline,
        on_progress=on_progress,
        token=token or None,
        mirror=mirror or None,
        cache_dir=cache_dir,
    )
    refuse_options(options, checkpoint)
    if calibrations is not None:
        refuse_uncalibrated(names, checkpoint, calibrations)


def refuse_options(options: TranscribeOptions, checkpoint: Checkpoint) -> None:
    """Raises OptionError for a language or a task that this checkpoint does not know."""
    from transcription.run import checked_language
    from transcription.tokenizer import WhisperTokens

    if options.language is None and options.task == "transcribe":
        return  # reading a vocabulary takes a second
    loaded: Any = SimpleNamespace(model=checkpoint.name, is_demo=checkpoint.is_demo)  # as the report of a load says
    checked_language(options, WhisperTokens.from_folder(checkpoint.folder), loaded)


def refuse_uncalibrated(names: Sequence[str], checkpoint: Checkpoint, calibrations: Path) -> None:
    """Raises CalibrationMissingError where all of these need a calibration of this checkpoint and there is none."""
    from model_loader.calibration import find_calibrated
    from model_loader.precision import is_automatic, resolve_precision

    rows = [None if is_automatic(name) else resolve_precision(name) for name in names]
    takers = [row.name for row in rows if row is not None and row.needs_calibration]
    if not takers or len(takers) < len(rows) or find_calibrated(checkpoint.folder, calibrations) is not None:
        return
    model = checkpoint.folder if checkpoint.source == "folder" else checkpoint.name
    raise CalibrationMissingError(
        f"{takers[0]} needs a calibration of {checkpoint.name}, and there is none yet. Make one with './start.sh "
        f"calibrate --model {model}', name the folder of one with --calibrated, or add a precision that needs none, "
        "for example int8-dynamic."
    )


def exit_code(rows: Sequence[CompareRow]) -> int:
    """0 where a row was measured, 2 where each was refused for a mistake in the request, else 1."""
    if any(not row.failed for row in rows):
        return 0
    codes = {getattr(errors, row.error_kind, SottoError).exit_code for row in rows}
    return 2 if codes == {2} else 1
