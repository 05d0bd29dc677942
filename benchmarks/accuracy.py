"""Word errors of every precision on the held-out recordings: `python -m benchmarks.accuracy`.

In: benchmarks/heldout/ (synthetic speech, several voices, six languages, made by training/heldout.py) and a checkpoint.
Out: a table, then one last line of JSON.

What is measured. Each recording is one window, decoded greedily at temperature 0 without fallback, with its true
language in the prompt: the same input for every precision and no randomness, so only the number format can differ.
Errors are summed over a language before dividing. Texts are compared as Whisper's published figures compare them
(transformers' EnglishTextNormalizer and BasicTextNormalizer: case, punctuation, spelling, written numbers made equal);
Mandarin is counted in characters. Language found: the likeliest language token after <|startoftranscript|>. Drift: word
errors against the fp32 text of the same checkpoint, and how many texts are equal to it to the letter. Points: word
errors less fp32's, in percentage points, by language; above zero is worse. Only what is worse can miss a goal.
Resolution: 430 to 790 words or characters a language, so one word is 0.13 to 0.23 points; 3,700 together (0.03).

A machine without ffmpeg (a rented GPU) takes its windows from a file: --save-windows FILE where ffmpeg is, --windows
FILE there. It holds the samples as 16-bit integers, so its texts may differ in a letter from those of the recordings.

The demo checkpoint has only heard synthetic speech. These figures compare precisions; they say nothing about people.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from audio.constants import SAMPLE_RATE
from audio.windows import Window
from errors import OptionError, SottoError
from model_loader.device import describe_device
from model_loader.engine import Engine
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision, resolve_precision
from transcription.decode import Decoder
from transcription.language import report_languages
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens

HELDOUT = Path(__file__).resolve().parent / "heldout"
REFERENCE = "fp32"
LONGEST_TEXT_TOKENS = 300
GOAL_8_BIT, GOAL_4_BIT = 0.3, 1.0
"""Points that all languages together may get worse than fp32: rows of 16 and 8 bits, rows of 4."""
LANGUAGE_GOAL_8_BIT, LANGUAGE_GOAL_4_BIT = 0.2, 0.7
"""Points that a single language may: rows packed for the fast engine, their 8-bit audio cache included."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A held-out recording and what is said in it."""

    file: str
    kind: str
    language: str
    text: str
    window: Window


@dataclass(slots=True)
class Tally:
    """Errors and words (characters in Mandarin) over several texts."""

    n_errors: int = 0
    n_words: int = 0

    def add(self, reference: str, hypothesis: str) -> None:
        words = reference.split()
        self.n_errors += edit_distance(words, hypothesis.split())
        self.n_words += len(words)

    @property
    def percent(self) -> float:
        return round(100.0 * self.n_errors / max(self.n_words, 1), 2)


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions (Levenshtein): what word error rates count.

    Written out because a machine lent for a measurement has no package for it; a test compares it with jiwer.
    """
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != heard))
    return row[-1]


@dataclass(slots=True)
class Result:
    """One precision over the whole set. Percentages, except counts (n_...) and seconds (..._s)."""

    precision: str
    effective: str
    wer_by_language: dict[str, float]
    wer_by_kind: dict[str, float]
    wer: float
    n_words: int
    language_found: float
    drift: float | None
    """Word errors against the fp32 text; None if fp32 was not run."""
    n_identical: int | None
    n_recordings: int
    decode_s: float
    texts: dict[str, str] = field(repr=False)
    """By file, as decoded."""
    engine: str = "reference"
    """Which engine decoded: reference or fast."""
    points_by_language: dict[str, float] | None = None
    """Word errors less fp32's, in percentage points; above zero is worse. None if fp32 was not run."""
    points: float | None = None
    """The same of all languages together."""
    missed: list[str] | None = None
    """Languages, or 'all', that got worse than fp32 by more than goals() allows. None if fp32 was not run."""

    def compare(self, fp32: Result) -> None:
        """Fill in the points against fp32's result on the same recordings, and what misses its goal."""
        of_language, of_all = goals(PRECISIONS[self.precision])
        self.points = round(self.wer - fp32.wer, 2)
        self.points_by_language = {
            language: round(wer - fp32.wer_by_language[language], 2) for language, wer in self.wer_by_language.items()
        }
        worse = self.points_by_language.items() if of_language is not None else ()
        self.missed = [language for language, points in worse if points > (of_language or 0.0)]
        self.missed += ["all"] if self.points > of_all else []


def goals(row: Precision) -> tuple[float | None, float]:
    """Points that a row may be worse than fp32: in a single language (None: no goal), in all together."""
    is_4_bit = row.bytes_per_weight < 1
    of_language = LANGUAGE_GOAL_4_BIT if is_4_bit else LANGUAGE_GOAL_8_BIT
    return (of_language if row.linear_class == "PackedLinear" else None), (GOAL_4_BIT if is_4_bit else GOAL_8_BIT)


def read_recordings(folder: Path, *, limit: int = 0) -> list[Recording]:
    """The set in its manifest's order; limit: at most so many of each language, singles and windows mixed."""
    from audio.decode import decode_all

    manifest: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text(encoding="utf8"))
    taken: Counter[str] = Counter()
    recordings = []
    for index, row in enumerate(_interleave(manifest) if limit else manifest):
        taken[row["language"]] += 1
        if limit and taken[row["language"]] > limit:
            continue
        samples = decode_all(folder / row["file"])
        window = Window(index, 0.0, samples, samples.size / SAMPLE_RATE)
        recordings.append(Recording(row["file"], row["kind"], row["language"], row["text"], window))
    return recordings


def save_windows(recordings: Sequence[Recording], file: Path) -> None:
    """All that measuring needs, without their sound files: int16 samples and texts in one .npz."""
    about = [{"file": r.file, "kind": r.kind, "language": r.language, "text": r.text} for r in recordings]
    samples = {
        f"samples_{i}": np.round(np.clip(r.window.samples, -1, 1) * 32767).astype(np.int16)
        for i, r in enumerate(recordings)
    }
    with file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, about=np.array(json.dumps(about)), **samples)


def read_windows(file: Path) -> list[Recording]:
    """What save_windows wrote. Raises OptionError for another file."""
    try:
        with np.load(file) as stored:
            about: list[dict[str, str]] = json.loads(str(stored["about"]))
            samples = [stored[f"samples_{i}"].astype(np.float32) / 32767 for i in range(len(about))]
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"{file} holds no windows ({error}); make it with python -m benchmarks.accuracy --save-windows {file}."
        ) from error
    return [
        Recording(**row, window=Window(index, 0.0, waveform, waveform.size / SAMPLE_RATE))
        for index, (row, waveform) in enumerate(zip(about, samples, strict=True))
    ]


def find_recordings(windows: Path | None, heldout: Path, limit: int) -> list[Recording]:
    """From a file of windows where there is one, else decoded from the held-out recordings."""
    return read_windows(windows) if windows else read_recordings(heldout, limit=limit)


def _interleave(manifest: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every seventh row, then every seventh from the second on, ...: any beginning holds all kinds."""
    return [row for offset in range(7) for row in manifest[offset::7]]


def measure(
    engine: Engine, recordings: Sequence[Recording], *, batch_size: int, fp32_texts: dict[str, str] | None
) -> Result:
    """Decode the recordings and count. fp32_texts: by file, what drift is measured against."""
    tokens = WhisperTokens.from_folder(engine.report.folder)
    started_s = time.perf_counter()
    texts: dict[str, str] = {}
    n_found = 0
    for batch in _batches(recordings, batch_size):
        decoded, guessed = decode_batch(engine, tokens, batch)
        texts |= {recording.file: text for recording, text in zip(batch, decoded, strict=True)}
        n_found += sum(guess == recording.language for recording, guess in zip(batch, guessed, strict=True))
    decode_s = time.perf_counter() - started_s
    return _count(engine, tokens, recordings, texts, fp32_texts, n_found=n_found, decode_s=decode_s)


def decode_batch(engine: Engine, tokens: WhisperTokens, batch: Sequence[Recording]) -> tuple[list[str], list[str]]:
    """(texts, likeliest languages) of recordings of one language."""
    options = TranscribeOptions(temperatures=(0.0,), max_new_tokens=LONGEST_TEXT_TOKENS)
    decoder = Decoder(tokens, options)
    windows = [recording.window for recording in batch]
    logits = decoder.first_logits(engine, windows)
    if tokens.is_multilingual:
        report = report_languages(logits, windows, tokens, top=1)
        guessed = [guesses.guesses[0].code for guesses in report.windows]
    else:
        guessed = ["en"] * len(batch)
    results = decoder.decode(engine, windows, batch[0].language)
    by_window = {window.index: "" for window in windows}
    for result in results:
        by_window[result.window.index] += tokens.decode(result.tokens)
    return [text.strip() for text in by_window.values()], guessed


def _batches(recordings: Sequence[Recording], batch_size: int) -> Iterator[list[Recording]]:
    """Of one language each, longest first, so that rows of a batch end at about the same time."""
    for language in dict.fromkeys(recording.language for recording in recordings):
        same = [recording for recording in recordings if recording.language == language]
        same.sort(key=lambda recording: -recording.window.samples.size)
        rest = iter(same)
        while batch := list(islice(rest, batch_size)):
            yield batch


def _count(
    engine: Engine,
    tokens: WhisperTokens,
    recordings: Sequence[Recording],
    texts: dict[str, str],
    fp32_texts: dict[str, str] | None,
    *,
    n_found: int,
    decode_s: float,
) -> Result:
    by_language = {language: Tally() for language in dict.fromkeys(r.language for r in recordings)}
    by_kind = {kind: Tally() for kind in dict.fromkeys(r.kind for r in recordings)}
    total, drift = Tally(), Tally()
    for recording in recordings:
        reference = tokens.normalise(recording.text, recording.language)
        hypothesis = tokens.normalise(texts[recording.file], recording.language)
        for tally in (by_language[recording.language], by_kind[recording.kind], total):
            tally.add(reference, hypothesis)
        fp32_text = tokens.normalise(fp32_texts[recording.file], recording.language) if fp32_texts else ""
        if fp32_text:
            drift.add(fp32_text, hypothesis)
    return Result(
        precision=engine.report.requested,
        effective=engine.report.effective,
        wer_by_language={language: tally.percent for language, tally in by_language.items()},
        wer_by_kind={kind: tally.percent for kind, tally in by_kind.items()},
        wer=total.percent,
        n_words=total.n_words,
        language_found=round(100.0 * n_found / len(recordings), 2),
        drift=drift.percent if fp32_texts else None,
        n_identical=sum(texts[file] == text for file, text in fp32_texts.items()) if fp32_texts else None,
        n_recordings=len(recordings),
        decode_s=round(decode_s, 1),
        texts=texts,
        engine=engine.report.engine,
    )


def run(
    model: str,
    precisions: Sequence[str],
    *,
    device: str,
    recordings: Sequence[Recording],
    batch_size: int,
    calibrated: Path | None = None,
    engine: str = "reference",
) -> Iterator[Result]:
    """One result per precision; fp32, if asked for, runs first, because the others are compared with it.

    calibrated: folder for the rows that need one, instead of where `python app.py calibrate` puts it.
    engine: reference, fast, or auto: fast for the rows that it runs.
    """
    names = sorted(dict.fromkeys(precisions), key=lambda name: name != REFERENCE)
    fp32: Result | None = None
    for name in names:
        source = str(calibrated) if calibrated and PRECISIONS[name].needs_calibration else model
        loaded = load_engine(source, name, engine=engine, device=device, warm_up=False)
        try:
            fp32_texts = fp32.texts if fp32 else None
            result = measure(loaded, recordings, batch_size=batch_size, fp32_texts=fp32_texts)
        finally:
            loaded.close()
        if name == REFERENCE:
            fp32 = result
            result.drift, result.n_identical = 0.0, result.n_recordings
        if fp32 is not None:
            result.compare(fp32)
        yield result


def table(results: Sequence[Result]) -> str:
    """A line per precision, all figures but the last three percentages; then a line each of points against fp32."""
    languages = list(results[0].wer_by_language)
    columns = [*languages, "all", "lang found", "drift", "identical", "seconds"]
    lines = [f"{'precision':14}" + "".join(f"{column:>12}" for column in columns)]
    for result in results:
        cells = [f"{result.wer_by_language[language]:.2f}" for language in languages]
        cells += [f"{result.wer:.2f}", f"{result.language_found:.1f}"]
        cells += ["-" if result.drift is None else f"{result.drift:.2f}"]
        cells += ["-" if result.n_identical is None else f"{result.n_identical}/{result.n_recordings}"]
        cells += [f"{result.decode_s:.0f}"]
        lines.append(f"{result.precision:14}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([*lines, *map(against_fp32, (row for row in results if row.precision != REFERENCE))])


def against_fp32(result: Result) -> str:
    """'int8 less fp32, points: en +0.13, zh -0.20, all -0.03; goal 0.2 worse in a language, 0.3 in all: kept.'"""
    if result.points_by_language is None or result.missed is None:
        return f"{result.precision} less fp32: not known, fp32 was not run."
    points = {**result.points_by_language, "all": result.points}
    figures = ", ".join(f"{name} {value:+.2f}" for name, value in points.items())
    of_language, of_all = goals(PRECISIONS[result.precision])
    goal = f"{of_all:g} in all" if of_language is None else f"{of_language:g} worse in a language, {of_all:g} in all"
    verdict = f"missed in {', '.join(result.missed)}" if result.missed else "kept"
    return f"{result.precision} less fp32, points: {figures}; goal {goal}: {verdict}."


def as_record(result: Result) -> dict[str, Any]:
    """For JSON: all but the texts."""
    return {key: value for key, value in asdict(result).items() if key != "texts"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it has a handler of its own
    try:
        device = describe_device(options.device)
        if options.precisions:
            names = [resolve_precision(name, device).name for name in options.precisions.split(",")]
        else:
            names = [name for name, row in PRECISIONS.items() if row.unavailable(device) is None]
        recordings = find_recordings(options.windows, options.heldout, options.limit)
        if options.save_windows:
            save_windows(recordings, options.save_windows)
            sys.stdout.write(f"{len(recordings)} recordings saved to {options.save_windows}\n")
            return 0
        results = []
        for result in run(
            options.model,
            names,
            device=options.device,
            recordings=recordings,
            batch_size=options.batch_size,
            calibrated=options.calibrated,
            engine=options.engine,
        ):
            results.append(result)
            sys.stderr.write(f"{result.precision}: {result.wer} % word errors in {result.decode_s:.0f} s\n")
    except SottoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    rows = [as_record(result) for result in results]
    sys.stdout.write(f"{device.label} · {options.model} · {len(recordings)} recordings\n{table(results)}\n")
    sys.stdout.write(json.dumps({"device": device.label, "model": options.model, "results": rows}) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description="Word errors of every precision."
    )
    parser.add_argument("--model", default="demo", help="checkpoint: demo, a folder or a Hub name (default: demo)")
    parser.add_argument("--precisions", default="", help="comma-separated; default: all that this device can run")
    parser.add_argument("--limit", type=int, default=0, help="recordings per language; 0 for all (default)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows decoded together (default: 16)")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="folder with manifest.json and its recordings")
    parser.add_argument(
        "--engine", choices=("reference", "fast", "auto"), default="reference", help="default: reference"
    )
    parser.add_argument("--calibrated", type=Path, help="calibrated folder for int8-static; default: the model's own")
    parser.add_argument("--save-windows", type=Path, metavar="FILE", help="write the windows (.npz) and stop")
    parser.add_argument("--windows", type=Path, metavar="FILE", help="read them from there: no ffmpeg is needed")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
