"""What a checkpoint says about itself before a byte of its weights is read: names, shapes and sizes.

In: a folder, or a model's name. Out: a Header. A safetensors file begins with 8 bytes of length and a JSON table of its
tensors; on the Hub that table is fetched by range request (a few hundred kB instead of gigabytes). Checkpoints in other
formats, and OpenAI's own sizes where neither cache nor Hub has them, are described by config.json's figures alone: they
fix every tensor of a Whisper.
Source: safetensors' format description (github.com/huggingface/safetensors); openai/whisper, model card, table 1.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from errors import ModelUnavailableError, NotWhisperError, UnknownModelError
from model_loader.hub import find_cached, hub_errors, is_reachable, shards
from model_loader.weights import DEMO_FOLDER

logger = logging.getLogger(__name__)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LINEAR = re.compile(r"model\.(encoder|decoder)\.layers\.\d+\.(?:.*_proj|fc1|fc2)\.weight")
_CROSS_KV = ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight")
_HEAD = "proj_out.weight"


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
        """Raises NotWhisperError, ModelUnavailableError (a figure is missing)."""
        if config.get("model_type") != "whisper":
            raise NotWhisperError(
                f"{name} is not a Whisper checkpoint (config.json says {config.get('model_type')!r}). Give one in "
                "Hugging Face's format, for example openai/whisper-large-v3."
            )
        try:
            return cls(
                d_model=int(config["d_model"]),
                encoder_layers=int(config["encoder_layers"]),
                decoder_layers=int(config["decoder_layers"]),
                ffn_dim=int(config["decoder_ffn_dim"]),
                n_mels=int(config["num_mel_bins"]),
                n_vocab=int(config["vocab_size"]),
                n_audio_ctx=int(config["max_source_positions"]),
                n_text_ctx=int(config["max_target_positions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelUnavailableError(
                f"config.json of {name} lacks or garbles {error}; fetch the model again, or choose another one."
            ) from error


def _large(decoder_layers: int, n_mels: int, n_vocab: int) -> Sizes:
    return Sizes(1280, 32, decoder_layers, 5120, n_mels, n_vocab)


KNOWN: dict[str, Sizes] = {
    "tiny": Sizes(384, 4, 4, 1536),
    "base": Sizes(512, 6, 6, 2048),
    "small": Sizes(768, 12, 12, 3072),
    "medium": Sizes(1024, 24, 24, 4096),
    "large-v3": _large(32, 128, 51866),
    "large-v3-turbo": _large(4, 128, 51866),
}
"""OpenAI's checkpoints by their short names, smallest first."""


@dataclass(frozen=True, slots=True)
class Header:
    """A checkpoint's tensors by kind. Counts are of numbers, not of bytes."""

    name: str
    sizes: Sizes
    source: str
    """Where this was read: file, hub, or config (calculated from its figures)."""
    encoder_linear: int
    """Weights of the encoder's projections and feed-forward layers, biases apart."""
    decoder_linear: int
    """The same of the decoder, cross-attention's keys and values included."""
    cross_kv: int
    """Of these, the projections of cross-attention's keys and values."""
    other: int
    """Everything else: convolutions, positions, norms, biases, the token embedding (and the head tied to it)."""
    linear_outputs: int
    """Outputs of all linear layers: what has a scale each in 8-bit formats."""
    largest: int
    """Weights of the largest linear layer."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False)

    @property
    def n_weights(self) -> int:
        return self.encoder_linear + self.decoder_linear + self.other

    def encoder_weights_of(self, names: Collection[str]) -> int:
        """Weights of the encoder's linear layers of these names ('out_proj'), biases apart."""
        endings = tuple(f".{name}.weight" for name in names)
        return sum(_count(s) for t, s in self.shapes.items() if t.startswith("model.encoder.") and t.endswith(endings))


def describe(name: str, sizes: Sizes, shapes: Mapping[str, tuple[int, ...]], source: str) -> Header:
    """Sort tensors by kind. shapes: by name, as safetensors headers list them."""
    encoder = decoder = cross_kv = other = outputs = largest = 0
    for tensor, shape in shapes.items():
        count = _count(shape)
        match = _LINEAR.fullmatch(tensor)
        if match is not None and len(shape) == 2:
            outputs, largest = outputs + shape[0], max(largest, count)
            encoder += count if match.group(1) == "encoder" else 0
            decoder += count if match.group(1) == "decoder" else 0
            cross_kv += count if tensor.endswith(_CROSS_KV) else 0
        elif tensor != _HEAD:  # tied to the token embedding, and stored once in memory
            other += count
    return Header(name, sizes, source, encoder, decoder, cross_kv, other, outputs, largest, dict(shapes))


def find_header(
    model: str,
    *,
    offline: bool = False,
    token: str | None = None,
    mirror: str | None = None,
    cache_dir: Path | None = None,
) -> Header:
    """The header of a folder, 'demo', a short name or a Hub name; from the nearest place that has it.

    Raises UnknownModelError, NotWhisperError, ModelUnavailableError. Never waits long for the Hub.
    """
    word = model.strip()
    path = DEMO_FOLDER if word == "demo" else Path(word).expanduser()
    if word and path.is_dir():
        return read_folder(path, "demo" if path.resolve() == DEMO_FOLDER else path.name)
    name, _, revision = word.partition("@")
    short = name.removeprefix("openai/").removeprefix("whisper-")
    known = KNOWN.get(short) if name in (short, f"whisper-{short}", f"openai/whisper-{short}") else None
    if known is not None:
        name = f"openai/whisper-{short}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UnknownModelError(
            f"There is no model '{model}': it is no folder and no name on the Hub (like openai/whisper-large-v3). "
            f"Short names are {', '.join(KNOWN)} and demo."
        )
    cached = find_cached(name, revision or "main", cache_dir)
    if cached is not None:
        return read_folder(cached, name)
    if not offline and (known is None or is_reachable(name, mirror)):
        return read_hub(name, revision or "main", token=token, mirror=mirror, cache_dir=cache_dir)
    if known is not None:
        return describe(name, known, dict(whisper_shapes(known)), "config")
    raise ModelUnavailableError(
        f"{name} is not in the cache and --offline forbids to ask the Hub how large it is. Start once without "
        f"--offline, give a checkpoint folder, or choose one of {', '.join(KNOWN)}."
    )


@cache
def known_headers() -> tuple[Header, ...]:
    """OpenAI's sizes, smallest first; no file and no network."""
    return tuple(describe(name, sizes, dict(whisper_shapes(sizes)), "config") for name, sizes in KNOWN.items())


def read_folder(folder: Path, name: str = "") -> Header:
    """A checkpoint on disk, shards included. Raises NotWhisperError, ModelUnavailableError."""
    name = name or folder.name
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = Sizes.from_config(config if isinstance(config, dict) else {}, name)
        index = folder / _INDEX
        files = shards(index) if index.is_file() else [_WEIGHTS]
        if not all((folder / file).is_file() for file in files):
            return describe(name, sizes, dict(whisper_shapes(sizes)), "config")
        shapes = {key: shape for file in files for key, shape in _read_file(folder / file)}
    except FileNotFoundError as error:
        raise NotWhisperError(
            f"{folder} is not a Whisper checkpoint: it has no config.json. Give a folder in Hugging Face's format."
        ) from error
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ModelUnavailableError(f"The header of {name} cannot be read ({error}); fetch the model again.") from error
    return describe(name, sizes, shapes, "file")


def read_hub(name: str, revision: str, *, token: str | None, mirror: str | None, cache_dir: Path | None) -> Header:
    """A checkpoint on the Hub, from config.json and range requests for the headers of its weight files.

    Raises UnknownModelError, NotWhisperError, ModelUnavailableError.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    api = HfApi(endpoint=mirror, token=token)
    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "endpoint": mirror, "token": token}
    with hub_errors(name, mirror):
        # A wrong name, a gated model and a silent Hub are told apart here, once and within the time limit.
        commit = str(api.model_info(name, revision=revision, timeout=30).sha)
        common["revision"] = commit
        sizes = Sizes.from_config(json.loads(Path(hf_hub_download(name, "config.json", **common)).read_text()), name)
        try:
            try:
                files = shards(Path(hf_hub_download(name, _INDEX, **common)))
            except EntryNotFoundError:
                files = [_WEIGHTS]
            shapes = {
                key: tuple(info.shape)
                for file in files
                for key, info in api.parse_safetensors_file_metadata(name, file, revision=commit).tensors.items()
            }
        except (EntryNotFoundError, SafetensorsParsingError) as error:
            logger.info("event=no_safetensors_header model=%s error=%r", name, error)
            return describe(name, sizes, dict(whisper_shapes(sizes)), "config")
    return describe(name, sizes, shapes, "hub")


def whisper_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Whisper of these sizes, as Hugging Face names it."""
    d, inner = sizes.d_model, sizes.ffn_dim
    yield from _with_bias("model.encoder.conv1", (d, sizes.n_mels, 3))
    yield from _with_bias("model.encoder.conv2", (d, d, 3))
    yield "model.encoder.embed_positions.weight", (sizes.n_audio_ctx, d)
    yield "model.decoder.embed_tokens.weight", (sizes.n_vocab, d)
    yield "model.decoder.embed_positions.weight", (sizes.n_text_ctx, d)
    for side, n_layers in (("encoder", sizes.encoder_layers), ("decoder", sizes.decoder_layers)):
        yield from _with_bias(f"model.{side}.layer_norm", (d,))
        attentions = ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn")
        for layer in range(n_layers):
            at = f"model.{side}.layers.{layer}"
            for attention in attentions:
                yield f"{at}.{attention}.k_proj.weight", (d, d)  # Whisper's keys have no bias
                for part in ("q_proj", "v_proj", "out_proj"):
                    yield from _with_bias(f"{at}.{attention}.{part}", (d, d))
                yield from _with_bias(f"{at}.{attention}_layer_norm", (d,))
            yield from _with_bias(f"{at}.fc1", (inner, d))
            yield from _with_bias(f"{at}.fc2", (d, inner))
            yield from _with_bias(f"{at}.final_layer_norm", (d,))


def _with_bias(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _read_file(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        table = json.loads(file.read(length))
    for name, entry in table.items():
        if name != "__metadata__":
            yield name, tuple(entry["shape"])


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
