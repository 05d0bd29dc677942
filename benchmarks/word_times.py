"""How near word times come to the truth: `python -m benchmarks.word_times`.

In: the held-out recordings, whose synthesiser told when it spoke each word, and a checkpoint. Each recording is
transcribed as a user would, with times of words; words are matched with the spoken ones in order (difflib, case and
punctuation aside), and starts and ends of those that match are compared. Out: a table by language in milliseconds
(median and 90th percentile of the error), the share of words within 100 and 200 ms, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from benchmarks.accuracy import HELDOUT
from benchmarks.load import table
from benchmarks.memory import circumstances, run
from model_loader.device import describe_device
from model_loader.pool import EnginePool
from transcription.options import TranscribeOptions
from transcription.pipeline import LocalTranscriber
from transcription.transcript import UNSPACED_LANGUAGES, Word


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    device = describe_device(arguments.device)
    pool = EnginePool(device=arguments.device, warm_up=False)
    transcriber = LocalTranscriber(pool, model=arguments.model, precision=arguments.precision, device=device)
    errors: dict[str, list[tuple[float, float]]] = {}
    spoken: dict[str, int] = {}
    try:
        for row in _recordings(arguments.heldout, arguments.limit):
            options = TranscribeOptions(language=row["language"], words=True, engine=arguments.engine)
            run = transcriber.transcribe(arguments.heldout / row["file"], options)
            heard = [word for segment in run for word in segment.words]
            truth = [word for sentence in row["sentences"] for word in sentence["words"]]
            spoken[row["language"]] = spoken.get(row["language"], 0) + len(truth)
            errors.setdefault(row["language"], []).extend(differences(truth, heard, row["language"]))
    finally:
        transcriber.close()
    rows = [summary(language, found, spoken[language]) for language, found in errors.items()]
    rows.append(summary("all", [pair for found in errors.values() for pair in found], sum(spoken.values())))
    print(table(rows))
    print(json.dumps({**circumstances("word_times", device, arguments.model), "languages": rows}))
    return 0


def differences(truth: Sequence[Sequence[Any]], heard: Sequence[Word], language: str) -> Iterator[tuple[float, float]]:
    """(start, end) found less spoken, in seconds, of the words that both have. truth: [word, start, end] each."""
    spoken = [(_bare(text), start, end) for text, start, end in _units(truth, language) if _bare(text)]
    found = [(_bare(word.text), word.start_s, word.end_s) for word in heard if _bare(word.text)]
    matcher = SequenceMatcher(None, [word for word, *_ in spoken], [word for word, *_ in found], autojunk=False)
    for block in matcher.get_matching_blocks():
        for (_, start, end), (_, found_start, found_end) in zip(
            spoken[block.a : block.a + block.size], found[block.b : block.b + block.size], strict=True
        ):
            yield found_start - start, found_end - end


def summary(language: str, found: Sequence[tuple[float, float]], n_spoken: int) -> dict[str, Any]:
    starts, ends = ([abs(pair[i]) for pair in found] for i in (0, 1))
    return {
        "language": language,
        "spoken": n_spoken,
        "matched": len(found),
        "start, median ms": round(1000 * statistics.median(starts)),
        "start, 90 %": round(1000 * statistics.quantiles(starts, n=10)[-1]),
        "end, median ms": round(1000 * statistics.median(ends)),
        "end, 90 %": round(1000 * statistics.quantiles(ends, n=10)[-1]),
        "starts within 100 ms, %": round(100 * sum(error <= 0.1 for error in starts) / len(starts), 1),
        "within 200 ms, %": round(100 * sum(error <= 0.2 for error in starts) / len(starts), 1),
    }


def _units(truth: Sequence[Sequence[Any]], language: str) -> Iterator[tuple[str, float, float]]:
    """Words; in languages without spaces their characters, spread evenly over the word."""
    for text, start, end in truth:
        characters = [c for c in text if _bare(c)] if language in UNSPACED_LANGUAGES else [text]
        step = (end - start) / max(len(characters), 1)
        for index, character in enumerate(characters):
            yield character, start + index * step, start + (index + 1) * step


def _bare(word: str) -> str:
    return "".join(character for character in word.casefold() if character.isalnum())


def _recordings(folder: Path, limit: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    by_language: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_language.setdefault(row["language"], []).append(row)
    return [row for same in by_language.values() for row in (same[:limit] if limit else same)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.word_times", description="Errors of word times.")
    parser.add_argument("--model", default="demo", help="checkpoint: demo, a folder or a Hub name (default: demo)")
    parser.add_argument("--precision", default="fp32", help="default: fp32")
    parser.add_argument("--engine", default="auto", help="auto, fast or reference (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--limit", type=int, default=0, help="recordings per language; 0 for all (default)")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="folder with manifest.json and its recordings")
    return parser


if __name__ == "__main__":
    run(main)
