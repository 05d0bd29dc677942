"""A comparison as a file: what was measured, on what, with what. Made to be read again beside a later run.

In: rows and what is known about the run. Out: JSON, and RunCards read from it. A card comes from anywhere, so reading
one believes nothing: every value is checked against the type it must have, and what is unknown is left out.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from errors import OptionError
from model_loader.transfer import sha256_of
from transcription.interface import CompareRow, MemoryPhase, Source
from transcription.options import TranscribeOptions
from transcription.transcript import Segment, Word
from transcription.verdict import ENGLISH, Claim
from transcription.worddiff import KINDS, DiffPart

SCHEMA = "sotto-run-card"
SCHEMA_VERSION = 1
MAX_BYTES = 50_000_000
MAX_NUMBER = 2**63
"""No figure comes near it. JSON's whole numbers have no end, and one of 400 digits can be neither divided nor drawn."""
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "triton", "gradio", "silero-vad")

Figure = TypeVar("Figure", int, float)


@dataclass(frozen=True, slots=True)
class RunCard:
    """One comparison."""

    date: str
    """ISO 8601 with the offset from UTC."""
    rows: tuple[CompareRow, ...]
    """Each carries its model, revision, device and driver."""
    recording: str = ""
    """Its name, without the folder."""
    recording_sha256: str = ""
    repeats: int | None = None
    order: str = ""
    seed: int | None = None
    reference_text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of libraries."""
    sotto: str = ""
    """Version of this program."""
    machine: str = ""
    """Operating system, processor and Python."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _alone(self.rows))

    @property
    def audio_s(self) -> float | None:
        return next((row.audio_s for row in self.rows if row.audio_s is not None), None)

    @property
    def device(self) -> str:
        return next((row.device for row in self.rows if row.device), "")

    @property
    def model(self) -> str:
        return next((row.model for row in self.rows if row.model), "")

    @property
    def minute(self) -> str:
        """'2026-11-20 14:05', in the time zone of its machine."""
        return self.date[:16].replace("T", " ")

    @property
    def mark(self) -> str:
        """Tells its rows from those of other runs: '(2026-11-20 14:05, demo, talk.wav, NVIDIA H200)'."""
        return f"({', '.join(part for part in (self.minute, self.model, self.recording, self.device) if part)})"


def _alone(rows: tuple[CompareRow, ...]) -> tuple[CompareRow, ...]:
    """The same rows; the only one that was measured does not say that others are held to it."""
    if sum(not row.failed for row in rows) > 1:
        return rows
    return tuple(replace(row, claims=tuple(claim for claim in row.claims if claim.key != "base")) for row in rows)


def make_card(
    rows: Sequence[CompareRow],
    source: Source,
    *,
    name: str,
    options: TranscribeOptions,
    repeats: int,
    order: str,
    seed: int,
    reference_text: str = "",
) -> RunCard:
    """The card of a comparison that has just been made here."""
    return RunCard(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        rows=tuple(rows),
        recording=name,
        recording_sha256=hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_of(source),
        repeats=repeats,
        order=order,
        seed=seed if order == "shuffled" else None,
        reference_text=reference_text.strip(),
        options=asdict(options),
        versions=library_versions(),
        sotto=own_version(),
        machine=f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
    )


def own_version() -> str:
    """As pyproject.toml has it (the program is run, not installed); empty where that file is not there."""
    try:
        content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    except OSError:
        return ""
    return str(content["project"]["version"])


def library_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # optional here
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def to_json(card: RunCard) -> str:
    """What read_card reads."""
    content = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "audio_s": card.audio_s,
        "device": card.device,
        **asdict(card),
        "rows": [row_dict(row) for row in card.rows],
    }
    return json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def row_dict(row: CompareRow) -> dict[str, Any]:
    """A row with its sentence; everything in it is JSON."""
    return {**asdict(row), "verdict": row.verdict}


# --- reading ---------------------------------------------------------------------------------------------------------


def load_card(path: Path) -> RunCard:
    """Raises OptionError with a sentence for a file that is no run card."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OptionError(f"{path.name} is larger than {MAX_BYTES // 1_000_000} MB; a run card is far smaller.")
        return read_card(path.read_text(encoding="utf-8-sig"), path.name)  # Windows' editors put a mark before it
    except OSError as error:
        raise OptionError(f"The run card {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise _no_card(path.name, "it is not text") from error


def read_card(text: str, name: str = "the file") -> RunCard:
    """name: for the sentence of an error. Raises OptionError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_card(name, "it is not JSON") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise _no_card(name, f"its schema is not '{SCHEMA}'")
    if content.get("version") != SCHEMA_VERSION:
        raise OptionError(
            f"{name} is a run card of version {content.get('version')}; this program reads version {SCHEMA_VERSION}. "
            "Open it with the version of Sotto that wrote it."
        )
    try:
        card: RunCard = _build(RunCard, content)
    except _WrongValue as error:
        raise _no_card(name, str(error)) from error
    if not card.rows:
        raise _no_card(name, "it holds no rows")
    return card


def _no_card(name: str, reason: str) -> OptionError:
    return OptionError(
        f"{name} is not a run card of Sotto: {reason}. Choose a file that was downloaded from Compare or written with "
        "compare --card."
    )


class _WrongValue(Exception):
    """A value has another type than it must have; the message says which."""


def _build(kind: Any, content: object) -> Any:
    """A dataclass of a dict. Unknown keys are left out; missing ones take their default."""
    if not isinstance(content, dict):
        raise _WrongValue(f"{kind.__name__} is not an object")
    values = {}
    for item in fields(kind):
        if item.name in content:
            values[item.name] = _checked(str(item.type), content[item.name], f"{kind.__name__}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise _WrongValue(f"{kind.__name__}.{item.name} is missing")
    built = kind(**values)
    if isinstance(built, DiffPart) and built.kind not in KINDS:
        raise _WrongValue(f"DiffPart.kind is '{built.kind}'")
    if isinstance(built, Claim):
        _check_claim(built)
    return built


def _check_claim(claim: Claim) -> None:
    try:
        ENGLISH[claim.key].format(**dict(claim.values))
    except KeyError as error:
        raise _WrongValue(f"the claim '{claim.key}' cannot be said") from error


def _checked(kind: str, value: object, where: str) -> Any:
    """value, of the type that a field is annotated with."""
    if kind.endswith(" | None"):
        return None if value is None else _checked(kind.removesuffix(" | None"), value, where)
    checked = _PLAIN.get(kind, _NESTED.get(kind))
    if checked is None:
        raise AssertionError(f"{where} has a type that a run card cannot hold: {kind}")
    return checked(value, where)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _WrongValue(f"{where} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair: JSON can say it, no file can hold it
        raise _WrongValue(f"{where} is not text") from error
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongValue(f"{where} is not a number")
    return float(_figure(value, where))


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongValue(f"{where} is not a whole number")
    return _figure(value, where)


def _figure(value: Figure, where: str) -> Figure:
    if not abs(value) <= MAX_NUMBER:  # so that NaN is refused too
        raise _WrongValue(f"{where} is not a number that can be measured")
    return value


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongValue(f"{where} is not an object")
    return value


def _texts(value: object, where: str) -> dict[str, str]:
    return {key: _text(item, f"{where}.{key}") for key, item in _mapping(value, where).items()}


def _each(read: Callable[[object, str], Any]) -> Callable[[object, str], tuple[Any, ...]]:
    def read_all(value: object, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _WrongValue(f"{where} is not a list")
        return tuple(read(item, where) for item in value)

    return read_all


def _pair(value: object, where: str) -> tuple[str, str]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _WrongValue(f"{where} is not a pair")
    return _text(value[0], where), _text(value[1], where)


def _of(kind: Any) -> Callable[[object, str], tuple[Any, ...]]:
    return _each(lambda value, where: _build(kind, value))


_PLAIN: dict[str, Callable[[object, str], Any]] = {
    "str": _text,
    "float": _number,
    "int": _whole,
    "Mapping[str, Any]": _mapping,
    "Mapping[str, str]": _texts,
}
_NESTED: dict[str, Callable[[object, str], Any]] = {
    "tuple[str, ...]": _each(_text),
    "tuple[float, ...]": _each(_number),
    "tuple[tuple[str, str], ...]": _each(_pair),
    "tuple[Segment, ...]": _of(Segment),
    "tuple[Word, ...]": _of(Word),
    "tuple[DiffPart, ...]": _of(DiffPart),
    "tuple[MemoryPhase, ...]": _of(MemoryPhase),
    "tuple[Claim, ...]": _of(Claim),
    "tuple[CompareRow, ...]": _of(CompareRow),
}
