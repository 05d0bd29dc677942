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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--audio", type=Path, metavar="FOLDER",
        help="folder of recordings in every language to serve. Default: the examples.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write. Default: where int8-static finds it.")
    parser.add_argument(
        "--keep-fp16", default="0", metavar="N",
        help="leave the N layers with the largest error at 16 bits, or 'auto'. Default: 0.",
    )  # fmt: skip
    parser.add_argument(
        "--wer-budget", type=float, default=1.0, metavar="PERCENT",
        help="with --keep-fp16 auto: percent of words that may change. Default: 1.",
    )  # fmt: skip


def calibrate(arguments: argparse.Namespace, transcriber: LocalTranscriber) -> int:
    """Raises OptionError before any work, and what the transcriber raises."""
    from transcription.calibrate import recordings_in

    automatic = arguments.keep_fp16.strip().lower() == "auto"
    if not automatic and not arguments.keep_fp16.isdecimal():
        raise OptionError(f"--keep-fp16 is '{arguments.keep_fp16}'; give a number of layers, or auto.")
    if not 0 <= arguments.wer_budget <= 100:
        raise OptionError(f"--wer-budget is {arguments.wer_budget:g}; give a percentage from 0 to 100.")
    result = transcriber.calibrate(
        recordings_in(arguments.audio or arguments.examples),
        out=arguments.out,
        keep_16_bit=0 if automatic else int(arguments.keep_fp16),
        wer_budget=arguments.wer_budget / 100 if automatic else None,
        on_progress=_tell,
    )
    _say_outcome(result)
    complain(how_to_load(arguments.out))
    say(str(result.folder))
    return 0


def how_to_load(out: Path | None) -> str:
    """The line that a person goes on with. out: the folder asked for; None: where it is found by itself."""
    if out is None:
        return (
            "int8-static finds it by itself: ./start.sh transcribe FILE --precision int8-static, with the same --model"
        )
    return f"Load it with: ./start.sh transcribe FILE --model {shlex.quote(str(out))} --precision int8-static"


def _tell(progress: CalibrationProgress) -> None:
    if sys.stderr.isatty():
        complain(f"{progress.step} ({progress.done + 1} of {progress.total})")


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
