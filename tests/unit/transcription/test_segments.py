"""Times of segments, and the seam between overlapping windows."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from audio.windows import Window
from tests.fakes import demo_tokens, hypothesis, segment
from transcription.decode import WindowResult
from transcription.segments import Seam, join_overlap, to_segments
from transcription.transcript import Segment


def result(
    *parts: tuple[float | None, str, float | None], start_s: float = 100.0, length_s: float = 10.0
) -> WindowResult:
    window = Window(3, start_s, np.zeros(round(length_s * 16_000), dtype=np.float32), length_s)
    return WindowResult(window, tuple(hypothesis(*parts).tokens), 0.0, -0.2, 1.2, 0.01, True)


def times(segments: list[Segment]) -> list[tuple[float, float, str]]:
    return [(s.start_s, s.end_s, s.text) for s in segments]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(0.5, "one two", 2.0), (2.5, "three", 4.0)], [(100.5, 102.0, "one two"), (102.5, 104.0, "three")]),
        ([(0.5, "one two", 2.0), (None, "three", None)], [(100.5, 102.0, "one two"), (102.0, 110.0, "three")]),
        ([(None, "no times at all", None)], [(100.0, 110.0, "no times at all")]),
        ([(0.5, "one two", None)], [(100.5, 110.0, "one two")]),
        ([(0.0, "too long", 30.0)], [(100.0, 110.0, "too long")]),
        ([(9.0, "late", 29.0), (29.0, "later", 30.0)], [(109.0, 110.0, "late"), (109.98, 110.0, "later")]),
        ([(2.0, "forth", 4.0), (1.0, "back", 3.0)], [(102.0, 104.0, "forth"), (104.0, 104.02, "back")]),
        ([(2.0, "no time", 2.0)], [(102.0, 102.02, "no time")]),
        ([(0.0, " ", 1.0), (1.0, "", 2.0)], []),
        ([], []),
    ],
)
def test_timestamps_become_seconds_of_the_recording(parts: list, expected: list) -> None:
    assert times(to_segments(result(*parts), demo_tokens(), "en")) == expected


def test_segments_stay_inside_their_window_and_never_run_back() -> None:
    generator = random.Random(0)
    for _ in range(300):
        parts = [
            (
                generator.choice([None, generator.uniform(0, 30)]),
                "word",
                generator.choice([None, generator.uniform(0, 30)]),
            )
            for _ in range(generator.randint(0, 6))
        ]
        segments = to_segments(result(*parts, length_s=generator.uniform(0.3, 30)), demo_tokens(), "en")
        for one, two in pairwise(segments):
            assert one.start_s <= one.end_s and one.end_s <= two.start_s + 0.021
            assert one.start_s <= two.start_s
        if segments:
            window_end_s = 100.0 + 30.0
            assert segments[0].start_s >= 100.0 and segments[-1].end_s <= window_end_s + 0.021


def joined(left: list[Segment], right: list[Segment], language: str = "en") -> str:
    result = join_overlap(left, right, 25.0, language)
    for one, two in pairwise(result):
        assert one.end_s <= two.start_s, "monotonic"
    return " ".join(s.text for s in result)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        # Both heard the same.
        (
            [segment(20, 24, "a b c"), segment(25.5, 29.5, "one two three four")],
            [segment(25.5, 29.5, "one two three four"), segment(30, 32, "five")],
            "a b c one two three four five",
        ),
        # Each window cuts the word at its border.
        (
            [segment(22, 30, "zero one two three fo")],
            [segment(25, 32, "ne two three four five")],
            "zero one two three four five",
        ),
        # Segments are divided differently, and written differently.
        (
            [segment(20, 27, "He said: go,"), segment(27, 30, "then he wen")],
            [segment(25, 33, "Go. Then he went home")],
            "He said: go, Then he went home",
        ),
        # The right window heard nothing in the overlap.
        ([segment(24, 27, "one two")], [segment(30.5, 32, "three")], "one two three"),
        # The left window heard nothing in the overlap.
        ([segment(20, 24, "one two")], [segment(26, 28, "three")], "one two three"),
        ([], [segment(26, 28, "three")], "three"),
        ([segment(20, 24, "one")], [], "one"),
        # A word that occurs again later is no seam.
        (
            [segment(20, 25.5, "the end of it")],
            [segment(29.5, 31, "the start")],
            "the end of it the start",
        ),
    ],
)
def test_no_word_is_doubled_or_lost_at_a_seam(left: list[Segment], right: list[Segment], expected: str) -> None:
    assert joined(left, right) == expected


def test_a_seam_in_chinese_compares_characters() -> None:
    left = [segment(22, 30, "今天天气很好我们去公", language="zh")]
    right = [segment(25, 33, "气很好我们去公园玩", language="zh")]
    assert joined(left, right, "zh").replace(" ", "") == "今天天气很好我们去公园玩"


def test_windows_that_agree_on_nothing_are_joined_by_time() -> None:
    left = [segment(20, 24.8, "before"), segment(25, 27, "alpha"), segment(28, 30, "beta")]
    right = [segment(25, 27, "gamma"), segment(28, 30, "delta"), segment(31, 33, "after")]
    assert joined(left, right) == "before alpha delta after"


def test_a_long_recording_comes_back_word_for_word() -> None:
    """Windows of 30 s every 25 s over 200 s of numbered words, half of them cut badly at their borders."""
    words = [(0.5 * i, 0.5 * i + 0.4, f"w{i}") for i in range(400)]
    seam, out, start_s = Seam("en"), [], 0.0
    while start_s < 195:
        heard = [w for w in words if w[0] >= start_s and w[1] <= start_s + 30]
        segments = [
            segment(part[0][0], part[-1][1], " ".join(w[2] for w in part))
            for part in (heard[i : i + 7] for i in range(0, len(heard), 7))
        ]
        finished = seam.join(segments, start_s=start_s, next_start_s=start_s + 25)
        assert all(s.end_s <= start_s + 25 for s in finished), "what may still change is held back"
        out += finished
        start_s += 25
    out += seam.flush()
    assert " ".join(s.text for s in out).split() == [w[2] for w in words]
    assert all(one.end_s <= two.start_s + 1e-6 for one, two in pairwise(out))
