"""Which language is spoken: probabilities over the checkpoint's languages, window by window and on average.

The encoder runs once per window; the probabilities are those of the first token after <|startoftranscript|>, restricted
to the language tokens (openai/whisper, decoding.py, detect_language). One window can mislead (a name, a quotation,
music), so several voiced windows spread over the recording are averaged, weighted by the speech in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from audio.constants import SAMPLE_RATE
from audio.windows import Window, cut_windows
from errors import OptionError
from transcription.tokenizer import WhisperTokens
from transcription.transcript import LanguageGuess, LanguageReport, WindowLanguage

EXCERPT_S = 60.0
"""Length of the stretches in which a long recording is searched for speech."""


def report_languages(
    first_logits: torch.Tensor, windows: Sequence[Window], tokens: WhisperTokens, *, top: int = 0
) -> LanguageReport:
    """first_logits: float32 [n_windows, n_vocab] after <|startoftranscript|>. top: guesses kept, 0 for all.

    Raises OptionError for an English-only checkpoint, which cannot tell languages apart.
    """
    if not tokens.languages:
        raise OptionError("This checkpoint knows English only and cannot detect a language; choose a multilingual one.")
    codes = list(tokens.languages)
    chosen = first_logits[:, [tokens.languages[code] for code in codes]].float()
    probabilities = torch.softmax(torch.nan_to_num(chosen), dim=-1).numpy()  # [n_windows, n_languages]
    weights = np.array([max(window.speech_s, 0.1) for window in windows])
    average = weights @ probabilities / weights.sum()
    return LanguageReport(
        guesses=_guesses(codes, average, top),
        windows=tuple(
            WindowLanguage(window.start_s, window.end_s, _guesses(codes, row, top))
            for window, row in zip(windows, probabilities, strict=True)
        ),
    )


def spread(windows: Sequence[Window], count: int) -> list[Window]:
    """At most `count` of the windows, evenly spread, in order."""
    if len(windows) <= count:
        return list(windows)
    return [windows[round(i * (len(windows) - 1) / max(count - 1, 1))] for i in range(count)]


def excerpts(
    blocks: Iterator[npt.NDArray[np.float32]], duration_s: float | None, count: int
) -> Iterator[tuple[float, npt.NDArray[np.float32]]]:
    """Up to `count` stretches of EXCERPT_S, evenly spread: (start in seconds, float32 [n_samples]).

    A recording short enough, or of unknown length, is returned from its start, up to count * EXCERPT_S. Only the
    excerpts pass the speech detector and stay in memory, so an hour costs little more than five minutes.
    """
    length = round(EXCERPT_S * SAMPLE_RATE)
    total = round((duration_s or 0.0) * SAMPLE_RATE)
    step = max((total - length) // max(count - 1, 1), length)
    starts = [i * step for i in range(count)]
    position, parts = 0, list[npt.NDArray[np.float32]]()
    for block in blocks:
        while starts and position + block.size > starts[0]:
            low = max(starts[0] - position, 0)
            high = min(starts[0] + length - position, block.size)
            parts.append(block[low:high])
            if high == block.size and starts[0] + length > position + block.size:
                break
            yield starts.pop(0) / SAMPLE_RATE, np.concatenate(parts)
            parts = []
        position += block.size
        if not starts:
            return
    if parts:
        yield starts[0] / SAMPLE_RATE, np.concatenate(parts)


def voiced_windows(parts: Iterator[tuple[float, npt.NDArray[np.float32]]], count: int) -> list[Window]:
    """At most `count` windows with speech from the excerpts, at their times in the recording."""
    windows: list[Window] = []
    for start_s, samples in parts:
        for window in cut_windows(iter([samples]), "vad"):
            moved = Window(len(windows), window.start_s + start_s, window.samples, window.speech_s)
            windows.append(moved)
    return spread(windows, count)


def _guesses(codes: Sequence[str], probabilities: npt.NDArray[np.floating], top: int) -> tuple[LanguageGuess, ...]:
    order = np.argsort(-probabilities)[: top or len(codes)]
    return tuple(LanguageGuess(codes[i], float(probabilities[i])) for i in order)
