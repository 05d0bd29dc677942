"""README, CHANGELOG and LOG against the code. `python -m tests.unit.test_docs` rewrites README's tables.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` and is made from the code's own tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import app
import cli
from model_loader.device import DeviceInfo
from model_loader.plan import matrix_table
from model_loader.precision import PRECISIONS, Precision
from settings import Settings, setting_docs, with_dashes
from tests.repository import ROOT, project_files
from transcription.formats import FORMATS
from ui.blocks import TABS
from ui.texts import TEXTS

README = ROOT / "README.md"
CAPABILITIES = [
    (5, 0),
    (5, 2),
    (5, 3),
    (6, 0),
    (6, 1),
    (7, 0),
    (7, 5),
    (8, 0),
    (8, 6),
    (8, 9),
    (9, 0),
    (10, 0),
    (12, 0),
]
"""CUDA compute capabilities, oldest first."""

# --- tables ---------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def precisions_table() -> str:
    def cells(row: Precision) -> list[str]:
        aliases = f" ({', '.join(row.aliases)})" if row.aliases else ""
        return [
            code(row.name) + aliases,
            row.description,
            f"{row.bytes_per_weight:g}",
            "no" if row.unavailable(device("cpu", None)) else "yes",
            oldest_gpu(row),
            row.engine(),
        ]

    head = ["precision (aliases)", "how it stores and computes", "bytes", "CPU", "GPU, compute capability", "engine"]
    return table(head, map(cells, PRECISIONS.values()))


def device(kind: str, capability: tuple[int, int] | None) -> DeviceInfo:
    return DeviceInfo(kind=kind, index=0, name="a GPU", capability=capability, total_bytes=2**40, n_cores=8)


def oldest_gpu(row: Precision) -> str:
    usable = [number for number in CAPABILITIES if not row.unavailable(device("cuda", number))]
    if not usable:
        return "no"
    return "any" if usable == CAPABILITIES else f"{usable[0][0]}.{usable[0][1]} or newer"


def formats_table() -> str:
    rows = ([code(row.name), first_line(row.render), code(row.mime)] for row in FORMATS.values())
    return table(["format", "what is in it", "type"], rows)


def first_line(thing: object) -> str:
    doc = inspect.getdoc(thing)
    assert doc, f"{thing} has no docstring"
    return doc.splitlines()[0]


def settings_table() -> str:
    docs = setting_docs()
    rows = []
    for name, field in Settings.__dataclass_fields__.items():
        default = {"True": "yes", "False": "no", "None": ""}.get(str(field.default), str(field.default))
        shown = code(default) if default else ""
        rows.append([code("--" + name.replace("_", "-")), code(f"SOTTO_{name.upper()}"), shown, docs[name]])
    return table(["option", "variable", "default", "meaning"], rows)


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def commands_table() -> str:
    return table(["command", "what it does"], ([code(name), row.description or ""] for name, row in commands().items()))


def tabs_table() -> str:
    rows = ([TEXTS[tab.label][0], tab_purpose(tab.build)] for tab in TABS)
    return table(["tab", "what it is for"], rows)


def tab_purpose(build: Callable[..., object]) -> str:
    text = first_line(importlib.import_module(build.__module__))
    purpose = text.partition(": ")[2]
    return purpose[:1].upper() + purpose[1:]


def gpus_table() -> str:
    head, *rows = matrix_table()
    return table(head, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "tabs": tabs_table,
    "precisions": precisions_table,
    "gpus": gpus_table,
    "formats": formats_table,
    "settings": settings_table,
}


def with_blocks(text: str) -> str:
    """README's text with every table made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        assert begin in text and end in text, f"README has no place for the table '{name}'"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


# --- reading README -------------------------------------------------------------------------------


def sessions() -> list[tuple[str, str]]:
    """(command, output shown) of every `$ ` line in README's console blocks."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", README.read_text(encoding="utf-8"), re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def app_arguments() -> list[str]:
    """What README's lines give to app.py."""
    lines = [command for command, _ in sessions()]
    return [line.partition("./start.sh")[2].strip() for line in lines if "./start.sh" in line]


@pytest.fixture
def run_app(monkeypatch, capsys):
    """app.py's own call in this process, from the top folder: (exit code, standard output, standard error)."""
    monkeypatch.setenv("SOTTO_DEVICE", "cpu")
    monkeypatch.setenv("SOTTO_OFFLINE", "1")
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments, serve=app.serve, examples=app.EXAMPLES)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_readme_table_equals_the_code(name):
    text = README.read_text(encoding="utf-8")
    written = text.partition(f"<!-- begin: {name} -->\n")[2].partition(f"\n<!-- end: {name} -->")[0]
    assert written == BLOCKS[name](), "behind the code; run: python -m tests.unit.test_docs"


def test_readme_tree_names_every_folder_and_file_at_the_top():
    tree = re.search(r"```\n(app\.py .*?)```", README.read_text(encoding="utf-8"), re.S)
    assert tree
    named = {line.split()[0].rstrip("/") for line in tree[1].splitlines() if line.strip()}
    there = {path.parts[0] for path in project_files() if not path.parts[0].startswith(".")}
    assert named == there - {"README.md", "LICENSE"}


@pytest.mark.parametrize("line", app_arguments())
def test_readme_command_is_accepted_by_the_parser(line):
    arguments = cli.build_parser().parse_args(with_dashes(shlex.split(line)))
    Settings().with_arguments(arguments)


@pytest.mark.parametrize("command", commands())
def test_command_explains_itself(run_app, command):
    status, out, err = run_app(command, "--help")
    assert status == 0, err
    assert f"./start.sh {command}" in out


@pytest.mark.parametrize(("line", "output"), [(line, output) for line, output in sessions() if output.strip()])
def test_readme_session_prints_what_readme_shows(run_app, line, output):
    status, out, err = run_app(*shlex.split(line.removeprefix("./start.sh ")))
    assert status == 0, err
    assert out == output


def test_readme_shows_a_transcript():
    """Else the test above could run over nothing."""
    assert [line for line, output in sessions() if output.strip() and "transcribe examples/" in line]


def test_readme_modules_and_scripts_exist():
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / (name.replace(".", "/") + ".py")).is_file(), name
    for name in set(re.findall(r"\./(\w+\.sh)", text)):
        assert os.access(ROOT / name, os.X_OK), name


def test_readme_lists_every_benchmark():
    runnable = [p for p in project_files() if p.parts[0] == "benchmarks" and p.suffix == ".py" and is_runnable(p)]
    text = README.read_text(encoding="utf-8")
    assert runnable
    assert not [path.stem for path in runnable if f"`python -m benchmarks.{path.stem}`" not in text]


def test_readme_gives_the_command_of_every_experiment():
    scripts = [p for p in project_files() if p.parts[0] == "examples" and p.suffix == ".py" and is_runnable(p)]
    text = README.read_text(encoding="utf-8")
    missing = {path.name for path in scripts if f"`python examples/{path.name}`" not in text}
    assert len(scripts) > len(missing) and missing == {"transcribe_file.py"}, "which the text links to"


def is_runnable(path: Path) -> bool:
    return '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")


def test_readme_links_and_named_files_exist():
    text = README.read_text(encoding="utf-8")
    linked = [name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name]
    folders = {path.parts[0] for path in project_files() if len(path.parts) > 1}
    named = [name for name in re.findall(r"`([\w./]+/[\w./]*)`", text) if name.split("/")[0] in folders]
    assert linked and named
    assert not [name for name in linked + named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", ["README.md", "LOG.md", "CHANGELOG.md"])
def test_page_names_only_settings_that_exist(page):
    variables = set(re.findall(r"\bSOTTO_[A-Z_]*[A-Z]\b", (ROOT / page).read_text(encoding="utf-8")))
    assert variables <= {f"SOTTO_{name.upper()}" for name in Settings.__dataclass_fields__} | {"SOTTO_TEST_AUDIO"}


@pytest.mark.parametrize("page", ["README.md", "LOG.md", "CHANGELOG.md"])
def test_page_is_finished(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:TBD|TODO|FIXME|XXX)\b|lorem ipsum", text)


def test_readme_docker_arguments_exist():
    named = set(re.findall(r"--build-arg (\w+)", README.read_text(encoding="utf-8")))
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.M))
    assert named and named <= declared


def test_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= allowed


def test_log_is_dated_newest_first():
    heads = re.findall(r"^## (.*)$", (ROOT / "LOG.md").read_text(encoding="utf-8"), re.M)
    days = [datetime.date.fromisoformat(head) for head in heads]
    assert days and days == sorted(set(days), reverse=True)


if __name__ == "__main__":
    README.write_text(with_blocks(README.read_text(encoding="utf-8")), encoding="utf-8")
