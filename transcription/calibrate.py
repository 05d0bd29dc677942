"""Calibrate static INT8 for a checkpoint: run recordings through it, quantise, check the text, save a folder.

In: a warm engine at 16 or 32 bits and recordings, best in every language the result shall serve. Out: a calibrated
checkpoint folder (model_loader/calibration.py) with its manifest, and a page that shows each layer's error.

Real windows are decoded with real prompts, so the decoder's layers see what they will see in use. The languages that
the set covers are part of the report: ranges measured on one language alone fit the others worse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from errors import AudioError, OptionError, UserError
from model_loader.calibration import (
    CalibrationReport,
    Quantised,
    quantise_model,
    rank,
    record_activations,
    save_calibrated,
    sha256_of,
    weight_files,
)
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
PACKAGES = ("torch", "transformers", "safetensors")


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


@dataclass(frozen=True, slots=True)
class _Heard:
    """One recording's windows and the text they gave before quantisation."""

    path: Path
    language: str
    windows: list[Window]
    text: str

    @property
    def seconds(self) -> float:
        return sum(window.samples.size for window in self.windows) / 16_000


def recordings_in(folder: Path) -> list[Path]:
    """Audio files of a folder and its subfolders, in order. Raises OptionError if there are none."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give one that holds recordings (--audio FOLDER).")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise OptionError(
            f"{folder} holds no recordings; put a few minutes of speech there, in every language the model shall "
            f"serve ({', '.join(sorted(AUDIO_SUFFIXES))})."
        )
    return found


def calibrate(
    engine: ReferenceEngine,
    recordings: Sequence[Path],
    out: Path,
    *,
    keep_16_bit: int = 0,
    wer_budget: float | None = None,
    on_progress: Callable[[CalibrationProgress], None] = lambda progress: None,
) -> Calibration:
    """Quantise the engine's own model in place (close the engine afterwards) and save it to `out`.

    keep_16_bit: so many of the worst layers stay at 16 bits. wer_budget: keep more of them, twice as many each time,
    until the text over the recordings differs by at most this share of words (0.01 = 1 %) from the text before.
    Raises UserError where a recording holds no speech at all in the whole set, DiskFullError.
    """
    weights = weight_files(engine.report.folder)  # before another training run saves over them
    tokens = WhisperTokens.from_folder(engine.report.folder)
    with record_activations(engine.network) as activations:
        heard = list(_listen(engine, tokens, recordings, on_progress))
    if not any(recording.text for recording in heard):
        raise UserError("The calibration recordings hold no speech; give recordings of people speaking.")
    on_progress(CalibrationProgress("Quantising", 0, 1))
    quantised = quantise_model(engine.network, activations)
    if keep_16_bit:
        quantised.keep_16_bit(layer.name for layer in rank(quantised.layers)[:keep_16_bit])
    agreement = _agreement(engine, tokens, heard, on_progress)
    if wer_budget is not None:
        agreement = _meet_budget(engine, tokens, heard, quantised, wer_budget, agreement, on_progress)
    report = CalibrationReport(
        model=engine.report.model,
        revision=engine.report.revision,
        languages=_seconds_by_language(heard),
        files={recording.path.name: sha256_of(recording.path) for recording in heard},
        weights=weights,
        layers=quantised.layers,
        versions={package: version(package) for package in PACKAGES},
    )
    save_calibrated(engine.network, engine.report.folder, out, report)
    (out / "report.html").write_text(render_page(report, agreement), encoding="utf-8")
    on_progress(CalibrationProgress("Saved", 1, 1))
    return Calibration(out, report, agreement)


def _listen(
    engine: ReferenceEngine,
    tokens: WhisperTokens,
    recordings: Sequence[Path],
    on_progress: Callable[[CalibrationProgress], None],
) -> Iterator[_Heard]:
    """Decode each recording once; one that cannot be read is left out and logged."""
    for index, path in enumerate(recordings):
        on_progress(CalibrationProgress(f"Listening to {path.name}", index, len(recordings)))
        try:
            with decode_blocks(path) as blocks:
                windows = list(cut_windows(blocks, "vad"))
        except AudioError as error:
            logger.warning("event=calibration_file_skipped file=%s reason=%s", path.name, error)
            continue
        if windows:
            decoder = _decoder(tokens)
            language = _language(engine, decoder, windows[0])
            yield _Heard(path, language, windows, _decode(engine, decoder, windows, language))


def _decoder(tokens: WhisperTokens) -> Decoder:
    """One for each recording: the window whose language was looked at is not encoded again where it is the only one."""
    return Decoder(tokens, TranscribeOptions(temperatures=(0.0,)))


def _language(engine: ReferenceEngine, decoder: Decoder, window: Window) -> str:
    if not decoder.tokens.is_multilingual:
        return "en"
    logits = decoder.first_logits(engine, [window])
    return report_languages(logits, [window], decoder.tokens, top=1).best.code


def _decode(engine: ReferenceEngine, decoder: Decoder, windows: Sequence[Window], language: str) -> str:
    tokens = decoder.tokens
    texts = [tokens.decode(result.tokens) for result in decoder.decode(engine, windows, language)]
    return tokens.normalise(" ".join(texts), language)


def _agreement(
    engine: ReferenceEngine,
    tokens: WhisperTokens,
    heard: Sequence[_Heard],
    on_progress: Callable[[CalibrationProgress], None],
) -> float | None:
    """Word differences of the quantised model's text from the text before, all recordings together."""
    before, after = [], []
    for index, recording in enumerate(heard):
        on_progress(CalibrationProgress(f"Checking {recording.path.name}", index, len(heard)))
        before.append(recording.text)
        after.append(_decode(engine, _decoder(tokens), recording.windows, recording.language))
    return error_rates(" ".join(before), " ".join(after))[0]


def _meet_budget(
    engine: ReferenceEngine,
    tokens: WhisperTokens,
    heard: Sequence[_Heard],
    quantised: Quantised,
    budget: float,
    agreement: float | None,
    on_progress: Callable[[CalibrationProgress], None],
) -> float | None:
    """Take the worst layers back to 16 bits, twice as many each time, until the budget is met or none is left."""
    ranked = [layer.name for layer in rank(quantised.layers)]
    n_kept = max(1, sum(layer.kept_16_bit for layer in quantised.layers))
    while agreement is not None and agreement > budget and n_kept <= len(ranked):
        quantised.keep_16_bit(ranked[:n_kept])
        agreement = _agreement(engine, tokens, heard, on_progress)
        n_kept *= 2
    return agreement


def _seconds_by_language(heard: Sequence[_Heard]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for recording in heard:
        seconds[recording.language] = round(seconds.get(recording.language, 0.0) + recording.seconds, 1)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def render_page(report: CalibrationReport, agreement: float | None) -> str:
    """The report as one self-contained HTML page: what was measured on what, and a bar for each layer."""
    worst = max((layer.output_error for layer in report.layers), default=1.0) or 1.0
    bars = "\n".join(
        f'<tr class="{"kept" if layer.kept_16_bit else ""}"><th>{layer.name.removeprefix("model.")}</th>'
        f'<td><div style="width:{100 * layer.output_error / worst:.1f}%"></div></td>'
        f"<td>{100 * layer.output_error:.2f} %{' · kept at 16 bits' if layer.kept_16_bit else ''}</td></tr>"
        for layer in report.ranked
    )
    languages = ", ".join(f"{code} {seconds:.0f} s" for code, seconds in report.languages.items()) or "none"
    text = "no words to compare" if agreement is None else f"{100 * agreement:.2f} % of words differ"
    return _PAGE.format(model=report.model, languages=languages, files=len(report.files), text=text, bars=bars)


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
<p>Text over these recordings against the text before quantisation: <b>{text}</b> (agreement, not accuracy).</p>
<p>Relative error of each linear layer's output, largest first; orange layers stay at 16 bits.</p>
<table>
{bars}
</table>
</html>
"""
