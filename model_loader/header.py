"""What a checkpoint says about itself before a byte of its weights is read: names, shapes and sizes.

In: a folder, or a model's name. Out: a Header. A safetensors file begins with a table of its tensors; on the Hub that
table is fetched by range request (a few hundred kB instead of gigabytes). Checkpoints in other formats, and OpenAI's
own sizes where neither cache nor Hub has them, are described by config.json's figures alone: they fix every tensor of a
Whisper. A folder that `calibrate` wrote says in the same table which of its layers are in 8 bits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from errors import ModelUnavailableError
from model_loader.files import (
    INDEX,
    WEIGHTS,
    Sizes,
    StoredTensor,
    read_config,
    read_index,
    read_object,
    read_tensors,
    weight_names,
)
from model_loader.hub import find_cached, hub_errors, is_reachable
from model_loader.names import AUTOMATIC, DEMO, DEMO_FOLDER, ModelName, read_name

logger = logging.getLogger(__name__)

_LINEAR = re.compile(r"model\.(encoder|decoder)\.layers\.\d+\.(?:.*_proj|fc1|fc2)\.weight")
_CROSS_KV = ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight")
_HEAD = "proj_out.weight"
_OF_INTEGERS = (".weight_scale", ".input_scale", ".input_zero", ".k_proj.bias")
"""What 8-bit layers add in a calibrated folder; it is counted with the layers. Whisper's keys have no bias."""


KNOWN: dict[str, Sizes] = {
    known.short_name: known.sizes for known in sorted(AUTOMATIC, key=lambda known: (known.sizes.d_model, known.name))
}
"""OpenAI's checkpoints by their short names, smallest first."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What of a calibrated folder's linear layers is not in 8 bits."""

    wide_linear: int
    """Weights of the linear layers that were kept at 16 bits."""
    wide_outputs: int
    """Their outputs."""


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
    calibrated: Calibrated | None = None
    """Set for a folder that `calibrate` wrote: it holds 8-bit weights and loads as int8-static alone."""

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
    asked = read_name(model)
    here, name = _on_disk(asked, cache_dir), asked.name
    if here is not None:
        return here
    if not offline and (asked.known is None or is_reachable(name, mirror)):
        return read_hub(name, asked.revision, token=token, mirror=mirror, cache_dir=cache_dir)
    if asked.known is not None:
        return from_sizes(name, asked.known.sizes)
    raise ModelUnavailableError(
        f"{name} is not in the cache and --offline forbids to ask the Hub how large it is. Start once without "
        f"--offline, give a checkpoint folder, or choose one of {', '.join(KNOWN)}."
    )


def header_at_hand(model: str, cache_dir: Path | None) -> Header | None:
    """The header of what a load would take, as far as this disk and the table of known sizes tell; asks nobody.

    None for 'auto', whose checkpoint is not chosen yet, and for what only the Hub knows. Raises UnknownModelError,
    NotWhisperError, ModelUnavailableError.
    """
    asked = read_name(model)
    if asked.is_automatic:
        return None
    here = _on_disk(asked, cache_dir)
    return from_sizes(asked.name, asked.known.sizes) if here is None and asked.known is not None else here


def _on_disk(asked: ModelName, cache_dir: Path | None) -> Header | None:
    """From the folder, or from the cache of the Hub."""
    if asked.folder is not None:
        is_demo = asked.folder.resolve() == DEMO_FOLDER
        return read_folder(asked.folder, DEMO if is_demo else asked.folder.resolve().name)
    cached = None if asked.is_automatic else find_cached(asked.name, asked.revision, cache_dir)
    return None if cached is None else read_folder(cached, asked.name)


def from_sizes(name: str, sizes: Sizes) -> Header:
    """Calculated from the figures of config.json."""
    return describe(name, sizes, dict(whisper_shapes(sizes)), "config")


@cache
def known_headers() -> tuple[Header, ...]:
    """OpenAI's sizes, smallest first; no file and no network."""
    return tuple(from_sizes(name, sizes) for name, sizes in KNOWN.items())


def read_folder(folder: Path, name: str = "") -> Header:
    """A checkpoint on disk, shards included. Raises NotWhisperError, ModelUnavailableError."""
    from model_loader.calibration import MANIFEST, CalibrationReport  # which brings torch

    name = name or folder.name
    sizes = Sizes.from_config(read_config(folder, name), name)
    files = weight_names(folder)
    if not all((folder / file).is_file() for file in files):
        return from_sizes(name, sizes)
    stored = {key: tensor for file in files for key, tensor in read_tensors(folder / file).items()}
    shapes = {key: tensor.shape for key, tensor in stored.items() if not key.endswith(_OF_INTEGERS)}
    header = describe(name, sizes, shapes, "file")
    if not (folder / MANIFEST).is_file():
        return header
    CalibrationReport.load(folder)  # refuses a damaged one
    return replace(header, calibrated=_calibrated(stored))


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
        sizes = Sizes.from_config(read_object(Path(hf_hub_download(name, "config.json", **common))), name)
        try:
            try:
                files = read_index(Path(hf_hub_download(name, INDEX, **common)))
            except EntryNotFoundError:
                files = [WEIGHTS]
            shapes = {
                key: tuple(info.shape)
                for file in files
                for key, info in api.parse_safetensors_file_metadata(name, file, revision=commit).tensors.items()
            }
        except (EntryNotFoundError, SafetensorsParsingError) as error:
            logger.info("event=no_safetensors_header model=%s error=%r", name, error)
            return from_sizes(name, sizes)
    return describe(name, sizes, shapes, "hub")


def _calibrated(stored: Mapping[str, StoredTensor]) -> Calibrated:
    """Counts what of the linear layers is not in 8 bits."""
    wide = [t.shape for key, t in stored.items() if _LINEAR.fullmatch(key) and t.dtype != "I8" and len(t.shape) == 2]
    return Calibrated(sum(map(_count, wide)), sum(shape[0] for shape in wide))


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


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
