"""The real application with the demo model in a process of its own, and one real Chromium that looks at it.

Every page notes what the browser's console complains about; a test ends with none, unless it says `expects_complaints`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, NoReturn

import numpy as np
import pytest
import soundfile

from tests.conftest import ROOT

START_LIMIT_S = 120
WORK_LIMIT_MS = 60_000
"""Longest wait for a piece of work on two slow cores."""
PERMISSIONS = ["clipboard-read", "clipboard-write", "microphone"]
OTHER_HOST = "sotto.test"
"""A name that the test browser finds on this machine, and that is no secure origin."""


@pytest.fixture(scope="session")
def manifest() -> list[dict[str, Any]]:
    """The example recordings, in the order of their buttons."""
    return json.loads((ROOT / "examples" / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="package")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python app.py --offline` on a free port, once its model is ready."""
    work = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "SOTTO_WORK_DIR": str(work), "GRADIO_TEMP_DIR": str(work / "gradio")}
    command = [sys.executable, str(ROOT / "app.py"), "--server_port", "0", "--offline", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--model", "demo"], env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        found = _address_in(process)
        _wait_until_ready(found)
        yield found
    finally:
        process.terminate()
        process.wait(20)


def _address_in(process: subprocess.Popen[str]) -> str:
    """Read what the app prints until it says where it is; go on reading, so that its pipe never fills."""
    lines: Queue[str] = Queue()
    assert process.stdout is not None
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    said = []
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and (process.poll() is None or not lines.empty()):
        try:
            said.append(lines.get(timeout=1))
        except Empty:
            continue
        if "http://" in said[-1]:
            return "http://" + said[-1].split("http://")[1].split()[0]
    raise AssertionError("the app did not start:\n" + "".join(said))


def _pass_on(stream: IO[str], lines: Queue[str]) -> None:
    with stream:
        for line in stream:
            lines.put(line)


def _wait_until_ready(found: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{found}/health", timeout=10) as answer:
            health = json.load(answer)
        if health["phase"] == "ready":
            return
        assert health["phase"] != "failed", health["message"]
        time.sleep(0.2)
    raise AssertionError(f"the model was not ready within {START_LIMIT_S} s")


@pytest.fixture(scope="session")
def spoken_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fake microphone hears: the first sentence of the English example, then silence."""
    samples, rate = soundfile.read(ROOT / "examples" / "english.flac", dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    heard = np.concatenate([samples[: round(3.3 * rate)], np.zeros(30 * rate, np.float32)])
    soundfile.write(path, heard, rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="package")
def chromium(spoken_wav: Path) -> Iterator[Any]:
    """One browser for all tests. Without one they are skipped, except in CI, where they must run.

    It ends with this package: while Playwright runs, no other test of the same process could start an event loop.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _miss("NO PLAYWRIGHT: the browser tests did not run (pip install --group dev)")
    with sync_playwright() as started:
        program = _find_chromium(started)
        if program is None:
            _miss("NO CHROMIUM: the browser tests did not run (apt install chromium, or playwright install chromium)")
        browser = started.chromium.launch(
            executable_path=program,
            args=[
                "--no-sandbox",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={spoken_wav}%noloop",
                f"--host-resolver-rules=MAP {OTHER_HOST} 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


def _miss(sentence: str) -> NoReturn:
    """CI must run them; elsewhere the reason is said aloud."""
    if os.environ.get("CI"):
        pytest.fail(sentence)
    pytest.skip(sentence)


def _find_chromium(started: Any) -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    own = started.chromium.executable_path
    return next(filter(None, map(shutil.which, names)), own if Path(own).exists() else None)


@pytest.fixture
def expects_complaints() -> bool:
    """Ask for this fixture where the browser must complain (a recording it cannot play)."""
    return True


@pytest.fixture(scope="package")
def visitor(chromium: Any) -> Iterator[Any]:
    """A browser's profile that most tests share: its cache spares each page most of its fetching and compiling."""
    context = chromium.new_context(permissions=PERMISSIONS)
    yield context
    context.close()


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any, visitor: Any, address: str, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """Opens pages with the model ready; closes them, and fails if the console complained. Options of Playwright's
    new_context make a profile of the page's own."""
    opened, complaints = [], []

    def listen(message: Any) -> None:
        if message.type == "error":
            complaints.append(message.text)

    def open_one(width: int = 1280, height: int = 900, url: str = address, **options: Any) -> Any:
        context = chromium.new_context(**{"permissions": PERMISSIONS, **options}) if options else visitor
        page = context.new_page()
        opened.append(context if options else page)
        page.set_viewport_size({"width": width, "height": height})
        page.set_default_timeout(WORK_LIMIT_MS)
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#memory-panel .pill:visible")
        page.wait_for_selector("#player #duration:not(:text('0:00'))")
        return page

    yield open_one
    for one in opened:
        one.close()
    if "expects_complaints" not in request.fixturenames:
        assert complaints == []


@pytest.fixture
def page(open_page: OpenPage) -> Any:
    """A page of 1280 by 900."""
    return open_page()
