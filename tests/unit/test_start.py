"""start.sh on small repositories of its own: a real .venv, real pip, a tiny local package instead of the network.

Where only start.sh's decisions are looked at, a stand-in takes pip's place: pip takes a second each time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

APP = "import json, os, sys, tiny\nprint(json.dumps([sys.argv[1:], os.getcwd(), tiny.VERSION]))\n"
PIP_NOISE = ("Collecting", "Processing", "Installing collected", "Successfully", "WARNING", "[notice]")


@dataclass
class Clone:
    """A folder with start.sh, a requirement that pip finds in wheels/, and an app.py that tells what it was given."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "start.sh"), *arguments],
            cwd=cwd or self.folder,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def call(self, line: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """One line of bash with start.sh's functions at hand."""
        return subprocess.run(
            ["bash", "-c", f"source '{self.folder}/start.sh'; {line}"],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # the tests' may be ignored
        )

    def require(self, version: str) -> None:
        (self.folder / "requirements.txt").write_text(f"tiny=={version}  # says its version\n")

    @property
    def log(self) -> str:
        return (self.folder / ".venv" / "install.log").read_text()


def write_wheel(folder: Path, name: str, version: str) -> None:
    """The smallest package pip installs: one module, three lines of metadata."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "".join(f"{info}/{file},,\n" for file in ("METADATA", "WHEEL", "RECORD")))


def make_clone(folder: Path, root: Path) -> Clone:
    folder.mkdir()
    wheels = folder.parent / "wheels"  # pip splits the list of link folders at spaces
    wheels.mkdir()
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("torch", "1.0")):
        write_wheel(wheels, name, version)
    shutil.copy(root / "start.sh", folder)
    (folder / "app.py").write_text(APP)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "https_proxy": "http://127.0.0.1:9",  # nothing is asked of the network
    }
    clone = Clone(folder, environ)
    clone.require("1.0")
    return clone


@pytest.fixture
def clone(tmp_path: Path, root: Path) -> Clone:
    return make_clone(tmp_path / "a folder", root)


PIP = """import os, pathlib, re, sys, sysconfig, zipfile
print("pip", *sys.argv[1:])
words = sys.argv[1:]
if "-r" in words:
    words += [line.split("#")[0].strip() for line in open(words[words.index("-r") + 1])]
for name, version in (word.split("==") for word in words if "==" in word):
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    wheel = pathlib.Path(os.environ["PIP_FIND_LINKS"], f"{name}-{version}-py3-none-any.whl")
    if not wheel.exists():
        sys.exit(f"ERROR: No matching distribution found for {name}=={version}")
    for compiled in [*site.glob(f"__pycache__/{name}*"), *site.glob(f"{name}/__pycache__/*")]:
        compiled.unlink()  # Python cannot tell a file from one of the same size that is less than a second older
    zipfile.ZipFile(wheel).extractall(site)
"""
"""Says what it is asked, and lays wheels out, whatever was there."""


def broken_off(clone: Clone, started: Clone, *left_out: str) -> Clone:
    """Give the clone an environment as after a start that broke off before the packages."""
    names = shutil.ignore_patterns("tiny*", ".installed", "install.log", *left_out)
    shutil.copytree(
        started.folder / ".venv", clone.folder / ".venv", symlinks=True, ignore=names, copy_function=os.link
    )
    return clone


@pytest.fixture
def with_pip(clone: Clone, started: tuple[Clone, subprocess.CompletedProcess[str]]) -> Clone:
    """A clone whose start broke off before the packages: Python and pip are there, nothing else."""
    return broken_off(clone, started[0])


@pytest.fixture
def with_fake_pip(clone: Clone, started: tuple[Clone, subprocess.CompletedProcess[str]]) -> Clone:
    """The same with PIP instead of pip."""
    broken_off(clone, started[0], "pip", "pip-*", "setuptools*", "pkg_resources")
    (site,) = (clone.folder / ".venv").glob("lib/python3.*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(PIP)
    return clone


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Clone, subprocess.CompletedProcess[str]]:
    """A clone after its first start, and what that start said."""
    clone = make_clone(tmp_path_factory.mktemp("start") / "a folder", root)
    return clone, clone.start("transcribe", "two words.wav")


def fake_command(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_first_start_installs_and_hands_all_arguments_to_app(started):
    clone, result = started
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [["transcribe", "two words.wav"], str(clone.folder), "1.0"]


def test_first_start_says_one_line_per_step_and_nothing_of_pip(started):
    _, result = started
    steps = [line for line in result.stderr.splitlines() if " ... " in line]
    assert [line.split(" ... ")[1][-2:] for line in steps] == [" s", " s", " s"]
    assert not [word for word in PIP_NOISE if word in result.stderr]


def test_second_start_installs_nothing_and_is_quick(started):
    clone, _ = started
    before = clone.log
    began = time.monotonic()
    result = clone.start()
    seconds = time.monotonic() - began
    assert result.returncode == 0 and clone.log == before
    assert len(result.stderr.splitlines()) == 1
    assert seconds < 1.0 + float(os.getloadavg()[0])  # 0.04 s on an idle machine; a busy one gets time


def test_file_arguments_stay_relative_to_the_callers_folder(started, tmp_path):
    clone, _ = started
    result = clone.start("transcribe", "talk.wav", cwd=tmp_path)
    assert json.loads(result.stdout)[1] == str(tmp_path)


def test_starts_through_a_link(started, tmp_path):
    clone, _ = started
    link = tmp_path / "sotto"
    link.symlink_to(clone.folder / "start.sh")
    result = subprocess.run([str(link), "detect"], cwd=tmp_path, env=clone.environ, capture_output=True, text=True)
    assert json.loads(result.stdout)[:2] == [["detect"], str(tmp_path)], result.stderr


def test_packages_of_another_python_do_not_stand_in(started, tmp_path):
    clone, _ = started
    (tmp_path / "tiny.py").write_text("VERSION = 'foreign'\n")
    assert json.loads(clone.start(PYTHONPATH=str(tmp_path)).stdout)[2] == "1.0"


def test_changed_requirements_are_installed(with_fake_pip):
    clone = with_fake_pip
    for version in ("1.0", "2.0", "1.0"):
        clone.require(version)
        assert json.loads(clone.start().stdout)[2] == version


def test_broken_environment_is_made_anew(with_fake_pip, tmp_path):
    clone = with_fake_pip
    good = (clone.folder / ".venv").rename(tmp_path / "good")  # what `python -m venv` gives, in a hundredth of its time
    copying = f'cp -R "{good}/." "{clone.folder}/.venv"'
    fake_command(
        tmp_path / "bin", "python3", f'case "$*" in *"-m venv"*) {copying} ;; *) exec {sys.executable} "$@" ;; esac'
    )
    (clone.folder / ".venv" / "bin").mkdir(parents=True)
    (clone.folder / ".venv" / "bin" / "python").symlink_to("/gone/python3.9")
    result = clone.start(PYTHON=str(tmp_path / "bin" / "python3"))
    assert result.returncode == 0, result.stderr
    assert ".venv is incomplete and is made anew" in result.stderr
    assert json.loads(result.stdout)[2] == "1.0"


def test_failed_installation_is_a_sentence_within_seconds_and_the_next_start_goes_on(with_pip):
    clone = with_pip
    began = time.monotonic()
    result = clone.start(PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert time.monotonic() - began < 60
    assert result.returncode == 1 and not result.stdout
    assert "the packages could not be had. Is there a network?" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(clone.start().stdout)[2] == "1.0"


def test_no_python_is_a_sentence(clone, tmp_path):
    tools = tmp_path / "tools"
    for name in ("dirname", "uname", "cksum", "cat", "mkdir", "bash", "readlink"):
        fake_command(tools, name, f'exec {shutil.which(name)} "$@"')
    result = clone.start(PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed; found none." in result.stderr


def test_old_python_is_named_in_the_sentence(clone, tmp_path):
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        fake_command(tmp_path / "old", name, "echo 3.9")
    result = clone.start(PATH=f"{tmp_path / 'old'}:{os.environ['PATH']}", PYTHON="")
    assert result.returncode == 1
    assert "found Python 3.9." in result.stderr


def test_python_without_venv_names_the_package(clone, tmp_path):
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        fake_command(tmp_path / "bare", name, 'case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    result = clone.start(PATH=f"{tmp_path / 'bare'}:{os.environ['PATH']}", PYTHON="")
    assert result.returncode == 1
    assert "apt install python3.12-venv" in result.stderr


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk is full"),
        ("SSLError(SSLCertVerificationError(1, CERTIFICATE_VERIFY_FAILED))", "PIP_CERT"),
        ("ERROR: No matching distribution found for torch", "Is there a network?"),
        ("error: subprocess-exited-with-error", "lines above are the end of"),
    ],
)
def test_failure_is_explained_from_the_log(clone, log, sentence):
    (clone.folder / ".venv").mkdir()
    (clone.folder / ".venv" / "install.log").write_text(log + "\n")
    result = clone.call("explain_failure")
    assert result.returncode == 1
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("machine", "gpus", "build"),
    [
        ("Linux x86_64", "", "cpu"),
        ("Linux x86_64", "NVIDIA H200, 570.86", "default"),
        ("Linux aarch64", "", "default"),
        ("Darwin arm64", "", "default"),
    ],
)
def test_processor_build_only_where_it_exists_and_no_gpu_does(clone, tmp_path, machine, gpus, build):
    fake_command(tmp_path / "bin", "uname", f"echo '{machine}'")
    result = clone.call(f"wanted_build '{gpus}'", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert result.stdout.strip() == build


def test_environment_for_processors_is_redone_once_a_driver_is_there(with_fake_pip, tmp_path):
    """And where the other build cannot be had, the one that is there serves on."""
    clone = with_fake_pip
    (clone.folder / "requirements.txt").write_text("torch==1.0\ntiny==1.0\n")
    fake_command(tmp_path / "bare", "uname", "echo Linux x86_64")
    fake_command(tmp_path / "gpu", "nvidia-smi", "echo 'NVIDIA H200, 570.86.15'")
    without = {"PATH": f"{tmp_path / 'bare'}:{clone.environ['PATH']}"}
    with_gpu = {"PATH": f"{tmp_path / 'gpu'}:{without['PATH']}"}

    def asked() -> list[str]:
        return [line.partition("install ")[2] for line in clone.log.splitlines() if line.startswith("pip ")]

    def ends(*words: str) -> list[bool]:
        return [line.endswith(word) for line, word in zip(asked(), words, strict=True)]

    assert "PyTorch, build for processors ..." in clone.start(**without).stderr
    assert all(ends("--no-deps torch==1.0", "requirements.txt"))
    assert "could not be had; going on without" in clone.start(**with_gpu, PIP_FIND_LINKS="/nowhere").stderr
    assert "PyTorch ..." in clone.start(**with_gpu).stderr
    assert all(ends("", "", *2 * ["--force-reinstall torch==1.0"], "requirements.txt")), "in place of the other build"
    for environ in (with_gpu, without):  # the build with CUDA serves a machine without a GPU as well
        assert len(clone.start(**environ).stderr.splitlines()) == 1


@pytest.fixture
def gpu_path(started, tmp_path):
    """A PATH with a driver that lists a GPU, for a clone whose environment suits it."""
    clone, _ = started
    fake_command(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H200, 570.86.15'")
    stamp = clone.folder / ".venv" / ".installed"
    before = stamp.read_text()
    stamp.write_text(before.replace(" cpu", " default"))
    yield f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    stamp.write_text(before)


def test_driver_that_lists_a_gpu_is_named_but_not_yet_called_working(started, gpu_path):
    result = started[0].start(PATH=gpu_path)
    assert "NVIDIA driver sees NVIDIA H200, 570.86.15" in result.stderr


def test_missing_compiler_is_said_where_a_gpu_would_need_it(started, gpu_path):
    clone, _ = started
    assert "apt install gcc python3-dev" in clone.start(PATH=gpu_path, CC="no-such-compiler").stderr
    assert "apt install gcc" not in clone.start(CC="no-such-compiler").stderr
    (compiler := clone.folder.parent / "cc").write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    header = clone.call("has_compiler; echo $?", CC=str(compiler)).stdout.strip()
    assert header == str(int(not Path(sysconfig.get_paths()["include"], "Python.h").exists()))


def test_stopping_the_script_ends_the_running_step_with_all_it_started(clone):
    beside = "begin /dev/null sleep 97.7"
    line = f"source '{clone.folder}/start.sh'; {beside}; step waiting /dev/null bash -c 'sleep 98.7; true'"
    process = subprocess.Popen(["bash", "-c", line], env=clone.environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.read(len("  waiting ..."))  # it has begun
    time.sleep(0.3)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 130
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 98.7" not in running and "sleep 97.7" not in running


def test_a_step_that_ended_beside_another_says_its_own_seconds_and_status(clone):
    beside = f"begin '{clone.folder}/log' bash -c 'echo 7 >\"{clone.folder}/ended\"; exit 3'; beside=$child"
    ends = f"step first /dev/null sleep 0.5; finish second $beside 2 '{clone.folder}/ended'; echo $?"
    result = clone.call(f"{beside}; {ends}; trap -p INT")
    assert "  second ... failed after 5 s" in result.stderr
    assert result.stdout == "3\n", "its status, and no trap is left"


def test_programs_of_a_step_can_be_interrupted(clone):
    """In a script's background SIGINT is ignored, and stays ignored in what the tests start and interrupt."""
    line = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    result = clone.call(f"step asking '{clone.folder}/log' '{sys.executable}' -c '{line}'")
    assert result.returncode == 0 and (clone.folder / "log").read_text() == "True\n"
