"""Causal language models (GPT-2 and its kin) through Whisper's rows, conversions, census and memory phases.

In: a folder or a Hub name, and a row. Out: a CausalEngine that continues tokens. Rows: fp32, fp16-autocast,
fp16, bf16, bnb-int8, bnb-nf4, bnb-fp4, int8-dynamic. The others are made for Whisper and refused: int8 and int4 are
packed for its decoder step, int8-static is calibrated on recordings.

GPT-2 keeps its projections as Conv1D, a linear layer whose weight is transposed. bitsandbytes converts those by itself;
for the other rows they become ordinary linear layers while loading, so that one census serves all.
Machines without a checkpoint get make_random(): GPT-2-small's shape (Radford et al. 2019: 12 layers, 768 wide, 124
million weights) with random weights. Bytes and speed are the real ones, its text is noise.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from errors import (
    DiskFullError,
    ModelUnavailableError,
    OptionError,
    UnavailablePrecisionError,
    UnknownModelError,
)
from model_loader.census import HEADS, Census, prove, take_census
from model_loader.convert.bnb import config_4bit, config_8bit
from model_loader.device import describe_device
from model_loader.engine import arithmetic, release
from model_loader.files import CONFIG, read_object
from model_loader.hub import DownloadProgress, download, find_cached, is_reachable
from model_loader.int8_linear import Int8Linear
from model_loader.loader import MemoryPhases, quiet_libraries, refuse_unavailable
from model_loader.memory import read_peak, read_point, reset_peak
from model_loader.precision import Precision, resolve_precision

_HEAD = "lm_head"
_HUB_NAMES = {"gpt2": "openai-community/gpt2"}


@dataclass(frozen=True, slots=True)
class CausalReport:
    """What was loaded, and what it cost."""

    model: str
    requested: str
    effective: str
    census: Census
    phases: MemoryPhases
    load_s: float


class CausalEngine:
    """A language model at one precision, for one caller at a time."""

    def __init__(self, model: Any, row: Precision, report: CausalReport, n_vocab: int) -> None:
        self._model, self._row, self.report, self.n_vocab = model, row, report, n_vocab

    def generate(self, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """Continue `tokens` by the likeliest n_tokens, neither more nor fewer."""
        if self._model is None:
            raise RuntimeError("this engine is closed")
        prompt = torch.tensor([list(tokens)], device=self._model.device)
        with torch.no_grad(), arithmetic(self._row, self._model.device.type):
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=n_tokens,
                max_new_tokens=n_tokens,
                pad_token_id=0,
            )
        new: list[int] = output[0, len(tokens) :].tolist()
        return new

    def close(self) -> None:
        """Give the memory back; the report then says what is left. Idempotent."""
        if self._model is None:
            return
        device = self._model.device
        self._model = None
        release(device)
        self.report = replace(self.report, phases=replace(self.report.phases, after_unload=read_point(device)))


def load_causal(
    model: str,
    precision: str,
    *,
    device: str = "auto",
    offline: bool = False,
    on_progress: Callable[[DownloadProgress], None] | None = None,
) -> CausalEngine:
    """Load and prove. model: a folder, 'gpt2' or a Hub name.

    Raises UnknownPrecisionError, UnavailablePrecisionError, ModelUnavailableError, UnknownModelError,
    EffectivePrecisionError, DeviceError.
    """
    place = describe_device(device)
    row = resolve_precision(precision, place)
    refuse_unavailable(row, place)
    if row.needs_calibration or row.linear_class == "PackedLinear":
        raise UnavailablePrecisionError(
            f"{row.name} is made for Whisper and does not run a language model. Choose int8-dynamic or bnb-int8."
        )
    folder = find_causal(model, offline, on_progress)
    release(place.torch_device)
    reset_peak(place.torch_device)
    before = read_point(place.torch_device)
    started_s = time.perf_counter()
    with quiet_libraries():
        network = _load(folder, row, place.torch_device).eval()
    release(place.torch_device)  # what converting left behind
    after_load = read_point(place.torch_device)
    load_s = time.perf_counter() - started_s
    census = take_census(network, row)
    phases = MemoryPhases(before, after_load, None, read_peak(place.torch_device))
    report = CausalReport(model, row.name, prove(census, row, place), census, phases, load_s)
    return CausalEngine(network, row, report, int(network.config.vocab_size))


def find_causal(model: str, offline: bool, on_progress: Callable[[DownloadProgress], None] | None = None) -> Path:
    """The folder of a checkpoint: itself, the cache's, or fetched.

    Raises UnknownModelError (no such folder or name, or no language model), ModelUnavailableError, DiskFullError.
    """
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return _checked(path, model)
    name = _HUB_NAMES.get(model, model)
    if path.is_file() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UnknownModelError(
            f"There is no language model '{model}': it is no folder and no name on the Hub (like "
            "openai-community/gpt2)."
        )
    cached = find_cached(name, "main", None)
    if cached is not None:
        return _checked(cached, name)
    if offline:
        raise ModelUnavailableError(f"{name} is not on this disk and the network may not be used; give a folder.")
    return download(
        name,
        "main",
        cache_dir=None,
        mirror=None,
        token=None,
        check_config=lambda config: _require_causal(config, name),
        on_progress=on_progress,
    )


def _checked(folder: Path, name: str) -> Path:
    """The folder, if its config.json is a language model's. Raises UnknownModelError, ModelUnavailableError."""
    try:
        _require_causal(read_object(folder / CONFIG), name)
    except FileNotFoundError as error:
        raise UnknownModelError(
            f"{folder} holds no language model: it has no {CONFIG}. Give a folder in Hugging Face's format, or a name "
            "on the Hub (like openai-community/gpt2)."
        ) from error
    return folder


def _require_causal(config: Mapping[str, Any], name: str) -> None:
    """Raises UnknownModelError unless config.json says that the model continues a text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    # The list has the decoders of Whisper and its kin too, which without their encoder's output continue nothing.
    if str(kind) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise UnknownModelError(
            f"{name} is {f'a {kind} model' if kind else 'of unknown type'}, not a language model that continues a text."
            " Choose one in Hugging Face's format, for example gpt2."
        )


def read_tokenizer(folder: Path) -> Any | None:
    """transformers' own of this folder; None where it has none. Raises ModelUnavailableError for a damaged one."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailableError(
            f"The tokenizer in {folder} cannot be read ({_first_line(error)}); fetch the model again."
        ) from error


def refuse_long(folder: Path, n_prompt: int, n_tokens: int) -> None:
    """Raises OptionError, before anything is loaded, if the model has no positions for so many tokens."""
    config = read_object(folder / CONFIG)
    longest = config.get("n_positions", config.get("max_position_embeddings"))
    if isinstance(longest, int) and n_prompt + n_tokens > longest:
        raise OptionError(
            f"The model has {longest} positions, and the prompt takes {n_prompt}: {n_tokens} tokens do not fit. Ask "
            f"for at most {max(longest - n_prompt, 0)}."
        )


def find_gpt2() -> Path:
    """gpt2's folder, from this disk or from a Hub that answers within seconds (HF_HUB_OFFLINE: from this disk alone).

    Raises ModelError with a sentence that tells why it is not to be had, DiskFullError.
    """
    from huggingface_hub import constants

    name, offline = _HUB_NAMES["gpt2"], bool(constants.HF_HUB_OFFLINE)
    if find_cached(name, "main", None) is None and not offline and not is_reachable(name, None):
        raise ModelUnavailableError(f"{name} is not on this disk and the Hub does not answer.")
    return find_causal(name, offline=offline)


def make_random(folder: Path, n_layers: int = 12) -> Path:
    """A checkpoint of GPT-2-small's shape with random weights, at 16 bits; n_layers: other than its 12.

    Raises DiskFullError.
    """
    from safetensors import SafetensorError
    from transformers import GPT2Config, GPT2LMHeadModel

    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).half()
        try:
            model.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise DiskFullError(
                f"The random weights could not be written to {folder} ({_first_line(error)}). Free some space, or name "
                "another place for temporary files in TMPDIR."
            ) from error
    return folder


def _load(folder: Path, row: Precision, device: torch.device) -> Any:
    """The model on its device in the row's format. Raises ModelUnavailableError if it is damaged or has holes."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    unreadable = (OSError, ValueError, LookupError, TypeError, ArithmeticError, SafetensorError, StrictDataclassError)
    options: dict[str, Any] = {}
    if row.linear_class == "Linear8bitLt":
        options["quantization_config"] = config_8bit(_HEAD)
    elif row.linear_class == "Linear4bit":
        options["quantization_config"] = config_4bit(row, device, _HEAD)
    dtype = getattr(torch, row.kept_dtype_on(device.type))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": str(device)},
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, as one of ours
            **options,
        )
    except unreadable as error:
        raise ModelUnavailableError(
            f"{folder} holds no language model that can be read ({_first_line(error)}). Fetch it again, or "
            "choose another."
        ) from error
    lacking = {*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])}
    holes = sorted(lacking - {f"{_HEAD}.weight"})
    if holes:
        raise ModelUnavailableError(
            f"The checkpoint in {folder} lacks {len(holes)} of its weights ({holes[0]}, ...) or they do not fit its "
            f"{CONFIG}; fetch it again."
        )
    if not options:
        _convert_linears(model, row, dtype)
    return model.requires_grad_(row.autocast)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")


def _convert_linears(model: Any, row: Precision, dtype: torch.dtype) -> None:
    """Conv1D -> Linear, a layer at a time; and Int8Linear where the row says so."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if name in HEADS or not isinstance(module, Conv1D | torch.nn.Linear):
            continue
        weight = module.weight.detach()
        weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight
        if row.linear_class == "Int8Linear":
            new: torch.nn.Module = Int8Linear.from_weights(weight, module.bias, dtype=dtype)
        else:
            new = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
            new.weight = torch.nn.Parameter(weight)
            new.bias = module.bias
        model.set_submodule(name, new)
