"""Measure a checkpoint on the held-out recordings through transformers' own generate: `python -m training.evaluate`.

In: a checkpoint folder and benchmarks/heldout. Out: a table, then one last line of JSON: word errors per language and
kind (characters in Mandarin; texts normalised as Whisper's published figures), language found, the times of segments
against the truth, and what the model writes for silence and noise.

It uses none of the program's own engine, so it also tells a fault of the engine from one of the model.
benchmarks/accuracy.py compares precisions; this compares checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt
import torch

from audio.constants import SAMPLE_RATE
from audio.decode import decode_all
from transcription.tokenizer import WhisperTokens

HELDOUT = Path(__file__).resolve().parent.parent / "benchmarks" / "heldout"
_BATCH_SIZE = 16
_MOST_TOKENS = 300
_NOISE_LEVELS = (0.0, 1e-4, 1e-3, 1e-2)
"""Standard deviations of the white noise that should give no text."""

Waveform = npt.NDArray[np.float32]


@dataclass(slots=True)
class Score:
    """Counts over the recordings of one language."""

    n_errors: int = 0
    n_words: int = 0
    n_found: int = 0
    n_recordings: int = 0

    @property
    def wer(self) -> float:
        """Percent."""
        return round(100.0 * self.n_errors / max(1, self.n_words), 2)

    @property
    def language_found(self) -> float:
        """Percent."""
        return round(100.0 * self.n_found / max(1, self.n_recordings), 1)


@dataclass(slots=True)
class Evaluation:
    by_language: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    by_kind: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    time_errors_s: list[float] = field(default_factory=list)
    """Of segments' starts and ends, in recordings whose number of segments is right."""
    n_right_segments: int = 0
    n_silent: int = 0
    n_quiet: int = 0
    """Of n_quiet recordings without speech, n_silent gave no text."""

    def summary(self) -> dict[str, Any]:
        errors = self.time_errors_s
        return {
            "wer": {language: score.wer for language, score in self.by_language.items()},
            "wer_by_kind": {kind: score.wer for kind, score in self.by_kind.items()},
            "language_found": {language: score.language_found for language, score in self.by_language.items()},
            "n_right_segments": self.n_right_segments,
            "n_recordings": sum(score.n_recordings for score in self.by_language.values()),
            "segment_time_error_s": round(sum(errors) / len(errors), 3) if errors else None,
            "silent": f"{self.n_silent} of {self.n_quiet}",
        }


class Listener:
    """A checkpoint as transformers loads it, in fp32."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        self.words = WhisperTokens.from_folder(folder)
        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._codes = {token: code for code, token in self.words.languages.items()}

    def hear(self, waveforms: Sequence[Waveform]) -> list[tuple[str, str, list[tuple[float, float]]]]:
        """(text, language, times of segments) of each waveform of at most 30 s."""
        features = self._processor.feature_extractor(
            list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features.to(self._model.device)
        languages = [self._codes[token] for token in self._model.detect_language(features).tolist()]
        output = self._model.generate(features, return_timestamps=True, max_new_tokens=_MOST_TOKENS).tolist()
        return [
            (self.words.decode(row).strip(), language, self._times(row))
            for row, language in zip(output, languages, strict=True)
        ]

    def _times(self, row: Sequence[int]) -> list[tuple[float, float]]:
        """Pairs of timestamps with text between them."""
        times: list[tuple[float, float]] = []
        opened: float | None = None
        has_text = False
        for token in row:
            time_s = self.words.timestamp_s(token)
            if time_s is None:
                has_text = has_text or token < self.words.eot
            elif opened is not None and has_text:
                times.append((opened, time_s))
                opened, has_text = None, False
            else:
                opened, has_text = time_s, False
        return times


def evaluate(model: Path, heldout: Path = HELDOUT, *, limit: int = 0, device: str = "cpu") -> Evaluation:
    """limit: recordings per language, 0 for all."""
    listener = Listener(model, device)
    manifest: list[dict[str, Any]] = json.loads((heldout / "manifest.json").read_text(encoding="utf8"))
    rows: list[dict[str, Any]] = []
    for language in dict.fromkeys(row["language"] for row in manifest):
        same = [row for row in manifest if row["language"] == language]
        rows += same[:: max(1, len(same) // limit)][:limit] if limit else same
    result = Evaluation()
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = rows[start : start + _BATCH_SIZE]
        heard = listener.hear([decode_all(heldout / row["file"]) for row in batch])
        for row, (text, language, times) in zip(batch, heard, strict=True):
            _count(result, listener.words, row, text, language)
            _compare_times(result, row, times)
    rng = np.random.default_rng(1)
    quiet = [rng.normal(0, level, 10 * SAMPLE_RATE).astype(np.float32) for level in _NOISE_LEVELS]
    result.n_quiet = len(quiet)
    result.n_silent = sum(not text for text, _, _ in listener.hear(quiet))
    return result


def _count(result: Evaluation, words: WhisperTokens, row: dict[str, Any], text: str, language: str) -> None:
    reference, hypothesis = words.normalise(row["text"], row["language"]), words.normalise(text, row["language"])
    found = jiwer.process_words(reference, hypothesis)
    for score in (result.by_language[row["language"]], result.by_kind[row["kind"]]):
        score.n_errors += found.substitutions + found.deletions + found.insertions
        score.n_words += found.hits + found.substitutions + found.deletions
        score.n_found += language == row["language"]
        score.n_recordings += 1


def _compare_times(result: Evaluation, row: dict[str, Any], times: Sequence[tuple[float, float]]) -> None:
    truth = [(sentence["start_s"], sentence["end_s"]) for sentence in row["sentences"]]
    if len(truth) != len(times):
        return
    result.n_right_segments += 1
    for (start_s, end_s), (true_start_s, true_end_s) in zip(times, truth, strict=True):
        result.time_errors_s += [abs(start_s - true_start_s), abs(end_s - true_end_s)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Measure a checkpoint.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="folder with manifest.json and recordings")
    parser.add_argument("--limit", type=int, default=0, help="recordings per language (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    result = evaluate(options.model, options.heldout, limit=options.limit, device=options.device)
    lines = [f"{'language':10}{'WER %':>8}{'words':>8}{'found %':>9}"]
    for language, score in result.by_language.items():
        lines.append(f"{language:10}{score.wer:8.2f}{score.n_words:8}{score.language_found:9.1f}")
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps(result.summary()) + "\n")


if __name__ == "__main__":
    main()
