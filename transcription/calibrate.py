"""Calibrate static INT8 for a checkpoint: run recordings through it, quantise, check the text, save a folder.

In: a warm engine at 16 or 32 bits and recordings, best in every language the result shall serve. Out: a calibrated
checkpoint folder (model_loader/calibration.py) with its manifest, and a page that shows each layer's error.

Real windows are decoded with real prompts, so the decoder's layers see what they will see in use. The languages that
the set covers are part of the report: ranges measured on one language alone fit the others worse. Recordings are read
batch by batch, and again for the check: hours of them need no more memory than minutes.
"""

from __future__ import annotations

import logging
import os
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from audio.constants import SAMPLE_RATE
from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from errors import AudioError, ModelError, OptionError, UserError
from model_loader.calibration import (
    CalibrationReport,
    Quantised,
    linear_layers,
    quantise_model,
    rank,
    record_activations,
    save_calibrated,
    weight_files,
)
from model_loader.fit import DEFAULT_BATCHES
from model_loader.transfer import sha256_of
from transcription.calibrated import check_target
from transcription.compare import error_rates
from transcription.decode import Decoder
from transcription.language import report_languages
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens

if TYPE_CHECKING:
    from model_loader.engine import ReferenceEngine

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = frozenset(
    [".aac", ".aiff", ".flac", ".m4a", ".mkv", ".mp3", ".mp4", ".ogg", ".opus", ".wav", ".webm", ".wma"]
)
"""Endings that are taken for recordings whatever is in the file."""
PACKAGES = ("torch", "transformers", "safetensors")
PAGE = "report.html"
_HEAD_BYTES = 4096
"""Of a file of another ending that are looked at."""


@dataclass(frozen=True, slots=True)
class CalibrationProgress:
    """How far a calibration is."""

    step: str
    """What is being done, in words."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration gave."""

    folder: Path
    report: CalibrationReport
    agreement_wer: float | None
    """Word differences between the int8 text and the text before, over the calibration recordings; None: no words."""
    wer_budget: float | None = None
    """What agreement_wer was to stay within; None where nobody said."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why, by recording, it was not heard or not to its end; a sentence each."""

    @property
    def misses_budget(self) -> bool:
        """More words differ than were to."""
        return self.wer_budget is not None and self.agreement_wer is not None and self.agreement_wer > self.wer_budget

    @property
    def budget_outcome(self) -> str:
        """Whether the budget was met and with how many layers at 16 bits, in a sentence; empty without a budget."""
        if self.wer_budget is None:
            return ""
        kept, total = sum(layer.kept_16_bit for layer in self.report.layers), len(self.report.layers)
        layers = f"{kept} of {total} layers at 16 bits"
        if self.agreement_wer is None:
            return f"The budget of {self.wer_budget:.2%} could not be checked, because there are no words to compare."
        if not self.misses_budget:
            return f"The budget of {self.wer_budget:.2%} of words is met with {layers}."
        return (
            f"The budget of {self.wer_budget:.2%} of words is not met, with {layers}: {self.agreement_wer:.2%} differ. "
            "Use fp16 or bf16 for this checkpoint, or allow more (--wer-budget)."
        )


@dataclass(frozen=True, slots=True)
class _Heard:
    """One recording and the text that it gave."""

    path: Path
    language: str
    """Empty where nothing was heard."""
    seconds: float
    """Of its windows."""
    text: str
    """Normalised."""
    problem: str
    """Why it was not heard, or not to its end; empty where it was."""


def recordings_in(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders, in order, that may be recordings, whatever their ending: one that turns out
    to be none is reported like one that cannot be read. Hidden files and plain text are none. Raises OptionError if
    there are none."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give one that holds recordings (--audio FOLDER).")
    found = sorted(path for path in folder.rglob("*") if _may_be_recording(path, folder))
    if not found:
        raise OptionError(
            f"{folder} holds no recordings; put a few minutes of speech there, in every language the model shall "
            "serve, in any audio or video format."
        )
    return found


def _may_be_recording(path: Path, folder: Path) -> bool:
    # "__" as in __MACOSX and __pycache__: what programs leave beside files.
    if not path.is_file() or any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
        return False
    return path.suffix.lower() in AUDIO_SUFFIXES or not _is_text(path)


def _is_text(path: Path) -> bool:
    """Lists, transcripts, scripts; not a file that is empty or cannot be read, of which somebody should be told."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        getincrementaldecoder("utf-8")().decode(head)  # whose last letter may be cut
    except (OSError, UnicodeDecodeError):
        return False
    return bool(head) and b"\0" not in head


def calibrate(
    engine: ReferenceEngine,
    recordings: Sequence[Path],
    out: Path,
    *,
    keep_16_bit: int = 0,
    wer_budget: float | None = None,
    batch_size: int = 0,
    is_own: bool = False,
    on_progress: Callable[[CalibrationProgress], None] = lambda progress: None,
) -> Calibration:
    """Quantise the engine's own model in place (close the engine afterwards) and save it to `out`.

    keep_16_bit: so many of the worst layers stay at 16 bits. wer_budget: keep more of them, twice as many each time,
    until the text over the recordings differs by at most this share of words (0.01 = 1 %) from the text before.
    batch_size: windows decoded together; 0 chooses for the device. is_own: `out` is a place of Sotto's own
    (check_target). on_progress: told of every step and every batch of windows; what it raises ends the calibration, and
    nothing is saved.
    Raises OptionError before any work if `out` cannot be written or holds something else, or if no layer would be
    quantised; UserError where nobody speaks in any recording, or where the budget is missed with a single layer
    quantised; DiskFullError.
    """
    check_target(out, is_own=is_own)
    _check_kept(keep_16_bit, len(linear_layers(engine.network)))
    weights = weight_files(engine.report.folder)  # before another training run saves over them
    tokens = WhisperTokens.from_folder(engine.report.folder)
    listener = _Listener(engine, tokens, batch_size or DEFAULT_BATCHES[engine.report.device.kind], on_progress)
    names = _names(recordings)
    with record_activations(engine.network) as activations:
        results = list(listener.listen(recordings))
    heard = [recording for recording in results if recording.language]
    left_out = {names[recording.path]: recording.problem for recording in results if recording.problem}
    _check_heard(heard, left_out)
    on_progress(CalibrationProgress("Quantising", 0, 1))
    quantised = quantise_model(engine.network, activations)
    if keep_16_bit:
        quantised.keep_16_bit(layer.name for layer in rank(quantised.layers)[:keep_16_bit])
    agreement = listener.agreement(heard)
    if wer_budget is not None:
        agreement = _meet_budget(listener, heard, quantised, wer_budget, agreement)
    report = CalibrationReport(
        model=engine.report.model,
        revision=engine.report.revision,
        languages=_seconds_by_language(heard),
        files={names[recording.path]: sha256_of(recording.path) for recording in heard},
        weights=weights,
        layers=quantised.layers,
        versions={package: version(package) for package in PACKAGES},
    )
    made = Calibration(out, report, agreement, wer_budget, left_out)
    if made.misses_budget:
        raise UserError(f"{made.budget_outcome} Nothing was saved.")
    save_calibrated(engine.network, engine.report.folder, out, report, {PAGE: render_page(made)})
    on_progress(CalibrationProgress("Saved", 1, 1))
    return made


def _check_kept(n_kept: int, n_layers: int) -> None:
    """Raises OptionError unless at least one layer becomes 8-bit: a folder without any is no int8-static."""
    if not 0 <= n_kept < n_layers:
        raise OptionError(
            f"{n_kept} layers are to stay at 16 bits (--keep-fp16), and the model has {n_layers}, of which one or more "
            f"become 8-bit. Give a number from 0 to {n_layers - 1}, or auto; or use fp16 or bf16, which keep all."
        )


def _check_heard(heard: Sequence[_Heard], left_out: Mapping[str, str]) -> None:
    """Raises UserError, with the first reason, where there is no text to measure with."""
    if not any(recording.text for recording in heard):
        reasons = "".join(f" {name}: {problem}" for name, problem in list(left_out.items())[:1])
        raise UserError(f"The calibration recordings hold no speech; give recordings of people speaking.{reasons}")


def _names(recordings: Sequence[Path]) -> dict[Path, str]:
    """Each recording's path below the folder that holds them all: in subfolders names may be equal."""
    top = Path(os.path.commonpath([path.absolute().parent for path in recordings]))
    return {path: path.absolute().relative_to(top).as_posix() for path in recordings}


@dataclass(frozen=True, slots=True)
class _Listener:
    """Decodes recordings a batch of windows at a time; no more of them is in memory."""

    engine: ReferenceEngine
    tokens: WhisperTokens
    batch_size: int
    on_progress: Callable[[CalibrationProgress], None]

    def listen(self, recordings: Sequence[Path]) -> Iterator[_Heard]:
        for index, path in enumerate(recordings):
            yield self._hear(path, CalibrationProgress(f"Listening to {path.name}", index, len(recordings)))

    def agreement(self, heard: Sequence[_Heard]) -> float | None:
        """Word differences of the model's text as it is now from the text before, all recordings together."""
        after = []
        for index, recording in enumerate(heard):
            progress = CalibrationProgress(f"Checking {recording.path.name}", index, len(heard))
            after.append(self._hear(recording.path, progress, recording.language).text)
        return error_rates(" ".join(recording.text for recording in heard), " ".join(after))[0]

    def _hear(self, path: Path, progress: CalibrationProgress, language: str = "") -> _Heard:
        """Up to the last batch that can be read. progress: told before the first batch and before each.
        language: looked for in the first window where it is not given, as while ranges are measured. Raises ModelError
        then for numbers that are not finite: no range holds them."""
        is_first = not language
        self.on_progress(progress)
        # One decoder for each: the window whose language was looked at is not encoded again where it is the only one.
        decoder = Decoder(self.tokens, TranscribeOptions(temperatures=(0.0,)))
        seconds, texts, problem = 0.0, [], ""
        try:
            with decode_blocks(path) as blocks:
                windows = cut_windows(blocks, "vad")
                while batch := list(islice(windows, self.batch_size)):
                    self.on_progress(progress)  # so that an hour in one file can be ended
                    language = language or self._language(decoder, batch[0])
                    results = decoder.decode(self.engine, batch, language)
                    if is_first and decoder.not_finite:
                        raise ModelError(_unmeasurable(path, decoder.not_finite, self.engine.report.effective))
                    texts += [self.tokens.decode(result.tokens) for result in results]
                    seconds += sum(window.samples.size for window in batch) / SAMPLE_RATE
        except AudioError as error:
            problem = str(error)
            logger.warning("event=calibration_file_skipped file=%s reason=%s", path.name, error)
        if not language:
            return _Heard(path, "", 0.0, "", problem or "No speech was found in it.")
        return _Heard(path, language, seconds, self.tokens.normalise(" ".join(texts), language), problem)

    def _language(self, decoder: Decoder, window: Window) -> str:
        if not self.tokens.is_multilingual:
            return "en"
        logits = decoder.first_logits(self.engine, [window])
        return report_languages(logits, [window], self.tokens, top=1).best.code


def _unmeasurable(path: Path, sentence: str, precision: str) -> str:
    there = "" if precision == "fp32" else " With --device cpu it is measured at fp32."
    return f"{sentence} That was in {path.name}, so nothing can be calibrated.{there}"


def _meet_budget(
    listener: _Listener, heard: Sequence[_Heard], quantised: Quantised, budget: float, agreement: float | None
) -> float | None:
    """Take the worst layers back to 16 bits, twice as many each time, until the budget is met or one is left."""
    ranked = [layer.name for layer in rank(quantised.layers)]
    n_kept, most = sum(layer.kept_16_bit for layer in quantised.layers), len(ranked) - 1
    while agreement is not None and agreement > budget and n_kept < most:
        n_kept = min(max(1, 2 * n_kept), most)
        quantised.keep_16_bit(ranked[:n_kept])
        agreement = listener.agreement(heard)
    return agreement


def _seconds_by_language(heard: Sequence[_Heard]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for recording in heard:
        seconds[recording.language] = round(seconds.get(recording.language, 0.0) + recording.seconds, 1)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def render_page(made: Calibration) -> str:
    """The report as one self-contained HTML page: what was measured on what, and a bar for each layer."""
    report = made.report
    worst = max((layer.output_error for layer in report.layers), default=1.0) or 1.0
    bars = "\n".join(
        f'<tr class="{"kept" if layer.kept_16_bit else ""}"><th>{escape(layer.name.removeprefix("model."))}</th>'
        f'<td><div style="width:{100 * layer.output_error / worst:.1f}%"></div></td>'
        f"<td>{100 * layer.output_error:.2f} %{' · kept at 16 bits' if layer.kept_16_bit else ''}</td></tr>"
        for layer in report.ranked
    )
    languages = ", ".join(f"{code} {seconds:.0f} s" for code, seconds in report.languages.items()) or "none"
    agreement = made.agreement_wer
    text = "no words to compare" if agreement is None else f"{100 * agreement:.2f} % of words differ"
    has_kept = any(layer.kept_16_bit for layer in report.layers)
    missed = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in made.left_out.items())
    return _PAGE.format(
        model=escape(report.model),
        languages=escape(languages),
        files=len(report.files),
        text=text,
        budget=f"<p>{escape(made.budget_outcome)}</p>" if made.budget_outcome else "",
        missed=f"<p>Not heard, or not to the end:</p><ul>{missed}</ul>" if missed else "",
        kept="; orange layers stay at 16 bits" if has_kept else "",
        bars=bars,
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Static INT8 calibration of {model}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th {{ text-align: left; font-weight: 400; padding-right: 1rem; overflow-wrap: anywhere }}
td {{ white-space: nowrap }} td:nth-child(2) {{ width: 45% }}
td:last-child {{ padding-left: .75rem; text-align: right; font-variant-numeric: tabular-nums }}
tr + tr > * {{ border-top: 1px solid color-mix(in srgb, currentColor 12%, transparent) }}
tr > * {{ padding-block: .2rem }}
td div {{ height: .8rem; background: #0d9488; border-radius: 2px; min-width: 1px }}
tr.kept div {{ background: #d97706 }}
</style>
<h1>Static INT8 calibration of {model}</h1>
<p>Languages heard: <b>{languages}</b>, {files} recordings. A language that is not listed was not measured.</p>
<p>Text over these recordings against the text before quantisation: <b>{text}</b> (agreement, not accuracy). The
ranges were measured on the same recordings, so the figure is optimistic: others may differ more.</p>
{budget}
{missed}
<p>Relative error of each linear layer's output, largest first{kept}.</p>
<table>
{bars}
</table>
</html>
"""
