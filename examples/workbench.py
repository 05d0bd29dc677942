"""What the experiment scripts share: recordings with their texts, one precision run over them, a table.

The same loader, decoder and word counting as the page and the command line; nothing here is a second implementation.
A figure that this machine cannot give is None and is printed as "-".
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from audio.constants import SAMPLE_RATE
from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from errors import EffectivePrecisionError, OptionError, OutOfMemoryError, PrecisionError, SottoError
from model_loader.activity import Activity, count_activity
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import GenerateRequest
from model_loader.loader import LoadReport, load_engine
from model_loader.memory import read_memory, read_peak, reset_peak
from model_loader.precision import PRECISIONS
from transcription.compare import error_rates
from transcription.decode import Decoder
from transcription.files import explain
from transcription.options import WARM_RUNS, TranscribeOptions
from transcription.tokenizer import WhisperTokens
from transcription.verdict import SAME_TIME, compare_times, times

if TYPE_CHECKING:
    from model_loader.engine import Engine

EXAMPLES = Path(__file__).resolve().parent
MIB = 2**20
T = TypeVar("T")
LONGEST_EXAMPLE_S = 20.0
PROFILED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Recording:
    """Something to transcribe, and what is said in it where that is known."""

    path: Path
    language: str
    text: str
    windows: tuple[Window, ...]

    @property
    def seconds(self) -> float:
        return sum(window.samples.size for window in self.windows) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Outcome:
    """One precision over the recordings."""

    precision: str
    reason: str = ""
    """Why it was not run, a sentence; the figures are then empty."""
    report: LoadReport | None = None
    first_s: float | None = None
    """All recordings, nothing warm."""
    warm_runs_s: tuple[float, ...] = ()
    """All recordings again and again, everything warm."""
    peak_bytes: int | None = None
    """torch's allocator at its highest; a CPU keeps no account."""
    utilisation_percent: float | None = None
    """The GPU's, averaged over the warm runs."""
    activity: Activity | None = None
    """Of one token."""
    errors: dict[str, float] = field(default_factory=dict)
    """Word error rate by language, 0 to 1."""
    texts: dict[str, str] = field(default_factory=dict)
    """By file name."""

    @property
    def warm_s(self) -> float | None:
        """The median warm run."""
        return median(self.warm_runs_s) if self.warm_runs_s else None

    def is_apart_from(self, base: Outcome) -> bool:
        """Whether the warm runs of both can bear that one is called faster (compare_times)."""
        return compare_times(self.warm_runs_s, base.warm_runs_s) in ("less", "more")

    def time_beside(self, base: Outcome) -> str:
        """'takes 1.52 times the time of fp32', or that it cannot be told. Both must have run."""
        assert self.warm_s and base.warm_s
        beside = compare_times(self.warm_runs_s, base.warm_runs_s)
        if beside == "near":
            return f"takes as long as {base.precision}: the difference is under {100 * SAME_TIME:.0f} %"
        if beside in ("few", "same"):
            return f"its time cannot be told from that of {base.precision} in {len(self.warm_runs_s)} warm runs"
        return f"takes {times(self.warm_s, base.warm_s)} times the time of {base.precision}"

    @property
    def weights_mib(self) -> float | None:
        return None if self.report is None else self.report.weights_bytes / MIB

    @property
    def peak_mib(self) -> float | None:
        return None if self.peak_bytes is None else self.peak_bytes / MIB

    @property
    def load_s(self) -> float | None:
        return None if self.report is None else self.report.load_s


def run_script(main: Callable[[Sequence[str]], int]) -> int:
    """A deliberate error is one sentence and its exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return main(sys.argv[1:])
    except SottoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=str(description).split("\n", 1)[0])
    made.add_argument("--model", default="demo", help="demo, a folder or a Hub name (default: demo)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return made


def upto(most: int) -> Callable[[str], int]:
    """For argparse: a whole number from 1."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to {most}")
        return int(text)

    return read


def path(text: str) -> Path:
    """For argparse: a path; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; give one, or leave the option out")
    return Path(os.path.expanduser(text))


def examples(*languages: str) -> list[Recording]:
    """The short bundled recordings of these languages (none named: all six), with their texts.

    Raises OptionError for a language that no recording is in.
    """
    manifest = json.loads((EXAMPLES / "manifest.json").read_text(encoding="utf-8"))
    rows = [row for row in manifest if row["seconds"] < LONGEST_EXAMPLE_S]
    known = [row["language"] for row in rows]
    for language in languages:
        if language not in known:
            raise OptionError(f"There is no bundled example in '{language}'; choose from {', '.join(known)}.")
    return [
        read_recording(EXAMPLES / row["file"], row["language"], row["text"])
        for row in rows
        if not languages or row["language"] in languages
    ]


def examples_in(languages: str) -> list[Recording]:
    """examples() of languages with commas between them; an empty text: of all. Raises OptionError."""
    return examples(*(code.strip().lower() for code in languages.split(","))) if languages.strip() else examples()


def read_recording(path: Path, language: str = "en", text: str = "") -> Recording:
    """Cut into windows as always. Raises AudioError, OptionError where nobody speaks in it."""
    with decode_blocks(path) as blocks:
        windows = tuple(cut_windows(blocks, "vad"))
    if not windows:
        raise OptionError(f"No speech was found in {path}; give a recording of somebody speaking.")
    return Recording(path, language, text, windows)


def run(
    model: str,
    precision: str,
    recordings: Sequence[Recording],
    *,
    device: DeviceInfo,
    engine: str = "reference",
    counts: bool = False,
    calibrations: Path | None = None,
) -> Outcome:
    """Load, transcribe cold and WARM_RUNS times warm, unload. counts: also count the activity of a token.

    A row that this machine cannot run is an outcome too; a checkpoint that none can load is an error (ModelError).
    """
    try:
        loaded = load_engine(
            model, precision, engine=engine, device=str(device.torch_device), warm_up=False, calibrations=calibrations
        )
    except (PrecisionError, OutOfMemoryError, EffectivePrecisionError) as error:
        return Outcome(precision, reason=str(error))
    try:
        tokens = WhisperTokens.from_folder(loaded.report.folder)
        reset_peak(loaded.device)
        started_s = time.perf_counter()
        _texts(loaded, tokens, recordings)
        first_s = time.perf_counter() - started_s
        with _utilisation(loaded) as samples:
            warm_runs_s, texts = timed_runs(partial(_texts, loaded, tokens, recordings))
        return Outcome(
            precision,
            report=loaded.report,
            first_s=first_s,
            warm_runs_s=tuple(warm_runs_s),
            peak_bytes=read_peak(loaded.device).allocated_bytes,
            utilisation_percent=sum(samples) / len(samples) if samples else None,
            activity=_activity(loaded, tokens, recordings[0]) if counts else None,
            errors=_errors(tokens, recordings, texts),
            texts=texts,
        )
    finally:
        loaded.close()


def timed_runs(work: Callable[[], T]) -> tuple[list[float], T]:
    """(seconds of WARM_RUNS runs, what the last one gave)."""
    seconds = []
    for _ in range(WARM_RUNS):
        started_s = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started_s)
    return seconds, result


def available(names: Sequence[str], device: DeviceInfo) -> list[str]:
    """The rows of these names that this device runs."""
    return [name for name in names if name in PRECISIONS and PRECISIONS[name].unavailable(device) is None]


def device_of(word: str) -> DeviceInfo:
    """The device, announced."""
    device = describe_device(word)
    sys.stdout.write(f"Device: {device.label}\n")
    sys.stdout.flush()
    return device


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns; None is '-', numbers get two digits or none."""
    lines = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return "-" if value is None else str(value)


def percent(value: float | None) -> str | None:
    """0.123 -> '12.3 %'."""
    return None if value is None else f"{100 * value:.1f} %"


def bar_chart(path: Path, title: str, unit: str, places: Sequence[str], bars: Mapping[str, Sequence[float]]) -> Path:
    """PNG: groups of bars, one group for each place and one bar in it for each name."""
    from matplotlib.figure import Figure  # its own canvas: no display is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(ylabel=unit, title=title)
    width = 0.8 / len(bars)
    for index, (name, heights) in enumerate(bars.items()):
        shift = width * (index - (len(bars) - 1) / 2)
        axes.bar([at + shift for at in range(len(places))], heights, width=0.9 * width, label=name)
    axes.set_xticks(range(len(places)), places)
    return _saved(figure, axes, path)


def line_chart(
    path: Path, title: str, x_unit: str, y_unit: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Path:
    """PNG: a line with points for each name, from its (x, y)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x_unit, ylabel=y_unit, title=title)
    for name, (x, y) in lines.items():
        axes.plot(x, y, marker="o", label=name)
    return _saved(figure, axes, path)


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    """Raises OptionError, DiskFullError where it cannot be written."""
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise explain(path, error, "--out") from error
    return path


def _texts(engine: Engine, tokens: WhisperTokens, recordings: Sequence[Recording]) -> dict[str, str]:
    """By file name. Text has left the GPU, so its work is done."""
    texts = {}
    for recording in recordings:
        decoder = Decoder(tokens, TranscribeOptions(temperatures=(0.0,)))
        results = decoder.decode(engine, recording.windows, recording.language)
        texts[recording.path.name] = " ".join(tokens.decode(result.tokens).strip() for result in results)
    return texts


def _errors(tokens: WhisperTokens, recordings: Sequence[Recording], texts: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for recording in recordings:
        said, heard = (
            tokens.normalise(text, recording.language) for text in (recording.text, texts[recording.path.name])
        )
        rate = error_rates(said, heard)[0] if said else None
        if rate is not None:
            found[recording.language] = rate
    return found


def _activity(engine: Engine, tokens: WhisperTokens, recording: Recording) -> Activity:
    """One token more: a longer run less a shorter one, so that prompt and preparation cancel out."""
    from audio.features import LogMel

    encoded = engine.encode(LogMel(engine.dims.n_mels)([recording.windows[0].samples]))
    rules = tokens.rules()
    prompt = tokens.prompt(recording.language, "transcribe")
    short, long = (
        count_activity(partial(engine.generate, encoded, GenerateRequest([prompt], n, rules)), engine.device)
        for n in (2, 2 + PROFILED_TOKENS)
    )

    def each(before: int | None, after: int | None) -> int | None:
        return None if before is None or after is None else round((after - before) / PROFILED_TOKENS)

    operators = each(short.n_operators, long.n_operators)
    assert operators is not None
    return Activity(operators, each(short.n_kernels, long.n_kernels), each(short.n_waits, long.n_waits))


@contextmanager
def _utilisation(engine: Engine) -> Iterator[list[float]]:
    """Percent of the GPU by NVML, read ten times a second while the block runs; stays empty on a CPU."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            for gpu in read_memory().gpus:
                if gpu.cuda_index == (engine.device.index or 0) and gpu.utilisation_percent is not None:
                    samples.append(gpu.utilisation_percent)

    thread = threading.Thread(target=sample, daemon=True)
    if engine.device.type == "cuda":
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
