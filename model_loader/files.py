"""The files that describe a checkpoint, each read and checked in one place: nothing that follows meets a surprise.

In: config.json, an index of shards, the table at the head of a safetensors file, any other JSON. Out: plain values of
the kinds they must be. What is damaged becomes ModelUnavailableError, a sentence that names the file. Knows no network.
Source: safetensors' format description (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from errors import ModelUnavailableError, NotWhisperError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

_LONGEST_TABLE = 100_000_000
"""Bytes; safetensors' own limit."""

_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
}
"""What JSON has for an annotation."""

_LEAST_VOCABULARY = 1501 + 8
"""The timestamps, and the special tokens that every Whisper has."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The figures of config.json that memory depends on."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    ffn_dim: int
    n_mels: int = 80
    n_vocab: int = 51865
    n_audio_ctx: int = 1500
    n_text_ctx: int = 448

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> Sizes:
        """Raises NotWhisperError, ModelUnavailableError (a figure is missing, or none that a Whisper can have)."""
        require_whisper(config, name)
        sizes = cls(
            d_model=_figure(config, "d_model", name),
            encoder_layers=_figure(config, "encoder_layers", name),
            decoder_layers=_figure(config, "decoder_layers", name),
            ffn_dim=_figure(config, "decoder_ffn_dim", name),
            n_mels=_figure(config, "num_mel_bins", name),
            n_vocab=_figure(config, "vocab_size", name, least=_LEAST_VOCABULARY),
            n_audio_ctx=_figure(config, "max_source_positions", name),
            n_text_ctx=_figure(config, "max_target_positions", name),
        )
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if sizes.d_model % _figure(config, heads, name):
                raise ModelUnavailableError(
                    f"config.json of {name} is damaged: {heads} is {config[heads]}, and d_model ({sizes.d_model}) "
                    "cannot be divided by that. Fetch the model again, or choose another one."
                )
        return sizes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors file lists it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, F16, BF16, I8."""
    end: int
    """Where its bytes end, counted from the end of the table."""


def require_whisper(config: Mapping[str, Any], name: str) -> None:
    """Raises NotWhisperError unless config.json says that this is one."""
    kind = config.get("model_type")
    if kind != "whisper":
        raise NotWhisperError(
            f"{name} is {f'a {kind} model' if kind else 'of unknown type'}, not a Whisper checkpoint. Choose one in "
            "Hugging Face's format, for example openai/whisper-large-v3."
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, ModelUnavailableError."""
    try:
        return parse_object(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(f"{path} cannot be read ({error}); fetch the model again.") from error


def parse_object(path: Path) -> dict[str, Any]:
    """The same for a file that cannot be fetched again. Raises OSError, ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, and it holds {_kind(content)}")
    return content


def fields_of(kind: type[Any], values: Any) -> dict[str, Any]:
    """What a JSON object says of a dataclass's fields, each of the kind that its annotation names; a dict is an object
    there and a tuple a list. What the dataclass has no field for is passed over. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"an object is expected, and there is {_kind(values)}")
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in values:
            raise ValueError(f"{field.name} is missing")
        value, wanted = values[field.name], str(field.type)
        inner = re.fullmatch(r"dict\[str, (\w+)\]", wanted)
        parts = value.values() if inner and isinstance(value, dict) else ()
        if type(value) not in _KINDS.get(wanted, (dict if inner else list,)) or not all(
            type(part) in _KINDS[inner[1]] for part in parts if inner
        ):
            raise ValueError(f"{field.name} is {json.dumps(value)[:60]}")
        found[field.name] = value
    return found


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a Whisper, every figure that memory depends on checked.

    Raises NotWhisperError, ModelUnavailableError.
    """
    try:
        config = read_object(folder / CONFIG)
    except FileNotFoundError as error:
        raise NotWhisperError(
            f"{folder} is not a Whisper checkpoint: it has no config.json. Give a folder in Hugging Face's format."
        ) from error
    Sizes.from_config(config, name)
    return config


def read_index(path: Path) -> list[str]:
    """File names of a sharded checkpoint. Raises ModelUnavailableError if the index is damaged."""
    try:
        names = read_object(path).get("weight_map")
    except FileNotFoundError as error:
        raise ModelUnavailableError(f"{path} is missing; fetch the checkpoint again.") from error
    if not isinstance(names, dict) or not names or not all(_is_file_name(name) for name in names.values()):
        raise ModelUnavailableError(f"{path} is damaged; fetch the checkpoint again.")
    return sorted(set(names.values()))


def weight_names(folder: Path) -> list[str]:
    """The safetensors files that a folder's weights are in; they need not be there."""
    index = folder / INDEX
    return [WEIGHTS] if (folder / WEIGHTS).is_file() or not index.is_file() else read_index(index)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The table of a safetensors file: 8 bytes of length, then JSON. Raises ModelUnavailableError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_TABLE):
                raise ValueError(f"a table of {length} bytes in a file of {size}")
            table = json.loads(file.read(length))
        if not isinstance(table, dict):
            raise ValueError(f"its table is {_kind(table)}")
        return {name: _stored(entry) for name, entry in table.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelUnavailableError(
            f"The header of {path} cannot be read ({error}): it is not a safetensors file, or a damaged one. Fetch the "
            "model again."
        ) from error


def _stored(entry: dict[str, Any]) -> StoredTensor:
    """Raises KeyError, TypeError, ValueError."""
    shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape) or not isinstance(dtype, str):
        raise ValueError(f"a tensor of shape {shape} and format {dtype}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ValueError(f"a tensor at {offsets}")
    return StoredTensor(tuple(shape), dtype, offsets[1])


def _figure(config: Mapping[str, Any], key: str, name: str, *, least: int = 1) -> int:
    """A whole number of config.json."""
    value: Any = config.get(key)
    if _is_count(value) and value >= least:
        return int(value)
    if key not in config:
        wrong = f"lacks {key}"
    else:
        wrong = f"is damaged: {key} is {json.dumps(value)}, and a Whisper has a whole number from {least} there"
    raise ModelUnavailableError(f"config.json of {name} {wrong}. Fetch the model again, or choose another one.")


def _is_count(value: Any) -> bool:
    """A whole number that is not negative; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_file_name(value: Any) -> bool:
    """A name inside the folder, no way out of it."""
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value


def _kind(content: Any) -> str:
    """What a JSON value is, in a word."""
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(content), "a number")
