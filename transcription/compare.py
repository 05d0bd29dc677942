"""One recording over several precisions, one after another, each in a process of its own -> a row of measurements each.

In: names, a way to measure one (pipeline.py: a worker process) and a way to make words comparable. Out: CompareRows as
they are measured, in the given order or a shuffled one.

Words are held to the text that the user pasted (accuracy), else to the text of fp32, else to that of the first
precision that ran (agreement, not accuracy; the row says with whom). Memory and time are held to that same precision.
A figure that was not measured is None. One precision failing leaves the others.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from errors import CancelledError, OptionError, SottoError
from transcription.interface import CompareRow
from transcription.measure import Measured
from transcription.transcript import UNSPACED_LANGUAGES
from transcription.verdict import YOUR_TEXT, claims
from transcription.worddiff import word_diff
from transcription.worker import WorkerError

logger = logging.getLogger(__name__)

REFERENCE_PRECISION = "fp32"
ORDERS = ("given", "shuffled")
MAX_REPEATS = 100


@dataclass(frozen=True, slots=True)
class Bench:
    """What a comparison is done with."""

    check: Callable[[], None]
    """Raises AudioError for a recording that no precision could read."""
    room: Callable[[], AbstractContextManager[object]]
    """Held while a precision is measured: nothing else uses the device."""
    measure: Callable[[str, Callable[[str], None], threading.Event], Measured]
    """(precision, told of each step, set to stop) -> its measurements."""
    normalise: Callable[[Measured, str, str], str]
    """(who made the text, text, language) -> text as word error rates compare it."""
    label: Callable[[str], str]


class LocalComparison:
    """A Comparison (interface.py) over worker processes. Iterate once."""

    def __init__(
        self,
        precisions: Sequence[str],
        bench: Bench,
        *,
        reference_text: str = "",
        order: str = "given",
        seed: int = 0,
        precision_reason: str | None = None,
    ) -> None:
        """Raises OptionError."""
        if order not in ORDERS:
            raise OptionError(f"The order is '{order}'; choose {' or '.join(ORDERS)}.")
        self._names = tuple(dict.fromkeys(precisions))
        self.running_order = shuffled(self._names, seed) if order == "shuffled" else self._names
        self._bench, self._reference_text = bench, reference_text.strip()
        self.precision_reason = precision_reason
        self._stop = threading.Event()
        self._step = ""
        self._rows: dict[str, CompareRow] = {}
        self._measured: dict[str, Measured] = {}
        self._stream = self._work()

    def __iter__(self) -> Iterator[CompareRow]:
        return self._stream

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def step(self) -> str:
        return self._step

    @property
    def is_cancelled(self) -> bool:
        return self._stop.is_set()

    def cancel(self) -> None:
        self._stop.set()

    def _work(self) -> Iterator[CompareRow]:
        self._bench.check()
        for name in self.running_order:
            if self._stop.is_set():
                return
            try:
                self._rows[name] = self._measure(name)
            except CancelledError:
                return
            finally:
                self._step = ""
            yield from self._settle(name)

    def _measure(self, name: str) -> CompareRow:
        """A deliberate error becomes the row's sentence."""
        self._note(name, "waiting for the device")
        try:
            with self._bench.room():
                self._note(name, "starting a process")
                measured = self._bench.measure(name, lambda text: self._note(name, text), self._stop)
        except CancelledError:
            raise
        except SottoError as error:
            logger.info("event=compare_row_failed precision=%s error=%s", name, type(error).__name__)
            kind = error.kind if isinstance(error, WorkerError) else type(error).__name__
            return CompareRow(precision=name, label=self._bench.label(name), error=str(error), error_kind=kind)
        self._measured[name] = measured
        return measured.row

    def _note(self, name: str, text: str) -> None:
        self._step = f"{name}: {text}"

    def _settle(self, newest: str) -> Iterator[CompareRow]:
        """The newest row, and every row that it lets be compared."""
        base = self._base()
        for name, row in list(self._rows.items()):
            settled = row if row.failed else self._compared(row, base)
            if name == newest or settled != row:
                self._rows[name] = settled
                yield settled

    def _base(self) -> CompareRow | None:
        """The row that the others are held to: fp32, else the first of the table; a failed one passes it on."""
        wanted = [name for name in self._names if name == REFERENCE_PRECISION]
        for name in [*wanted, *(name for name in self._names if name not in wanted)]:
            if name not in self._rows:
                return None
            if not self._rows[name].failed:
                return self._rows[name]
        return None

    def _compared(self, row: CompareRow, base: CompareRow | None) -> CompareRow:
        if not row.reference:
            if self._reference_text:
                row = self._held_to(row, self._reference_text, YOUR_TEXT)
            elif base is not None and base.precision != row.precision:
                row = self._held_to(row, base.text, base.precision)
        return replace(row, claims=claims(row, base))

    def _held_to(self, row: CompareRow, text: str, reference: str) -> CompareRow:
        measured = self._measured[row.precision]

        def normalise(words: str, language: str) -> str:
            return self._bench.normalise(measured, words, language)

        errors = count_errors(normalise(text, row.language), normalise(row.text, row.language), row.language)
        return replace(
            row,
            reference=reference,
            diff=word_diff(text, row.segments, row.language, normalise),
            wer=errors.wer,
            cer=errors.cer,
            n_word_errors=errors.n_word_errors,
            n_reference_words=errors.n_reference_words,
        )


def shuffled(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The same seed gives the same order."""
    mixed = list(names)
    random.Random(seed).shuffle(mixed)
    return tuple(mixed)


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one normalised text against another; rates are None where the reference holds no word."""

    wer: float | None
    cer: float | None
    n_word_errors: int | None
    n_reference_words: int | None


def count_errors(reference: str, hypothesis: str, language: str = "") -> Errors:
    """Word and character errors of normalised texts.

    In a language written without spaces the normalisation puts one behind every character; as characters they would
    all be right, and halve the rate.
    """
    import jiwer

    if not reference:
        return Errors(None, None, None, None)
    words = jiwer.process_words(reference, hypothesis)
    n_errors = int(words.substitutions + words.deletions + words.insertions)
    n_words = int(words.hits + words.substitutions + words.deletions)
    if language in UNSPACED_LANGUAGES:
        reference, hypothesis = ("".join(text.split()) for text in (reference, hypothesis))
    return Errors(float(words.wer), float(jiwer.cer(reference, hypothesis)), n_errors, n_words)


def error_rates(reference: str, hypothesis: str, language: str = "") -> tuple[float | None, float | None]:
    """(word, character) error rate of normalised texts; None where the reference holds no word."""
    errors = count_errors(reference, hypothesis, language)
    return errors.wer, errors.cer
