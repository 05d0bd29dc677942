"""`app.py calibrate`: measure a checkpoint on recordings and save it for static INT8.

Arguments -> LocalTranscriber.calibrate -> the folder on standard output; what it came to on standard error.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from errors import OptionError
from terminal import complain, say

if TYPE_CHECKING:
    from transcription.calibrate import Calibration, CalibrationProgress
    from transcription.pipeline import LocalTranscriber

N_WORST = 5
"""Layers that are named."""
WER_BUDGET = 1.0
"""Percent, where --keep-fp16 auto is given alone."""
_NOT_ASKED: dict[str, tuple[tuple[object, ...], str]] = {
    "precision": ((), "calibrate measures at 16 or 32 bits and makes int8-static, nothing else"),
    "engine": (("auto", "reference"), "calibrate listens inside the reference engine"),
    "max_upload_mb": ((), "calibrate takes recordings of any size"),
    "max_duration_h": ((), "calibrate takes recordings of any length"),
}
"""Settings that calibrate does not follow: the values that agree with it all the same, and why the others do not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--audio", metavar="FOLDER",
        help="folder of recordings in every language to serve. Default: the examples.",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder to write. Default: where int8-static finds it.")
    parser.add_argument(
        "--keep-fp16", default="0", metavar="N",
        help="leave the N layers with the largest error at 16 bits, or 'auto'. Default: 0.",
    )  # fmt: skip
    parser.add_argument(
        "--wer-budget", type=float, metavar="PERCENT",
        help=f"with --keep-fp16 auto: percent of words that may change. Default: {WER_BUDGET:g}.",
    )  # fmt: skip


def calibrate(arguments: argparse.Namespace, transcriber: LocalTranscriber) -> int:
    """Raises OptionError before any work, and what the transcriber raises."""
    from transcription.calibrate import recordings_in

    _refuse_unused(arguments)
    kept, budget = _kept_layers(arguments)
    out = _folder(arguments.out, "--out")
    result = transcriber.calibrate(
        recordings_in(_folder(arguments.audio, "--audio") or arguments.examples),
        out=out,
        keep_16_bit=kept,
        wer_budget=budget,
        on_progress=_Teller(),
    )
    _say_outcome(result)
    complain(how_to_load(out))
    say(str(result.folder))
    return 0


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Raises OptionError for a setting on the command line that would change nothing."""
    from transcription.calibrated import is_made

    for name, (agreeing, why) in _NOT_ASKED.items():
        given = getattr(arguments, name, None)  # only where it was given
        if given is not None and given not in agreeing and not (name == "precision" and is_made(given)):
            raise OptionError(f"--{name.replace('_', '-')} {given} would not be followed: {why}. Leave it out.")


def _kept_layers(arguments: argparse.Namespace) -> tuple[int, float | None]:
    """(layers to keep at 16 bits, share of words that may change or None). Raises OptionError."""
    word, percent = arguments.keep_fp16.strip().lower(), arguments.wer_budget
    if word != "auto" and not word.isdecimal():
        raise OptionError(f"--keep-fp16 is '{arguments.keep_fp16}'; give a number of layers, or auto.")
    if percent is not None and not 0 <= percent <= 100:
        raise OptionError(f"--wer-budget is {percent:g}; give a percentage from 0 to 100.")
    if word == "auto":
        return 0, (WER_BUDGET if percent is None else percent) / 100
    if percent is not None:
        raise OptionError(
            "--wer-budget says how many layers to keep, and so does --keep-fp16 with a number (0 if not given). Give "
            "--keep-fp16 auto with it, or leave --wer-budget out."
        )
    return int(word), None


def _folder(given: str | None, option: str) -> Path | None:
    """Raises OptionError for an empty name, which would mean the folder one is in."""
    if given is not None and not given.strip():
        raise OptionError(f"{option} is empty; give a folder, or leave {option} out.")
    return None if given is None else Path(given)


def how_to_load(out: Path | None) -> str:
    """The line that a person goes on with. out: the folder asked for; None: where it is found by itself."""
    if out is None:
        return (
            "int8-static finds it by itself: ./start.sh transcribe FILE --precision int8-static, with the same --model"
        )
    return f"Load it with: ./start.sh transcribe FILE --model {shlex.quote(str(out))} --precision int8-static"


class _Teller:
    """Says each step to a person once; it is told for every batch of windows."""

    def __init__(self) -> None:
        self._said: CalibrationProgress | None = None

    def __call__(self, progress: CalibrationProgress) -> None:
        if progress != self._said and sys.stderr.isatty():
            complain(f"{progress.step} ({progress.done + 1} of {progress.total})")
        self._said = progress


def _say_outcome(result: Calibration) -> None:
    for name, why in result.left_out.items():
        complain(f"{name} was not heard, or not to its end: {why}")
    spoken = ", ".join(f"{code} {seconds:.0f} s" for code, seconds in result.report.languages.items())
    complain(f"Languages heard: {spoken}. A language that is not listed was not measured.")
    for layer in result.report.ranked[:N_WORST]:
        note = " (kept at 16 bits)" if layer.kept_16_bit else ""
        complain(f"  {layer.output_error:6.2%} output error  {layer.name}{note}")
    if result.agreement_wer is not None:
        complain(f"{result.agreement_wer:.2%} of the words differ from the text before (agreement, not accuracy).")
    if result.budget_outcome:
        complain(result.budget_outcome)
    complain(f"The report, a bar for each layer: {result.folder / 'report.html'}")
