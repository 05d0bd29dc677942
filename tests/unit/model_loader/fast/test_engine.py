"""The fast engine against the reference engine, on a CPU: the same code as in its graphs, uncaptured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import EffectivePrecisionError, OutOfMemoryError, UnavailablePrecisionError
from model_loader.calibration import linear_layers
from model_loader.engine import Encoded, GenerateRequest, ReferenceEngine, TokenRules, TokenSequence
from model_loader.fast.census import refuse_mixture
from model_loader.fast.engine import FastEngine, refusal
from model_loader.fast.weights import tensors_of
from model_loader.loader import load_engine
from model_loader.orders import SharedEngine, WindowOrder
from model_loader.precision import PRECISIONS
from tests.calibrated import calibrate_demo
from tests.unit.model_loader.conftest import ENGLISH, EOT, GERMAN, LANGUAGES, N_WEIGHTS, NO_TIMESTAMPS, SOT, TRANSCRIBE

PREVIOUS = 4500
PROMPTS = [[SOT, ENGLISH, TRANSCRIBE], [SOT, GERMAN, TRANSCRIBE]]
RULES = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, tuple(range(EOT + 1, NO_TIMESTAMPS)), (220,), 1500)


def request(**changes: object) -> GenerateRequest:
    return GenerateRequest(**{"prompts": PROMPTS, "max_new_tokens": 120, "rules": RULES, **changes})


@pytest.fixture(scope="module")
def fast(short_demo: Path) -> Iterator[FastEngine]:
    engine = load_engine(str(short_demo), "fp32", engine="fast", device="cpu", warm_up=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def six(demo_engine: ReferenceEngine, six_features: torch.Tensor) -> tuple[list[list[int]], Encoded]:
    """A window of every language the demo checkpoint knows: prompts and encoder output."""
    return [[SOT, code, TRANSCRIBE] for code in LANGUAGES.values()], demo_engine.encode(six_features)


@pytest.fixture(scope="module")
def texts(fast: FastEngine, six: tuple[list[list[int]], Encoded]) -> list[TokenSequence]:
    """What the fast engine says in each of them, decoded together and with timestamps."""
    prompts, encoded = six
    return fast.generate(encoded, request(prompts=prompts))


def test_the_encoder_is_transformers_own(fast: FastEngine, speech_features: torch.Tensor, encoded: Encoded) -> None:
    found = fast.encode(speech_features).hidden
    torch.testing.assert_close(found, encoded.hidden, rtol=1e-4, atol=1e-4)


def test_tokens_are_the_reference_engines_in_every_language(
    demo_engine: ReferenceEngine, six: tuple[list[list[int]], Encoded], texts: list[TokenSequence]
) -> None:
    prompts, encoded = six
    check_alike(demo_engine.generate(encoded, request(prompts=prompts)), texts)


def test_tokens_without_timestamps_are_the_reference_engines(
    fast: FastEngine, demo_engine: ReferenceEngine, encoded: Encoded
) -> None:
    asked = request(prompts=[[*prompt, NO_TIMESTAMPS] for prompt in PROMPTS], timestamps=False)
    check_alike(demo_engine.generate(encoded, asked), fast.generate(encoded, asked))


def check_alike(expected: list[TokenSequence], found: list[TokenSequence]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert other.tokens == one.tokens and other.n_tokens == len(other.tokens) > 12
        assert other.finished == one.finished
        assert other.avg_logprob == pytest.approx(one.avg_logprob, abs=1e-4)


def test_a_prompt_with_previous_text_is_read(fast: FastEngine, demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    previous = demo_engine.generate(encoded, request(max_new_tokens=12))[1].tokens[1:]
    asked = request(prompts=[[PREVIOUS, *previous, *prompt] for prompt in PROMPTS], max_new_tokens=12)
    expected, found = demo_engine.generate(encoded, asked), fast.generate(encoded, asked)
    assert [s.tokens for s in found] == [s.tokens for s in expected]


def test_batch_size_and_order_change_no_token(
    fast: FastEngine, six: tuple[list[list[int]], Encoded], texts: list[TokenSequence]
) -> None:
    prompts, encoded = six
    together = [s.tokens for s in texts]
    order = [4, 0, 5, 2]
    shuffled = fast.generate(fast.select(encoded, order), request(prompts=[prompts[i] for i in order]))
    assert [s.tokens for s in shuffled] == [together[i] for i in order]
    alone = fast.generate(fast.select(encoded, [3]), request(prompts=prompts[3:4]))
    assert alone[0].tokens == together[3]


def test_neighbours_change_no_draw(fast: FastEngine, six: tuple[list[list[int]], Encoded]) -> None:
    prompts, encoded = six
    asked = request(prompts=prompts, temperature=0.6, seed=5, max_new_tokens=12)
    together = fast.generate(encoded, asked)
    alone = fast.generate(fast.select(encoded, [2]), replace(asked, prompts=prompts[2:3]))
    assert alone[0].tokens == together[2].tokens
    assert alone[0].avg_logprob == pytest.approx(together[2].avg_logprob, abs=1e-4)


def test_draws_repeat_for_a_seed_and_differ_between_seeds(fast: FastEngine, encoded: Encoded) -> None:
    first, again, other = (
        [s.tokens for s in fast.generate(encoded, request(temperature=1.0, seed=seed, max_new_tokens=10))]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_first_logits_are_the_reference_engines(
    fast: FastEngine, demo_engine: ReferenceEngine, encoded: Encoded
) -> None:
    found = fast.first_logits(encoded)
    assert found.shape == (2, 6004) and found.dtype == torch.float32
    torch.testing.assert_close(found, demo_engine.first_logits(encoded), rtol=1e-3, atol=1e-3)
    assert fast.generate(encoded, request(max_new_tokens=3))[0].n_tokens == 3  # and decoding goes on as before


def test_a_changed_window_is_not_taken_for_the_one_before(fast: FastEngine, encoded: Encoded) -> None:
    hidden = Encoded(encoded.hidden.clone())
    before = fast.generate(hidden, request(max_new_tokens=10))
    hidden.hidden.copy_(encoded.hidden.flip(0))
    after = fast.generate(hidden, request(max_new_tokens=10, prompts=PROMPTS[::-1]))
    assert [s.tokens for s in after] == [s.tokens for s in before[::-1]]


def test_more_windows_than_rows_take_turns(fast: FastEngine, short_demo: Path, encoded: Encoded) -> None:
    whole = fast.generate(encoded, request(max_new_tokens=8))
    narrow = load_engine(str(short_demo), "fp32", engine="fast", device="cpu", warm_up=False, batch=1)
    assert isinstance(narrow, FastEngine) and narrow.max_rows == 1
    parts = narrow.generate(encoded, request(max_new_tokens=8))
    assert [s.tokens for s in parts] == [s.tokens for s in whole]
    torch.testing.assert_close(narrow.first_logits(encoded)[1], narrow.first_logits(fast.select(encoded, [1]))[0])
    narrow.close()


def test_a_stop_takes_effect_within_a_token(fast: FastEngine, encoded: Encoded) -> None:
    asked: list[int] = []

    def stop_at_tenth() -> bool:
        asked.append(1)
        return len(asked) >= 10

    found = fast.generate(encoded, request(should_stop=stop_at_tenth))
    assert len(asked) == 10
    assert [s.n_tokens for s in found] == [7, 7]  # two of the nine steps before read the prompt
    assert not any(s.finished for s in found)


def test_the_limit_cuts_and_says_so(fast: FastEngine, encoded: Encoded) -> None:
    found = fast.generate(encoded, request(max_new_tokens=7))
    assert [(s.n_tokens, s.finished) for s in found] == [(7, False), (7, False)]


def test_the_decoders_positions_are_never_exceeded(least_folder: Path) -> None:
    engine = load_engine(str(least_folder), "fp32", engine="fast", device="cpu", warm_up=False)
    rules = replace(RULES, suppress=(EOT,))  # never ends by itself
    asked = request(prompts=[[100] * 430 + PROMPTS[0]], rules=rules, timestamps=False, max_new_tokens=440)
    assert engine.generate(Encoded(torch.zeros(1, 1500, 128)), asked)[0].n_tokens == engine.dims.n_text_ctx - 433
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_not_a_number_ends_its_row_and_leaves_the_others(
    fast: FastEngine, encoded: Encoded, temperature: float
) -> None:
    hidden = encoded.hidden.clone()
    hidden[0] = math.nan
    found = fast.generate(Encoded(hidden), request(temperature=temperature, max_new_tokens=10))
    assert found[0].tokens == [] and math.isnan(found[0].avg_logprob)
    assert found[1].n_tokens == 10 and math.isfinite(found[1].avg_logprob)
    again = fast.generate(encoded, request(max_new_tokens=4))  # nothing of it is left in the caches
    assert all(math.isfinite(s.avg_logprob) for s in again)


def test_beam_search_runs_on_transformers_generate(
    fast: FastEngine, demo_engine: ReferenceEngine, encoded: Encoded, caplog: pytest.LogCaptureFixture
) -> None:
    one = fast.select(encoded, [0])
    asked = request(prompts=PROMPTS[:1], beam_size=2, max_new_tokens=8)
    with caplog.at_level("INFO", logger="model_loader.fast"):
        found = fast.generate(one, asked)
    assert found == demo_engine.generate(one, asked)
    assert "event=reference_beside_fast" in caplog.text


def test_the_report_names_the_engine_and_counts_what_it_holds(fast: FastEngine) -> None:
    report = fast.report
    assert (report.engine, report.engine_reason, report.effective) == ("fast", "", "fp32")
    network = fast._loaded
    held = {t.data_ptr(): t.numel() * 4 for t in tensors_of([network.encoder, network.decoder])}
    assert report.weights_bytes == sum(held.values())
    # The parameters, and the sums and biases that folding adds.
    assert report.census.n_weights == pytest.approx(N_WEIGHTS, rel=0.01)
    assert sum(line.n_modules for line in report.census.lines if line.module_class == "decoder projection") == 6 * 4


def test_rows_without_kernels_run_on_transformers_generate_and_say_why() -> None:
    config = {"d_model": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    for row in PRECISIONS.values():
        reason = refusal(row, config)
        assert reason is None if row.fast else reason and row.name in reason and "transformers' generate" in reason
    assert {name for name, row in PRECISIONS.items() if not row.fast} == {"fp16-autocast", "bnb-int8"}
    assert "looks for outliers at every call" in str(refusal(PRECISIONS["bnb-int8"], config))


def test_auto_falls_back_with_a_reason_and_fast_refuses(toy_folder: Path) -> None:
    """The toy's heads are 32 wide."""
    engine = load_engine(str(toy_folder), "fp32", engine="auto", device="cpu", warm_up=False)
    assert engine.report.engine == "reference"
    assert engine.report.engine_reason == (
        "The checkpoint runs on transformers' generate: its attention heads are 32 wide, and the fast engine's kernels "
        "know only 64."
    )
    engine.close()
    with pytest.raises(UnavailablePrecisionError, match=r"32 wide.*Choose --engine auto"):
        load_engine(str(toy_folder), "fp32", engine="fast", device="cpu")


def test_a_closed_engine_refuses_work_and_closes_twice(least_folder: Path) -> None:
    engine = load_engine(str(least_folder), "bf16", engine="fast", device="cpu")
    assert engine.report.warm_up_s is not None
    engine.close()
    engine.close()
    assert engine.report.phases.after_unload is not None
    with pytest.raises(RuntimeError, match="closed"):
        engine.encode(torch.zeros(1, 80, 3000))


def test_a_second_checkpoint_that_does_not_fit_is_said_in_a_sentence(
    fast: FastEngine, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beam search and word times load one; decoding goes on without."""

    def full() -> ReferenceEngine:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fast, "_make_reference", full)
    monkeypatch.setattr(fast, "_reference", None)
    window = fast.select(encoded, [0])
    with pytest.raises(OutOfMemoryError, match="choose a smaller precision"):
        fast.attend(window, [SOT, ENGLISH, TRANSCRIBE, 300, EOT], 100)
    with pytest.raises(OutOfMemoryError, match="choose a smaller precision"):
        fast.generate(window, request(prompts=PROMPTS[:1], beam_size=2))
    assert fast.generate(window, request(prompts=PROMPTS[:1], max_new_tokens=4))[0].n_tokens == 4


def test_what_capturing_cost_is_in_the_report(least_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(str(least_folder), "fp32", engine="fast", device="cpu", warm_up=False, batch=4)
    assert isinstance(engine, FastEngine)
    engine.capture()
    assert engine.report.captured is None, "there are no graphs on a CPU"
    graphs: list[object] = []
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(engine, "_on_gpu", True)
        on_gpu.setattr(FastEngine, "captures", property(lambda _: tuple(graphs)))
        on_gpu.setattr(engine, "encode", lambda features: graphs.append(len(features)))
        on_gpu.setattr(engine._serving, "capture", lambda: False)
        engine.capture()
        assert engine.report.captured is None, "somebody's windows were there, so not all graphs are"
        graphs.clear()
        on_gpu.setattr(engine._serving, "capture", lambda: graphs.extend(["1 row", "2 rows", "4 rows"]) is None)
        engine.capture()
        cost = engine.report.captured
        assert graphs[3:] == [1, 2, 4], "batches of the encoder, up to as many windows as there are rows"
        assert cost is not None and cost.n_graphs == 6 and cost.seconds > 0
        engine.capture()
        assert engine.report.captured is cost
    engine.close()


# --- 8 and 4 bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits", "worst_drift"), [("int8", 8.0, 0.03), ("int4", 4.13, 0.6)])
def test_packed_rows_are_small_near_fp32_and_decode_what_their_unpacked_weights_decode(
    name: str, bits: float, worst_drift: float, short_demo: Path, demo_engine: ReferenceEngine, encoded: Encoded
) -> None:
    """The last against transformers' modules on the same packed weights: what differs is the 8-bit audio cache."""
    unpacked, engine = (
        load_engine(str(short_demo), name, engine=kind, device="cpu", warm_up=False) for kind in ("reference", "fast")
    )
    (line,) = [x for x in engine.report.census.lines if x.module_class == "decoder projection"]
    assert line.dtype == name and line.n_weights == 4 * 14 * 256 * 256
    assert 8 * line.n_bytes / line.n_weights <= bits + 0.35  # biases and sums of columns are counted too
    kept = {x.module_class: x.dtype for x in engine.report.census.lines if x is not line}
    assert set(kept.values()) == {"float32"}

    in_full, expected, found = (each.first_logits(encoded).log_softmax(-1) for each in (demo_engine, unpacked, engine))
    assert float((found - in_full).abs().mean()) <= worst_drift
    assert float((found - expected).abs().mean()) < 0.02
    asked = request(max_new_tokens=16)
    assert [s.tokens for s in engine.generate(encoded, asked)] == [s.tokens for s in unpacked.generate(encoded, asked)]
    unpacked.close()
    engine.close()


# --- rows whose layers have kernels of their own ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "n_layers"),
    [
        ("int8-dynamic", "Int8Linear int8", 6 * 4 + 4 * 6 + 1),  # joined: queries, keys, values; those of the audio
        ("int8-static", "Int8Linear int8", 6 * 4 + 4 * 6 + 1),
        ("bnb-nf4", "Linear4bit nf4", 6 * 6 + 4 * 10),
        ("bnb-fp4", "Linear4bit fp4", 6 * 6 + 4 * 10),
    ],
)
def test_layers_with_kernels_of_their_own_write_the_reference_engines_tokens(
    name: str,
    layer: str,
    n_layers: int,
    short_demo: Path,
    speech_features: torch.Tensor,
    calibrations: Path,
    demo_engine: ReferenceEngine,
    encoded: Encoded,
) -> None:
    in_full = demo_engine.first_logits(encoded).log_softmax(-1)
    found = {}
    for kind in ("reference", "fast"):
        engine = load_engine(str(short_demo), name, engine=kind, device="cpu", warm_up=False, calibrations=calibrations)
        hidden = engine.encode(speech_features)
        sequences = engine.generate(hidden, request(max_new_tokens=24))
        found[kind] = [s.tokens for s in sequences], engine.first_logits(hidden).log_softmax(-1), engine.report
        engine.close()
    (expected, logits, _), (tokens, own_logits, report) = found["reference"], found["fast"]
    assert tokens == expected
    # What shifts all log-probabilities of a window alike depends on how single values happened to be rounded.
    apart = [x - in_full - (x - in_full).mean(dim=-1, keepdim=True) for x in (logits, own_logits)]
    reference_drift, drift = (float(x.abs().mean()) for x in apart)
    assert drift <= min(1.15 * reference_drift, PRECISIONS[name].tolerance)
    assert (report.engine, report.effective, report.engine_reason) == ("fast", name, "")
    lines = [line for line in report.census.lines if line.is_linear]
    n_weights = 256 * 256 * (6 * 12 + 4 * 16)
    assert [(f"{x.module_class} {x.dtype}", x.n_modules, x.n_weights) for x in lines] == [(layer, n_layers, n_weights)]


SOME = ("model.decoder.layers.1.self_attn.k_proj", "model.encoder.layers.0.fc1")


@pytest.mark.parametrize(("kept", "linears"), [(SOME, (1, 1, 0)), ("encoder", (0, 24, 0)), ("decoder", (0, 1, 24))])
def test_a_calibration_may_leave_layers_in_16_bits(
    kept: str | tuple[str, ...],
    linears: tuple[int, int, int],
    short_demo: Path,
    speech_features: torch.Tensor,
    demo_engine: ReferenceEngine,
    tmp_path: Path,
) -> None:
    """One inside a joined projection and one whose product is our own; all of a side. linears: modules, and projections
    of the encoder (of the audio's keys and values too) and of the decoder."""
    if isinstance(kept, str):
        kept = tuple(name for name in linear_layers(demo_engine.network) if f".{kept}." in name)
    home = calibrate_demo(tmp_path, speech_features, device="cpu", model=str(short_demo), kept=kept)
    tokens = {}
    for kind in ("reference", "fast"):
        engine = load_engine(
            str(short_demo), "int8-static", engine=kind, device="cpu", warm_up=False, calibrations=home
        )
        tokens[kind] = [s.tokens for s in engine.generate(engine.encode(speech_features), request(max_new_tokens=24))]
        found = {line.module_class: line.n_modules for line in engine.report.census.lines if line.is_linear}
        said = f"; {len(kept)} of 76 layers left in float32 by the calibration"
        assert engine.report.census.summary.endswith(said), "the proof does not hide them behind the row's name"
        engine.close()
    assert tokens["fast"] == tokens["reference"]
    ours = found.get("encoder projection", 0) + found.get("cross projection", 0), found.get("decoder projection", 0)
    assert (found.get("Linear", 0), *ours) == linears and found["Int8Linear"] > 0


def test_a_format_that_packing_let_through_is_an_error(short_demo: Path, calibrations: Path, fast: FastEngine) -> None:
    where = {"engine": "fast", "device": "cpu", "warm_up": False, "calibrations": calibrations}
    engine = load_engine(str(short_demo), "int8-static", **where)  # type: ignore[arg-type]
    assert isinstance(engine, FastEngine)
    static, floats = engine._loaded, fast._loaded
    refuse_mixture(static.encoder, static.decoder, PRECISIONS["int8-static"])
    for encoder, decoder, name, side in (
        (static.encoder, static.decoder, "bnb-nf4", "encoder"),
        (floats.encoder, static.decoder, "int8-dynamic", "encoder was to be int8, but after packing it is float32"),
        (static.encoder, floats.decoder, "int8-dynamic", "decoder"),
        (static.encoder, static.decoder, "fp16", "encoder"),
    ):
        with pytest.raises(EffectivePrecisionError, match=side):
            refuse_mixture(encoder, decoder, PRECISIONS[name])
    own = replace(static.decoder, cross=floats.decoder.cross)  # one projection of many
    with pytest.raises(EffectivePrecisionError, match="decoder was to be int8, but after packing it is float32, int8"):
        refuse_mixture(static.encoder, own, PRECISIONS["int8-dynamic"])
    refuse_mixture(static.encoder, own, PRECISIONS["int8-static"])  # as a calibration may have left it
    engine.close()


def test_beams_of_a_calibrated_checkpoint_search_with_its_own_weights(
    short_demo: Path, speech_features: torch.Tensor, calibrations: Path
) -> None:
    engine = load_engine(
        str(short_demo), "int8-static", engine="fast", device="cpu", warm_up=False, calibrations=calibrations
    )
    found = engine.generate(engine.encode(speech_features), request(max_new_tokens=8, beam_size=2))
    assert all(sequence.n_tokens == 8 for sequence in found)
    assert isinstance(engine, FastEngine) and engine._reference is not None
    assert engine._reference.report.census.summary.startswith("76 Int8Linear int8")
    engine.close()


def test_weights_packed_otherwise_than_the_row_says_are_an_error(
    monkeypatch: pytest.MonkeyPatch, least_folder: Path
) -> None:
    int8, int4 = PRECISIONS["int8"], PRECISIONS["int4"]
    monkeypatch.setitem(PRECISIONS, "int4", replace(int4, convert=lambda _, *place: int8.convert(int8, *place)))
    with pytest.raises(EffectivePrecisionError, match="PackedLinear int8, not PackedLinear int4"):
        load_engine(str(least_folder), "int4", engine="fast", device="cpu")


def test_orders_of_a_wrong_size_are_refused_where_they_are_made(
    fast: FastEngine, six: tuple[list[list[int]], Encoded]
) -> None:
    assert isinstance(fast, SharedEngine)
    encoded = six[1]
    one = WindowOrder(RULES, encoded=Encoded(encoded.hidden[:1]))
    with pytest.raises(ValueError, match=r"\[80, 3000\], not \[128, 3000\]"):
        fast.submit(WindowOrder(RULES, features=torch.zeros(128, 3000)), job=0)
    with pytest.raises(ValueError, match="448 positions"):
        fast.submit(replace(one, prompt=(SOT,) * 448), job=0)
    with pytest.raises(ValueError, match=r"\[400, 256\]"):
        fast.submit(WindowOrder(RULES, encoded=Encoded(torch.zeros(1, 400, 64))), job=0)
    with pytest.raises(ValueError, match=r"torch\.float32, not torch\.bfloat16"):
        fast.submit(replace(one, encoded=Encoded(encoded.hidden[:1].bfloat16())), job=0)
    with pytest.raises(ValueError, match="not both"):
        WindowOrder(RULES, features=torch.zeros(80, 3000), encoded=Encoded(encoded.hidden[:1]))
    with pytest.raises(ValueError, match="needs rules"):
        WindowOrder(None, (SOT,), encoded=Encoded(encoded.hidden[:1]))
    with pytest.raises(ValueError, match="one window"):
        WindowOrder(RULES, encoded=encoded)
