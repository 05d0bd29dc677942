"""Work for a worker process to do: each ends in its own way."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from errors import OutOfMemoryError


def answer(argument: Any, step: Any) -> Any:
    step("thinking")
    print("this must not reach the terminal")
    return {"argument": argument, "pid": os.getpid()}


def refuse(argument: Any, step: Any) -> None:
    raise OutOfMemoryError("It does not fit. Choose a smaller one.")


def break_down(argument: Any, step: Any) -> None:
    raise ZeroDivisionError("a bug")


def be_killed(argument: Any, step: Any) -> None:
    os.kill(os.getpid(), getattr(signal, argument))
    time.sleep(60)


def leave(argument: Any, step: Any) -> None:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os._exit(argument)


def hang(argument: Path, step: Any) -> None:
    argument.write_text(str(os.getpid()))
    step("hanging")
    time.sleep(600)
