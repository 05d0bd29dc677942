"""A worker process: whatever becomes of it, the caller gets an answer or a sentence, and no process stays behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from errors import CancelledError
from tests.unit.transcription import workers
from transcription.worker import WorkerError, run_in_worker


def run(work, argument=None, *, steps=None, stop=None):
    told = steps.append if steps is not None else lambda text: None
    return run_in_worker(work, argument, name="bf16", on_step=told, stop=stop or threading.Event())


def test_the_answer_comes_from_another_process_that_is_gone_then(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []
    said = run(workers.answer, 7, steps=steps)
    assert said["argument"] == 7 and said["pid"] != os.getpid() and steps == ["thinking"]
    assert not psutil.pid_exists(said["pid"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("work", "argument", "sentence"),
    [
        (workers.refuse, None, "It does not fit. Choose a smaller one."),
        (workers.break_down, None, "Something unexpected went wrong"),
        (workers.be_killed, "SIGKILL", "killed by the system"),
        (workers.be_killed, "SIGSEGV", "crashed (SIGSEGV)"),
        (workers.leave, 3, "exit code 3"),
    ],
)
def test_every_bad_end_is_a_sentence(work, argument, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WorkerError) as raised:
        run(work, argument)
    assert sentence in str(raised.value) and "Traceback" not in str(raised.value)
    assert raised.value.kind == ("OutOfMemoryError" if work is workers.refuse else "MachineError")
    if work is workers.leave:
        assert "last words" in caplog.text
    if work is workers.break_down:
        assert "ZeroDivisionError" in caplog.text


def test_a_cancel_ends_the_process_at_once(tmp_path: Path) -> None:
    stop, file = threading.Event(), tmp_path / "pid"
    with pytest.raises(CancelledError):
        run_in_worker(workers.hang, file, name="bf16", on_step=lambda text: stop.set(), stop=stop)
    assert not psutil.pid_exists(int(file.read_text()))
