"""The recordings that ship: `python -m training.heldout examples` and `python -m training.heldout evaluation`.

In: examples/scripts.toml and benchmarks/heldout/sentences.toml. Out: examples/*.flac, benchmarks/heldout/*.opus, and a
manifest.json beside each: texts, speakers, times of sentences and (evaluation) of words.

The evaluation set has single sentences, as one speaks to a telephone, and windows of 20 to 28 seconds with pauses and
sometimes several speakers, as a recording is cut. The synthesisers' versions decide the samples, so a newer eSpeak NG
gives other recordings: compare precisions on the recordings that are committed.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.recordings import Line, Recording, record, write_flac, write_opus
from training.synthesis import Delivery, Synthesizer
from training.units import LANGUAGES

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "CC0-1.0"
"""Texts written for this project, spoken by programs."""

_SEED = 20
_SINGLES_SHARE = 0.4
"""Of the sentences of a kind; the rest goes into windows."""
_SHORTEST_WINDOW_S, _LONGEST_WINDOW_S = 20.0, 28.0
_SAME_SPEAKER = 0.6
_OPUS_KBPS = 20


def make_examples(folder: Path, synthesizer: Synthesizer) -> list[dict[str, Any]]:
    """Say every script of folder/scripts.toml, write the recordings and manifest.json; returns the manifest."""
    scripts = tomllib.loads((folder / "scripts.toml").read_text(encoding="utf8"))["recording"]
    manifest = []
    for script in scripts:
        recording = say_script(script, synthesizer)
        write_flac(folder / script["file"], recording.samples)
        voices = list(dict.fromkeys(sentence.voice for sentence in recording.sentences))
        head = {"file": script["file"], "label": script["label"]}
        tail = {"voice": ", ".join(voices), "licence": LICENCE}
        manifest.append(head | recording.truth(with_words=False) | tail)
        logger.info("recording=%s seconds=%.1f", script["file"], recording.duration_s)
    _write_json(folder / "manifest.json", manifest)
    return manifest


def say_script(script: dict[str, Any], synthesizer: Synthesizer) -> Recording:
    """One [[recording]] of scripts.toml; a line is a text, or a voice, the pause after it in seconds, and a text."""
    lines = []
    for entry in script["lines"]:
        voice, pause_s, text = entry if isinstance(entry, list) else (script["voice"], 0.4, entry)
        lines.append(Line(text, script["language"], Delivery(voice, script["rate_wpm"]), pause_s))
    return record(lines, synthesizer)


def make_evaluation(folder: Path, synthesizer: Synthesizer) -> list[dict[str, Any]]:
    """Say the sentences of folder/sentences.toml, write the recordings and manifest.json; returns the manifest."""
    sentences = tomllib.loads((folder / "sentences.toml").read_text(encoding="utf8"))
    manifest = []
    for language in LANGUAGES:
        rng = random.Random(f"{_SEED} {language}")
        for kind, texts in sentences[language].items():
            for number, recording in enumerate(say_sentences(texts, language, rng, synthesizer), 1):
                file = f"{language}-{kind}-{number:02d}.opus"
                write_opus(folder / file, recording.samples, bitrate_kbps=_OPUS_KBPS)
                manifest.append({"file": file, "kind": kind} | recording.truth(with_words=True) | {"licence": LICENCE})
        logger.info("language=%s recordings=%d", language, sum(row["language"] == language for row in manifest))
    _write_rows(folder / "manifest.json", manifest)
    return manifest


def say_sentences(
    texts: Sequence[str], language: str, rng: random.Random, synthesizer: Synthesizer
) -> Iterator[Recording]:
    """Every sentence once: some alone, the others several to a window."""
    order = rng.sample(list(texts), len(texts))
    n_singles = round(len(order) * _SINGLES_SHARE)
    for text in order[:n_singles]:
        line = Line(text, language, synthesizer.pick(language, rng, moderate=True), rng.uniform(0.1, 1.0))
        yield record([line], synthesizer, lead_s=rng.uniform(0.1, 0.8), gain=rng.uniform(0.6, 2.5))
    lines: list[Line] = []
    speaker = synthesizer.pick(language, rng, moderate=True)
    for text in order[n_singles:]:
        if rng.random() > _SAME_SPEAKER:
            speaker = synthesizer.pick(language, rng, moderate=True)
        lines.append(Line(text, language, speaker, rng.uniform(0.3, 2.0)))
        window = record(lines, synthesizer)
        if window.duration_s > _LONGEST_WINDOW_S:  # the last line went too far: it opens the next window
            yield record(lines[:-1], synthesizer)
            lines = lines[-1:]
        elif window.duration_s > _SHORTEST_WINDOW_S:
            yield window
            lines = []
    if lines:
        yield record(lines, synthesizer)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row a line: readable in a diff and compact, although it holds the times of every word."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("examples", "evaluation"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.what == "examples":
        make_examples(ROOT / "examples", Synthesizer())
    else:
        make_evaluation(ROOT / "benchmarks" / "heldout", Synthesizer())


if __name__ == "__main__":
    main()
