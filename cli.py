"""The command line: arguments -> Transcriber -> text on standard output, progress on standard error, an exit code.

Exit codes: 0 done, 2 the request cannot be done as given, 1 anything else. An error is one sentence on standard error;
an unexpected one names the log file that holds its traceback. Nothing heavy is imported before a command needs it, so
`--help` answers at once. Libraries' warnings and log lines go to the log file, never to the terminal.
"""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from errors import OptionError, SottoError
from settings import Settings, add_arguments, with_dashes
from transcription.files import format_of, plan_files, write_file
from transcription.formats import FORMATS, Format, resolve_format
from transcription.options import TASKS, WINDOW_MODES, TranscribeOptions

if TYPE_CHECKING:
    from model_loader.weights import DownloadProgress
    from transcription.interface import CompareRow, TranscriptionRun
    from transcription.pipeline import LocalTranscriber
    from transcription.transcript import Transcript

logger = logging.getLogger(__name__)

Serve = Callable[[Settings], int]

EPILOG = """\
examples:
  python app.py                                          the page on http://127.0.0.1:7860
  python app.py --server-port 8000 --precision bnb-int8  the same, on another port, in 8 bit
  python app.py transcribe                               the example recording
  python app.py transcribe talk.mp3 --language de        text on standard output
  python app.py transcribe *.mp4 --format srt --output subtitles/
  python app.py detect talk.mp3 --json                   which language is spoken
  python app.py precisions                               what this machine can run
  python app.py compare talk.mp3 --precisions fp32,bnb-int8

Every option of the page's settings can also be set in the environment as SOTTO_<NAME>, for example SOTTO_MODEL.
Options may be written with dashes or underscores. exit codes: 0 done, 2 mistake in the request, 1 anything else."""

_SERVER_SETTINGS = ("server_name", "server_port", "root_path", "ssl_certfile", "ssl_keyfile", "warm_up")
_WORK_SETTINGS = (
    "model", "precision", "device", "engine", "batch_size", "offline", "hf_token", "hub_mirror", "cache_dir",
    "work_dir", "max_upload_mb", "max_duration_h", "log_level",
)  # fmt: skip


def main(argv: Sequence[str], *, serve: Serve, examples: Path) -> int:
    """Run one command and return its exit code. serve: starts the page; examples: folder of example recordings."""
    _write_utf8(sys.stdout, sys.stderr)
    log_file = Path(tempfile.gettempdir()) / "sotto.log"
    try:
        arguments = build_parser().parse_args(with_dashes(argv))
        settings = Settings.from_env().with_arguments(arguments)
        arguments.examples = examples
        with _log_to_file(settings) as log_file:
            try:
                command = getattr(arguments, "command", None)
                return _COMMANDS[command](arguments, settings) if command in _COMMANDS else serve(settings)
            except (SottoError, KeyboardInterrupt, BrokenPipeError, SystemExit):
                raise
            except Exception:
                report_id = secrets.token_hex(4)
                logger.exception("event=unexpected_error id=%s", report_id)
                _complain(f"Something unexpected went wrong (id {report_id}); the details are in {log_file}.")
                return 1
    except SottoError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("Stopped.")
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain once more while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_transcriber(settings: Settings) -> LocalTranscriber:
    """The transcriber of these settings. Loads libraries, no model yet."""
    _quiet_libraries()
    from model_loader.device import describe_device
    from model_loader.pool import EnginePool
    from transcription.pipeline import Limits, LocalTranscriber

    pool = EnginePool(
        device=settings.device,
        offline=settings.offline,
        warm_up=settings.warm_up,
        token=settings.hf_token or None,
        mirror=settings.hub_mirror or None,
        cache_dir=settings.cache_dir,
    )
    limits = Limits(
        batch_size=settings.batch_size, max_bytes=settings.max_upload_bytes, max_duration_s=settings.max_duration_s
    )
    return LocalTranscriber(
        pool,
        model=settings.model,
        precision=settings.precision,
        device=describe_device(settings.device),
        engine=settings.engine,
        limits=limits,
        on_progress=_Download(),
    )


def build_parser() -> argparse.ArgumentParser:
    """All commands and options. Settings may stand before or after the command."""
    parser = _Parser(
        prog="app.py",
        description="Transcribe speech with Whisper at the numeric precision this machine can afford.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    _add_transcribe(commands)
    _add_detect(commands)
    _add_precisions(commands)
    _add_compare(commands)
    served = _add_command(commands, "serve", "serve the page (the default)")
    add_arguments(served, _SERVER_SETTINGS)
    group = parser.add_argument_group("settings of the page and of every command")
    add_arguments(group, (*_SERVER_SETTINGS, *_WORK_SETTINGS))
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage and exits on a mistake; a sentence is enough."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[:1].upper() + text[1:] + ".", allow_abbrev=False
    )
    add_arguments(parser.add_argument_group("settings"), _WORK_SETTINGS)
    return parser


def _add_transcribe(commands: Any) -> None:
    parser = _add_command(commands, "transcribe", "recordings to text; without FILES an example recording")
    _option(parser, "files", "audio or video files of any format", nargs="*", type=Path, metavar="FILES")
    _option(
        parser, "--format", f"{', '.join(FORMATS)}; several with commas. Default: txt.", default="", metavar="NAMES"
    )
    _option(parser, "--json", "the same as --format json", action="store_true")
    _option(parser, "--output", "file or folder to write to. Default: standard output.", default="", metavar="PATH")
    _add_options(parser)


def _add_detect(commands: Any) -> None:
    parser = _add_command(commands, "detect", "which language is spoken, with probabilities")
    _option(parser, "file", "an audio or video file", type=Path, metavar="FILE")
    _option(parser, "--json", "print JSON: the average, and every window", action="store_true")


def _add_precisions(commands: Any) -> None:
    parser = _add_command(commands, "precisions", "list the precisions: name, and available here or why not")
    _option(parser, "--json", "print JSON", action="store_true")


def _add_compare(commands: Any) -> None:
    parser = _add_command(commands, "compare", "one recording over several precisions: text, time, memory, errors")
    _option(parser, "file", "a recording. Default: an example.", nargs="?", type=Path, metavar="FILE")
    _option(parser, "--precisions", "names with commas. Default: all that run here.", default="", metavar="NAMES")
    _option(parser, "--reference", "what is really said: the text, or a file that holds it", default="", metavar="TEXT")
    _option(parser, "--repeats", "runs of each precision. Default: 1.", type=int, default=1, metavar="N")
    _option(parser, "--json", "print JSON", action="store_true")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    default, group = TranscribeOptions(), parser.add_argument_group("options of the transcription")
    _option(group, "--language", "language spoken, for example en. Default: detected.", metavar="CODE")
    _option(
        group, "--task", f"{' or '.join(TASKS)} (into English). Default: {default.task}.",
        default=default.task, metavar="NAME",
    )  # fmt: skip
    _option(
        group, "--windows", f"{' or '.join(WINDOW_MODES)}: cut in silence, or every 25 s with overlap. Default: vad.",
        default=default.windows, metavar="NAME",
    )  # fmt: skip
    _option(group, "--prompt", "names and words that the recording holds", default="", metavar="TEXT")
    _option(
        group, "--beam-size", f"hypotheses kept while decoding. Default: {default.beam_size}.",
        type=int, default=default.beam_size, metavar="N",
    )  # fmt: skip


def _option(parser: Any, name: str, text: str, **kwargs: Any) -> None:
    parser.add_argument(name, help=text.replace("%", "%%"), **kwargs)


# --- commands ---------------------------------------------------------------------------------------------------------


def transcribe(arguments: argparse.Namespace, settings: Settings) -> int:
    """Every file to its formats; a file that fails leaves the others. Returns the first failure's exit code."""
    files = arguments.files or [_example(arguments.examples)]
    formats = _formats(arguments)
    if len(formats) > 1 and not arguments.output:
        raise OptionError("Several formats need a place to go; give --output FOLDER, or one format.")
    options = _options(arguments)
    targets = plan_files(files, formats, arguments.output) if arguments.output else {}
    exit_code, n_done = 0, 0
    with _transcriber(settings) as transcriber:
        for file in files:
            try:
                _transcribe_one(file, formats, targets, options, transcriber, is_one_of_many=len(files) > 1)
                n_done += 1
            except SottoError as error:
                _complain(f"{file.name}: {error}" if len(files) > 1 else str(error))
                exit_code = exit_code or error.exit_code
        if n_done:
            _say_banner(transcriber)
    return exit_code


def _transcribe_one(
    file: Path,
    formats: Sequence[Format],
    targets: dict[tuple[Path, str], Path],
    options: TranscribeOptions,
    transcriber: LocalTranscriber,
    *,
    is_one_of_many: bool,
) -> None:
    run = transcriber.transcribe(file, options)
    streams = not targets and formats[0].name == "txt"
    if is_one_of_many and not targets and formats[0].name != "json":
        _say(f"==> {file.name} <==")
    try:
        with _Bar() as bar:
            for segment in run:
                if streams:
                    bar.above(" ".join(segment.text.split()))
                bar.show(run)
    finally:
        run.close()
        transcript = run.transcript
        if transcript.segments or not run.is_cancelled:
            _hand_over(file, formats, targets, transcript, streams, is_one_of_many)
    for warning in run.warnings:
        _complain(f"{file.name}: {warning}")


def _hand_over(
    file: Path,
    formats: Sequence[Format],
    targets: dict[tuple[Path, str], Path],
    transcript: Transcript,
    streamed: bool,
    is_one_of_many: bool,
) -> None:
    """Write what there is, also after an interruption: no result is lost."""
    if not targets and not streamed:
        text = formats[0].render(transcript)
        if is_one_of_many and formats[0].name == "json":
            text = json.dumps({"file": file.name, **json.loads(text)}, ensure_ascii=False) + "\n"  # JSON Lines
        sys.stdout.write(text)
        sys.stdout.flush()
    for row in formats if targets else ():
        write_file(targets[file, row.name], row.render(transcript))
        _complain(f"Wrote {targets[file, row.name]}")


def detect(arguments: argparse.Namespace, settings: Settings) -> int:
    """The most probable languages of a recording."""
    with _transcriber(settings) as transcriber:
        report = transcriber.detect_language(arguments.file)
        names = {language.code: language.name for language in transcriber.status().languages}
        _say_banner(transcriber)
    if arguments.json:
        _say(json.dumps(asdict(report), ensure_ascii=False, indent=2))
        return 0
    for guess in report.guesses[:5]:
        _say(f"{guess.code:4} {names.get(guess.code, guess.code):12} {guess.probability:7.1%}")
    return 0


def precisions(arguments: argparse.Namespace, settings: Settings) -> int:
    """The table of precisions as this machine sees it."""
    _quiet_libraries()
    from model_loader.device import describe_device
    from model_loader.precision import PRECISIONS

    device = describe_device(settings.device)
    rows = [(row, row.unavailable(device)) for row in PRECISIONS.values()]
    if arguments.json:
        listed = [
            {"name": row.name, "aliases": list(row.aliases), "label": row.label, "available": not why, "reason": why}
            for row, why in rows
        ]
        _say(json.dumps(listed, ensure_ascii=False, indent=2))
        return 0
    for row, why in rows:
        names = ", ".join([row.name, *row.aliases])
        _say(f"{names:20} {why or 'available'}")
    return 0


def compare(arguments: argparse.Namespace, settings: Settings) -> int:
    """One line per precision as it finishes. Exit code 1 if none could be run."""
    file = arguments.file or _example(arguments.examples)
    rows: list[CompareRow] = []
    with _transcriber(settings, warm_up=True) as transcriber:
        available = [row.name for row in transcriber.status().precisions if row.unavailable is None]
        names = [name.strip() for name in arguments.precisions.split(",") if name.strip()] or available
        if not arguments.json:
            _say("precision      load   first text    run   x real time    weights       peak    WER  text")
        reference = _reference_text(arguments.reference)
        for row in transcriber.compare(
            file, names, _options(arguments), reference_text=reference, repeats=arguments.repeats
        ):
            rows.append(row)
            if not arguments.json:
                _say(_compare_line(row))
        _say_banner(transcriber)
    if arguments.json:
        _say(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=2))
    elif any(row.reference == "fp32" for row in rows):
        _say(
            "WER is the difference from fp32's own text: agreement, not accuracy. Give --reference to measure accuracy."
        )
    return 0 if any(not row.failed for row in rows) else 1


def _compare_line(row: CompareRow) -> str:
    if row.failed:
        return f"{row.precision:14} {row.error}"
    shown = [
        _figure(row.load_s, "{:5.1f} s"), _figure(row.first_text_s, "{:10.2f} s"), _figure(row.warm_s, "{:4.1f} s"),
        _figure(row.real_time_factor, "{:11.1f} x"), _figure(row.weights_bytes, "{:6.0f} MiB", 2**20),
        _figure(row.peak_bytes, "{:6.0f} MiB", 2**20), _figure(row.wer, "{:4.1f} %", 0.01),
    ]  # fmt: skip
    return f"{row.precision:12} {' '.join(shown)}  {row.text[:60]}"


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    """A measured figure, or a dash of the same width."""
    return "-".rjust(len(form.format(0.0))) if value is None else form.format(value / unit)


_COMMANDS: dict[str, Callable[[argparse.Namespace, Settings], int]] = {
    "transcribe": transcribe,
    "detect": detect,
    "precisions": precisions,
    "compare": compare,
}


# --- what commands share ----------------------------------------------------------------------------------------------


@contextmanager
def _transcriber(settings: Settings, *, warm_up: bool = False) -> Iterator[LocalTranscriber]:
    """A transcriber that is closed again. A command runs once: warming up would only delay it, unless it measures."""
    transcriber = build_transcriber(replace(settings, warm_up=warm_up))
    try:
        yield transcriber
    finally:
        transcriber.close()


def _say_banner(transcriber: LocalTranscriber) -> None:
    if banner := transcriber.status().banner:
        _complain(banner)


def _options(arguments: argparse.Namespace) -> TranscribeOptions:
    return TranscribeOptions(
        language=arguments.language,
        task=arguments.task,
        windows=arguments.windows,
        prompt=arguments.prompt,
        beam_size=arguments.beam_size,
    )


def _formats(arguments: argparse.Namespace) -> list[Format]:
    """The formats asked for: by name, by the ending of --output, else txt."""
    names = ["json"] if arguments.json else [name for name in arguments.format.split(",") if name.strip()]
    if names:
        return list({row.name: row for row in map(resolve_format, names)}.values())
    named = format_of(arguments.output)
    return [named or FORMATS["txt"]]


def _example(folder: Path) -> Path:
    """The first example recording."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise OptionError("No recording was given and the examples folder is missing; give the path of a recording.")
    return folder / str(json.loads(manifest.read_text(encoding="utf-8"))[0]["file"])


def _reference_text(given: str) -> str:
    """The text itself, or the content of the file that it names."""
    try:
        return Path(given).read_text(encoding="utf-8") if given and Path(given).is_file() else given
    except OSError:  # a long text is no path
        return given


class _Download:
    """A checkpoint's download on standard error: one line that counts on a terminal, else a line per tenth."""

    def __init__(self) -> None:
        self._tenth = -1

    def __call__(self, progress: DownloadProgress) -> None:
        done, total = progress.done_bytes, max(progress.total_bytes, 1)
        line = f"Downloading {progress.model}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif 10 * done // total != self._tenth:
            self._tenth = 10 * done // total
            _complain(line)


class _Bar:
    """Progress on standard error while a run is iterated, where that is a terminal."""

    WIDTH = 30

    def __init__(self) -> None:
        self._is_drawn = sys.stderr.isatty()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write("")

    def above(self, line: str) -> None:
        """A line of text on standard output; the bar moves down."""
        self._write("")
        _say(line)

    def show(self, run: TranscriptionRun) -> None:
        progress = run.progress
        total_s = progress.total_s or 0.0
        n_full = min(round(self.WIDTH * progress.done_s / total_s), self.WIDTH) if total_s else 0
        length = f"{progress.done_s:.0f}/{total_s:.0f} s" if total_s else f"{progress.done_s:.0f} s"
        rest = f", {progress.eta_s:.0f} s left" if progress.eta_s else ""
        self._write(f"[{'#' * n_full}{'.' * (self.WIDTH - n_full)}] {length}{rest}")

    def _write(self, line: str) -> None:
        if self._is_drawn:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)  # erase the line, then draw


def _say(line: str) -> None:
    print(line, flush=True)


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write_utf8(*streams: TextIO) -> None:
    """Text in any language, wherever the output goes; a file name that is not text is shown escaped."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@contextmanager
def _log_to_file(settings: Settings) -> Iterator[Path]:
    """Every logger and warning of this process into one rotating file; nothing on the terminal."""
    path = _log_path(settings.work_dir)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=5_000_000, backupCount=3, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"))
    root, before = logging.getLogger(), (logging.getLogger().level, logging.getLogger().handlers[:])
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    if settings.log_level != "debug":
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    logging.captureWarnings(True)
    try:
        yield path
    finally:
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        handler.close()


def _log_path(work_dir: Path) -> Path:
    """work_dir/sotto.log, or one in the temporary folder where work_dir cannot be written."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        path = work_dir / "sotto.log"
        with path.open("a", encoding="utf-8"):
            return path
    except OSError:
        return Path(tempfile.gettempdir()) / f"sotto-{os.getuid()}.log"


def _quiet_libraries() -> None:
    """Libraries that print or set up their own handlers are told to use the log like everybody else."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
