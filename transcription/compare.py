"""One recording over several precisions, one after another -> a row of measurements each.

In: functions that load a precision, transcribe with it and read memory (pipeline.py). Out: CompareRows as they finish.

A figure that was not measured is None. Without a text to compare with, the fp32 row (if it is among the precisions, it
then runs first) is what the others are compared with: that is agreement with fp32, not accuracy, and the row says so.
One precision failing leaves the others.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errors import SottoError
from transcription.interface import CompareRow, TranscriptionRun
from transcription.transcript import Transcript

if TYPE_CHECKING:
    from model_loader.loader import LoadReport

logger = logging.getLogger(__name__)

REFERENCE_PRECISION = "fp32"
YOUR_TEXT = "your text"


@dataclass(frozen=True, slots=True)
class Bench:
    """What a comparison is done with."""

    load: Callable[[str], LoadReport]
    """Load a precision afresh and warm it up."""
    run: Callable[[str], TranscriptionRun]
    release: Callable[[str], None]
    """Unload it again."""
    peak_bytes: Callable[[], int | None]
    """Highest use of device memory by this process since the last load; None where that cannot be read."""
    normalise: Callable[[str, str], str]
    """(text, language) -> text as word error rates compare it."""
    label: Callable[[str], str]


def compare(
    precisions: Sequence[str], bench: Bench, *, reference_text: str = "", repeats: int = 1
) -> Iterator[CompareRow]:
    """Yield one row per precision as it finishes."""
    reference, against = reference_text.strip(), YOUR_TEXT if reference_text.strip() else ""
    names = list(dict.fromkeys(precisions))
    if not reference and REFERENCE_PRECISION in names:
        names = [REFERENCE_PRECISION, *(name for name in names if name != REFERENCE_PRECISION)]
    for name in names:
        row = _measure(name, bench, max(repeats, 1))
        if not row.failed and reference:
            row = _with_errors(row, reference, against, bench)
        if not row.failed and not reference and name == REFERENCE_PRECISION and row.text:
            reference, against = row.text, REFERENCE_PRECISION
        yield row


def _measure(name: str, bench: Bench, repeats: int) -> CompareRow:
    """Load, run and unload one precision; a deliberate error becomes the row's sentence."""
    label = bench.label(name)
    try:
        report = bench.load(name)
        try:
            done = [_timed_run(name, bench) for _ in range(repeats)]
            peak_bytes = bench.peak_bytes()
        finally:
            bench.release(name)
    except SottoError as error:
        logger.info("event=compare_row_failed precision=%s error=%s", name, type(error).__name__)
        return CompareRow(precision=name, label=label, error=str(error))
    return _row(CompareRow(precision=name, label=label), report, done, peak_bytes)


def _timed_run(name: str, bench: Bench) -> tuple[float, Transcript]:
    """(seconds, transcript) of one transcription."""
    started_s = time.monotonic()
    run = bench.run(name)
    for _ in run:
        pass
    return time.monotonic() - started_s, run.transcript


def _row(
    row: CompareRow, report: LoadReport, done: Sequence[tuple[float, Transcript]], peak_bytes: int | None
) -> CompareRow:
    times_s, transcript = [seconds for seconds, _ in done], done[-1][1]
    steady_s = times_s[1:] or times_s
    warm_s = statistics.median(steady_s)
    return replace(
        row,
        effective=report.effective,
        text=transcript.text,
        segments=transcript.segments,
        language=transcript.language,
        language_probability=transcript.language_probability,
        load_s=report.load_s,
        warm_up_s=report.warm_up_s,
        first_run_s=times_s[0],
        warm_s=warm_s,
        warm_spread_s=max(steady_s) - min(steady_s) if len(steady_s) > 1 else None,
        first_text_s=transcript.first_text_s,
        real_time_factor=transcript.duration_s / warm_s,
        tokens_per_s=transcript.n_tokens / warm_s,
        weights_bytes=report.weights_bytes,
        peak_bytes=peak_bytes,
        warnings=transcript.warnings,
    )


def _with_errors(row: CompareRow, reference: str, against: str, bench: Bench) -> CompareRow:
    wer, cer = error_rates(bench.normalise(reference, row.language), bench.normalise(row.text, row.language))
    return replace(row, wer=wer, cer=cer, reference=against)


def error_rates(reference: str, hypothesis: str) -> tuple[float | None, float | None]:
    """(word, character) error rate of normalised texts; None where the reference holds no word."""
    import jiwer

    if not reference:
        return None, None
    return float(jiwer.wer(reference, hypothesis)), float(jiwer.cer(reference, hypothesis))
