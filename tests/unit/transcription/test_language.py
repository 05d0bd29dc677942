"""Language detection: averages over voiced windows, and where they are looked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from audio.windows import Window
from errors import OptionError
from tests.fakes import N_VOCAB, demo_tokens
from transcription.language import EXCERPT_S, excerpts, report_languages, spread
from transcription.tokenizer import WhisperTokens

SECOND = 16_000


def window(index: int, speech_s: float) -> Window:
    return Window(index, 10.0 * index, np.zeros(SECOND, dtype=np.float32), speech_s)


def logits(*favoured: dict[str, float]) -> torch.Tensor:
    """A row per window: probability by language."""
    rows = torch.full((len(favoured), N_VOCAB), 50.0)  # text tokens must not matter
    for row, probabilities in zip(rows, favoured, strict=True):
        for code, token in demo_tokens().languages.items():
            row[token] = float(np.log(probabilities.get(code, 1e-9)))
    return rows


def test_windows_are_averaged_by_the_speech_in_them() -> None:
    report = report_languages(
        logits({"en": 0.9, "de": 0.1}, {"en": 0.2, "de": 0.8}), [window(0, 3.0), window(1, 1.0)], demo_tokens()
    )
    assert report.best.code == "en"
    assert report.best.probability == pytest.approx((3 * 0.9 + 1 * 0.2) / 4, abs=1e-4)
    assert [w.guesses[0].code for w in report.windows] == ["en", "de"]
    assert [w.start_s for w in report.windows] == [0.0, 10.0]
    assert sum(guess.probability for guess in report.guesses) == pytest.approx(1.0, abs=1e-4)
    assert set(guess.code for guess in report.guesses) == set(demo_tokens().languages)


def test_an_english_only_checkpoint_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    tokens: WhisperTokens = replace(demo_tokens(), languages={})
    with pytest.raises(OptionError, match="English only"):
        report_languages(logits({"en": 1.0}), [window(0, 1.0)], tokens)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (20, list(range(10)))])
def test_windows_are_spread_evenly(count: int, expected: list[int]) -> None:
    assert [w.index for w in spread([window(i, 1.0) for i in range(10)], count)] == expected


def stream(total_s: int, block_s: float) -> Iterator[np.ndarray]:
    """Samples that tell the second they are from."""
    samples = np.repeat(np.arange(total_s, dtype=np.float32), SECOND)
    size = round(block_s * SECOND)
    yield from (samples[i : i + size] for i in range(0, samples.size, size))


@pytest.mark.parametrize("block_s", [10.0, 7.3, 1.0, 95.0])
def test_excerpts_are_spread_over_a_long_recording(block_s: float) -> None:
    found = list(excerpts(stream(600, block_s), 600.0, 4))
    assert [start for start, _ in found] == [0.0, 180.0, 360.0, 540.0]
    for start_s, samples in found:
        assert samples.size == EXCERPT_S * SECOND
        assert samples[0] == start_s and samples[-1] == start_s + EXCERPT_S - 1


def test_a_short_recording_is_seen_whole() -> None:
    found = list(excerpts(stream(90, 10.0), 90.0, 5))
    assert [(start, samples.size / SECOND) for start, samples in found] == [(0.0, 60.0), (60.0, 30.0)]


def test_unknown_or_wrong_length_starts_at_the_beginning() -> None:
    assert [start for start, _ in excerpts(stream(200, 10.0), None, 2)] == [0.0, 60.0]
    assert [start for start, _ in excerpts(stream(100, 10.0), 3600.0, 3)] == [0.0]
