"""The Dockerfile's steps as far as they can be judged without Docker: files, user, settings, entry point, health check.

The image's /app is built in a folder by the file's own COPY lines, .dockerignore applied, and started there.
"""

from __future__ import annotations

import fnmatch
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest

from settings import Settings
from tests.repository import ROOT, project_files

IMAGE_PYTHON = "/app/.venv/bin/python"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def rests(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in rests("ENV") for pair in shlex.split(rest))


def is_ignored(path: Path) -> bool:
    """Whether .dockerignore keeps the file, or a folder it is in, out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert not [line for line in patterns if line.startswith("!")], "this reader knows no exceptions"
    for part in (path, *path.parents):
        for pattern in patterns:
            anywhere = pattern.removeprefix("**/")
            if anywhere != pattern and fnmatch.fnmatchcase(part.name, anywhere):
                return True
            if len(part.parts) == len(PurePosixPath(pattern).parts) and fnmatch.fnmatchcase(part.as_posix(), pattern):
                return True
    return False


def copied_files() -> set[Path]:
    """What COPY brings into the image, relative to the repository."""
    files: set[Path] = set()
    for rest in rests("COPY"):
        *sources, _target = shlex.split(rest)
        for source in sources:
            chosen = {
                path
                for path in project_files()
                if source == "." or path == Path(source) or Path(source) in path.parents
            }
            assert chosen, f"COPY {source}: there is no such file"
            assert source == "." or not any(map(is_ignored, chosen)), f"COPY {source}: .dockerignore keeps it out"
            files |= {path for path in chosen if not is_ignored(path)}
    return files


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what /app would hold."""
    folder = tmp_path_factory.mktemp("app")
    for path in copied_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def test_base_image_is_pinned_to_a_python_that_start_accepts():
    (base,) = rests("FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)
    assert version, f"{base} is not pinned to a patch release"
    check = subprocess.run(["bash", "-c", f"source '{ROOT}/start.sh'; is_fit_version {version[1]}"])
    assert check.returncode == 0


def test_image_holds_the_product_and_none_of_the_workshop():
    files = copied_files()
    tops = {path.parts[0] for path in files}
    assert {"app.py", "settings.py", "audio", "model_loader", "transcription", "ui", "models", "examples"} <= tops
    assert not tops & {".git", ".venv", "tests", "training", "Dockerfile"}
    assert not [path for path in files if path.suffix == ".pyc"]


def test_ignore_patterns_hit_what_they_name():
    for name in (".git/HEAD", ".venv/bin/python", "tests/unit/test_docker.py", "ui/__pycache__/blocks.cpython-312.pyc"):
        assert is_ignored(Path(name)), name
    for name in ("app.py", "models/demo/config.json", "ui/tabs/transcribe.py"):
        assert not is_ignored(Path(name)), name


def test_runs_as_a_user_of_its_own_who_may_write_to_the_volumes():
    (user,) = rests("USER")
    assert user not in ("root", "0")
    made = " ".join(rests("RUN"))
    assert f"--uid 10001 {user}" in made
    assert f"install -d -o {user} -g {user} {' '.join(json.loads(rests('VOLUME')[0]))}" in made
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))


def test_environment_names_settings_that_exist_and_are_accepted():
    names = {name.removeprefix("SOTTO_").lower() for name in environment() if name.startswith("SOTTO_")}
    assert names <= set(Settings.__dataclass_fields__)
    settings = Settings.from_env(environment())
    assert settings.server_name == "0.0.0.0"
    assert rests("EXPOSE") == [str(settings.server_port)]
    assert json.loads(rests("VOLUME")[0]) == [str(settings.cache_dir), str(settings.work_dir)]


def test_run_steps_are_valid_shell_and_call_functions_of_start_sh():
    for step in rests("RUN"):
        assert subprocess.run(["sh", "-nc", step], capture_output=True).returncode == 0, step
    (install,) = [step for step in rests("RUN") if "start.sh" in step]
    called = re.search(r'&& (\w+) "\$BUILD"', install)
    assert called
    known = subprocess.run(["bash", "-c", f"source '{ROOT}/start.sh' && declare -F {called[1]}"], capture_output=True)
    assert known.returncode == 0


def test_entry_point_runs_on_the_image_files_alone(image, tmp_path):
    (entry,) = rests("ENTRYPOINT")
    command = [
        {IMAGE_PYTHON: sys.executable}.get(word, word.replace("/app/", f"{image}/")) for word in json.loads(entry)
    ]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment(), "SOTTO_WORK_DIR": str(tmp_path)}
    result = subprocess.run([*command, "--help"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "transcribe" in result.stdout


@contextmanager
def server(status: int) -> Iterator[int]:
    """A web server that answers /health with that status; yields its port."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield listener.server_port
        finally:
            listener.shutdown()
            thread.join()


def check_health(port: int) -> int:
    (rest,) = rests("HEALTHCHECK")
    command = json.loads(rest[rest.index("[") :])
    assert command[0] == IMAGE_PYTHON
    environ = {"SOTTO_SERVER_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, *command[1:]], env=environ, capture_output=True).returncode


def test_health_check_tells_a_serving_app_from_a_failing_and_an_absent_one():
    with server(200) as port:
        assert check_health(port) == 0
    with server(503) as failing:
        assert check_health(failing) != 0
    assert check_health(port) != 0  # nobody listens there any more


def test_health_check_asks_a_route_the_app_has():
    assert '"/health"' in (ROOT / "app.py").read_text()
