"""Windows: never too long, in order, all speech inside, known early."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import audio.windows
from audio.constants import SAMPLE_RATE, WINDOW_S, WINDOW_SAMPLES
from audio.decode import decode_blocks
from audio.vad import FRAME_SAMPLES, MAX_SPAN_S
from audio.windows import MAX_GAP_S, OVERLAP_S, PAD_S, Window, cut_windows

from .test_vad import LoudnessDetector, find_speech


@pytest.fixture
def by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio.windows, "SpeechDetector", LoudnessDetector)
    monkeypatch.setattr(audio.vad, "SpeechDetector", LoudnessDetector)


def recording(seed: int) -> np.ndarray:
    """Random speech and pauses; every sample is different, so a wrong position shows."""
    rng = np.random.default_rng(seed)
    longest_s, pause_s = rng.choice([2, 10, 40, 70]), rng.choice([0.2, 0.5, 2, 10])
    parts = []
    for _ in range(rng.integers(1, 25)):
        parts.append(0.6 + 0.3 * rng.random(int(rng.uniform(0.05, longest_s) * SAMPLE_RATE)))
        parts.append(0.1 * rng.random(int(rng.exponential(pause_s) * SAMPLE_RATE)))
    return np.concatenate(parts[rng.integers(0, 2) :]).astype(np.float32)


def in_blocks(waveform: np.ndarray, n_samples: int) -> Iterator[np.ndarray]:
    for start in range(0, waveform.size, n_samples):
        yield waveform[start : start + n_samples]


def samples_of(window: Window) -> tuple[int, int]:
    start = round(window.start_s * SAMPLE_RATE)
    return start, start + window.samples.size


@pytest.mark.usefixtures("by_loudness")
@pytest.mark.parametrize("seed", range(25))
def test_properties_of_silence_cut_windows(seed: int) -> None:
    waveform = recording(seed)
    spans = [(span.start_sample, span.end_sample) for span in find_speech([waveform])]
    windows = list(cut_windows(in_blocks(waveform, 16_000)))
    assert [window.index for window in windows] == list(range(len(windows)))
    last_end, left = 0, list(spans)
    for window in windows:
        start, end = samples_of(window)
        assert 0 < window.samples.size <= WINDOW_SAMPLES
        assert window.end_s == pytest.approx(end / SAMPLE_RATE)
        assert start >= last_end
        assert np.array_equal(window.samples, waveform[start:end])
        inside = [span for span in left if start <= span[0] and span[1] <= end]
        assert left[: len(inside)] == inside  # whole spans, in order, each once
        left = left[len(inside) :]
        assert window.speech_s == pytest.approx(sum(b - a for a, b in inside) / SAMPLE_RATE)
        assert inside[0][0] - start <= PAD_S * SAMPLE_RATE
        assert end - inside[-1][1] <= PAD_S * SAMPLE_RATE
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(inside)]
        assert max(gaps, default=0) <= MAX_GAP_S * SAMPLE_RATE
        last_end = end
    assert left == []


@pytest.mark.usefixtures("by_loudness")
@pytest.mark.parametrize("seed", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["vad", "fixed"])
def test_block_sizes_do_not_change_windows(seed: int, mode: str) -> None:
    waveform = recording(seed)
    whole = list(cut_windows([waveform], mode))
    for n_samples in (977, 160_000):
        streamed = list(cut_windows(in_blocks(waveform, n_samples), mode))
        assert [(w.start_s, w.samples.size, w.speech_s) for w in streamed] == [
            (w.start_s, w.samples.size, w.speech_s) for w in whole
        ]


@pytest.mark.usefixtures("by_loudness")
@pytest.mark.parametrize("mode", ["vad", "fixed"])
def test_a_window_comes_as_soon_as_it_is_known(mode: str) -> None:
    waveform = recording(3)
    n_fed = 0

    def feed() -> Iterator[np.ndarray]:
        nonlocal n_fed
        for block in in_blocks(waveform, 1600):
            n_fed += block.size
            yield block

    late = MAX_GAP_S + 2 * PAD_S if mode == "vad" else 0.0
    # A span that does not fit is known to end the window before only when that span has ended.
    for window in cut_windows(feed(), mode):
        limit_s = window.end_s + late + (WINDOW_S if mode == "vad" else 0.0)
        assert n_fed / SAMPLE_RATE <= limit_s + 0.2
        assert window.samples.size > 0


@pytest.mark.usefixtures("by_loudness")
def test_a_pause_longer_than_the_limit_releases_the_window() -> None:
    """Live use: the words before a pause must not wait for the words after it."""
    speech = np.full(2 * SAMPLE_RATE, 0.9, np.float32)
    silence = np.zeros(60 * SAMPLE_RATE, np.float32)
    n_fed = 0

    def feed() -> Iterator[np.ndarray]:
        nonlocal n_fed
        for block in in_blocks(np.concatenate([speech, silence]), FRAME_SAMPLES):
            n_fed += block.size
            yield block

    window = next(iter(cut_windows(feed())))
    assert n_fed / SAMPLE_RATE <= 2 + MAX_GAP_S + 0.1
    assert window.start_s == 0.0
    assert window.end_s == pytest.approx(2 + PAD_S, abs=0.04)


@pytest.mark.usefixtures("by_loudness")
def test_memory_does_not_grow_with_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class WatchedTape(audio.windows.Tape):
        def append(self, block: np.ndarray) -> None:
            super().append(block)
            kept.append(sum(part.size for part in self._blocks))

    monkeypatch.setattr(audio.windows, "Tape", WatchedTape)
    monkeypatch.setattr(audio.vad, "Tape", WatchedTape)
    for mode in ("vad", "fixed"):
        for level in (0.0, 0.9):
            list(cut_windows((np.full(SAMPLE_RATE, level, np.float32) for _ in range(300)), mode))
    assert max(kept) <= (2 * WINDOW_S + 2) * SAMPLE_RATE


FIXED = {  # seconds of recording to the windows' starts and lengths
    0.0: [],
    0.05: [(0, 0.05)],
    29.0: [(0, 29)],
    30.0: [(0, 30)],
    30.5: [(0, 30), (25, 5.5)],
    54.0: [(0, 30), (25, 29)],
    55.0: [(0, 30), (25, 30)],
    60.0: [(0, 30), (25, 30), (50, 10)],
    80.0: [(0, 30), (25, 30), (50, 30)],
}


@pytest.mark.parametrize("duration_s", FIXED)
def test_fixed_windows(duration_s: float) -> None:
    waveform = np.random.default_rng(0).random(round(duration_s * SAMPLE_RATE)).astype(np.float32)
    windows = list(cut_windows(in_blocks(waveform, 12_345), "fixed"))
    assert [(w.start_s, w.samples.size / SAMPLE_RATE) for w in windows] == FIXED[duration_s]
    for window in windows:
        start, end = samples_of(window)
        assert np.array_equal(window.samples, waveform[start:end])
    assert sum(window.speech_s for window in windows) == pytest.approx(duration_s)


def test_the_longest_span_fits_with_its_padding() -> None:
    assert MAX_SPAN_S + 2 * PAD_S <= WINDOW_S


def test_overlap_is_shorter_than_half_a_window() -> None:
    assert 0 < OVERLAP_S < WINDOW_S / 2


@pytest.mark.parametrize("duration_s", [0.0, 0.01, 5.0, 100.0])
def test_silence_yields_no_windows(duration_s: float) -> None:
    assert list(cut_windows([np.zeros(round(duration_s * SAMPLE_RATE), np.float32)])) == []


def test_another_mode_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'vad' or 'fixed', not 'sliding'"):
        cut_windows([], "sliding")  # type: ignore[arg-type]


def test_real_recording_is_cut_between_words(shared_audio: Path) -> None:
    """The border is quieter than the speech: nothing is cut inside a vowel."""
    with decode_blocks(shared_audio / "en-sonnet-1.mp3") as blocks:
        windows = list(cut_windows(blocks))
    assert len(windows) == 2
    loudness = float(np.sqrt(np.mean(np.concatenate([w.samples for w in windows]) ** 2)))
    for edge in (windows[0].samples[-800:], windows[1].samples[:800]):
        assert np.sqrt(np.mean(edge**2)) < 0.2 * loudness
