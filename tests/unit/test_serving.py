"""app.py as a server, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def test_the_page_is_served_until_interrupted(root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, root / "app.py", "--server_port", "0", "--offline", "--model", "demo", "--device", "cpu",
         "--no-warm-up", "--work-dir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[0].startswith("Device: CPU")
        address = lines[1].split()[3]
        assert b"<!doctype html>" in get(address)
        deadline_s = time.monotonic() + 60
        while json.loads(get(f"{address}/health"))["phase"] != "ready" and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert json.loads(get(f"{address}/health")) == {"phase": "ready", "message": "", "model": "demo"}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return bytes(answer.read())
