"""Times of single tokens and words, from where the model looked while it wrote them.

In: one accepted hypothesis and its window's encoder output. Out: a time and a probability for every text token, and
the words that they make. A second, teacher-forced pass; the text itself never changes.

The path through "token t looks at frame f" is found by dynamic time warping, as in openai/whisper (timing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_loader.engine import Encoded, Engine
from transcription.tokenizer import INCOMPLETE, TIMESTAMP_STEP_S, WhisperTokens
from transcription.transcript import UNSPACED_LANGUAGES, is_one_word


@dataclass(frozen=True, slots=True)
class TokenTime:
    """One text token. Seconds from the start of its window."""

    start_s: float
    end_s: float
    probability: float


def time_tokens(
    engine: Engine, encoded: Encoded, tokens: Sequence[int], vocabulary: WhisperTokens, language: str, task: str,
    duration_s: float,
) -> tuple[TokenTime, ...]:  # fmt: skip
    """One entry for each text token in `tokens` (timestamps may be among them). encoded: of that window alone.

    duration_s: of the sound in the window.
    """
    text = [token for token in tokens if token < vocabulary.eot]
    if not text:
        return ()
    start = [*vocabulary.prompt(language, task), vocabulary.no_timestamps]
    n_frames = max(1, min(round(duration_s / TIMESTAMP_STEP_S), encoded.hidden.shape[1]))
    attended = engine.attend(encoded, [*start, *text, vocabulary.eot], n_frames)
    # A row looks where the token is heard that it chooses: from the row that chooses the first word to the end's.
    begins = first_frames(-attended.focus[len(start) - 1 : -1].double().numpy())
    seconds = [frame * TIMESTAMP_STEP_S for frame in begins]
    chances = attended.probabilities[len(start) - 1 :]
    return tuple(TokenTime(seconds[i], seconds[i + 1], chances[i]) for i in range(len(text)))


def first_frames(cost: npt.NDArray[np.float64]) -> list[int]:
    """cost: [n_rows, n_frames]. The frame at which the cheapest path enters each row.

    The path goes from the first row and frame to the last ones, a step in either direction or in both (dynamic time
    warping). All cells of an anti-diagonal depend on the two before it only, so they are computed at once.
    """
    n_rows, n_frames = cost.shape
    total = np.full((n_rows + 1, n_frames + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((n_rows + 1, n_frames + 1), dtype=np.int8)
    for diagonal in range(2, n_rows + n_frames + 1):
        i = np.arange(max(1, diagonal - n_frames), min(n_rows, diagonal - 1) + 1)
        j = diagonal - i
        both, down, along = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        way = np.where((both < down) & (both < along), 0, np.where((down < both) & (down < along), 1, 2))
        total[i, j] = cost[i - 1, j - 1] + np.choose(way, (both, down, along))
        came[i, j] = way
    came[0, :], came[:, 0] = 2, 1
    frames = [0] * n_rows
    row, frame = n_rows, n_frames
    while row > 0:
        if frame > 0:
            frames[row - 1] = frame - 1
        way = came[row, frame]
        row, frame = row - (way != 2), frame - (way != 1)
    return frames


def group_words(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], language: str) -> list[list[int]]:
    """Positions of the tokens that make each word: what split_words (transcript.py) makes of their text.

    In languages without spaces a word is a character, but for foreign words and numbers; punctuation stays with the
    word before it.
    """
    words: list[list[int]] = []
    unit: list[int] = []
    for position in range(len(tokens)):
        unit.append(position)
        piece = decode([tokens[i] for i in unit])
        if INCOMPLETE in piece and position + 1 < len(tokens):
            continue  # the character goes on in the next token
        is_new = not words or piece[:1].isspace()
        if language in UNSPACED_LANGUAGES:
            before = decode([tokens[i] for i in words[-1]]) if words else ""
            is_new = not words or (any(map(str.isalnum, piece)) and not is_one_word(before, piece))
        if is_new:
            words.append(unit)
        else:
            words[-1] += unit
        unit = []
    return words
