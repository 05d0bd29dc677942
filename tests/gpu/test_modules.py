"""Rows whose layers have kernels of their own, inside the fast engine's graphs, on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from model_loader.engine import GenerateRequest
from model_loader.fast.encoder import encode, preferred_attention
from model_loader.fast.encoder_ops import TorchEncoderOps
from model_loader.fast.engine import FastEngine
from model_loader.fast.slots import RuleTensors, make_slots
from model_loader.fast.step import decoder_step
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import Norm, Projection
from model_loader.int8_linear import to_int8
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS
from tests.gpu.test_fast import ENDLESS, N_STEPS, PROMPT, RULES, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

ROWS = [name for name, row in PRECISIONS.items() if row.fast and row.linear_class in ("Int8Linear", "Linear4bit")]
PLACE = torch.device("cuda")


@pytest.fixture(scope="module", params=ROWS)
def engine(request: pytest.FixtureRequest, calibrations: Path) -> Iterator[FastEngine]:
    loaded = load_engine("demo", request.param, engine="fast", device="cuda", calibrations=calibrations)
    assert isinstance(loaded, FastEngine) and loaded.report.engine == "fast"
    yield loaded
    loaded.close()


@pytest.mark.parametrize("n_rows", [1, 3, 32])
def test_a_step_between_our_kernels_computes_what_torch_computes(engine: FastEngine, n_rows: int) -> None:
    """Both go on from torch's state: int8 rounds a value near a tie either way, and a text would part there."""
    from model_loader.fast.triton_ops import ModuleOps

    weights = engine._loaded.decoder
    with torch.no_grad():
        slots = make_slots(weights, n_rows, quantised=False)
        for row in range(n_rows):
            projected = torch.randn(1500, len(weights.layers) * 2 * weights.d_model, device=PLACE).to(weights.dtype)
            TorchWindowOps().store_cross(projected, slots, row)
        start(slots)
        copy = replace(slots, **{f.name: getattr(slots, f.name).clone() for f in fields(slots)[1:]})
        rules = RuleTensors.on(PLACE, weights.n_vocab)
        rules.load(ENDLESS)
        ops, own = TorchOps(weights, slots), ModuleOps(weights, copy)
        alive = (slots.finished == 0).nonzero()[:, 0]
        worst = 0.0
        for _ in range(N_STEPS):
            decoder_step(weights, ops, rules)
            decoder_step(weights, own, rules)
            expected, found = (s.logits.index_select(0, alive) for s in (slots, copy))
            worst = max(worst, float((found - expected).norm() / expected.norm()))
            for name in ("tokens", "position", "finished", "logprob", "last_timestamp", "self_keys", "self_values"):
                getattr(copy, name).copy_(getattr(slots, name))
    print(engine.report.effective, n_rows, f"{worst:.1e}")
    assert slots.position.tolist()[0] == N_STEPS
    assert worst < 0.03


def test_the_encoder_between_our_kernels_computes_what_torch_computes(
    engine: FastEngine, features: torch.Tensor
) -> None:
    network = engine._loaded
    x = torch.cat([features, features.roll(500, dims=2)]).to(PLACE, torch.float16)
    with torch.no_grad(), preferred_attention(PLACE):
        expected = encode(network.encoder, TorchEncoderOps(), x).float()
        found = encode(network.encoder, network.encoder_ops, x).float()
    error = float((found - expected).norm() / expected.norm())
    print(engine.report.effective, f"{error:.1e}")
    assert error < 0.03


def test_values_are_rounded_to_int8_as_torch_rounds_them(engine: FastEngine) -> None:
    network = engine._loaded
    if network.encoder.layers[0].fc1.input_zero is None:
        pytest.skip("its inputs have no scale ahead of time")
    ahead = Projection(
        torch.empty(0),
        torch.empty(0),
        input_scale=torch.tensor(0.031, device=PLACE),
        input_zero=torch.tensor(-7.0, device=PLACE),
    )
    x = 2 * torch.randn(3, 1500, 256, device=PLACE).half()
    norm = Norm(torch.randn(256, device=PLACE).half(), torch.randn(256, device=PLACE).half(), 1e-5)
    ours, plain = network.encoder_ops, TorchEncoderOps()
    for found, expected in (
        (ours.norm(x, norm, ahead), plain.norm(x, norm, ahead)),
        (ours._taken(x, ahead), to_int8(x, ahead.input_scale, ahead.input_zero)),
        (ours.activated(x.clone(), ahead), to_int8(torch.nn.functional.gelu(x), ahead.input_scale, ahead.input_zero)),
    ):
        apart = (found.int() - expected.int()).abs()
        assert found.dtype == torch.int8 and int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 5e-3


def test_texts_are_the_reference_engines_but_for_rounding(
    engine: FastEngine, features: torch.Tensor, calibrations: Path
) -> None:
    """Captured and replayed, alone and in a batch; the reference's drift from fp32 is the measure."""
    many = torch.cat([features.roll(31 * i, dims=2) - 0.02 * i for i in range(9)])
    name = engine.report.effective
    plain = load_engine("demo", name, engine="reference", device="cuda", warm_up=False, calibrations=calibrations)
    full = load_engine("demo", "fp32", engine="reference", device="cuda", warm_up=False)
    in_full, expected = (each.first_logits(each.encode(many)).log_softmax(-1) for each in (full, plain))
    for _ in range(3):
        found = engine.first_logits(engine.encode(many)).log_softmax(-1)
    apart = [x - in_full - (x - in_full).mean(dim=-1, keepdim=True) for x in (expected, found)]
    reference_drift, drift = (float(x.abs().mean()) for x in apart)
    print(name, f"{reference_drift:.4f} {drift:.4f}")
    assert drift <= 1.25 * reference_drift + 1e-3
    asked = GenerateRequest([PROMPT] * 9, 40, RULES)
    texts = [s.tokens for s in engine.generate(engine.encode(many), asked)]
    for _ in range(2):
        assert [s.tokens for s in engine.generate(engine.encode(many), asked)] == texts
    assert {f"decoder step of {n} rows" for n in (1, 16)} <= {capture.name for capture in engine.captures}
    plain.close()
    full.close()
