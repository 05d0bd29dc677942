"""One recording on its way to a transcript: the main path, window by window.

bytes -> waveform -> windows -> features -> tokens -> segments, as a chain of generators: the first segment appears
before the file has been read to its end, and an hour needs no more memory than a minute.

How windows pass through the engine is in flow.py. Reading, speech detection and the consumer's own time do not hold it,
so a page that stops reading blocks nobody, and several runs share an engine window by window.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from audio.constants import SAMPLE_RATE, WINDOW_S
from audio.decode import AudioReader, decode_blocks
from audio.windows import OVERLAP_S, Mode, Window, cut_windows
from errors import CancelledError, ModelError, OptionError
from model_loader.engine import Engine
from transcription.decode import Decoder, WindowResult
from transcription.flow import Flow, make_flow, usual_batch
from transcription.interface import Source
from transcription.language import report_languages
from transcription.live import Heard
from transcription.options import TranscribeOptions
from transcription.segments import Seam, to_segments
from transcription.tokenizer import INCOMPLETE, WhisperTokens
from transcription.transcript import NO_SPEECH, Progress, Segment, Transcript

if TYPE_CHECKING:
    from model_loader.loader import LoadReport

logger = logging.getLogger(__name__)

SURE_LANGUAGE = 0.7
"""Average probability at which the language is taken as known."""
LANGUAGE_WINDOWS = 3
"""Voiced windows looked at, at most, before the most probable language is taken."""
WORDLESS_S = 2.0
"""A window with more speech than this and no words is reported."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What a run needs from its transcriber: a way to the engine, and the limits."""

    borrow: Callable[[], AbstractContextManager[Engine]]
    tokens_of: Callable[[Engine], WhisperTokens]
    model: str
    precision: str
    engine: str
    batch_size: int = 0
    max_bytes: int | None = None
    max_duration_s: float | None = None


class LocalRun:
    """A TranscriptionRun (interface.py) in this process. Iterate once; the other members work from any thread."""

    def __init__(self, source: Source, options: TranscribeOptions, desk: Desk) -> None:
        self._source, self._options, self._desk = source, options, desk
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._elapsed_s: float | None = None
        self._segments: list[Segment] = []
        self._warnings: list[str] = []
        self._decoder: Decoder | None = None
        self._draft: Sequence[int] = ()
        self._reader: AudioReader | None = None
        self._language = ""
        self._language_probability: float | None = None
        self._speech_s = self._transcribed_s = self._done_s = self._wordless_s = 0.0
        self._windows_done = self._n_tokens = 0
        self._first_text_s: float | None = None
        self._model, self._effective, self._engine = desk.model, desk.precision, desk.engine
        self._limit: int | None = None
        self._stream = self._work()

    def __iter__(self) -> Iterator[Segment]:
        return self._stream

    @property
    def progress(self) -> Progress:
        decoded_s = self._reader.decoded_s if self._reader else 0.0
        total_s = self._reader.duration_s if self._reader else None
        if total_s is not None:
            total_s = max(total_s, decoded_s)
        elapsed_s = self._elapsed()
        eta_s = elapsed_s * (total_s - self._done_s) / self._done_s if total_s and self._done_s else None
        if self._elapsed_s is not None and not self.is_cancelled:
            eta_s = 0.0
        return Progress(self._done_s, total_s, self._windows_done, elapsed_s, eta_s)

    @property
    def draft(self) -> str:
        if self._decoder is None or self._elapsed_s is not None:
            return ""
        return self._decoder.tokens.decode(self._draft).strip().rstrip(INCOMPLETE)

    @property
    def transcript(self) -> Transcript:
        with self._lock:
            segments = tuple(self._segments)
        return Transcript(
            segments=segments,
            language=self._language,
            language_probability=self._language_probability,
            duration_s=round(min(self._done_s, self._reader.decoded_s), 3) if self._reader else 0.0,
            speech_s=round(self._speech_s, 3),
            transcribed_s=round(self._transcribed_s, 3),
            elapsed_s=self._elapsed(),
            first_text_s=self._first_text_s,
            n_tokens=self._n_tokens,
            model=self._model,
            precision=self._effective,
            engine=self._engine,
            warnings=self.warnings,
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [*(self._reader.warnings if self._reader else ()), *(self._decoder.warnings if self._decoder else ())]
        return tuple(dict.fromkeys([*found, *self._warnings]))

    @property
    def is_cancelled(self) -> bool:
        return self._stop.is_set()

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        if self._elapsed_s is not None:
            return
        # Running in another thread it cannot be closed from here; it ends by itself at the next decoding step.
        self._stop.set()
        with suppress(ValueError):
            self._stream.close()

    def _elapsed(self) -> float:
        return self._elapsed_s if self._elapsed_s is not None else time.monotonic() - self._started_s

    def _work(self) -> Generator[Segment]:
        self._started_s = time.monotonic()
        try:
            with decode_blocks(
                self._source, max_duration_s=self._desk.max_duration_s, max_bytes=self._desk.max_bytes
            ) as self._reader:
                for segment in self._transcribe(self._reader):
                    with self._lock:
                        self._segments.append(segment)
                    self._note_text()
                    yield segment
            self._conclude()
        except CancelledError:
            self._stop.set()
        finally:
            self._elapsed_s = time.monotonic() - self._started_s
            logger.info(
                "event=run_ended precision=%s done_s=%.1f elapsed_s=%.2f windows=%d cancelled=%s",
                *(self._effective, self._done_s, self._elapsed_s, self._windows_done, self.is_cancelled),
            )

    def _transcribe(self, reader: AudioReader) -> Iterator[Segment]:
        """Windows ahead of their results, as many as the flow has room for: one at first, so that text comes early."""
        flow = self._meet_engine()
        # The generator is closed with us, so that nothing waits for a garbage collector.
        windows = cast("Generator[Window]", cut_windows(reader, cast("Mode", self._options.windows)))
        with closing(windows), closing(flow):
            seen = list(islice(windows, 1))
            if seen and not self._language:
                seen = self._detect_language(flow, seen, windows)
            seam = Seam(self._language) if self._options.windows == "fixed" else None
            for window in seen:
                flow.add(window, self._language)
            while decoded := flow.take():
                for window, results in decoded:
                    yield from self._finish(window, results, seam)
                for window in islice(windows, max(flow.room, 0)):
                    if self._stop.is_set():
                        raise CancelledError("Stopped. The text so far is kept.")
                    flow.add(window, self._language)
            if seam is not None:
                yield from seam.flush()

    def _meet_engine(self) -> Flow:
        """Learn what the checkpoint can do, and refuse options that it cannot meet. Raises OptionError."""
        options = self._options
        with self._desk.borrow() as engine:
            report = engine.report
            tokens = self._desk.tokens_of(engine)
            self._model, self._effective = report.model, report.effective
            # Beams change places in the caches, so they are never decoded in a fast row.
            self._engine = report.engine if options.beam_size == 1 else "reference"
            limit = options.batch_size or self._desk.batch_size or usual_batch(engine, options.beam_size)
            self._limit = limit
            self._language = checked_language(options, tokens, report) or ""
            self._decoder = Decoder(tokens, options, self._stop.is_set)
            return make_flow(self._desk.borrow, self._decoder, engine, limit, on_draft=self._note_draft)

    @property
    def batch_size(self) -> int | None:
        """Windows that may be decoded together, fewer after an out-of-memory; None before the engine is met."""
        limits = (self._limit, self._decoder.batch_limit if self._decoder else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def _note_draft(self, written: Sequence[int]) -> None:
        """From the engine's thread."""
        self._draft = written
        if self._first_text_s is None and self._decoder is not None:
            eot = self._decoder.tokens.eot
            if any(token < eot for token in written):
                self._note_text()

    def _note_text(self) -> None:
        if self._first_text_s is None:
            self._first_text_s = time.monotonic() - self._started_s

    def _detect_language(self, flow: Flow, batch: list[Window], windows: Iterator[Window]) -> list[Window]:
        """Look at the first voiced windows until the language is clear; return the windows looked at."""
        assert self._decoder is not None
        while True:
            logits = flow.look(batch)
            report = report_languages(logits, batch, self._decoder.tokens)
            more = [] if report.best.probability >= SURE_LANGUAGE else list(islice(windows, 1))
            if not more or len(batch) == LANGUAGE_WINDOWS:
                self._language, self._language_probability = report.best.code, report.best.probability
                return [*batch, *more]
            batch = [*batch, *more]

    def _finish(self, window: Window, results: list[WindowResult], seam: Seam | None) -> Iterator[Segment]:
        """Count a finished window and yield its segments."""
        assert self._decoder is not None
        self._draft = ()
        segments = [s for result in results for s in to_segments(result, self._decoder.tokens, self._language)]
        self._windows_done += 1
        self._n_tokens += sum(len(result.tokens) for result in results)
        self._speech_s += window.speech_s
        self._transcribed_s += window.end_s - max(window.start_s, self._done_s)
        self._done_s = max(self._done_s, window.end_s)
        if not segments and window.speech_s > WORDLESS_S:
            self._wordless_s += window.speech_s
        if seam is not None:
            next_start_s = window.start_s + WINDOW_S - OVERLAP_S
            segments = seam.join(segments, start_s=window.start_s, next_start_s=next_start_s)
        yield from segments

    def _conclude(self) -> None:
        """The recording has been read to its end. Raises ModelError where no text came of numbers that are not finite:
        somebody may well have spoken."""
        assert self._reader is not None
        self._done_s = self._reader.decoded_s
        if not self._segments and self._decoder is not None and self._decoder.not_finite:
            raise ModelError(self._decoder.not_finite)
        if not self._segments:
            self._warnings.append(NO_SPEECH)
        elif self._wordless_s:
            self._warnings.append(
                f"In {self._wordless_s:.0f} s of the recording speech was heard, but the model found no words in it."
            )


class Ear:
    """Hears windows of a microphone (live.py): the same path as a run, one window at a time, the first temperature."""

    def __init__(self, desk: Desk, options: TranscribeOptions) -> None:
        self._desk = desk
        self._options = replace(options, temperatures=options.temperatures[:1])
        self._language: str | None = None

    def hear(self, samples: npt.NDArray[np.float32], start_s: float) -> Heard:
        """samples: float32 [n_samples], at most 30 s. Raises OptionError."""
        window = Window(0, start_s, samples, samples.size / SAMPLE_RATE)
        with self._desk.borrow() as engine:
            tokens = self._desk.tokens_of(engine)
            language = checked_language(self._options, tokens, engine.report) or self._language
            flow = make_flow(self._desk.borrow, Decoder(tokens, self._options), engine, 1, urgent=True)
        if language is None:
            best = report_languages(flow.look([window]), [window], tokens).best
            language = best.code
            if best.probability >= SURE_LANGUAGE:
                self._language = language
        flow.add(window, language)
        results = [result for _, found in flow.take() for result in found]
        segments = [segment for result in results for segment in to_segments(result, tokens, language)]
        return Heard(tuple(segments), language)


def checked_language(options: TranscribeOptions, tokens: WhisperTokens, report: LoadReport) -> str | None:
    """The language code to decode with, None to detect it. Raises OptionError for what the checkpoint cannot do."""
    if options.task == "translate" and (tokens.translate is None or report.is_demo):
        raise OptionError(
            f"{report.model} was not trained to translate; choose a multilingual Whisper checkpoint "
            "(--model openai/whisper-large-v3), or the task 'transcribe'."
        )
    return tokens.resolve_language(options.language, report.model)
