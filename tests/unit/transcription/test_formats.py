"""Every format against its golden file, and the rules that players insist on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from errors import OptionError
from transcription.formats import FORMATS, resolve_format
from transcription.transcript import Segment, Transcript

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def make_segment(start_s: float, end_s: float, text: str) -> Segment:
    return Segment(
        start_s=start_s, end_s=end_s, text=text, language="en", window_index=0, temperature=0.0, avg_logprob=-0.25,
        compression_ratio=1.5, no_speech_prob=0.125,
    )  # fmt: skip


TRANSCRIPT = Transcript(
    segments=(
        make_segment(0.3, 2.861, " Good morning, and welcome.\n"),
        make_segment(3.0, 3.0, "No time at all"),
        make_segment(4.0, 5.0, "   "),
        make_segment(59.9996, 3600.5, 'Tom & "Jerry" <laugh> --> 安静。\tПривет'),
        make_segment(36000.0, 36001.25, "Ten hours, one minute?\n\nYes."),
    ),
    language="en", language_probability=0.75, duration_s=36002.0, speech_s=12.5, transcribed_s=36000.0, elapsed_s=8.0,
    first_text_s=0.5, n_tokens=42, model="demo", precision="fp32", engine="reference", warnings=("A warning.",),
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_golden_file(name: str) -> None:
    row = FORMATS[name]
    path = GOLDEN / f"transcript.{row.extension}"
    rendered = row.render(TRANSCRIPT)
    if os.environ.get("SOTTO_WRITE_GOLDEN"):
        path.write_text(rendered, encoding="utf-8")
    assert rendered == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_transcript_renders(name: str) -> None:
    empty = replace(TRANSCRIPT, segments=())
    rendered = FORMATS[name].render(empty)
    assert "-->" not in rendered
    if name == "vtt":
        assert rendered == "WEBVTT\n"


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_cues_are_never_empty_and_end_after_they_start(name: str) -> None:
    blocks = [b for b in FORMATS[name].render(TRANSCRIPT).split("\n\n") if "-->" in b]
    assert len(blocks) == 4
    for block in blocks:
        lines = block.strip().split("\n")
        times = next(line for line in lines if "-->" in line)
        start, end = times.split(" --> ")
        assert start < end
        assert lines[-1].strip() and lines[-1] != times


def test_tsv_has_whole_milliseconds_and_one_row_per_segment() -> None:
    rows = [line.split("\t") for line in FORMATS["tsv"].render(TRANSCRIPT).splitlines()]
    assert rows[0] == ["start", "end", "text"]
    assert all(len(row) == 3 and row[0].isdigit() and row[1].isdigit() for row in rows[1:])


def test_json_holds_everything_and_no_nan() -> None:
    odd = replace(TRANSCRIPT, segments=(replace(TRANSCRIPT.segments[0], avg_logprob=float("nan")),))
    loaded = json.loads(FORMATS["json"].render(odd), parse_constant=lambda word: pytest.fail(word))
    assert loaded["segments"][0]["avg_logprob"] is None
    assert loaded["text"] and loaded["real_time_factor"] > 0


@pytest.mark.parametrize(
    ("source", "expected"),
    [("talk.mp3", "talk.srt"), ("C:\\x\\talk.mp4", "talk.srt"), ("запись 1.wav", "запись 1.srt"), (".mp3", ".mp3.srt")],
)
def test_results_are_named_after_the_recording(source: str, expected: str) -> None:
    assert FORMATS["srt"].file_name(source) == expected


def test_an_unknown_format_is_refused_with_the_list() -> None:
    assert resolve_format(" SRT ").name == "srt"
    with pytest.raises(OptionError, match="txt, srt, vtt, tsv, json"):
        resolve_format("docx")
