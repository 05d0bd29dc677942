"""The one table of precisions: a row each, and what a row says. No conversion code, no torch at import.

A precision is a number format and how it is computed, nothing else. Whatever lists, offers, loads, proves or tests
precisions reads PRECISIONS, so that a new row (one row here, one function in convert/) appears everywhere by itself.

Sources of the requirements: CUDA C++ programming guide, arithmetic instructions by compute capability (fp16 5.3, bf16
8.0); bitsandbytes 0.50 installation guide (LLM.int8() 7.5, NF4/FP4 6.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from errors import UnknownPrecisionError
from model_loader.convert.bnb import load_bnb_4bit, load_bnb_8bit
from model_loader.convert.cast import load_cast
from model_loader.convert.fp8 import load_fp8
from model_loader.convert.int8 import load_int8_dynamic, load_int8_static
from model_loader.convert.packed import load_packed

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from model_loader.device import DeviceInfo

    Convert = Callable[["Precision", Path, torch.device], torch.nn.Module]
    """(row, checkpoint folder, device) -> a Whisper model on that device, in the row's format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One row. Formats are named as torch names dtypes, plus nf4 and fp4."""

    name: str
    aliases: tuple[str, ...] = ()
    label: str
    """For menus: a few words."""
    description: str
    """For users: one sentence on how weights are stored and how the arithmetic is done."""
    stored_dtype: str
    """Of the linear layers' weights in memory."""
    kept_dtype: str
    """Of everything else: convolutions, positions, LayerNorms, token embedding and the output head tied to it."""
    compute_dtype: str
    """Of the activations between layers, on a GPU. LayerNorm statistics are fp32 inside torch in every row."""
    cpu_kept_dtype: str | None = None
    """kept_dtype and compute_dtype on a CPU where they differ."""
    bytes_per_weight: float
    """Of the linear layers, scales included."""
    linear_class: str = "Linear"
    """Class of the linear layers after the conversion; the proof compares it with what is in memory."""
    kept_linears: tuple[str, ...] = ()
    """Names, with *, of the linear layers that stay in the kept format by design. The proof takes no conversion's word
    for it: whatever else is left there is an error. A calibrated row adds what its calibration kept."""
    encoder_class: str | None = None
    """Class of the encoder's linear layers where it is another than the decoder's; linear_class is then the decoder's
    alone, and so is stored_dtype."""
    encoder_dtype: str | None = None
    """Stored format of the encoder's linear layers where encoder_class is given."""
    encoder_kept: tuple[str, ...] = ()
    """Of these, the names of those that stay in the kept format."""
    fast: bool = False
    """The fast engine can run it; other rows run on transformers' own generate."""
    why_reference: str = "its layers have no kernel for the fast engine's step"
    """Why the fast engine cannot, as a clause."""
    autocast: bool = False
    """Compute under torch.autocast instead of in the stored format."""
    needs_calibration: bool = False
    """Loads only from a folder that `python app.py calibrate` made of the checkpoint."""
    tolerance: float
    """Largest mean difference of log-probabilities from fp32 over all tokens and positions of the demo checkpoint's
    greedy text of examples/english.flac. About twice what was measured: bf16 0.021, int8 0.013, int4 0.231,
    fp8 0.056, bnb-int8 0.050, bnb-nf4 0.225, bnb-fp4 0.371 on a CPU."""
    convert: Convert
    refusal: Callable[[DeviceInfo], str | None]
    """Why this device cannot run the row, as a clause; None where it can."""
    alternatives: tuple[str, ...] = ("fp16", "bf16", "fp32")
    """Offered in this order where the row cannot run."""

    def unavailable(self, device: DeviceInfo) -> str | None:
        """The reason and the nearest row that runs, as a sentence; None where this device can run it."""
        reason = self.refusal(device)
        if reason is None:
            return None
        usable = [name for name in self.alternatives if PRECISIONS[name].refusal(device) is None]
        return f"{self.name} {reason}. Choose {usable[0]}." if usable else f"{self.name} {reason}."

    @property
    def linears(self) -> frozenset[tuple[str, str]]:
        """(class, stored format) of the linear layers that must be there, each of them, and no others."""
        own = {(self.linear_class, self.stored_dtype)}
        if self.encoder_class is not None and self.encoder_dtype is not None:
            own.add((self.encoder_class, self.encoder_dtype))
        return frozenset(own)

    def engine(self, asked: str = "auto") -> str:
        """fast or reference, where one of these or auto is asked for; some checkpoints leave auto the reference."""
        return "fast" if self.fast and asked != "reference" else "reference"

    def kept_dtype_on(self, device_kind: str) -> str:
        """device_kind: cuda or cpu."""
        return (self.cpu_kept_dtype or self.kept_dtype) if device_kind == "cpu" else self.kept_dtype

    def compute_dtype_on(self, device_kind: str) -> str:
        """device_kind: cuda or cpu."""
        return (self.cpu_kept_dtype or self.compute_dtype) if device_kind == "cpu" else self.compute_dtype


def _always(device: DeviceInfo) -> str | None:
    return None


def _needs_gpu(device: DeviceInfo, *, capability: tuple[int, int]) -> str | None:
    """fp16 on a CPU: no faster than fp32 even with AVX512-FP16 (318 against 313 ms a window, demo checkpoint)."""
    if device.kind != "cuda":
        return "needs a GPU: a CPU computes in 16 bits with bf16, and no faster in fp16 than in fp32"
    return _capability(device, capability)


def _capability(device: DeviceInfo, needed: tuple[int, int]) -> str | None:
    if device.kind == "cpu" or device.capability is None or device.capability >= needed:
        return None
    have, need = (f"{major}.{minor}" for major, minor in (device.capability, needed))
    return f"needs a GPU of compute capability {need} or newer; {device.name} has {have}"


def _needs_float8(device: DeviceInfo) -> str | None:
    """Multiplying float8 in a CPU's float32 is as slow as fp32 and less exact: of use to tests alone."""
    if device.kind != "cuda":
        return "needs a GPU that multiplies 8-bit floats (compute capability 8.9 or newer)"
    return _capability(device, (8, 9))


def _needs_bitsandbytes(device: DeviceInfo, *, capability: tuple[int, int]) -> str | None:
    if find_spec("bitsandbytes") is None:
        return "needs the package bitsandbytes, which is not installed (pip install bitsandbytes)"
    return _capability(device, capability)


_AUDIO_CACHE = ("model.decoder.*.encoder_attn.k_proj", "model.decoder.*.encoder_attn.v_proj")
"""Keys and values of the audio: projected once a window, so that smaller weights would save nothing."""

_ROWS = (
    Precision(
        name="fp32",
        aliases=("float32", "full"),
        label="fp32 · full precision",
        description="Weights and arithmetic in 32 bits, TF32 off: the yardstick for every other row.",
        stored_dtype="float32",
        kept_dtype="float32",
        compute_dtype="float32",
        bytes_per_weight=4.0,
        tolerance=0.0,
        fast=True,
        convert=load_cast,
        refusal=_always,
    ),
    Precision(
        name="fp16-autocast",
        aliases=("autocast", "mixed", "amp"),
        label="fp16 autocast · mixed",
        description="Weights stored in 32 bits, cast to 16-bit floats while computing; LayerNorm and softmax in 32.",
        stored_dtype="float32",
        kept_dtype="float32",
        compute_dtype="float16",
        bytes_per_weight=4.0,
        autocast=True,
        tolerance=0.02,
        why_reference="torch casts its weights anew at every call, which is what this row shows",
        convert=load_cast,
        refusal=partial(_needs_gpu, capability=(5, 3)),
        alternatives=("bf16", "fp32"),
    ),
    Precision(
        name="fp16",
        aliases=("float16", "half"),
        label="fp16 · half the memory",
        description="Weights and arithmetic in 16-bit floats (10 bits of mantissa, largest value 65504).",
        stored_dtype="float16",
        kept_dtype="float16",
        compute_dtype="float16",
        bytes_per_weight=2.0,
        tolerance=0.02,
        fast=True,
        convert=load_cast,
        refusal=partial(_needs_gpu, capability=(5, 3)),
        alternatives=("bf16", "fp32"),
    ),
    Precision(
        name="bf16",
        aliases=("bfloat16",),
        label="bf16 · half the memory, wide range",
        description="Weights and arithmetic in bfloat16 (7 bits of mantissa, the range of fp32: it cannot overflow).",
        stored_dtype="bfloat16",
        kept_dtype="bfloat16",
        compute_dtype="bfloat16",
        bytes_per_weight=2.0,
        tolerance=0.05,
        fast=True,
        convert=load_cast,
        refusal=partial(_capability, needed=(8, 0)),
    ),
    Precision(
        name="int8",
        aliases=("w8",),
        label="int8 · 8-bit decoder",
        description="Decoder weights and audio cache in 8-bit integers, computed in 16-bit floats; encoder in 16 bits "
        "(32 on a processor).",
        stored_dtype="int8",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=1.0,
        linear_class="PackedLinear",
        kept_linears=("model.encoder.*", *_AUDIO_CACHE),
        fast=True,
        tolerance=0.03,
        convert=load_packed,
        refusal=partial(_capability, needed=(5, 3)),
    ),
    Precision(
        name="int4",
        aliases=("w4",),
        label="int4 · 4-bit decoder",
        description="Decoder weights in 4-bit integers, 128 a scale, audio cache in 8, computed in 16-bit floats; "
        "encoder in 16 bits (32 on a processor).",
        stored_dtype="int4",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=0.516,
        linear_class="PackedLinear",
        kept_linears=("model.encoder.*", *_AUDIO_CACHE),
        fast=True,
        tolerance=0.5,
        convert=load_packed,
        refusal=partial(_capability, needed=(5, 3)),
    ),
    Precision(
        name="fp8",
        aliases=("float8", "e4m3", "f8"),
        label="fp8 · 8-bit float encoder, int8 decoder",
        description="Encoder weights and activations in 8-bit floats (e4m3, one scale a layer), attention's output "
        "projection in 16 bits; decoder as in int8.",
        stored_dtype="int8",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=1.0,
        linear_class="PackedLinear",
        encoder_class="Float8Linear",
        encoder_dtype="float8_e4m3fn",
        encoder_kept=("out_proj",),
        kept_linears=("model.encoder.*.out_proj", *_AUDIO_CACHE),
        fast=True,
        tolerance=0.12,
        convert=load_fp8,
        refusal=_needs_float8,
        alternatives=("int8", "fp16", "bf16", "fp32"),
    ),
    Precision(
        name="bnb-int8",
        aliases=("8bit", "8-bit", "llm-int8"),
        label="bnb-int8 · bitsandbytes 8 bit",
        description="Linear weights in 8-bit integers, outliers in fp16 (LLM.int8()). On an H200 it cost the demo "
        "model 0.9 % of its Russian words: four.",
        stored_dtype="int8",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="bfloat16",
        bytes_per_weight=1.0,
        linear_class="Linear8bitLt",
        tolerance=0.1,
        why_reference="bitsandbytes looks for outliers at every call, and a captured step cannot wait for them",
        convert=load_bnb_8bit,
        refusal=partial(_needs_bitsandbytes, capability=(7, 5)),
    ),
    Precision(
        name="bnb-nf4",
        aliases=("4bit", "4-bit", "nf4"),
        label="bnb-nf4 · bitsandbytes 4 bit",
        description="Linear weights in 4-bit NormalFloat with double quantisation, expanded to 16 bits (32 on a "
        "processor) to compute.",
        stored_dtype="nf4",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=0.516,
        linear_class="Linear4bit",
        tolerance=0.5,
        fast=True,
        convert=load_bnb_4bit,
        refusal=partial(_needs_bitsandbytes, capability=(6, 0)),
    ),
    Precision(
        name="bnb-fp4",
        aliases=("fp4",),
        label="bnb-fp4 · bitsandbytes 4-bit float",
        description="Linear weights in 4-bit floats with double quantisation, expanded to 16 bits (32 on a processor) "
        "to compute.",
        stored_dtype="fp4",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=0.516,
        linear_class="Linear4bit",
        tolerance=0.8,
        fast=True,
        convert=load_bnb_4bit,
        refusal=partial(_needs_bitsandbytes, capability=(6, 0)),
    ),
    Precision(
        name="int8-static",
        aliases=("static", "int8static", "w8a8-static"),
        label="int8-static · calibrated 8 bit",
        description="Weights and activations in 8-bit integers; activation scales measured beforehand on recordings. "
        "On an H200 it cost the demo model 0.5 % of its Russian words: two.",
        stored_dtype="int8",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=1.0,
        linear_class="Int8Linear",
        needs_calibration=True,
        tolerance=0.2,
        fast=True,
        convert=load_int8_static,
        refusal=partial(_capability, needed=(7, 5)),
    ),
    Precision(
        name="int8-dynamic",
        aliases=("dynamic", "w8a8"),
        label="int8-dynamic · 8 bit",
        description="Weights and activations in 8-bit integers; activation scales computed for each position.",
        stored_dtype="int8",
        kept_dtype="float16",
        compute_dtype="float16",
        cpu_kept_dtype="float32",
        bytes_per_weight=1.0,
        linear_class="Int8Linear",
        tolerance=0.1,
        fast=True,
        convert=load_int8_dynamic,
        refusal=partial(_capability, needed=(7, 5)),
    ),
)

PRECISIONS: dict[str, Precision] = {row.name: row for row in _ROWS}
"""All rows by name, in the order of menus."""

AUTO = "auto"


def resolve_precision(name: str, device: DeviceInfo | None = None) -> Precision:
    """The row of a name or alias, in any case; '_' counts as '-'. 'auto' needs the device.

    Raises UnknownPrecisionError naming the rows.
    """
    word = name.strip().lower().replace("_", "-")
    if is_automatic(name) and device is not None:
        return automatic_precision(device)
    names = {alias: row for row in PRECISIONS.values() for alias in (row.name, *row.aliases)}
    if word in names:
        return names[word]
    close = get_close_matches(word, names, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UnknownPrecisionError(f"There is no precision '{name}'; choose one of {', '.join(PRECISIONS)}.{hint}")


def is_automatic(name: str) -> bool:
    """'auto', in any case."""
    return name.strip().lower() == AUTO


def by_accuracy() -> tuple[Precision, ...]:
    """Most accurate first, by measured tolerance; of equal ones what the fast engine runs, then the table's order."""
    return tuple(sorted(PRECISIONS.values(), key=lambda row: (row.tolerance, not row.fast)))


def automatic_precision(device: DeviceInfo) -> Precision:
    """The most accurate row that runs. Whether it fits depends on the checkpoint: fit.choose_precision."""
    return next(row for row in by_accuracy() if row.refusal(device) is None)
