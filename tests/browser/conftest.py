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
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, NoReturn

import numpy as np
import pytest
import soundfile

from tests.browser.steps import open_tab, use_example
from tests.conftest import ROOT

START_LIMIT_S = 120
WORK_LIMIT_MS = 60_000
"""Longest wait for a piece of work on two slow cores."""
PERMISSIONS = ["clipboard-read", "clipboard-write", "microphone"]
SHORT_EXAMPLES = ("english.flac", "french.flac", "german.flac")
OTHER_HOST = "sotto.test"
"""A name that the test browser finds on this machine, and that is no secure origin."""
FEW_FRAMES_JS = """
window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 150);
window.cancelAnimationFrame = clearTimeout;
"""
"""Gradio asks for the next frame for as long as a page lives, sixty times a second (a timer that it never stops): up to
a third of a processor for each page, which the tests need otherwise."""


@pytest.fixture(scope="package")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """app.py as it is beside links to all else, except for the examples: a few, each of them one sentence."""
    folder = tmp_path_factory.mktemp("program")
    for one in ROOT.iterdir():
        if one.name not in ("app.py", "examples") and not one.name.startswith("."):
            (folder / one.name).symlink_to(one)
    shutil.copy(ROOT / "app.py", folder)
    (folder / "examples").mkdir()
    short = [_first_sentence(entry, folder / "examples") for entry in _examples() if entry["file"] in SHORT_EXAMPLES]
    (folder / "examples" / "manifest.json").write_text(json.dumps(short), encoding="utf-8")
    return folder


def _examples() -> list[dict[str, Any]]:
    return json.loads((ROOT / "examples" / "manifest.json").read_text(encoding="utf-8"))


def _first_sentence(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    sentence = entry["sentences"][0]
    samples, rate = soundfile.read(ROOT / "examples" / entry["file"], dtype="float32")
    samples = samples[: round((sentence["end_s"] + 0.3) * rate)]
    soundfile.write(folder / entry["file"], samples, rate)
    return {**entry, "text": sentence["text"], "sentences": [sentence], "seconds": samples.size / rate}


@pytest.fixture(scope="package")
def manifest(program: Path) -> list[dict[str, Any]]:
    """The example recordings, in the order of their buttons."""
    return json.loads((program / "examples" / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="package")
def longest() -> dict[str, Any]:
    """The longest recording of examples/, which is no example of the program that the tests look at."""
    return max(_examples(), key=lambda entry: entry["seconds"])


@pytest.fixture(scope="package")
def address(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python app.py --offline` on a free port, once its model is ready."""
    work = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "SOTTO_WORK_DIR": str(work), "GRADIO_TEMP_DIR": str(work / "gradio")}
    command = [sys.executable, str(program / "app.py"), "--server_port", "0", "--offline", "--device", "cpu"]
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
                "--disable-gpu",
                "--disable-dev-shm-usage",
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


class Visits:
    """Opens pages with the model ready, and notes what the console says against them."""

    def __init__(self, browser: Any, address: str) -> None:
        self._browser, self._address = browser, address
        self._shared: Any = None
        self.complaints: list[str] = []
        self.first_sight: dict[str, str] = {}
        """What the shared page showed when it had just been opened, by selector."""

    def open(self, url: str = "", **options: Any) -> Any:
        """A page in a profile of its own, with options of Playwright's new_context."""
        context = self._browser.new_context(**{"permissions": PERMISSIONS, "reduced_motion": "reduce", **options})
        context.add_init_script(FEW_FRAMES_JS)
        page = context.new_page()
        page.set_default_timeout(WORK_LIMIT_MS)
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url or self._address)
        page.wait_for_selector("#memory-panel .pill:visible")
        page.wait_for_selector("#player #duration:not(:text('0:00'))")
        return page

    def shared(self) -> Any:
        """The one page that most tests use: a load of Gradio's page costs seconds."""
        if self._shared is None:
            self._shared = self.open()
            shown = ("#recording-current", "#player #duration")
            self.first_sight = {selector: self._shared.inner_text(selector) for selector in shown}
        return self._shared

    def forget(self) -> None:
        """The next test gets a new shared page, whatever this one is still doing."""
        if self._shared is not None:
            self._shared.context.close()
        self._shared = None

    def _listen(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture(scope="package")
def all_visits(chromium: Any, address: str) -> Visits:
    return Visits(chromium, address)


@pytest.fixture
def visits(all_visits: Visits, request: pytest.FixtureRequest) -> Iterator[Visits]:
    """Fails if the console complained during the test. After a failure the next test gets a new page."""
    n_failed = request.session.testsfailed
    yield all_visits
    complaints = all_visits.complaints.copy()
    all_visits.complaints.clear()
    if request.session.testsfailed > n_failed:
        all_visits.forget()
    elif "expects_complaints" not in request.fixturenames:
        assert complaints == []


@pytest.fixture
def page(visits: Visits, manifest: list[dict[str, Any]]) -> Any:
    """The shared page at 1280 by 900, with Transcribe open and the first example chosen."""
    page = visits.shared()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    open_tab(page, "transcribe")
    use_example(page, manifest[0])
    return page
