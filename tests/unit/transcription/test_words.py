"""Times of words: the path through what the model looked at, words from tokens, both engines on a real recording."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

from audio.windows import Window
from benchmarks.word_times import differences
from model_loader.alignment import _median, alignment_heads
from model_loader.device import describe_device
from model_loader.pool import EnginePool
from tests.fakes import demo_tokens
from transcription.decode import WindowResult
from transcription.formats import FORMATS
from transcription.options import TranscribeOptions
from transcription.pipeline import LocalTranscriber
from transcription.segments import Seam, to_segments
from transcription.transcript import Segment, Transcript, Word, join_words, split_words
from transcription.words import TokenTime, first_frames, group_words

TOKENS = demo_tokens()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 5), (7, 40), (30, 120), (6, 3)])
def test_the_path_is_transformers_own(shape: tuple[int, int]) -> None:
    for seed in range(5):
        cost = np.random.default_rng(seed).standard_normal(shape)
        rows, frames = _dynamic_time_warping(cost)
        expected = [int(frames[rows == row].min()) for row in range(shape[0])]
        assert first_frames(cost) == expected


def test_the_median_is_transformers_own() -> None:
    weights = torch.randn(2, 3, 50)
    torch.testing.assert_close(_median(weights), _median_filter(weights[None], 7)[0])


def test_heads_are_told_by_the_checkpoint_or_the_upper_half(tmp_path: Path, demo_folder: Path) -> None:
    told = json.loads((demo_folder / "generation_config.json").read_text())["alignment_heads"]
    assert alignment_heads(demo_folder, 4, 4) == [tuple(pair) for pair in told]
    assert alignment_heads(tmp_path, 4, 2) == [(2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("language", "text"),
    [("en", " It's 7:30, isn't it? Well..."), ("fr", " L'été n'est pas « fini »."), ("ru", " Добрый день, мир!")],
)
def test_words_are_those_between_spaces(language: str, text: str) -> None:
    ids = TOKENS.encode(text)
    words = group_words(ids, TOKENS.decode, language)
    assert [TOKENS.decode([ids[i] for i in word]).strip() for word in words] == split_words(text, language)
    assert [i for word in words for i in word] == list(range(len(ids)))


def test_a_chinese_word_is_a_character_with_the_punctuation_behind_it() -> None:
    ids = TOKENS.encode("早上好，欢迎。")
    words = [TOKENS.decode([ids[i] for i in word]) for word in group_words(ids, TOKENS.decode, "zh")]
    assert words == ["早", "上", "好，", "欢", "迎。"]


def test_a_foreign_word_in_chinese_is_one_word_as_in_its_text() -> None:
    text = "我用iPhone 15，很好。"
    ids = TOKENS.encode(text)
    words = [TOKENS.decode([ids[i] for i in word]).strip() for word in group_words(ids, TOKENS.decode, "zh")]
    assert words == ["我", "用", "iPhone", "15，", "很", "好。"]


def result_of(text: str, times: list[tuple[float, float]], *, start_s: float = 10.0) -> WindowResult:
    window = Window(0, start_s, np.zeros(16_000 * 4, dtype=np.float32), 4.0)
    stamp = TOKENS.timestamp_begin
    ids = TOKENS.encode(text)
    assert len(ids) == len(times), ids
    spoken = tuple(TokenTime(a, b, 0.5) for a, b in times)
    return WindowResult(window, (stamp + 25, *ids, stamp + 100), 0.0, -0.1, 1.0, 0.0, True, spoken)


def test_words_stay_inside_their_segment_and_in_order() -> None:
    ids = TOKENS.encode(" the library")
    times = [(0.1, 0.2)] * (len(ids) - 1) + [(1.9, 3.5)]  # begins before its segment, ends behind it
    (segment,) = to_segments(result_of(" the library", times), TOKENS, "en")
    assert (segment.start_s, segment.end_s) == (10.5, 12.0)
    assert [word.text for word in segment.words] == ["the", "library"]
    edges = [edge for word in segment.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges) and edges[0] == 10.5 and edges[-1] == 12.0


def timed_segment(start_s: float, text: str) -> Segment:
    words = tuple(Word(start_s + i, start_s + i + 0.8, word, 0.9) for i, word in enumerate(text.split()))
    return Segment(start_s, words[-1].end_s, text, "en", 0, 0.0, -0.1, 1.0, 0.0, words)


def test_words_are_cut_at_a_seam_with_their_text() -> None:
    seam = Seam("en")
    found = seam.join([timed_segment(20.0, "one two three four five")], start_s=0.0, next_start_s=23.0)
    found += seam.join([timed_segment(22.0, "three four five six seven")], start_s=22.0, next_start_s=60.0)
    found += seam.flush()
    assert join_words((s.text for s in found), "en") == "one two three four five six seven"
    assert [word.text for s in found for word in s.words] == ["one", "two", "three", "four", "five", "six", "seven"]
    assert all(s.words[0].start_s == s.start_s and s.words[-1].end_s == s.end_s for s in found)


def test_web_subtitles_hold_the_times_between_the_words() -> None:
    segment = timed_segment(1.0, "one <two> three")
    late = replace(segment.words[2], start_s=9.0)  # outside its cue: left out
    segments = (replace(segment, words=(*segment.words[:2], late)),)
    transcript = Transcript(segments, "en", 1.0, 5.0, 4.0, 5.0, 1.0, 0.5, 3, "demo", "fp32", "fast")
    assert FORMATS["vtt"].render(transcript).splitlines()[-1] == "one <00:00:02.000>&lt;two&gt; three"
    assert json.loads(FORMATS["json"].render(transcript))["segments"][0]["words"][1]["text"] == "<two>"
    assert FORMATS["txt"].render(transcript) == "one <two> three\n"


@pytest.fixture(scope="module")
def demo() -> Iterator[LocalTranscriber]:
    pool = EnginePool(device="cpu", offline=True, warm_up=False)
    transcriber = LocalTranscriber(pool, model="demo", precision="fp32", device=describe_device("cpu"))
    yield transcriber
    transcriber.close()


@pytest.mark.parametrize(("engine", "beams"), [("fast", 1), ("reference", 1), ("reference", 2)])
def test_words_are_heard_when_they_were_spoken(demo: LocalTranscriber, root: Path, engine: str, beams: int) -> None:
    """The synthesiser told when it spoke each word."""
    folder = root / "benchmarks" / "heldout"
    row = next(r for r in json.loads((folder / "manifest.json").read_text(encoding="utf-8")) if r["language"] == "en")
    options = TranscribeOptions(language="en", words=True, engine=engine, beam_size=beams)
    segments = list(demo.transcribe(folder / row["file"], options))
    for segment in segments:
        assert join_words((word.text for word in segment.words), "en") == segment.text
        assert all(0 < word.probability <= 1 for word in segment.words)
    truth = [word for sentence in row["sentences"] for word in sentence["words"]]
    found = list(differences(truth, [word for segment in segments for word in segment.words], "en"))
    assert len(found) == len(truth)
    assert statistics.median(abs(start) for start, _ in found) < 0.1 and max(abs(start) for start, _ in found) < 0.3
