"""The command line: arguments -> Transcriber -> text on standard output, progress on standard error, an exit code.

Exit codes: 0 done, 2 the request cannot be done as given, 1 anything else. An error is one sentence on standard error;
an unexpected one names the log file that holds its traceback. Nothing heavy is imported before a command needs it, so
`--help` answers at once. Libraries' warnings and log lines go to the log file, never to the terminal.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import calibrating
import planning
from errors import OptionError, SottoError
from settings import Settings, add_arguments, with_dashes
from startup import keep_libraries
from terminal import Bar, Download, FitWarning, complain, log_to_file, quiet_libraries, say, write_utf8
from transcription.files import format_of, plan_files, write_file
from transcription.formats import FORMATS, Format, resolve_format
from transcription.options import TASKS, WARM_RUNS, WINDOW_MODES, TranscribeOptions

if TYPE_CHECKING:
    from transcription.interface import CompareRow, TranscriptionRun
    from transcription.pipeline import LocalTranscriber
    from transcription.results import Result
    from transcription.transcript import Transcript

logger = logging.getLogger(__name__)

Serve = Callable[[Settings], int]

EPILOG = """\
examples:
  ./start.sh                                          the page on http://127.0.0.1:7860
  ./start.sh --server-port 8000 --precision bnb-int8  the same, on another port, in 8 bit
  ./start.sh transcribe                               the example recording
  ./start.sh transcribe talk.mp3 --language de        text on standard output
  ./start.sh transcribe *.mp4 --format srt --output subtitles/
  ./start.sh detect talk.mp3 --json                   which language is spoken
  ./start.sh precisions                               what this machine can run
  ./start.sh plan --model large-v3                    what would fit, before downloading it
  ./start.sh compare talk.mp3 --precisions fp32,bnb-int8

Every option of the page's settings can also be set in the environment as SOTTO_<NAME>, for example SOTTO_MODEL.
Options may be written with dashes or underscores. exit codes: 0 done, 2 mistake in the request, 1 anything else."""

_SERVER_SETTINGS = ("server_name", "server_port", "root_path", "ssl_certfile", "ssl_keyfile", "warm_up")
_WORK_SETTINGS = (
    "model", "precision", "device", "engine", "batch_size", "offline", "hf_token", "hub_mirror", "cache_dir",
    "work_dir", "max_upload_mb", "max_duration_h", "log_level",
)  # fmt: skip


def main(argv: Sequence[str], *, serve: Serve, examples: Path) -> int:
    """Run one command and return its exit code. serve: starts the page; examples: folder of example recordings."""
    write_utf8(sys.stdout, sys.stderr)
    log_file = Path(tempfile.gettempdir()) / "sotto.log"
    try:
        arguments = build_parser().parse_args(with_dashes(argv))
        settings = Settings.from_env().with_arguments(arguments)
        arguments.examples = examples
        with log_to_file(settings) as log_file:
            try:
                command = getattr(arguments, "command", None)
                return _COMMANDS[command](arguments, settings) if command in _COMMANDS else serve(settings)
            except (SottoError, KeyboardInterrupt, BrokenPipeError, SystemExit):
                raise
            except Exception:
                report_id = secrets.token_hex(4)
                logger.exception("event=unexpected_error id=%s", report_id)
                complain(f"Something unexpected went wrong (id {report_id}); the details are in {log_file}.")
                return 1
    except SottoError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("Stopped.")
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain once more while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_transcriber(settings: Settings) -> LocalTranscriber:
    """The transcriber of these settings. Loads libraries, no model yet."""
    quiet_libraries()
    from model_loader.device import describe_device
    from model_loader.pool import EnginePool
    from transcription.pipeline import Limits, LocalTranscriber

    keep_libraries()
    pool = EnginePool(
        device=settings.device,
        offline=settings.offline,
        warm_up=settings.warm_up,
        token=settings.hf_token or None,
        mirror=settings.hub_mirror or None,
        cache_dir=settings.cache_dir,
        calibrations=settings.work_dir / "calibrations",
        batch=settings.batch_size,
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
        on_progress=Download(),
        on_fit=FitWarning(),
    )


def build_parser() -> argparse.ArgumentParser:
    """All commands and options. Settings may stand before or after the command."""
    parser = _Parser(
        prog="./start.sh",
        description="Transcribe speech with Whisper at the numeric precision this machine can afford.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    _add_transcribe(commands)
    _add_detect(commands)
    _add_precisions(commands)
    planning.add_arguments(
        _add_command(commands, "plan", "which precision of a model fits this machine, and which GPUs")
    )
    _add_compare(commands)
    calibrating.add_arguments(
        _add_command(commands, "calibrate", "measure a checkpoint on recordings for static INT8 (int8-static)")
    )
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
    _option(parser, "--format", f"{', '.join(FORMATS)}; several with commas. Default: txt.", default="", metavar="A,B")
    _option(parser, "--json", "the same as --format json", action="store_true")
    _option(parser, "--output", "file or folder to write to. Default: standard output.", default="", metavar="PATH")
    _option(parser, "--words", "times of single words too, in json and vtt; a second pass", action="store_true")
    _add_options(parser)


def _add_detect(commands: Any) -> None:
    parser = _add_command(commands, "detect", "which language is spoken, with probabilities")
    _option(parser, "file", "an audio or video file", type=Path, metavar="FILE")
    _option(parser, "--json", "print JSON: the average, and every window", action="store_true")


def _add_precisions(commands: Any) -> None:
    parser = _add_command(
        commands, "precisions", "list the precisions: name, and on which engine it runs here or why not"
    )
    _option(parser, "--json", "print JSON", action="store_true")


def _add_compare(commands: Any) -> None:
    parser = _add_command(commands, "compare", "one recording over several precisions: text, time, memory, errors")
    _option(parser, "file", "a recording. Default: an example.", nargs="?", type=Path, metavar="FILE")
    _option(parser, "--precisions", "names with commas. Default: all that run here.", metavar="NAMES")
    _option(
        parser, "--text", "what is really said: the text, or a file that holds it; gives accuracy", default="",
        metavar="TEXT",
    )  # fmt: skip
    _option(parser, "--reference", "the same as --text", dest="text", default=argparse.SUPPRESS, metavar="TEXT")
    _option(
        parser, "--repeats",
        f"warm runs of each precision, after its first; with fewer than three none can be called faster. Default: "
        f"{WARM_RUNS}.", type=int, default=WARM_RUNS, metavar="N",
    )  # fmt: skip
    _option(parser, "--calibrated", "folder of calibrate --out, for int8-static. Default: where it is found by itself.",
            type=Path, metavar="DIR")  # fmt: skip
    _option(parser, "--order", "given or shuffled. Default: given.", default="given", metavar="NAME")
    _option(parser, "--seed", "of the shuffled order. Default: 0.", type=int, default=0, metavar="N")
    _option(parser, "--json", "the rows as JSON, to a file or instead of the table", nargs="?", const="-", default="",
            metavar="OUT")  # fmt: skip
    for name, what in (("--card", "the run card (JSON)"), ("--csv", "the table as CSV"), ("--markdown", "as Markdown")):
        _option(parser, name, f"write {what} to this file", default="", metavar="OUT")
    _option(parser, "--with-card", "show the rows of an earlier run card beside", default="", metavar="OLD")
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
    delivery = _Delivery.of(arguments, files)
    options = _options(arguments)
    exit_code, n_done = 0, 0
    with _transcriber(settings) as transcriber:
        for file in files:
            try:
                _transcribe_one(file, delivery, transcriber.transcribe(file, options))
                n_done += 1
            except SottoError as error:
                complain(_named(file, str(error)) if len(files) > 1 else str(error))
                exit_code = exit_code or error.exit_code
        if n_done:
            _say_banner(transcriber)
    return exit_code


def _transcribe_one(file: Path, delivery: _Delivery, run: TranscriptionRun) -> None:
    """Text and progress while it comes; the results at the end, also of what an interruption leaves."""
    delivery.begin(file)
    is_complete = False
    try:
        with Bar() as bar:
            for segment in run:
                if delivery.streams:
                    bar.above(" ".join(segment.text.split()))
                bar.show(run)
        is_complete = True
    finally:
        run.close()
        if is_complete or run.transcript.segments:
            delivery.hand_over(file, run.transcript)
    for warning in run.warnings:
        complain(_named(file, warning))


def _named(file: Path, sentence: str) -> str:
    """With the file's name in front, unless it begins with that."""
    return sentence if sentence.startswith(file.name) else f"{file.name}: {sentence}"


@dataclass(frozen=True, slots=True)
class _Delivery:
    """Where and how results go: to files, or to standard output in one format."""

    formats: tuple[Format, ...]
    files: dict[tuple[Path, str], Path]
    """(recording, format name) -> file; empty for standard output."""
    is_one_of_many: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace, files: Sequence[Path]) -> _Delivery:
        """Raises OptionError, DiskFullError: what cannot be delivered is refused before any work."""
        formats = _formats(arguments)
        if len(formats) > 1 and not arguments.output:
            raise OptionError("Several formats need a place to go; give --output FOLDER, or one format.")
        planned = plan_files(files, formats, arguments.output) if arguments.output else {}
        return cls(tuple(formats), planned, len(files) > 1)

    @property
    def streams(self) -> bool:
        """Text is printed segment by segment."""
        return not self.files and self.formats[0].name == "txt"

    def begin(self, file: Path) -> None:
        if self.is_one_of_many and not self.files and self.formats[0].name != "json":
            say(f"==> {file.name} <==")

    def hand_over(self, file: Path, transcript: Transcript) -> None:
        for row in self.formats if self.files else ():
            write_file(self.files[file, row.name], row.render(transcript))
            complain(f"Wrote {self.files[file, row.name]}")
        if not self.files and not self.streams:
            text = self.formats[0].render(transcript)
            if self.is_one_of_many and self.formats[0].name == "json":
                text = json.dumps({"file": file.name, **json.loads(text)}, ensure_ascii=False) + "\n"  # JSON Lines
            sys.stdout.write(text)
            sys.stdout.flush()


def detect(arguments: argparse.Namespace, settings: Settings) -> int:
    """The most probable languages of a recording."""
    with _transcriber(settings) as transcriber:
        report = transcriber.detect_language(arguments.file)
        names = {language.code: language.name for language in transcriber.status().languages}
        _say_banner(transcriber)
    if arguments.json:
        say(json.dumps(asdict(report), ensure_ascii=False, indent=2))
        return 0
    for guess in report.guesses[:5]:
        say(f"{guess.code:4} {names.get(guess.code, guess.code):12} {guess.probability:7.1%}")
    return 0


def calibrate(arguments: argparse.Namespace, settings: Settings) -> int:
    """Static INT8: what it came to is said by calibrating.py."""
    with _transcriber(settings) as transcriber:
        return calibrating.calibrate(arguments, transcriber)


def precisions(arguments: argparse.Namespace, settings: Settings) -> int:
    """The table of precisions as this machine sees it."""
    quiet_libraries()
    from model_loader.device import describe_device
    from model_loader.precision import PRECISIONS

    device = describe_device(settings.device)
    rows = [(row, row.unavailable(device)) for row in PRECISIONS.values()]
    if arguments.json:
        listed = [
            {"name": row.name, "aliases": list(row.aliases), "label": row.label, "available": not why, "reason": why,
             "engine": None if why else row.engine(settings.engine)}
            for row, why in rows
        ]  # fmt: skip
        say(json.dumps(listed, ensure_ascii=False, indent=2))
        return 0
    names = [", ".join([row.name, *row.aliases]) for row, _ in rows]
    for name, (row, why) in zip(names, rows, strict=True):
        engine = row.engine(settings.engine)
        reason = "" if row.fast or settings.engine == "reference" else f": {row.why_reference}"
        say(f"{name:{max(map(len, names))}}  {why or f'available, {engine} engine{reason}'}")
    return 0


def compare(arguments: argparse.Namespace, settings: Settings) -> int:
    """Every precision in a process of its own; the table at the end, also of what an interruption leaves.

    Exit code 1 if none was measured, 2 if each was refused for a mistake in the request. What all of them would refuse
    is raised before any work: OptionError, AudioError, ModelError, PrecisionError.
    """
    from transcription import compare_request as asked
    from transcription.comparison import reason
    from transcription.results import Result, plan_outputs
    from transcription.run_card import load_card, make_card

    file = arguments.file or _example(arguments.examples)
    given = {kind: getattr(arguments, kind) for kind in ("json", "card", "csv", "markdown")}
    files = plan_outputs(given, file)
    old = load_card(Path(arguments.with_card)) if arguments.with_card else None
    how = {"repeats": arguments.repeats, "order": arguments.order, "seed": arguments.seed}
    options, text = _options(arguments), asked.reference_text(arguments.text)
    rows: dict[str, CompareRow] = {}
    with _transcriber(settings) as transcriber:
        statuses = transcriber.status().precisions
        names = asked.asked_names(arguments.precisions, statuses)
        asked.refuse_if_none_runs(names, statuses)
        asked.refuse_unreadable(file, max_bytes=settings.max_upload_bytes, max_duration_s=settings.max_duration_s)
        chosen = {"reference_text": text, "calibrated": arguments.calibrated}
        comparison = transcriber.compare(file, names, options, **chosen, **how)
        asked.refuse_alike(
            names, options, model=settings.model, device=settings.device, offline=settings.offline,
            token=settings.hf_token, mirror=settings.hub_mirror, cache_dir=settings.cache_dir, on_progress=Download(),
            calibrations=None if arguments.calibrated else settings.work_dir / "calibrations",
        )  # fmt: skip
        if comparison.precision_reason:
            complain(comparison.precision_reason)
        try:
            for row in comparison:
                if row.precision not in rows:
                    complain(f"{row.precision}: {reason(row) or f'measured, {row.warm_s:.2f} s a warm run'}")
                rows[row.precision] = row
        finally:
            comparison.cancel()
            if measured := [rows[name] for name in comparison.names if name in rows]:
                card = make_card(measured, file, name=file.name, options=options, reference_text=text, **how)
                _hand_over(arguments, files, Result(card, old))
        _say_banner(transcriber, [row.model for row in rows.values()])
    return asked.exit_code(tuple(rows.values()))


def _hand_over(arguments: argparse.Namespace, files: dict[str, Path], result: Result) -> None:
    """Every file that was asked for, then the table or the JSON on standard output: what cannot be written or drawn
    leaves the others. Where nothing was measured, each reason has been said already."""
    failures: list[SottoError] = []
    for kind, path in files.items():  # the new rows alone come first, as JSON
        try:
            write_file(path, result.render(kind))
            complain(f"Wrote {path}")
        except SottoError as error:
            failures.append(error)
    if arguments.json == "-":
        say(result.render("json").rstrip())
    elif any(not row.failed for row in result.rows):
        say(result.render("table"))
    if failures:
        raise failures[0]


_COMMANDS: dict[str, Callable[[argparse.Namespace, Settings], int]] = {
    "transcribe": transcribe,
    "detect": detect,
    "precisions": precisions,
    "plan": planning.plan,
    "compare": compare,
    "calibrate": calibrate,
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


def _say_banner(transcriber: LocalTranscriber, measured: Sequence[str] = ()) -> None:
    """measured: models that processes of their own had in memory, of which the transcriber's status knows nothing."""
    from model_loader.weights import DEMO
    from transcription.pipeline import DEMO_BANNER

    status = transcriber.status()
    banner = status.banner or (DEMO_BANNER if DEMO in measured else None)
    for sentence in (status.precision_reason, banner):
        if sentence:
            complain(sentence)


def _options(arguments: argparse.Namespace) -> TranscribeOptions:
    return TranscribeOptions(
        language=arguments.language,
        task=arguments.task,
        windows=arguments.windows,
        prompt=arguments.prompt,
        beam_size=arguments.beam_size,
        words=getattr(arguments, "words", False),
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
