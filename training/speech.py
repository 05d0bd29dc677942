"""Lines of text -> shards of training speech, in parallel processes.

In: <work>/text/<language>.tsv. Out: <work>/speech/shard_NN.pcm (int16, 16 kHz, utterances one after another) and
shard_NN.npz, its index: where each utterance lies, its language, and the tokens, starts and ends of its units.

A speaker says 6 to 14 lines in a row, so a window can hold one voice or several. Languages keep their SHARE of the
time. About 80 s of speech per second and core; 115 MB an hour. A folder with speech.json is complete and left alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from audio.constants import SAMPLE_RATE
from errors import MachineError
from training.synthesis import Synthesizer, Utterance
from training.text import read_lines
from training.units import LANGUAGES, Unit, parse_units
from transcription.tokenizer import WhisperTokens

logger = logging.getLogger(__name__)

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
"""Its tokenizer is the recipe's; training reads nothing else of it."""

SHARE = {"en": 0.5, "es": 0.1, "fr": 0.1, "de": 0.1, "ru": 0.1, "zh": 0.1}
_LONGEST_UTTERANCE_S = 20.0
_BYTES_AN_HOUR = 2 * SAMPLE_RATE * 3600
_FREE_SPACE_USED = 0.85


@dataclass(slots=True)
class ShardWriter:
    """Appends utterances to one shard."""

    pcm: IO[bytes]
    vocabulary: WhisperTokens
    n_samples: int = 0
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    languages: list[int] = field(default_factory=list)
    n_units: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    _cache: dict[str, list[int]] = field(default_factory=dict)

    def add(self, utterance: Utterance, units: Sequence[Unit], language: str) -> None:
        self.pcm.write(utterance.samples.tobytes())
        self.offsets.append(self.n_samples)
        self.lengths.append(len(utterance.samples))
        self.languages.append(LANGUAGES.index(language))
        self.n_units.append(len(units))
        for unit in units:
            ids = self._encode(unit.written)
            self.tokens += ids
            self.n_tokens.append(len(ids))
        self.starts += utterance.starts
        self.ends += utterance.ends
        self.n_samples += len(utterance.samples)

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.vocabulary.encode(text)
        return self._cache[text]

    def write_index(self, path: Path) -> None:
        np.savez(
            path,
            n_samples=np.int64(self.n_samples),
            offsets=np.array(self.offsets, np.int64),
            lengths=np.array(self.lengths, np.int32),
            languages=np.array(self.languages, np.int8),
            n_units=np.array(self.n_units, np.int32),
            tokens=np.array(self.tokens, np.int32),
            n_tokens=np.array(self.n_tokens, np.int16),
            starts=np.array(self.starts, np.int32),
            ends=np.array(self.ends, np.int32),
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What every worker needs to know."""

    work: Path
    hours: float
    deadline: float
    """Value of time.time() at which work stops."""
    n_workers: int
    languages: tuple[str, ...]
    seed: int


def make_speech(
    work: Path,
    *,
    hours: float,
    minutes: float,
    n_workers: int,
    languages: tuple[str, ...] = LANGUAGES,
    seed: int = 1000,
) -> dict[str, float]:
    """Fill work/speech until `hours` of speech exist or `minutes` have passed; returns hours by language.

    Raises MachineError if the disk has no room or no worker made anything.
    """
    folder = work / "speech"
    done = folder / "speech.json"
    if done.exists():
        logger.info("event=speech_exists folder=%s", folder)
        return dict(json.loads(done.read_text(encoding="utf8")))
    folder.mkdir(parents=True, exist_ok=True)
    room_h = shutil.disk_usage(folder).free / _BYTES_AN_HOUR * _FREE_SPACE_USED
    if room_h < min(hours, 0.1):
        raise MachineError(
            f"{folder} has room for {room_h:.2f} hours of speech; free some space or give another --work."
        )
    order = Order(work, min(hours, room_h), time.time() + 60 * minutes, n_workers, languages, seed)
    seconds = _run_workers(order)
    result = {language: round(sum(part.get(language, 0.0) for part in seconds) / 3600, 4) for language in languages}
    if not sum(result.values()):
        raise MachineError(f"No speech was made in {folder}. Run one worker (--workers 1) to see why.")
    done.write_text(json.dumps(result), encoding="utf8")
    return result


def _run_workers(order: Order) -> list[dict[str, float]]:
    """Seconds by language of each worker. One worker runs in this process, which is easier to debug."""
    if order.n_workers == 1:
        return [_work(order, 0)]
    with multiprocessing.get_context("spawn").Pool(order.n_workers) as pool:
        return pool.starmap(_work, [(order, index) for index in range(order.n_workers)])


def _work(order: Order, index: int) -> dict[str, float]:
    """One shard: speakers in turn, always in the language that is furthest behind its share."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(order.seed + index)
    synthesizer = Synthesizer()
    lines = {language: read_lines(order.work / "text", language) for language in order.languages}
    position = {language: index * len(lines[language]) // order.n_workers for language in order.languages}
    seconds = dict.fromkeys(order.languages, 0.0)
    quota_s = order.hours * 3600 / order.n_workers
    stem = order.work / "speech" / f"shard_{index:02d}"
    with open(f"{stem}.pcm", "wb", buffering=1 << 22) as pcm:
        shard = ShardWriter(pcm, WhisperTokens.from_folder(DEMO))
        while time.time() < order.deadline and sum(seconds.values()) < quota_s:
            language = min(order.languages, key=lambda name: seconds[name] / SHARE[name])
            n_lines = rng.randint(6, 14)
            picked = [lines[language][(position[language] + i) % len(lines[language])] for i in range(n_lines)]
            position[language] += n_lines
            seconds[language] += _say(picked, language, synthesizer, rng, shard)
    shard.write_index(Path(f"{stem}.npz"))
    return seconds


def _say(
    lines: Sequence[str], language: str, synthesizer: Synthesizer, rng: random.Random, shard: ShardWriter
) -> float:
    """One speaker says the lines; returns the seconds added. Lines that cannot be said are left out."""
    delivery = synthesizer.pick(language, rng)
    added_s = 0.0
    for line in lines:
        try:
            units = parse_units(line, language)
            utterance = synthesizer.speak(units, delivery)
        except ValueError as error:
            logger.warning("event=line_skipped voice=%s reason=%s", delivery.voice, error)
            continue
        if utterance is not None and utterance.duration_s <= _LONGEST_UTTERANCE_S:
            shard.add(utterance, units, language)
            added_s += utterance.duration_s
    return added_s


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.speech", description="Speak the sentences of a run.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run, with text/ in it")
    parser.add_argument("--hours", type=float, default=220.0, help="of speech (default: 220)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so much time (default: 10)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hours = make_speech(options.work, hours=options.hours, minutes=options.minutes, n_workers=options.workers)
    logger.info("hours=%.2f %s", sum(hours.values()), hours)


if __name__ == "__main__":
    main()
