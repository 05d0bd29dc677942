"""Transcript -> txt, srt, vtt, tsv, json: pure functions and the table of them. No files are opened here.

Times follow openai/whisper (whisper/utils.py): tsv in whole milliseconds, srt with a comma, vtt with a point (hours
always written, which WebVTT allows). A cue is never empty, never ends before it starts, and never holds a blank line,
because that would end it. All results are text ending in a newline, to be written as UTF-8.

To add a format: one function, one row in FORMATS, one golden file in tests/golden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from errors import OptionError
from transcription.transcript import Segment, Transcript, join_words


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a transcript down."""

    name: str
    label: str
    extension: str
    """Without the dot."""
    mime: str
    render: Callable[[Transcript], str]

    def file_name(self, source_name: str) -> str:
        """A name for the result, after the recording it came from: 'talk.mp3' -> 'talk.srt'."""
        stem = PurePath(source_name.replace("\\", "/")).stem or "transcript"
        return f"{stem}.{self.extension}"


def to_txt(transcript: Transcript) -> str:
    """One segment per line."""
    return "".join(f"{text}\n" for _, text in _lines(transcript))


def to_srt(transcript: Transcript) -> str:
    """SubRip, the de facto format: numbered cues, HH:MM:SS,mmm."""
    cues = (
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text.replace('-->', '->')}\n"
        for number, (_, start, end, text) in enumerate(_cues(transcript), 1)
    )
    return "\n".join(cues)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT (W3C): HH:MM:SS.mmm; &, < and > are escaped; times of words stand between them where known."""
    cues = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_with_word_times(segment, start, end, text)}\n"
        for segment, start, end, text in _cues(transcript)
    )
    return "\n".join(["WEBVTT\n", *cues])


def to_tsv(transcript: Transcript) -> str:
    """start, end, text separated by tabs; times in whole milliseconds."""
    return "start\tend\ttext\n" + "".join(f"{start}\t{end}\t{text}\n" for _, start, end, text in _cues(transcript))


def to_json(transcript: Transcript) -> str:
    """Every field of the transcript; a number that is not finite becomes null, which JSON can hold."""
    return json.dumps(_finite(transcript.to_dict()), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("txt", "Text (.txt)", "txt", "text/plain", to_txt),
        Format("srt", "Subtitles (.srt)", "srt", "application/x-subrip", to_srt),
        Format("vtt", "Web subtitles (.vtt)", "vtt", "text/vtt", to_vtt),
        Format("tsv", "Table (.tsv)", "tsv", "text/tab-separated-values", to_tsv),
        Format("json", "Everything (.json)", "json", "application/json", to_json),
    )
}


def resolve_format(name: str) -> Format:
    """The row of that name; raises OptionError."""
    row = FORMATS.get(name.strip().lower().lstrip("."))
    if row is None:
        raise OptionError(f"There is no output format '{name}'; choose one of {', '.join(FORMATS)}.")
    return row


def _lines(transcript: Transcript) -> Iterator[tuple[Segment, str]]:
    """Segments that have text, with their white space (tabs, line breaks) collapsed."""
    for segment in transcript.segments:
        text = " ".join(segment.text.split())
        if text:
            yield segment, text


def _cues(transcript: Transcript) -> Iterator[tuple[Segment, int, int, str]]:
    """(segment, start, end, text) in whole milliseconds, end after start."""
    for segment, text in _lines(transcript):
        start_ms, end_ms = round(1000 * segment.start_s), round(1000 * segment.end_s)
        yield segment, start_ms, max(end_ms, start_ms + 1), text


def _with_word_times(segment: Segment, start_ms: int, end_ms: int, text: str) -> str:
    """The cue's text, escaped. A time must lie inside the cue and behind the one before it (W3C), or it is left out."""
    if join_words((word.text for word in segment.words), segment.language) != text:
        return _escape(text)
    parts, latest_ms = list[str](), start_ms
    for word in segment.words:
        time_ms = round(1000 * word.start_s)
        if latest_ms < time_ms < end_ms:
            latest_ms = time_ms
            parts.append(f"<{_clock(time_ms, '.')}>{_escape(word.text)}")
        else:
            parts.append(_escape(word.text))
    return join_words(parts, segment.language)


def _clock(time_ms: int, point: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{milliseconds:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
