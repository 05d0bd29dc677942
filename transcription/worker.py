"""One piece of work in a fresh process, whatever becomes of it.

In: a function, its argument. Out: what it returns. The process is new (spawn), so memory figures are clean and the
device is wholly given back when it ends. A native crash, a kill for want of memory or a hang costs that process alone:
the caller gets an error with a sentence. A cancel ends it at once, and it never outlives its parent.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from errors import CancelledError, MachineError, SottoError
from startup import keep_libraries

logger = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[str], None]
"""Told in words what is being done."""
Work = Callable[[Any, Step], T]
"""A function of a module, so that the new process finds it by name."""

_LOOK_S = 0.1
"""How often a cancel is looked for."""
_KEPT_CHARACTERS = 4000
_BAD_END = "bad end"


class WorkerError(MachineError):
    """The process ended without an answer, or refused: a sentence for the user."""

    def __init__(self, sentence: str, kind: str = "") -> None:
        super().__init__(sentence)
        self.kind = kind or MachineError.__name__
        """Class of errors.py that was raised there, by name; MachineError where none was."""


def run_in_worker(work: Work[T], argument: Any, *, name: str, on_step: Step, stop: threading.Event) -> T:
    """work(argument, step) in a new process. Blocks; set `stop` from another thread to end it.

    name: for sentences and the log. Raises WorkerError for whatever goes wrong there, CancelledError.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sotto-worker-") as folder:
        log = Path(folder) / "log.txt"
        receiver, sender = context.Pipe(duplex=False)
        level = logging.getLogger().getEffectiveLevel()
        # daemon: also ended with an ordinary end of this program.
        process = context.Process(target=_main, args=(sender, log, level, work, argument), name=name, daemon=True)
        try:
            process.start()
            sender.close()  # the child's copy is the only one left: its end is the end of the pipe
            kind, value = _listen(receiver, on_step, stop)
            if kind == _BAD_END:
                process.join()
                value = (_sentence(name, process.exitcode or 0),)
        finally:
            if process.pid is not None:
                process.kill()
                process.join()
                process.close()
            receiver.close()
            _pass_on(log, name, logging.ERROR if sys.exc_info()[0] else logging.DEBUG)
        if kind != "done":
            _pass_on(log, name, logging.INFO if kind == "refused" else logging.ERROR)
            raise WorkerError(*value)
        result: T = value
        return result


def _listen(receiver: Connection, on_step: Step, stop: threading.Event) -> tuple[str, Any]:
    """(kind, value) of the last message; 'bad end' where the process ended without one. An error's value is what
    WorkerError takes."""
    while not stop.is_set():
        if not wait([receiver], timeout=_LOOK_S):
            continue
        try:
            kind, value = receiver.recv()
        except (EOFError, ConnectionResetError):
            return _BAD_END, None
        if kind != "step":
            return kind, value
        on_step(value)
    raise CancelledError("Stopped. What was measured is kept.")


def _sentence(name: str, exit_code: int) -> str:
    """Why a process ended without an answer. exit_code: negative for a signal (multiprocessing)."""
    if exit_code == -signal.SIGKILL:
        return (
            f"The worker process of {name} was killed by the system, most often because main memory ran out. Close "
            "other programs, or choose a smaller precision or model."
        )
    if exit_code < 0:
        how = signal.Signals(-exit_code).name
        return (
            f"The worker process of {name} crashed ({how}); the log file holds its last words. Try another precision."
        )
    return f"The worker process of {name} ended without an answer (exit code {exit_code}); the log file may say why."


def _pass_on(log: Path, name: str, level: int) -> None:
    """The process's own log and last words into ours."""
    if not logger.isEnabledFor(level) or not log.is_file():
        return
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if text:
        logger.log(level, "event=worker_log name=%s\n%s", name, text[-_KEPT_CHARACTERS:])


# --- in the new process ----------------------------------------------------------------------------------------------


def _main(sender: Connection, log: Path, level: int, work: Work[T], argument: Any) -> None:
    """The worker's door: every end is a message, except those that no program can send."""
    _settle_in(log, level)
    try:
        message: tuple[str, Any] = ("done", work(argument, lambda text: sender.send(("step", text))))
    except SottoError as error:
        message = ("refused", (str(error), type(error).__name__))
    except Exception:
        report_id = secrets.token_hex(4)
        logger.exception("event=unexpected_error id=%s", report_id)
        message = ("broke", (f"Something unexpected went wrong (id {report_id}); the details are in the log file.",))
    sys.stderr.flush()
    sender.send(message)
    sender.close()


def _settle_in(log: Path, level: int) -> None:
    """Everything that is printed goes to the log file, Ctrl-C is the parent's business, and its end is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    faulthandler.enable()
    keep_libraries()
    logging.basicConfig(level=level, format="level=%(levelname)s logger=%(name)s %(message)s", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
