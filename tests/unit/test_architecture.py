"""The arrows between the folders, and the rules of style a program can see. The list here is the list DESIGN speaks of.

Read from the syntax trees of all files, imported or not. Imports inside functions count as arrows. So do imports for
types alone, but by folder only: what a value is called is no dependency on the module that makes it.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.repository import ROOT, project_files

ARROWS: dict[str, set[str]] = {
    "app": {"cli", "terminal", "ui", "serving", "jobs", "transcription", "model_loader", "audio", "settings"},
    "cli": {
        "terminal",
        "planning",
        "calibrating",
        "ui",
        "serving",
        "jobs",
        "transcription",
        "model_loader",
        "audio",
        "settings",
    },
    "calibrating": {"terminal", "transcription"},
    "planning": {"terminal", "model_loader", "settings"},
    "terminal": {"transcription", "model_loader", "settings"},
    "ui": {"jobs", "transcription", "model_loader.precision", "model_loader.memory"},
    "serving": {"jobs", "transcription", "model_loader.precision", "settings"},
    "jobs": {"transcription"},
    "transcription": {"audio", "model_loader"},
    "audio": set(),
    "model_loader": set(),
    "settings": set(),
    "errors": set(),
    "startup": set(),
    "benchmarks": {"transcription", "model_loader", "audio"},
    "training": {"audio", "model_loader", "transcription.tokenizer"},
    "examples": {"transcription", "model_loader", "audio"},
}
"""Who may import whom; everyone may import itself, errors and startup."""

PACKAGES = ("audio", "model_loader", "transcription", "jobs", "ui", "serving")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
WORKPLACE = ("/wor" + "k/", "/far" + "m/", ".librar" + "y/", "device machin" + "e")
"""Where this is written is nobody's business: the project must run anywhere."""


@cache
def source_files() -> tuple[Path, ...]:
    """Python files that are the product: all but tests."""
    return tuple(path for path in project_files() if path.suffix == ".py" and path.parts[0] != "tests")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in source_files()}


@cache
def imported_modules(path: Path) -> tuple[tuple[str, bool], ...]:
    """(module of ours, only for types) of every import in the file, deepest module that exists."""
    return tuple(_imported_modules(path))


def _imported_modules(path: Path) -> Iterator[tuple[str, bool]]:
    for_types = {
        id(inner)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the name from the top"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ARROWS:
                yield name, id(node) in for_types


def is_allowed(importer: str, imported: str, *, for_types: bool = False) -> bool:
    home, target = importer.split(".")[0], imported.split(".")[0]
    if target in (home, "errors", "startup"):
        return True
    if for_types:
        return any(arrow.split(".")[0] == target for arrow in ARROWS[home])
    return any(imported == arrow or imported.startswith(f"{arrow}.") for arrow in ARROWS[home])


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(path: Path, name: str) -> Iterator[int]:
    """Lines where the plain function `name` is called."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node.lineno


def test_every_source_file_has_a_place_in_the_arrows():
    homeless = [str(path) for path in source_files() if module_name(path).split(".")[0] not in ARROWS]
    assert not homeless


def test_imports_follow_the_arrows():
    wrong = [
        f"{path} imports {name}"
        for path in source_files()
        for name, for_types in imported_modules(path)
        if not is_allowed(module_name(path), name, for_types=for_types)
    ]
    assert not wrong


@pytest.mark.parametrize("top", ["app", "cli", "ui", "serving", "benchmarks", "training"])
def test_nothing_below_imports_the_top(top):
    composers = {"app", "cli"}  # they put ui and serving together
    wrong = [
        str(path)
        for path in source_files()
        for name, _ in imported_modules(path)
        if name.split(".")[0] == top and module_name(path).split(".")[0] not in composers | {top}
    ]
    assert not wrong


def test_modules_do_not_import_in_circles():
    """Imports inside functions count: they would only hide the knot. Imports for types alone load nothing."""
    graph = {
        module_name(path): {name for name, for_types in imported_modules(path) if not for_types}
        for path in source_files()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_detectors_find_what_they_look_for(tmp_path, monkeypatch):
    """A rule that sees nothing passes too; each detector is shown one offender."""
    offender = tmp_path / "audio.py"
    lines = ["import ui.blocks", "from transcription.pipeline import X", "def f():", *["    print(1)"] * 61]
    offender.write_text("\n".join(lines))
    assert not is_allowed("audio", "ui.blocks") and not is_allowed("ui.page", "model_loader.pool")
    assert is_allowed("ui.page", "model_loader.pool", for_types=True) and not is_allowed("audio", "ui", for_types=True)
    assert is_allowed("ui.page", "model_loader.memory") and is_allowed("audio.vad", "errors")
    assert [name for name, _ in imported_modules(offender)] == ["ui.blocks", "transcription.pipeline"]
    assert len(list(calls(offender, "print"))) == 61
    assert too_long(offender) == [f"{offender}:3 f has 62 lines"]


def too_long(path: Path) -> list[str]:
    return [
        f"{path}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_functions_fit_on_a_screen():
    assert not [line for path in source_files() for line in too_long(path)]


def test_files_hold_one_idea():
    counts = {
        path: len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in project_files()
        if path.suffix == ".py"
    }
    assert not {str(path): count for path, count in counts.items() if count > MAX_FILE_LINES}


def test_every_source_file_says_what_it_is_for():
    silent = [
        str(path) for path in source_files() if path.name != "__init__.py" and not ast.get_docstring(tree_of(path))
    ]
    assert not silent


def test_packages_do_not_print():
    assert not [f"{path}:{n}" for path in source_files() if path.parts[0] in PACKAGES for n in calls(path, "print")]


def environment_reads(path: Path) -> Iterator[str]:
    """Lines that read a variable. Setting one (`os.environ[NAME] = value`) is no reading."""
    for line in _text(path).splitlines():
        if re.search(r"getenv|environ\.get|in os\.environ|environ\[[^]]+\](?! = )", line):
            yield f"{path}: {line.strip()}"


def test_only_settings_reads_the_environment():
    drivers_own = "CUDA_VISIBLE_DEVICES"  # not a setting of ours; a sentence about a missing GPU quotes it
    product = [path for path in source_files() if path.parts[0] in (*PACKAGES, "app.py", "cli.py", "terminal.py")]
    assert not [line for path in product for line in environment_reads(path) if drivers_own not in line]
    assert list(environment_reads(Path("settings.py")))


def test_only_audio_starts_other_programs():
    wrong = [
        str(path)
        for path in source_files()
        if path.parts[0] in PACKAGES
        and path.parts[0] != "audio"
        and re.search(r"^\s*import subprocess", _text(path), re.M)
    ]
    assert not wrong


def _text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_no_file_names_the_place_it_was_written_in():
    wrong = []
    for path in project_files():
        try:
            text = _text(path)
        except UnicodeDecodeError:
            continue  # sound, weights, pictures
        wrong += [f"{path}: {word}" for word in WORKPLACE if word in text]
    assert not wrong
