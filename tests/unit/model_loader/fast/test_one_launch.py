"""The kernel of all layers, run on a processor (gpu_on_host.hpp), against the same operations in plain torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from model_loader.convert.packed import pack_decoder
from model_loader.fast.one_launch import SOURCE, Arguments, Memory, Sizes, arguments, sizes_of, unfit
from model_loader.fast.packing import Format
from model_loader.fast.slots import Slots, make_slots
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderWeights, take_decoder

HERE = Path(__file__).parent
N_BLOCKS, WORKERS = 3, 2
N_STEPS = 3
"""More than the first round of self-attention holds for one warp."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (apt install g++)")


def make_weights(form: Format, dtype: torch.dtype, width: int) -> DecoderWeights:
    model = deepcopy(make_model(width))
    if form is not Format.FLOAT:
        pack_decoder(model, form)
    return take_decoder(model.to(dtype) if form is Format.FLOAT else model, dtype)


@cache
def make_model(width: int) -> WhisperForConditionalGeneration:
    """Two layers, sixteen text and forty-five audio positions, LayerNorms that are not neutral."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=width, encoder_layers=1, decoder_layers=2, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, vocab_size=64,
        max_source_positions=45, max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    model.model.decoder.embed_tokens.weight.normal_(0.0, 1.0)[:, :3] += 8.0
    for module in model.model.decoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.normal_(1.0, 0.3)
            module.bias.normal_(0.0, 0.3)
        elif isinstance(module, torch.nn.Linear):
            module.weight.normal_(0.0, 0.06)
    return model


def flat(path: Path) -> str:
    """A source with the files that it includes of its own, each once."""
    seen: set[Path] = set()

    def read(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"$', lambda found: read(path.parent / found[1]), text, flags=re.MULTILINE)

    return read(path)


def build(folder: Path, cases: Sequence[Sizes]) -> list[Callable[[Arguments], bool]]:
    """The kernel for each of these sizes as a function of this process: compiled together, each in its namespace, once
    for the same text."""
    code = f"{flat(HERE / 'gpu_on_host.hpp')}\n{flat(SOURCE)}"
    parts = re.findall(r"^#include <.+>$", code, re.MULTILINE)
    code = re.sub(r"^#include <.+>$", "", code, flags=re.MULTILINE)
    for index, sizes in enumerate(cases):
        macros = {**sizes.macros, "decoder_layers": f"decoder_layers_{index}"}  # extern "C", which no namespace renames
        parts += [f"#undef {name}\n#define {name} {value}" for name, value in macros.items()]
        parts.append(
            f"namespace case_{index} {{\n{code}\n"
            f'extern "C" bool run_{index}(Arguments* a) {{\n'
            "  return run_grid(GRID, THREADS, SHARED_BYTES, [a] { decoder_layers(*a); });\n"
            "}\n"
            f'extern "C" int shared_bytes_{index}() {{ return SHARED_BYTES; }}\n'
            "}"
        )
    text = "\n".join(parts)
    library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        compile_text(text, library)
    loaded = ctypes.CDLL(str(library))
    functions = []
    for index, sizes in enumerate(cases):
        assert loaded[f"shared_bytes_{index}"]() == sizes.shared_bytes
        run = loaded[f"run_{index}"]
        run.restype = ctypes.c_bool
        functions.append(lambda given, run=run: run(ctypes.byref(given)))
    return functions


def compile_text(text: str, library: Path) -> None:
    partial = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(partial)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    partial.replace(library)  # at once, so that nobody loads half of it


def filled(weights: DecoderWeights, n_rows: int, *, quantised: bool) -> Slots:
    slots = make_slots(weights, n_rows, quantised=quantised)
    for row in range(n_rows):
        projected = torch.randn(weights.n_audio_ctx, len(weights.layers) * 2 * weights.d_model).to(weights.dtype)
        TorchWindowOps().store_cross(projected, slots, row)
    slots.finished.zero_()
    if n_rows > 2:
        slots.finished[1] = 1
    return slots


CASES = [
    (Format.FLOAT, torch.float16, 1, 256), (Format.FLOAT, torch.bfloat16, 3, 256),
    (Format.FLOAT, torch.float16, 12, 128),
    (Format.INT8, torch.float16, 1, 256), (Format.INT8, torch.float16, 9, 128),
    (Format.INT4, torch.float16, 1, 256), (Format.INT4, torch.float16, 4, 128),
]  # fmt: skip


def case_sizes(weights: DecoderWeights, n_rows: int, form: Format) -> Sizes:
    return replace(sizes_of(weights, n_rows, N_BLOCKS, quantised=form is not Format.FLOAT), workers=WORKERS)


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> dict[Sizes, Callable[[Arguments], bool]]:
    """Of every case; pytest keeps what was compiled from one run to the next."""
    cases = [case_sizes(make_weights(form, dtype, width), n_rows, form) for form, dtype, n_rows, width in CASES]
    return dict(zip(cases, build(request.config.cache.mkdir("kernel-on-host"), cases), strict=True))


@pytest.mark.parametrize(
    ("form", "dtype", "n_rows", "width"), CASES, ids=[f"{f.name}-{str(d)[6:]}-{r}-{w}" for f, d, r, w in CASES]
)
def test_one_launch_computes_what_the_operations_compute(
    form: Format, dtype: torch.dtype, n_rows: int, width: int, kernels: dict[Sizes, Callable[[Arguments], bool]]
) -> None:
    torch.manual_seed(0)
    weights = make_weights(form, dtype, width)
    assert unfit(weights, (9, 0)) is None
    slots = filled(weights, n_rows, quantised=form is not Format.FLOAT)
    other = filled(weights, n_rows, quantised=form is not Format.FLOAT)
    for name in ("cross_keys", "cross_values", "cross_scale"):
        getattr(other, name).copy_(getattr(slots, name))
    sizes = case_sizes(weights, n_rows, form)
    run, memory = kernels[sizes], Memory(weights, other)
    ops = TorchOps(weights, slots)
    alive = slots.finished == 0
    for step in range(N_STEPS):
        # Rows stand at other positions: the last is as far behind as it can be.
        position = torch.full((n_rows,), step, dtype=torch.int32)
        position[-1] = max(0, step - 5)
        tokens = torch.randint(64, (n_rows, 16), dtype=torch.int32)
        for each in (slots, other):
            each.position.copy_(position)
            each.tokens.copy_(tokens)
        ops.embed()
        for index, layer in enumerate(weights.layers):
            ops.qkv(layer.qkv, index)
            ops.self_attention(index)
            ops.add_attended(layer.out)
            ops.cross_query(layer.cross_query)
            ops.cross_attention(index)
            ops.add_attended(layer.cross_out)
            ops.expand(layer.fc1)
            ops.add_inner(layer.fc2)
        assert run(arguments(weights, other, memory)), "a block wrote behind its shared memory"
        tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3
        for name in ("x", "self_keys", "self_values"):
            by_row = 1 if name.startswith("self_") else 0
            expected, found = (getattr(each, name).float().transpose(0, by_row)[alive] for each in (slots, other))
            error = (found - expected).norm() / expected.norm()
            assert error <= tolerance, f"step {step}: {name} is off by {error:.1e}"
        sums = other.x_copy.float().sum(1)
        made = memory.last_stats.view(2, -1, 128)[0, :n_rows, : sizes.n_parts].sum(1)
        torch.testing.assert_close(made[alive], sums[alive], rtol=1e-3, atol=1e-2)
    assert int(memory.barrier[0]) == int(memory.barrier[1]) == N_STEPS * 8 * len(weights.layers) * N_BLOCKS
