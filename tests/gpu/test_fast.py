"""The fast engine on a real GPU: every Triton kernel against plain torch, graphs, tokens, memory that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from model_loader.convert.packed import pack_decoder
from model_loader.engine import GenerateRequest, ReferenceEngine, TokenRules
from model_loader.fast.choosing import mask_logits
from model_loader.fast.engine import FastEngine
from model_loader.fast.graph import Captured
from model_loader.fast.one_launch import OneLaunch
from model_loader.fast.packing import Format
from model_loader.fast.slots import MAX_ROWS, RuleTensors, Slots, make_slots, mix_seed
from model_loader.fast.step import decoder_step, each_layer
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderLayer, DecoderWeights, take_decoder
from model_loader.loader import load_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MIB = 2**20
EOT, SOT, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS = 4396, 4397, 4398, 4498, 4502
RULES = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, tuple(range(EOT + 1, NO_TIMESTAMPS)), (220,), 1500)
ENDLESS = replace(RULES, suppress=(EOT, *RULES.suppress))
PROMPT = [SOT, ENGLISH, TRANSCRIBE]
N_STEPS = 70
"""More than one block of the text cache."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Largest relative error of what an operation writes, after N_STEPS steps of two layers."""


def make_weights(form: Format, dtype: torch.dtype, width: int) -> DecoderWeights:
    """Two layers whose LayerNorms are not neutral and whose residual has a few large channels."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=width, encoder_layers=1, decoder_layers=2, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, vocab_size=6004,
        pad_token_id=EOT, bos_token_id=EOT, eos_token_id=EOT, decoder_start_token_id=SOT,
    )  # fmt: skip
    with torch.device("cuda"):
        model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    for module in model.model.decoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.normal_(1.0, 0.3)
            module.bias.normal_(0.0, 0.3)
        elif isinstance(module, torch.nn.Linear):
            module.weight.normal_(0.0, 0.06)
    model.model.decoder.embed_tokens.weight[:, :3] += 8.0
    model.tie_weights()
    if form is not Format.FLOAT:
        pack_decoder(model, form)
    return take_decoder(model.to(dtype) if form is Format.FLOAT else model, dtype)


class Both:
    """Ops that run in torch and in Triton, and compare what each wrote after every one.

    at_once: all layers, and the embedding in front of them, in one launch.
    """

    def __init__(self, weights: DecoderWeights, slots: Slots, *, at_once: bool = False) -> None:
        from model_loader.fast.triton_ops import TritonOps

        self.slots = slots
        self._copy = replace(slots, **{f.name: getattr(slots, f.name).clone() for f in fields(slots)[1:]})
        self._at_once = at_once
        one_launch = OneLaunch(weights, self._copy) if at_once else None
        self._torch, self._triton = TorchOps(weights, slots), TritonOps(weights, self._copy, one_launch=one_launch)
        # Products of 4-bit weights are taken from sums around 1, see kernels/linear.py: an error of 1e-5 a projection.
        coarse = weights.layers[0].qkv.format is Format.INT4
        self._tolerance = max(TOLERANCE[weights.dtype], 2e-4 if coarse else 0.0)
        self._alive = (slots.finished == 0).nonzero()[:, 0]  # kernels leave finished rows out
        self.worst: dict[str, float] = {}

    def embed(self) -> None:
        self._run("embed") if not self._at_once else self._torch.embed()

    def layers(self, layers: list[DecoderLayer]) -> None:
        self._run("layers", layers) if self._at_once else each_layer(self, layers)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._run, name)

    def _run(self, name: str, *arguments: object) -> None:
        if name == "choose":
            self._copy.logits.copy_(self.slots.logits)
        getattr(self._torch, name)(*arguments)
        getattr(self._triton, name)(*arguments)
        for part in WRITES[name]:
            self._compare(name, part)

    def _compare(self, operation: str, part: str) -> None:
        expected = getattr(self.slots, part)
        found = getattr(self._triton, f"_{part}") if part in ("attended", "inner") else getattr(self._copy, part)
        by_row = 1 if part.startswith("self_") else 0
        expected, found = (tensor.index_select(by_row, self._alive) for tensor in (expected, found))
        if not expected.is_floating_point() or operation == "choose":
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=f"{operation} wrote other {part}")
            return
        error = ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)).item()
        self.worst[operation] = max(error, self.worst.get(operation, 0.0))
        assert error <= self._tolerance, f"{operation} wrote {part} with a relative error of {error:.1e}"


WRITES = {
    "embed": ("x",),
    "qkv": ("query", "self_keys", "self_values"),
    "self_attention": ("attended",),
    "cross_query": ("query",),
    "cross_attention": ("attended",),
    "add_attended": ("x",),
    "expand": ("inner",),
    "add_inner": ("x",),
    "layers": ("x", "self_keys", "self_values"),
    "head": ("logits",),
    "choose": ("tokens", "position", "finished", "logprob", "last_timestamp"),
}


def filled_slots(weights: DecoderWeights, n_rows: int, *, quantised: bool) -> Slots:
    """Random audio caches, through the operation that fills them."""
    slots = make_slots(weights, n_rows, quantised=quantised)
    n_values = len(weights.layers) * 2 * weights.d_model
    for row in range(n_rows):
        projected = torch.randn(weights.n_audio_ctx, n_values, device="cuda").to(weights.dtype)
        TorchWindowOps().store_cross(projected, slots, row)
    return slots


def start(slots: Slots, temperature: float = 0.0) -> None:
    for row in range(slots.n_rows):
        slots.begin(row, PROMPT, max_new_tokens=400, temperature=temperature, seed=3, timestamps=True)
    # Rows must not be alike: other first tokens, one finished, the last without timestamps.
    slots.tokens[:, 0] = torch.arange(slots.n_rows, dtype=torch.int32, device="cuda") + 100
    if slots.n_rows > 2:
        slots.finished[1] = 1
        slots.timed[-1] = 0


CASES = [
    (Format.FLOAT, torch.float32), (Format.INT8, torch.float32), (Format.INT4, torch.float32),
    (Format.FLOAT, torch.float16), (Format.INT8, torch.float16), (Format.INT4, torch.float16),
    (Format.FLOAT, torch.bfloat16), (Format.INT8, torch.bfloat16), (Format.INT4, torch.bfloat16),
]  # fmt: skip


IN_ONE_LAUNCH = [
    (form, dtype)
    for form, dtype in CASES
    if dtype == torch.float16 or (form is Format.FLOAT and dtype == torch.bfloat16)
]


@pytest.mark.parametrize("n_rows", [1, 3, 8, 32])
@pytest.mark.parametrize(("form", "dtype"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_every_operation_writes_what_torch_writes(form: Format, dtype: torch.dtype, n_rows: int) -> None:
    weights = make_weights(form, dtype, 384)
    slots = filled_slots(weights, n_rows, quantised=form is not Format.FLOAT)
    start(slots)
    rules = RuleTensors.on(torch.device("cuda"), weights.n_vocab)
    rules.load(ENDLESS)
    both = Both(weights, slots)
    with torch.no_grad():
        for _ in range(N_STEPS):
            decoder_step(weights, both, rules)
            # A row whose token differs by a tie would differ ever after; both go on from torch's.
            both._copy.tokens.copy_(slots.tokens)
    assert slots.position.tolist()[0] == N_STEPS
    print({name: f"{error:.0e}" for name, error in both.worst.items()})


@pytest.mark.parametrize("n_rows", [1, 3, 4, 8, 32])
@pytest.mark.parametrize(("form", "dtype"), IN_ONE_LAUNCH, ids=str)
def test_one_launch_writes_what_torch_writes(form: Format, dtype: torch.dtype, n_rows: int) -> None:
    weights = make_weights(form, dtype, 384)
    slots = filled_slots(weights, n_rows, quantised=form is not Format.FLOAT)
    start(slots)
    rules = RuleTensors.on(torch.device("cuda"), weights.n_vocab)
    rules.load(ENDLESS)
    both = Both(weights, slots, at_once=True)
    with torch.no_grad():
        for _ in range(N_STEPS):
            decoder_step(weights, both, rules)
            both._copy.tokens.copy_(slots.tokens)
    assert slots.position.tolist()[0] == N_STEPS
    print({name: f"{error:.0e}" for name, error in both.worst.items()})


@pytest.mark.parametrize("width", [256, 512, 768, 1024, 1280])
@pytest.mark.parametrize("form", [Format.FLOAT, Format.INT8, Format.INT4])
def test_every_whisper_width_computes_right(form: Format, width: int) -> None:
    weights = make_weights(form, torch.float16, width)
    rules = RuleTensors.on(torch.device("cuda"), weights.n_vocab)
    rules.load(ENDLESS)
    for n_rows in (1, 16):
        slots = filled_slots(weights, n_rows, quantised=form is not Format.FLOAT)
        start(slots)
        with torch.no_grad():
            for at_once in (False, True):
                both = Both(weights, slots, at_once=at_once)
                for _ in range(4):
                    decoder_step(weights, both, rules)
                    both._copy.tokens.copy_(slots.tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n_rows", [1, 32])
def test_tokens_are_chosen_as_torch_chooses_them(n_rows: int, temperature: float) -> None:
    """On logits that lean to text, to neither, or to timestamps; large vocabulary; draws included."""
    from model_loader.fast.triton_ops import TritonOps

    weights = make_weights(Format.FLOAT, torch.float16, 256)
    big = torch.zeros(51866, 256, device="cuda", dtype=torch.float16)
    weights.tokens = big
    rules = RuleTensors.on(torch.device("cuda"), 51866)
    rules.load(TokenRules(50257, 50364, 50365, suppress=(1, 2, 50257, 51000), begin_suppress=(220,),
                          max_initial_timestamp_index=50))  # fmt: skip
    slots = make_slots(weights, n_rows, quantised=False)
    start(slots, temperature)
    slots.seed.copy_(torch.arange(n_rows, dtype=torch.int32) + mix_seed(1, temperature) // 2)
    copy = replace(slots, **{f.name: getattr(slots, f.name).clone() for f in fields(slots)[1:]})
    torch_ops, triton_ops = TorchOps(weights, slots), TritonOps(weights, copy)
    generator = torch.Generator("cuda").manual_seed(0)
    for step in range(60):
        logits = 3 * torch.randn(n_rows, 51866, device="cuda", generator=generator)
        logits[:, 50365:] += (-6.0, -1.0, 4.0)[step % 3]
        for ops in (torch_ops, triton_ops):
            ops.slots.logits.copy_(logits)
            ops.choose(rules)
        for part in WRITES["choose"]:
            torch.testing.assert_close(getattr(copy, part), getattr(slots, part), rtol=1e-4, atol=2e-3)
    assert (slots.tokens[0, 3:50] >= 50365).any() and (slots.tokens[0, 3:50] < 50257).any()


def test_a_logit_that_is_not_a_number_ends_its_row_only() -> None:
    from model_loader.fast.triton_ops import TritonOps

    weights = make_weights(Format.FLOAT, torch.float16, 256)
    rules = RuleTensors.on(torch.device("cuda"), weights.n_vocab)
    rules.load(RULES)
    slots = make_slots(weights, 4, quantised=False)
    for row in range(4):
        slots.begin(row, [SOT], max_new_tokens=9, temperature=0.0, seed=0, timestamps=False)
    slots.logits.normal_()
    slots.logits[2, 5000] = math.nan
    expected = mask_logits(slots.logits, slots, rules).argmax(1).tolist()
    TritonOps(weights, slots).choose(rules)
    assert slots.tokens[:, 1].tolist() == [*expected[:2], EOT, expected[3]]
    assert slots.finished.tolist() == [0, 0, 1, 0] and slots.logprob.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_audio_cache_is_written_as_torch_writes_it(dtype: torch.dtype, quantised: bool) -> None:
    from model_loader.fast.triton_ops import TritonWindowOps

    weights = make_weights(Format.FLOAT, dtype, 384)
    one, other = (make_slots(weights, 3, quantised=quantised) for _ in range(2))
    projected = (torch.randn(1500, 2 * 2 * 384, device="cuda") * torch.rand(2 * 2 * 384, device="cuda")).to(dtype)
    for ops, slots in ((TorchWindowOps(), one.first(2)), (TritonWindowOps(), other.first(2))):
        ops.store_cross(projected, slots, 1)
    assert torch.equal(other.cross_scale, one.cross_scale)
    for found, expected in ((other.cross_keys, one.cross_keys), (other.cross_values, one.cross_values)):
        assert torch.equal(found, expected)
        assert found[:, 0].eq(0).all() and found[:, 2].eq(0).all()


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_captured_function_computes_anew_and_names_a_wrong_argument() -> None:
    captured = Captured(lambda x, y: x @ y + 1, "product", has_state=False)
    y = torch.eye(8, device="cuda")
    for _ in range(3):
        x = torch.randn(4, 8, device="cuda")
        torch.testing.assert_close(captured(x, y), x + 1)
    assert captured.capture is not None and captured.capture.capture_s > 0
    with pytest.raises(ValueError, match=r"argument 0 of product was captured as float32 \[4, 8\]"):
        captured(torch.randn(5, 8, device="cuda"), y)
    with pytest.raises(ValueError, match="2 arguments, not 1"):
        captured(y)
    captured.release()
    with pytest.raises(RuntimeError, match="product was released"):
        captured(x, y)


def test_a_function_with_state_is_run_once_for_every_call() -> None:
    total = torch.zeros(1, device="cuda")
    captured = Captured(lambda: total.add_(1), "counter", has_state=True)
    for count in range(1, 6):
        captured()
        assert total.item() == count
    captured.release()


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Iterator[ReferenceEngine]:
    engine = load_engine("demo", "fp32", engine="reference", device="cuda", warm_up=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fast() -> Iterator[FastEngine]:
    engine = load_engine("demo", "fp32", engine="fast", device="cuda")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def many(features: torch.Tensor) -> torch.Tensor:
    """Forty windows: the tone, shifted and faded more and more."""
    return torch.cat([features.roll(31 * i, dims=2) - 0.02 * i for i in range(40)])


@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize("n", [1, 3, 8, 40])
def test_tokens_are_the_reference_engines_at_fp32(
    fast: FastEngine, reference: ReferenceEngine, many: torch.Tensor, n: int, timestamps: bool
) -> None:
    prompts = [PROMPT if timestamps else [*PROMPT, NO_TIMESTAMPS]] * n
    asked = GenerateRequest(prompts, 60, RULES, timestamps=timestamps)
    expected = reference.generate(reference.encode(many[:n]), asked)
    for _ in range(3):  # as it is, captured, replayed
        found = fast.generate(fast.encode(many[:n]), asked)
        assert [s.tokens for s in found] == [s.tokens for s in expected]
        assert [s.finished for s in found] == [s.finished for s in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-3)


def test_graphs_are_reported(fast: FastEngine, many: torch.Tensor) -> None:
    for _ in range(3):  # the first call of a size is not captured
        fast.generate(fast.encode(many[:2]), GenerateRequest([PROMPT] * 2, 9, RULES))
    names = {capture.name for capture in fast.captures}
    assert {"decoder step of 2 rows", "encoder of 2 windows"} <= names
    assert all(capture.capture_s > 0 and capture.n_bytes >= 0 for capture in fast.captures)


def test_batch_size_and_order_change_no_token(fast: FastEngine, many: torch.Tensor) -> None:
    encoded = fast.encode(many)
    for temperature in (0.0, 0.8):
        asked = GenerateRequest([PROMPT] * 40, 30, RULES, temperature=temperature, seed=2)
        together = [s.tokens for s in fast.generate(encoded, asked)]
        for picked in ([7], [39, 0, 12], [5, 4, 3, 2, 1, 0, 9]):
            part = fast.generate(fast.select(encoded, picked), replace(asked, prompts=[PROMPT] * len(picked)))
            assert [s.tokens for s in part] == [together[i] for i in picked]


@pytest.mark.parametrize(
    ("name", "worst"), [("fp16", 0.02), ("bf16", 0.1), ("int8", 0.05), ("int4", 0.1), ("fp8", 0.1)]
)
def test_rows_compute_what_the_reference_computes_in_the_same_format(
    name: str, worst: float, many: torch.Tensor
) -> None:
    one = load_engine("demo", name, engine="reference", device="cuda", warm_up=False)
    other = load_engine("demo", name, engine="fast", device="cuda", warm_up=False)
    for n in (1, 5):
        expected, found = (e.first_logits(e.encode(many[:n])).log_softmax(-1) for e in (one, other))
        assert float((found - expected).abs().mean()) <= worst
    one.close()
    other.close()


def test_beams_and_word_times_come_from_the_same_checkpoint(
    fast: FastEngine, reference: ReferenceEngine, many: torch.Tensor
) -> None:
    """On transformers, loaded beside the engine when first asked for; windows were encoded by our own encoder."""
    own, plain = fast.encode(many[:2]), reference.encode(many[:2])
    asked = GenerateRequest([PROMPT] * 2, 16, RULES, beam_size=3)
    texts = [s.tokens for s in fast.generate(own, asked)]
    assert texts == [s.tokens for s in reference.generate(plain, asked)] and all(texts)
    tokens = [*PROMPT, *texts[0]]
    found, expected = (e.attend(e.select(h, [0]), tokens, 1500).focus for e, h in ((fast, own), (reference, plain)))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_stop_is_seen_soon(fast: FastEngine, many: torch.Tensor) -> None:
    fast.capture()  # rows for both, so that neither waits for the other
    asked: list[int] = []

    def stop_at_fourth() -> bool:
        """Asked at every look at the rows."""
        asked.append(1)
        return len(asked) >= 4

    request = GenerateRequest([PROMPT] * 2, 400, ENDLESS, should_stop=stop_at_fourth)
    found = fast.generate(fast.encode(many[:2]), request)
    assert len(asked) == 4 and all(0 < s.n_tokens <= 10 and not s.finished for s in found)


def test_an_engine_computes_on_while_another_comes_and_goes(fast: FastEngine, many: torch.Tensor) -> None:
    """Its graphs write to memory that nobody else may be given: what is free now is filled with NaN."""
    asked = GenerateRequest([PROMPT] * 3, 40, RULES)
    for _ in range(3):  # as it is, captured, replayed
        expected = [s.tokens for s in fast.generate(fast.encode(many[:3]), asked)]
    for name in ("fp32", "fp16"):
        load_engine("demo", name, engine="fast", device="cuda").close()
        poison = torch.full((512 * MIB // 4,), math.nan, device="cuda")
        assert [s.tokens for s in fast.generate(fast.encode(many[:3]), asked)] == expected
        assert bool(poison.isnan().all())  # nor has it written where others live
        del poison


def test_memory_comes_back(base_folder: Path) -> None:
    load_engine(str(base_folder), "fp16", engine="fast", device="cuda").close()  # kernels are loaded once
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    engine = load_engine(str(base_folder), "fp16", engine="fast", device="cuda")
    begin = engine.dims.n_vocab - 1501
    rules = TokenRules(begin - 107, begin - 1, begin)
    for n in (1, 12, MAX_ROWS):
        encoded = engine.encode(torch.randn(n, 80, 3000))
        for _ in range(2):
            engine.generate(encoded, GenerateRequest([[begin - 106]] * n, 20, rules))
    held = torch.cuda.memory_allocated() - before
    assert held > engine.report.weights_bytes
    del encoded
    engine.close()
    assert torch.cuda.memory_allocated() - before <= MIB
    assert torch.cuda.memory_reserved() - reserved <= 8 * MIB


def test_torch_operations_serve_where_triton_is_missing(
    fast: FastEngine, many: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_loader.fast.engine.has_triton", lambda device: False)
    plain = load_engine("demo", "fp32", engine="fast", device="cuda")
    asked = GenerateRequest([PROMPT] * 3, 40, RULES)
    for _ in range(2):
        found = plain.generate(plain.encode(many[:3]), asked)
    assert [s.tokens for s in found] == [s.tokens for s in fast.generate(fast.encode(many[:3]), asked)]
    assert plain.report.attention == "sdpa" and any("decoder step" in c.name for c in plain.captures)
    plain.close()
