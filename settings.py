"""All settings in one frozen value: defaults, units, one line each. The only file that reads environment variables.

Order, last wins: the default below, Hugging Face's own variable where there is one, SOTTO_<NAME>, the command line.
`--help` and the README's table are made from the strings under the fields.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from errors import OptionError

Container = argparse.ArgumentParser | argparse._ArgumentGroup
LOG_LEVELS = ("debug", "info", "warning", "error")
ENGINES = ("auto", "fast", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one process. Raises OptionError for a value outside its range."""

    server_name: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    server_port: int = 7860
    """Port to listen on."""
    root_path: str = ""
    """Path under which a reverse proxy serves the page, for example /sotto."""
    ssl_certfile: Path | None = None
    """Certificate (PEM) for https; needs ssl_keyfile. Browsers allow a microphone only on https or localhost."""
    ssl_keyfile: Path | None = None
    """Private key (PEM) of ssl_certfile."""
    model: str = "auto"
    """Hub name (openai/whisper-large-v3), a checkpoint folder, demo, or auto: the best that can be had at once."""
    precision: str = "auto"
    """Name of a precision (`./start.sh precisions` lists them); auto: the most accurate one that fits."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    engine: str = "auto"
    """fast: the captured decoder step; reference: transformers' own generate; auto: fast where precision and checkpoint
    allow it."""
    batch_size: int = 0
    """Windows decoded together; 0 chooses for the device."""
    warm_up: bool = True
    """Decode one second of sound at start, so that the first request is as fast as the next."""
    offline: bool = False
    """Never contact the Hub; use what is on disk. (HF_HUB_OFFLINE)"""
    hf_token: str = field(default="", repr=False)
    """Access token for gated checkpoints on the Hub. (HF_TOKEN)"""
    hub_mirror: str = ""
    """Address of a mirror of the Hub. (HF_ENDPOINT)"""
    cache_dir: Path | None = None
    """Folder for downloaded checkpoints; not given: Hugging Face's own."""
    work_dir: Path = Path("~/.cache/sotto")
    """Folder for logs and results that outlive a request."""
    max_upload_mb: int = 2000
    """Largest recording accepted, in megabytes."""
    max_duration_h: float = 12.0
    """Longest recording accepted, in hours."""
    log_level: str = "info"
    """Detail of the log file: debug, info, warning or error."""

    def __post_init__(self) -> None:
        for name in ("cache_dir", "work_dir", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, Path(path).expanduser())
        _require(0 <= self.server_port <= 65535, f"--server-port is {self.server_port}; choose one from 0 to 65535.")
        _require(0 <= self.batch_size <= 256, f"--batch-size is {self.batch_size}; choose one from 0 to 256.")
        _require(self.max_upload_mb > 0, f"--max-upload-mb is {self.max_upload_mb}; give a number above 0.")
        _require(self.max_duration_h > 0, f"--max-duration-h is {self.max_duration_h}; give a number above 0.")
        _require(self.engine in ENGINES, f"--engine is '{self.engine}'; choose one of {', '.join(ENGINES)}.")
        _require(
            self.log_level in LOG_LEVELS, f"--log-level is '{self.log_level}'; choose one of {', '.join(LOG_LEVELS)}."
        )
        _require(
            (self.ssl_certfile is None) == (self.ssl_keyfile is None),
            "https needs both --ssl-certfile and --ssl-keyfile; give both or neither.",
        )

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_mb * 1_000_000

    @property
    def max_duration_s(self) -> float:
        return self.max_duration_h * 3600

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Defaults, changed by environment variables. Raises OptionError naming the variable at fault."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for setting in fields(cls):
            for variable in (_HUB_VARIABLES.get(setting.name), f"SOTTO_{setting.name.upper()}"):
                if variable and environ.get(variable, "") != "":
                    values[setting.name] = _convert(setting, environ[variable], variable)
        return cls(**values)

    def with_arguments(self, arguments: argparse.Namespace) -> Settings:
        """These settings, changed by the options that were given on the command line."""
        given = {f.name: getattr(arguments, f.name) for f in fields(self) if hasattr(arguments, f.name)}
        return replace(self, **given)


_HUB_VARIABLES = {"offline": "HF_HUB_OFFLINE", "hf_token": "HF_TOKEN", "hub_mirror": "HF_ENDPOINT"}


def add_arguments(parser: Container, names: Sequence[str] | None = None) -> None:
    """Give the parser one option per setting (or per name given). Options not used leave no attribute behind."""
    docs = setting_docs()
    for setting in fields(Settings):
        if names is not None and setting.name not in names:
            continue
        flag, text = "--" + setting.name.replace("_", "-"), docs[setting.name].replace("%", "%%")
        if setting.type == "bool":
            text += f" Default: {'yes' if setting.default else 'no'}."
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            shown = "" if setting.default in (None, "") else f" Default: {setting.default}."
            kind = _CONVERTERS[str(setting.type)]
            metavar = _METAVARS[str(setting.type)]
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text + shown)


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Let options be written either way: --server_port and --server-port."""
    result: list[str] = []
    for index, word in enumerate(argv):
        if word == "--":
            return [*result, *argv[index:]]
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return result


@cache
def setting_docs() -> dict[str, str]:
    """The string under each field of Settings, by field name."""
    body = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs[statement.target.id] = str(after.value.value)
    return docs


def setting_defaults() -> dict[str, object]:
    """The default of each field, by field name."""
    return {f.name: f.default for f in fields(Settings) if f.default is not MISSING}


def _truth(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


_CONVERTERS: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "bool": _truth, "Path": Path, "Path | None": Path,
}  # fmt: skip
_METAVARS = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH", "Path | None": "PATH"}


def _convert(setting: Field[Any], text: str, variable: str) -> Any:
    try:
        return _CONVERTERS[str(setting.type)](text)
    except ValueError as error:
        kind = {"int": "a whole number", "float": "a number", "bool": "yes or no"}[str(setting.type)]
        raise OptionError(f"{variable} is '{text}'; it must be {kind}.") from error


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise OptionError(sentence)
