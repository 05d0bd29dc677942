"""Static INT8: measure what flows into every linear layer, move outliers into the layer before it, quantise, save.

In: a loaded Whisper model, and a caller that runs recordings through it while an ActivationRecorder listens (real
prompts and tokens, encoder and decoder alike). Out: a calibrated checkpoint folder: int8 weights, scales, everything
else at 16 bits (safetensors), and a manifest that says what was measured on what. Opens no audio.

Outliers: a few channels behind a LayerNorm are far larger than the rest, and one scale for all would leave those 3 of 8
bits. SmoothQuant (Xiao et al., arXiv 2211.10438) divides each channel by s_j = max|x_j|^a / max|w_j|^(1-a) and
multiplies the weight's column by it. The division is free where the layer in front is linear: the LayerNorm before
q/k/v, the cross-attention query and fc1; the encoder's last LayerNorm before all cross-attention keys and values;
v_proj before out_proj (attention mixes positions, never channels). Behind fc1 stands GELU: fc2 keeps its channels.
The exponent a is the one of a short list that gives the least error of the layer's output on rows of real activations
kept while recording. Ranges are never clipped: the largest activations stand at the first positions of a text, are rare
among the rows, and everything after them hangs on them (LOG.md).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from errors import DiskFullError, ModelUnavailableError
from model_loader.files import fields_of, parse_object
from model_loader.int8_linear import LEVELS, Int8Linear, quantise_weight, static_scale
from model_loader.transfer import sha256_of

MANIFEST = "int8_static.json"
WEIGHTS = "model.safetensors"
STAGING = ".unfinished"
"""Folder inside the one to write: beside it nothing may be allowed, and it may be a file system of its own."""
_INDEX = "model.safetensors.index.json"
"""Names weight files that a calibrated folder has not."""
EXPONENTS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""0 leaves the channels as they are."""
MAX_ROWS = 384
"""Activation rows kept for each layer to judge exponents by."""
ROWS_A_CALL = 4


@dataclass(slots=True)
class Activations:
    """What flowed into one linear layer."""

    low: torch.Tensor
    """Lowest value of each input channel, float32 [in]."""
    high: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)
    """Some of the inputs, float32 [n, in] each, on the CPU."""
    n_rows: int = 0
    """Rows seen in all."""

    @property
    def kept(self) -> torch.Tensor:
        """float32 [n, in]."""
        return torch.cat(self.rows)

    @property
    def n_kept(self) -> int:
        return sum(row.shape[0] for row in self.rows)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one linear layer was quantised."""

    name: str
    low: float
    high: float
    exponent: float
    output_error: float
    """Relative error of its output on kept rows, int8 against floating point: |y - y8| / |y|."""
    kept_16_bit: bool
    n_rows: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of a checkpoint's weights as it was when it was calibrated."""

    name: str
    n_bytes: int
    mtime_ns: int
    sha256: str

    def is_still(self, checkpoint: Path) -> bool:
        """Whether the folder holds this very file; it is read only where its time differs, as a copy's does."""
        file = checkpoint / self.name
        if not file.is_file() or file.stat().st_size != self.n_bytes:
            return False
        return file.stat().st_mtime_ns == self.mtime_ns or sha256_of(file) == self.sha256


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibrated folder holds and how it was made; stored as its manifest."""

    model: str
    revision: str | None
    languages: dict[str, float]
    """Seconds of audio by language."""
    files: dict[str, str]
    """Calibration files by name, with SHA-256."""
    weights: tuple[WeightFile, ...]
    """The checkpoint's weights that were quantised (weight_files)."""
    layers: tuple[LayerReport, ...]
    versions: dict[str, str]

    @property
    def ranked(self) -> list[LayerReport]:
        return rank(self.layers)

    def is_of(self, checkpoint: Path) -> bool:
        """Whether the folder still holds the weights that were quantised: a fine-tune may be saved over them."""
        names = {weights.name for weights in self.weights}
        return names == {file.name for file in _weight_paths(checkpoint)} and all(
            weights.is_still(checkpoint) for weights in self.weights
        )

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CalibrationReport:
        """Raises ModelUnavailableError if the manifest is not there, or not as save() writes it.

        What a later version adds is passed over.
        """
        path = folder / MANIFEST
        try:
            values = fields_of(cls, {"weights": [], **parse_object(path)})  # an early manifest names no weights
            layers = tuple(LayerReport(**fields_of(LayerReport, layer)) for layer in values["layers"])
            weights = tuple(WeightFile(**fields_of(WeightFile, file)) for file in values["weights"])
        except (OSError, ValueError) as error:
            raise ModelUnavailableError(
                f"{path}, which says how this checkpoint was calibrated, cannot be read ({error}). Calibrate again: "
                "./start.sh calibrate."
            ) from error
        return cls(**{**values, "layers": layers, "weights": weights})


def rank(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """Largest output error first."""
    return sorted(layers, key=lambda layer: -layer.output_error)


def find_calibrated(checkpoint: Path, calibrations: Path) -> Path | None:
    """The calibrated folder of a checkpoint folder: itself, or what was calibrated from it before; None if neither."""
    for folder in (checkpoint, calibrated_home(checkpoint, calibrations)):
        if (folder / MANIFEST).exists() and (folder / WEIGHTS).exists():
            return folder
    return None


def calibrated_home(checkpoint: Path, calibrations: Path) -> Path:
    """Where a calibration of this checkpoint is kept unless the user names a folder; `calibrations` holds all of them.

    Named by the checkpoint's path, in which the Hub's cache has the revision; whether the weights are still those that
    were calibrated is asked of the report (is_of).
    """
    digest = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:12]
    return calibrations / f"{checkpoint.name}-{digest}"


def weight_files(checkpoint: Path) -> tuple[WeightFile, ...]:
    """What identifies a checkpoint's weights, every byte read. Take it before minutes pass: files may be replaced."""
    return tuple(
        WeightFile(file.name, file.stat().st_size, file.stat().st_mtime_ns, sha256_of(file))
        for file in _weight_paths(checkpoint)
    )


def _weight_paths(checkpoint: Path) -> list[Path]:
    return sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("pytorch_model*.bin")])


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Every linear layer of encoder and decoder by name; not the output head, which stays with the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "proj_out"
    }


@contextmanager
def record_activations(model: Any) -> Iterator[dict[str, Activations]]:
    """Listen to the inputs of every linear layer while the block runs."""
    found: dict[str, Activations] = {}
    handles = [layer.register_forward_pre_hook(_recorder(found, name)) for name, layer in linear_layers(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _recorder(found: dict[str, Activations], name: str) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        low, high = rows.amin(dim=0).float(), rows.amax(dim=0).float()
        seen = found.get(name)
        if seen is None:
            seen = found[name] = Activations(low, high)
        seen.low, seen.high = torch.minimum(seen.low, low), torch.maximum(seen.high, high)
        seen.n_rows += rows.shape[0]
        _keep_rows(seen, rows)

    return hook


def _keep_rows(seen: Activations, rows: torch.Tensor) -> None:
    """Keep a few rows of this call; once full, every later call replaces the oldest, less and less often."""
    calls = len(seen.rows)
    if seen.n_kept >= MAX_ROWS:
        if seen.n_rows % 7:  # a sample spread over the whole recording set, without a random generator
            return
        seen.rows.pop(0)
    step = max(1, rows.shape[0] // ROWS_A_CALL)
    start = calls % step
    seen.rows.append(rows[start::step][:ROWS_A_CALL].float().cpu())


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers that share an input, and the module in front that can take over a factor for each channel."""

    front: str
    layers: tuple[str, ...]


def smoothing_groups(model: Any) -> list[Group]:
    """All groups of a Whisper model, by module names as transformers gives them."""
    groups: list[Group] = []
    for side in ("encoder", "decoder"):
        for index in range(len(getattr(model.model, side).layers)):
            at = f"model.{side}.layers.{index}"
            attention = tuple(f"{at}.self_attn.{part}_proj" for part in "qkv")
            groups.append(Group(f"{at}.self_attn_layer_norm", attention))
            groups.append(Group(f"{at}.self_attn.v_proj", (f"{at}.self_attn.out_proj",)))
            groups.append(Group(f"{at}.final_layer_norm", (f"{at}.fc1",)))
            if side == "decoder":
                groups.append(Group(f"{at}.encoder_attn_layer_norm", (f"{at}.encoder_attn.q_proj",)))
                groups.append(Group(f"{at}.encoder_attn.v_proj", (f"{at}.encoder_attn.out_proj",)))
    n_decoder = len(model.model.decoder.layers)
    crossed = tuple(f"model.decoder.layers.{i}.encoder_attn.{part}_proj" for i in range(n_decoder) for part in "kv")
    groups.append(Group("model.encoder.layer_norm", crossed))
    return groups


@dataclass(slots=True)
class Quantised:
    """A model quantised in place, and what is needed to take single layers back to 16 bits."""

    model: Any
    layers: tuple[LayerReport, ...]
    floating: dict[str, torch.nn.Linear]
    """The smoothed layers before quantisation."""

    def keep_16_bit(self, names: Iterable[str]) -> None:
        """Put the floating-point layers of these names back."""
        kept = {*names} | {layer.name for layer in self.layers if layer.kept_16_bit}
        for name in kept:
            replace_layer(self.model, name, self.floating[name])
        self.layers = tuple(replace(layer, kept_16_bit=layer.name in kept) for layer in self.layers)
        self.model.kept_linears = tuple(sorted(kept))


def quantise_model(model: Any, activations: Mapping[str, Activations]) -> Quantised:
    """Smooth, then replace every linear layer in place by an Int8Linear.

    Raises ValueError if a layer was never run while recording.
    """
    layers = linear_layers(model)
    silent = sorted(set(layers) - set(activations))
    if silent:
        raise ValueError(f"{len(silent)} linear layers saw no activations, first {silent[0]}: nothing to calibrate on")
    rows = {name: activations[name].kept for name in layers}
    ranges = {name: (activations[name].low, activations[name].high) for name in layers}
    exponents = dict.fromkeys(layers, 0.0)
    for group in smoothing_groups(model):
        exponent, factors = _choose_factors(group, layers, rows, ranges)
        if exponent:
            _apply(group, factors, model, layers, rows, ranges)
            exponents.update(dict.fromkeys(group.layers, exponent))
    reports = []
    for name, layer in layers.items():
        low, high = float(ranges[name][0].min()), float(ranges[name][1].max())
        error = _output_error(rows[name].to(layer.weight.device), layer.weight.detach().float(), low, high)
        reports.append(LayerReport(name, low, high, exponents[name], error, False, activations[name].n_rows))
        replace_layer(model, name, _quantised(layer, (low, high)))
    model.kept_linears = ()
    return Quantised(model, tuple(reports), layers)


def save_calibrated(
    model: Any, source: Path, out: Path, report: CalibrationReport, pages: Mapping[str, str] | None = None
) -> None:
    """Write the quantised model beside the small files (configuration, tokenizer) of the checkpoint it came from.

    The floating-point rest is stored at 16 bits. pages: texts to put beside them, by file name. All of it, or nothing:
    what ends the writing leaves the folder as it was. Raises DiskFullError if the folder cannot hold it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    integer = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    tensors = {
        name: (tensor if name.rpartition(".")[0] in integer else tensor.half()).contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if name != "proj_out.weight"  # tied to the token embedding
    }
    staged = out / STAGING
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
        staged.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in (".json", ".txt") and file.name != _INDEX:
                shutil.copy(file, staged)
        save_file(tensors, staged / WEIGHTS)
        (staged / WEIGHTS).chmod(0o644)  # safetensors makes it its owner's alone
        for name, text in (pages or {}).items():
            (staged / name).write_text(text, encoding="utf-8")
        report.save(staged)
        _put(staged, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]  # safetensors' own words come first
        raise DiskFullError(
            f"The calibrated checkpoint could not be written to {out} ({reason}). Free some space or choose another "
            "folder with --out."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):  # one that holds files stays
            for folder in made:
                folder.rmdir()


def _put(staged: Path, out: Path) -> None:
    """Move the files to where they belong. Without its manifest a folder is no calibration: the old one goes first and
    the new one comes last, so that weights and manifest of two calibrations are never taken for one."""
    for name in (MANIFEST, _INDEX):
        (out / name).unlink(missing_ok=True)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == MANIFEST):
        file.replace(out / file.name)


def replace_layer(model: Any, name: str, new: torch.nn.Module) -> None:
    """Put `new` where the module called `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _quantised(layer: torch.nn.Linear, input_range: tuple[float, float]) -> Int8Linear:
    return Int8Linear.from_weights(layer.weight, layer.bias, dtype=layer.weight.dtype, input_range=input_range)


def _choose_factors(
    group: Group,
    layers: Mapping[str, torch.nn.Linear],
    rows: Mapping[str, torch.Tensor],
    ranges: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[float, torch.Tensor]:
    """The exponent with the least summed output error over the group's layers, and its factors [in]."""
    device = layers[group.layers[0]].weight.device
    peak = torch.stack([torch.maximum(-low, high).to(device) for low, high in map(ranges.__getitem__, group.layers)])
    largest = peak.amax(dim=0).clamp(min=1e-5)  # [in]
    columns = torch.stack([layers[name].weight.detach().float().abs().amax(dim=0) for name in group.layers])
    weights = columns.amax(dim=0).clamp(min=1e-5)
    judged = group.layers[:: max(1, len(group.layers) // 8)]  # the cross-attention group has two for each layer
    best, best_error = (0.0, torch.ones_like(largest)), float("inf")
    for exponent in EXPONENTS:
        factors = torch.ones_like(largest)
        if exponent:
            factors = largest**exponent / weights ** (1 - exponent)
            factors = (factors / factors.mean()).clamp(1e-2, 1e2)
        error = 0.0
        for name in judged:
            low, high = (float((end.to(device) / factors).aminmax()[side]) for side, end in enumerate(ranges[name]))
            x = rows[name].to(device) / factors
            error += _output_error(x, layers[name].weight.detach().float() * factors, low, high)
        if error < best_error * 0.99:  # a tie goes to the smaller change
            best, best_error = (exponent, factors), error
    return best


def _apply(
    group: Group,
    factors: torch.Tensor,
    model: Any,
    layers: Mapping[str, torch.nn.Linear],
    rows: dict[str, torch.Tensor],
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Divide the front module's output by the factors and multiply the columns of the group's weights by them."""
    front = model.get_submodule(group.front)
    with torch.no_grad():
        divided = factors[:, None] if front.weight.ndim == 2 else factors
        front.weight.copy_(front.weight.float() / divided)
        if front.bias is not None:
            front.bias.copy_(front.bias.float() / factors)
        for name in group.layers:
            layers[name].weight.copy_(layers[name].weight.float() * factors)
            rows[name] = rows[name] / factors.cpu()
            low, high = ranges[name]
            ranges[name] = (low / factors.to(low.device), high / factors.to(high.device))


def _output_error(x: torch.Tensor, weight: torch.Tensor, low: float, high: float) -> float:
    """|x W^T - x8 W8^T| / |x W^T| for rows x [n, in] rounded as Int8Linear rounds them."""
    scale, zero = static_scale(low, high)
    levels = (torch.round(x / scale) + zero).clamp(-LEVELS - 1, LEVELS)
    quantised, weight_scale = quantise_weight(weight)
    exact = x @ weight.t()
    rounded = ((levels - zero) * scale) @ (quantised.float() * weight_scale[:, None]).t()
    return float((exact - rounded).norm() / exact.norm().clamp(min=1e-8))
