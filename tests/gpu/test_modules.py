"""Rows whose layers have kernels of their own, inside the fast engine's graphs, on a real GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from model_loader.engine import GenerateRequest
from model_loader.fast.encoder import encode, preferred_attention
from model_loader.fast.encoder_ops import TorchEncoderOps
from model_loader.fast.engine import FastEngine
from model_loader.fast.slots import RuleTensors, Slots, make_slots
from model_loader.fast.step import decoder_step, each_layer
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderLayer, DecoderWeights, Norm, Projection
from model_loader.int8_linear import to_int8
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS
from tests.calibrated import calibrate_demo
from tests.gpu.test_fast import ENDLESS, N_STEPS, PROMPT, RULES, TOLERANCE, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

ROWS = [name for name, row in PRECISIONS.items() if row.fast and row.linear_class in ("Int8Linear", "Linear4bit")]
PLACE = torch.device("cuda")


@pytest.fixture(scope="module")
def mixed(features: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrations that left some layers in 16 bits: one of a joined projection, and one in front of an int8 layer."""
    kept = ("model.decoder.layers.1.self_attn.k_proj", "model.encoder.layers.0.fc1", "model.encoder.layers.2.fc2")
    return calibrate_demo(tmp_path_factory.mktemp("mixed"), features, device="cuda", kept=kept)


@pytest.fixture(scope="module", params=[*ROWS, "int8-static, some layers in 16 bits"])
def case(request: pytest.FixtureRequest, calibrations: Path, mixed: Path) -> tuple[str, Path]:
    """A row, and where its calibration is."""
    name, _, some = request.param.partition(",")
    return name, mixed if some else calibrations


@pytest.fixture(scope="module")
def engine(case: tuple[str, Path]) -> Iterator[FastEngine]:
    loaded = load_engine("demo", case[0], engine="fast", device="cuda", calibrations=case[1])
    assert isinstance(loaded, FastEngine) and loaded.report.engine == "fast"
    yield loaded
    loaded.close()


class Beside:
    """Ops in torch and between our kernels, each from torch's state: int8 rounds a value near a tie either way, and
    after a few layers the two would be as far apart as either is from 16 bits."""

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        from model_loader.fast.triton_ops import ModuleOps

        self.slots = slots
        self._copy = replace(slots, **{f.name: getattr(slots, f.name).clone() for f in fields(slots)[1:]})
        self._torch, self._own = TorchOps(weights, slots), ModuleOps(weights, self._copy)
        self._alive = (slots.finished == 0).nonzero()[:, 0]  # attention leaves finished rows out
        self.worst: dict[str, float] = {}

    def layers(self, layers: Sequence[DecoderLayer]) -> None:
        each_layer(self, layers)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._run, name)

    def _run(self, name: str, *arguments: object) -> None:
        getattr(self._torch, name)(*arguments)
        getattr(self._own, name)(*arguments)
        for expected, found in self._written(name, arguments):
            expected, found = expected.float()[self._alive], found.float()[self._alive]
            error = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
            self.worst[name] = max(error, self.worst.get(name, 0.0))
            assert error < TOLERANCE[torch.float16], f"{name} is off by {error:.1e}"
        for part in ("x", "query", "self_keys", "self_values", *_STATE):
            getattr(self._copy, part).copy_(getattr(self.slots, part))
        self._copy.attended_copy.copy_(self.slots.attended)
        self._own._inner = self.slots.inner.to(self._copy.inner_copy.dtype)
        self._own._addend = None

    def _written(self, name: str, arguments: tuple[object, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By row: what torch wrote, and what our kernels did."""
        own, slots = self._own, self.slots
        added = self._copy.x if own._addend is None else self._copy.x + own._addend
        written = {
            "qkv": (slots.query, self._copy.query),
            "cross_query": (slots.query, self._copy.query),
            "self_attention": (slots.attended, self._copy.attended_copy),
            "cross_attention": (slots.attended, self._copy.attended_copy),
            "expand": (slots.inner, own._inner),
            "head": (slots.logits, self._copy.logits),
            "choose": (slots.logprob, self._copy.logprob),
        }
        pairs = [written.get(name, (slots.x, added))]
        if name == "qkv":
            layer, rows, position = arguments[1], torch.arange(slots.n_rows, device=PLACE), slots.position.long()
            for cache in ("self_keys", "self_values"):
                pairs.append(tuple(getattr(s, cache)[layer][rows, :, position] for s in (slots, self._copy)))
        if name == "choose":
            pairs.append((slots.tokens, self._copy.tokens))
        return pairs


_STATE = ("tokens", "position", "finished", "logprob", "last_timestamp")


@pytest.mark.parametrize("n_rows", [1, 3, 32])
def test_every_operation_between_our_kernels_writes_what_torch_writes(engine: FastEngine, n_rows: int) -> None:
    weights = engine._loaded.decoder
    with torch.no_grad():
        slots = make_slots(weights, n_rows, quantised=False)
        for row in range(n_rows):
            projected = torch.randn(1500, len(weights.layers) * 2 * weights.d_model, device=PLACE).to(weights.dtype)
            TorchWindowOps().store_cross(projected, slots, row)
        start(slots)
        rules = RuleTensors.on(PLACE, weights.n_vocab)
        rules.load(ENDLESS)
        both = Beside(weights, slots)
        for _ in range(N_STEPS):
            decoder_step(weights, both, rules)
    assert slots.position.tolist()[0] == N_STEPS
    print(engine.report.effective, n_rows, {name: f"{error:.0e}" for name, error in both.worst.items()})


def test_whole_steps_between_our_kernels_are_near_torchs(engine: FastEngine) -> None:
    """What is added waits for the operation behind it, through all layers and from one step to the next."""
    from model_loader.fast.triton_ops import ModuleOps

    weights = engine._loaded.decoder
    with torch.no_grad():
        slots = make_slots(weights, 3, quantised=False)
        start(slots)
        copy = replace(slots, **{f.name: getattr(slots, f.name).clone() for f in fields(slots)[1:]})
        rules = RuleTensors.on(PLACE, weights.n_vocab)
        rules.load(ENDLESS)
        ops, own = TorchOps(weights, slots), ModuleOps(weights, copy)
        for _ in range(N_STEPS):
            decoder_step(weights, ops, rules)
            decoder_step(weights, own, rules)
            for name in ("x", "logits"):
                expected, found = (getattr(s, name)[[0, 2]] for s in (slots, copy))  # the other has finished
                assert float((found - expected).norm() / expected.norm()) < 0.1, name
            for name in (*_STATE, "self_keys", "self_values"):
                getattr(copy, name).copy_(getattr(slots, name))


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
    if network.encoder.layers[1].fc1.input_zero is None:
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
    engine: FastEngine, case: tuple[str, Path], features: torch.Tensor
) -> None:
    """Captured and replayed, alone and in a batch; the reference's drift from fp32 is the measure."""
    many = torch.cat([features.roll(31 * i, dims=2) - 0.02 * i for i in range(9)])
    name, home = case
    plain = load_engine("demo", name, engine="reference", device="cuda", warm_up=False, calibrations=home)
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
    alone = engine.select(engine.encode(many), [4])
    for _ in range(3):
        (text,) = engine.generate(alone, replace(asked, prompts=[PROMPT]))
        assert text.n_tokens > 0
    assert {f"decoder step of {n} rows" for n in (1, 16)} <= {capture.name for capture in engine.captures}
    plain.close()
    full.close()
