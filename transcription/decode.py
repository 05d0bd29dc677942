"""Windows -> tokens and scores: batches, temperature fallback, out-of-memory, nonsense.

In: an engine and windows. Out: one WindowResult per window. No text files, no times of segments (segments.py).

Fallback follows openai/whisper (transcribe.py, decode_with_fallback): a hypothesis whose text repeats itself
(compression ratio) or that the model itself finds unlikely (mean log probability) is decoded again at the next
temperature, unless the window is silence. Here only the windows that fail are decoded again, as a batch of their own:
their encoder output is picked from the first pass, so nothing is encoded twice (flow.py does the same for engines that
take windows one by one). When every temperature fails, the best
attempt is kept (faster-whisper does the same; openai/whisper keeps the last, hottest one) and a warning says where.
"""

from __future__ import annotations

import gc
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from audio.constants import SAMPLE_RATE
from audio.features import LogMel
from audio.windows import Window
from errors import CancelledError, OutOfMemoryError
from model_loader.engine import Encoded, Engine, GenerateRequest, TokenSequence
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens
from transcription.words import TokenTime, time_tokens

logger = logging.getLogger(__name__)

_CANNOT_OVERFLOW = ("bf16", "fp32")
"""Precisions whose numbers reach as far as those of 32 bits."""

_SHORTEST_STEP_S = 0.5
"""Less sound than this is not worth a hypothesis of its own."""

_TOO_LITTLE_MEMORY = (
    "Memory does not suffice for one window of 30 s at this precision; choose a smaller precision or model, or close "
    "other programs that use the device."
)

_NO_ROOM_FOR_TIMES = (
    "Memory does not suffice for the times of words, so words are missing them; the text itself is complete. Choose a "
    "smaller precision or model, or close other programs that use the device."
)


@dataclass(frozen=True, slots=True)
class WindowResult:
    """The accepted hypothesis of one window."""

    window: Window
    tokens: tuple[int, ...]
    """Text and timestamp tokens, without prompt and end; empty where nothing was said."""
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    finished: bool
    """False if max_new_tokens cut the hypothesis off."""
    times: tuple[TokenTime, ...] = ()
    """Of every text token, where the options ask for words."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """Windows whose language was looked at and that are about to be decoded."""

    engine: Engine
    indices: list[int]
    encoded: Encoded
    logits: torch.Tensor


@dataclass(slots=True)
class Decoder:
    """Decodes batches of windows for one recording and remembers what it learnt on the way.

    The engine is an argument of each call, because another user may have it between two batches.
    """

    tokens: WhisperTokens
    options: TranscribeOptions
    should_stop: Callable[[], bool] = lambda: False
    batch_limit: int | None = None
    """Windows that fitted into memory after an out-of-memory; None: no limit is known."""
    warnings: list[str] = field(default_factory=list)
    not_finite: str = ""
    """What to do about numbers that are not finite, a sentence that is among the warnings too; empty without such."""
    _seen: _Seen | None = None

    def decode(self, engine: Engine, windows: Sequence[Window], language: str) -> list[WindowResult]:
        """Results in time order: one per window, more where a window holds more text than one hypothesis can.

        Raises CancelledError, OutOfMemoryError.
        """
        results: list[WindowResult] = []
        rest = list(windows)
        while rest:
            self.check_stop()
            batch = rest[: self.batch_limit or len(rest)]
            try:
                found = self._decode_batch(engine, batch, language)
            except (torch.OutOfMemoryError, OutOfMemoryError) as error:
                self._halve(len(batch), error)
                continue
            rest = rest[len(batch) :]
            for result in found:
                results += self._continue(engine, result, language)
        return results

    def first_logits(self, engine: Engine, windows: Sequence[Window]) -> torch.Tensor:
        """float32 [n_windows, n_vocab] after <|startoftranscript|>; decoding the same windows next encodes nothing."""
        try:
            encoded = encode(engine, windows)
            logits = engine.first_logits(encoded)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(_TOO_LITTLE_MEMORY) from error
        self._seen = _Seen(engine, [window.index for window in windows], encoded, logits)
        return logits

    def _decode_batch(self, engine: Engine, windows: Sequence[Window], language: str) -> list[WindowResult]:
        seen, self._seen = self._seen, None
        if seen is not None and seen.engine is engine and seen.indices == [window.index for window in windows]:
            encoded, logits = seen.encoded, seen.logits
        else:
            encoded = encode(engine, windows)
            logits = engine.first_logits(encoded)
        silence = no_speech_probs(logits, self.tokens)
        attempts: list[list[WindowResult]] = [[] for _ in windows]
        open_rows = [row for row, probability in enumerate(silence) if math.isfinite(probability)]
        for temperature in self.options.temperatures:
            if not open_rows:
                break
            part = encoded if len(open_rows) == len(windows) else engine.select(encoded, open_rows)
            sequences = engine.generate(part, self.request(engine, len(open_rows), language, temperature))
            self.check_stop()
            for row, sequence in zip(open_rows, sequences, strict=True):
                attempts[row].append(self.score(windows[row], sequence, temperature, silence[row]))
            open_rows = [row for row in open_rows if self.fails(attempts[row][-1])]
        results = []
        for row, (window, tried) in enumerate(zip(windows, attempts, strict=True)):
            result = self.accept(engine, window, tried, row in open_rows)
            if self.options.words:
                result = self.time(engine, engine.select(encoded, [row]), result, language)
            results.append(result)
        return results

    def time(self, engine: Engine, encoded: Encoded, result: WindowResult, language: str) -> WindowResult:
        """The same with its tokens' times; without them, and with a warning, once memory ran out over them.

        encoded: of that window alone.
        """
        if _NO_ROOM_FOR_TIMES in self.warnings:
            return result  # to load a checkpoint again in vain for every window would take longer than its text
        duration_s = result.window.samples.size / SAMPLE_RATE
        try:
            times = time_tokens(engine, encoded, result.tokens, self.tokens, language, self.options.task, duration_s)
        except (torch.OutOfMemoryError, OutOfMemoryError) as error:
            error.__traceback__ = None  # it holds the tensors of the failed attempt
            logger.warning("event=out_of_memory_over_word_times start_s=%.1f", result.window.start_s)
            self.warnings.append(_NO_ROOM_FOR_TIMES)
            return result
        return replace(result, times=times)

    def _continue(self, engine: Engine, result: WindowResult, language: str) -> list[WindowResult]:
        head, tail = self.split(result)
        return [head] if tail is None else [head, *self.decode(engine, [tail], language)]

    def split(self, result: WindowResult) -> tuple[WindowResult, Window | None]:
        """A hypothesis that ran out of tokens up to its last timestamp, and the sound behind that; else itself."""
        cut = last_timestamp(result.tokens, self.tokens) if not result.finished else None
        if cut is None:
            return result, None
        n_tokens, cut_s = cut
        window, n_samples = result.window, round(cut_s * SAMPLE_RATE)
        if cut_s < _SHORTEST_STEP_S or window.samples.size - n_samples < _SHORTEST_STEP_S * SAMPLE_RATE:
            return result, None
        tail = replace(window, start_s=window.start_s + cut_s, samples=window.samples[n_samples:])
        head = result.tokens[:n_tokens]
        n_text = sum(token < self.tokens.eot for token in head)
        return replace(result, tokens=head, times=result.times[:n_text]), tail

    def request(self, engine: Engine, n_windows: int, language: str, temperature: float) -> GenerateRequest:
        """What to ask of the engine for so many windows."""
        context = engine.dims.n_text_ctx
        prompt = self.tokens.prompt(
            language, self.options.task, previous_text=self.options.prompt, limit=context // 2 - 1
        )
        return GenerateRequest(
            prompts=[prompt] * n_windows,
            max_new_tokens=min(self.options.max_new_tokens, context - len(prompt)),
            temperature=temperature,
            beam_size=self.options.beam_size if temperature == 0.0 else 1,
            seed=self.options.seed,
            rules=self.tokens.rules(),
            timestamps=True,
            should_stop=self.should_stop,
        )

    def score(self, window: Window, sequence: TokenSequence, temperature: float, no_speech_prob: float) -> WindowResult:
        """A hypothesis with what its acceptance depends on."""
        return WindowResult(
            window=window,
            tokens=tuple(sequence.tokens),
            temperature=temperature,
            avg_logprob=sequence.avg_logprob,
            compression_ratio=compression_ratio(self.tokens.decode(sequence.tokens)),
            no_speech_prob=no_speech_prob,
            finished=sequence.finished,
        )

    def fails(self, result: WindowResult) -> bool:
        """It is to be decoded again at the next temperature."""
        return needs_fallback(result, self.options)

    def accept(self, engine: Engine, window: Window, tried: list[WindowResult], failed: bool) -> WindowResult:
        """The last attempt, or the best one where all failed; without text where it is silence or not finite."""
        result = self._best(window, tried, failed)
        if not (math.isfinite(result.no_speech_prob) and math.isfinite(result.avg_logprob)):
            self._warn_not_finite(engine)
        return _emptied(result) if is_silence(result, self.options) else result

    def _best(self, window: Window, tried: list[WindowResult], failed: bool) -> WindowResult:
        if not tried:
            return WindowResult(window, (), 0.0, math.nan, 0.0, math.nan, True)
        if not failed:
            return tried[-1]
        result = max(tried, key=lambda r: (_fits(r, self.options), r.avg_logprob))
        if self.tokens.decode(result.tokens).strip() and not is_silence(result, self.options):
            self.warnings.append(
                f"From {clock(window.start_s)} to {clock(window.end_s)} the text is uncertain: every temperature gave "
                "words that repeat themselves or that the model finds unlikely."
            )
        return result

    def _warn_not_finite(self, engine: Engine) -> None:
        precision = engine.report.effective
        wider = " or ".join(name for name in _CANNOT_OVERFLOW if name != precision)
        # What 32 bits cannot hold, no other precision can.
        advice = "the checkpoint itself is damaged: fetch it again, or choose another model"
        if precision != "fp32":
            advice = f"use {wider} for this checkpoint"
        self.not_finite = (
            f"The model produced numbers that are not finite at precision {precision}, so text is missing; {advice}."
        )
        if self.not_finite not in self.warnings:
            self.warnings.append(self.not_finite)

    def _halve(self, size: int, error: Exception) -> None:
        """Free memory and decode half as many windows at once from now on; give up at one window."""
        # The traceback holds the tensors of the failed attempt; without it they can be freed.
        error.__traceback__ = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise OutOfMemoryError(_TOO_LITTLE_MEMORY) from error
        self.batch_limit = size // 2
        logger.warning("event=out_of_memory windows=%d next=%d", size, self.batch_limit)
        self.warnings.append(
            f"Memory ran out with {size} windows at once; going on with {self.batch_limit}. No text was lost."
        )

    def check_stop(self) -> None:
        """Raises CancelledError once somebody asked to stop."""
        if self.should_stop():
            raise CancelledError("Stopped. The text so far is kept.")


def encode(engine: Engine, windows: Sequence[Window]) -> Encoded:
    """Windows -> the encoder's output."""
    return engine.encode(log_mel_of(engine)([window.samples for window in windows]))


def log_mel_of(engine: Engine) -> LogMel:
    """Features as this engine wants them, computed on its device."""
    return _log_mel(engine.dims.n_mels, str(engine.device))


def needs_fallback(result: WindowResult, options: TranscribeOptions) -> bool:
    """The hypothesis repeats itself or is unlikely, and the window is not silence. NaN cannot be mended by sampling."""
    if is_silence(result, options):
        return False
    return not _fits(result, options) or result.avg_logprob < options.logprob_limit


def is_silence(result: WindowResult, options: TranscribeOptions) -> bool:
    """Not finite; or the model says 'no speech' and is unsure of its words all the same (openai/whisper's rule)."""
    if not math.isfinite(result.avg_logprob):
        return True
    return result.no_speech_prob > options.no_speech_limit and result.avg_logprob < options.logprob_limit


def last_timestamp(tokens: Sequence[int], vocabulary: WhisperTokens) -> tuple[int, float] | None:
    """(tokens up to it, seconds into the window) of the last timestamp that ends text, if there is one."""
    for index in range(len(tokens) - 1, 0, -1):
        time_s = vocabulary.timestamp_s(tokens[index])
        if time_s is not None and tokens[index - 1] < vocabulary.eot:
            return index + 1, time_s
    return None


def no_speech_probs(first_logits: torch.Tensor, tokens: WhisperTokens) -> list[float]:
    """first_logits: float32 [n_windows, n_vocab] after <|startoftranscript|>. NaN where they are not finite."""
    probabilities = torch.softmax(first_logits.float(), dim=-1)[:, tokens.no_speech]
    return [float(value) for value in probabilities]


def compression_ratio(text: str) -> float:
    """Bytes of the text over their zlib size; 0 for no text."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data)) if data else 0.0


@lru_cache(maxsize=4)
def _log_mel(n_mels: int, device: str) -> LogMel:
    return LogMel(n_mels, device=device)


def _fits(result: WindowResult, options: TranscribeOptions) -> bool:
    return result.compression_ratio <= options.compression_ratio_limit


def _emptied(result: WindowResult) -> WindowResult:
    return replace(result, tokens=(), compression_ratio=0.0, finished=True)


def clock(time_s: float) -> str:
    """Seconds as m:ss, for sentences."""
    return f"{int(time_s) // 60}:{int(time_s) % 60:02d}"
