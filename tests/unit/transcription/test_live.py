"""Settled and tentative text over a real recording and a scripted ear."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from audio.decode import decode_all
from tests.fakes import segment
from transcription.live import FULL_S, Heard, listen

SECOND = 16_000


@pytest.fixture(scope="module")
def speech(root: Path) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """The English example, and the end of each of its sentences."""
    entry = json.loads((root / "examples" / "manifest.json").read_text(encoding="utf-8"))[0]
    samples = decode_all(root / "examples" / entry["file"])
    words = [(s["start_s"], s["end_s"], s["text"].split()) for s in entry["sentences"]]
    timed = [
        (start + (end - start) * (i + 1) / len(texts), word)
        for start, end, texts in words
        for i, word in enumerate(texts)
    ]
    return samples, timed


class ScriptedEar:
    """Hears the words whose end lies in the window; the newest one is heard wrongly at first."""

    def __init__(self, timed: list[tuple[float, str]]) -> None:
        self.timed = timed
        self.windows: list[tuple[float, float]] = []

    def __call__(self, samples: np.ndarray, start_s: float) -> Heard:
        end_s = start_s + samples.size / SECOND
        self.windows.append((start_s, end_s))
        timed = [(time_s, word) for time_s, word in self.timed if start_s < time_s <= end_s]
        if timed and end_s - timed[-1][0] < 0.3:
            timed[-1] = (timed[-1][0], "???")
        parts = [timed[i : i + 6] for i in range(0, len(timed), 6)]
        ends = [part[-1][0] for part in parts]
        return Heard(
            tuple(
                segment(part_start_s, part[-1][0], " ".join(word for _, word in part))
                for part_start_s, part in zip([start_s, *ends], parts, strict=False)
            ),
            "en",
        )


def blocks(samples: np.ndarray, size_s: float) -> Iterator[np.ndarray]:
    size = round(size_s * SECOND)
    yield from (samples[i : i + size] for i in range(0, samples.size, size))


@pytest.mark.parametrize("block_s", [0.25, 1.0, 30.0])
def test_settled_text_only_grows_and_ends_complete(speech: tuple, block_s: float) -> None:
    samples, timed = speech
    ear = ScriptedEar(timed)
    texts = list(listen(blocks(samples, block_s), ear))
    settled = [text.settled for text in texts]
    for before, after in pairwise(settled):
        assert after.startswith(before)
    assert settled[-1].split() == [word for _, word in timed]
    assert texts[-1].tentative == ""
    assert any(text.tentative for text in texts), "words are shown before they are sure"
    assert any(text.settled and text.tentative for text in texts)
    assert texts[-1].heard_s == pytest.approx(samples.size / SECOND)


def test_silence_is_never_decoded() -> None:
    ear = ScriptedEar([])
    texts = list(listen(blocks(np.zeros(20 * SECOND, dtype=np.float32), 0.5), ear))
    assert ear.windows == []
    assert [text.text for text in texts] == [""]


def test_a_pause_ends_an_utterance(speech: tuple) -> None:
    samples, timed = speech
    ear = ScriptedEar(timed)
    gap = np.zeros(3 * SECOND, dtype=np.float32)
    list(listen(blocks(np.concatenate([samples, gap, samples]), 0.5), ear))
    starts = sorted({start for start, _ in ear.windows})
    assert starts[-1] > samples.size / SECOND, "the second utterance is heard by itself"


def test_speech_without_a_pause_never_overflows_the_window(speech: tuple) -> None:
    samples, _ = speech
    spoken = samples[round(7.5 * SECOND) : round(11.6 * SECOND)]  # one sentence, no pause
    long = np.tile(spoken, 16)
    ear = ScriptedEar([(i * 0.5, f"w{i}") for i in range(1, int(2 * long.size / SECOND))])
    texts = list(listen(blocks(long, 0.5), ear))
    assert max(end - start for start, end in ear.windows) <= FULL_S + 1.1
    words = texts[-1].settled.split()
    assert len(words) >= 2 * long.size / SECOND - 3
    assert len(set(words)) == len(words)
