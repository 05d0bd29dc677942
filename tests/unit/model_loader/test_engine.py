"""The reference engine against transformers' own generate, and what it promises beyond it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from model_loader.engine import Encoded, GenerateRequest, ReferenceEngine, TokenRules, _Judge
from model_loader.loader import load_engine
from tests.unit.model_loader.conftest import ENGLISH, EOT, GERMAN, NO_TIMESTAMPS, SOT, TRANSCRIBE

PROMPTS = [[SOT, ENGLISH, TRANSCRIBE], [SOT, GERMAN, TRANSCRIBE]]
RULES = TokenRules(
    eot=EOT,
    no_timestamps=NO_TIMESTAMPS,
    timestamp_begin=NO_TIMESTAMPS + 1,
    suppress=tuple(range(EOT + 1, NO_TIMESTAMPS)),
    begin_suppress=(220,),
    max_initial_timestamp_index=1500,
)


def request(**changes: object) -> GenerateRequest:
    return GenerateRequest(**{"prompts": PROMPTS, "max_new_tokens": 120, "rules": RULES, **changes})


@pytest.fixture(scope="module")
def upstream(short_demo: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(short_demo, dtype=torch.float32).eval()


@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize(("beam_size", "n_windows"), [(1, 2), (2, 1)])
def test_tokens_are_those_of_transformers_generate(
    demo_engine: ReferenceEngine,
    upstream: WhisperForConditionalGeneration,
    speech_features: torch.Tensor,
    encoded: Encoded,
    timestamps: bool,
    beam_size: int,
    n_windows: int,
) -> None:
    languages = ["en", "de"][:n_windows]
    expected = upstream.generate(
        speech_features[:n_windows], language=languages, return_timestamps=timestamps, num_beams=beam_size
    ).tolist()
    prompts = [prompt if timestamps else [*prompt, NO_TIMESTAMPS] for prompt in PROMPTS[:n_windows]]
    part = demo_engine.select(encoded, range(n_windows))
    found = demo_engine.generate(part, request(prompts=prompts, timestamps=timestamps, beam_size=beam_size))
    for row, prompt, sequence in zip(expected, prompts, found, strict=True):
        text = row[len(prompt) :] if row[: len(prompt)] == prompt else row
        assert sequence.tokens == (text[: text.index(EOT)] if EOT in text else text)
        assert sequence.finished and sequence.n_tokens == len(sequence.tokens) > 12


def test_rules_mask_what_transformers_processors_mask() -> None:
    """On random logits and on hypotheses made by the rules themselves, step by step."""
    generator = torch.Generator().manual_seed(7)
    settings = GenerationConfig(
        eos_token_id=EOT, no_timestamps_token_id=NO_TIMESTAMPS, max_initial_timestamp_index=1500
    )
    theirs = [
        SuppressTokensAtBeginLogitsProcessor([220], begin_index=3),
        SuppressTokensLogitsProcessor(list(RULES.suppress)),
        WhisperTimeStampLogitsProcessor(settings, begin_index=3),
    ]
    n_rows, n_vocab = 6, 6004
    ours = _Judge(request(prompts=[PROMPTS[0]] * n_rows), 3, n_vocab, torch.device("cpu"))
    tokens = torch.tensor([PROMPTS[0]] * n_rows)
    for step in range(40):
        logits = 3 * torch.randn(n_rows, n_vocab, generator=generator)
        logits[:, RULES.timestamp_begin :] += [-4.0, 0.0, 4.0][step % 3]  # text, undecided, timestamps
        expected = logits
        for processor in theirs:
            expected = processor(tokens, expected)
        found = ours(tokens, logits)
        assert torch.equal(found.isneginf(), expected.isneginf())
        assert torch.equal(found, expected)
        choice = torch.multinomial(found.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, choice], dim=1)


def test_average_logprob_is_that_of_the_chosen_tokens(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    greedy = demo_engine.generate(encoded, request())
    for index, sequence in enumerate(greedy):
        tokens = torch.tensor([PROMPTS[index] + sequence.tokens + [EOT]])
        with torch.no_grad():
            logits = demo_engine._logits(tokens, encoded.hidden[index : index + 1])[0]
        total = 0.0
        for position in range(3, tokens.shape[1]):
            judge = _Judge(request(), 3, demo_engine.dims.n_vocab, demo_engine.device)
            masked = judge(tokens[:, :position], logits[None, position - 1])
            total += float(masked.log_softmax(-1)[0, tokens[0, position]])
        assert sequence.avg_logprob == pytest.approx(total / (len(sequence.tokens) + 1), abs=1e-4)


def test_beam_search_reports_a_likelihood_near_that_of_the_same_greedy_text(
    demo_engine: ReferenceEngine, encoded: Encoded
) -> None:
    part = demo_engine.select(encoded, [0])
    greedy, beam = (
        demo_engine.generate(part, request(prompts=PROMPTS[:1], max_new_tokens=12, beam_size=size)) for size in (1, 2)
    )
    for one, other in zip(greedy, beam, strict=True):
        assert other.avg_logprob == pytest.approx(one.avg_logprob, abs=0.05)


def test_a_batch_gives_what_each_window_gives_alone(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    together = demo_engine.generate(encoded, request())
    alone = demo_engine.generate(demo_engine.select(encoded, [1]), request(prompts=PROMPTS[1:]))
    assert alone[0].tokens == together[1].tokens
    assert alone[0].avg_logprob == pytest.approx(together[1].avg_logprob, abs=1e-4)


def test_first_logits_tell_the_language(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    logits = demo_engine.first_logits(encoded)
    assert logits.shape == (2, 6004) and logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert logits.argmax(dim=-1).tolist() == [ENGLISH, GERMAN]


def test_sampling_repeats_for_a_seed_and_differs_between_seeds(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        [s.tokens for s in demo_engine.generate(encoded, request(temperature=1.0, seed=seed, max_new_tokens=12))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)  # other users of the generator are not disturbed


@pytest.mark.parametrize("beam_size", [1, 2])
def test_a_stop_takes_effect_within_a_token(demo_engine: ReferenceEngine, encoded: Encoded, beam_size: int) -> None:
    asked: list[int] = []

    def stop_at_fifth() -> bool:
        asked.append(1)
        return len(asked) >= 5

    found = demo_engine.generate(encoded, request(should_stop=stop_at_fifth, beam_size=beam_size))
    assert len(asked) == 5
    assert [s.n_tokens for s in found] == [5, 5]
    assert not any(s.finished for s in found)


def test_the_limit_cuts_and_says_so(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    found = demo_engine.generate(encoded, request(max_new_tokens=7))
    assert [(s.n_tokens, s.finished) for s in found] == [(7, False), (7, False)]


def test_the_decoders_positions_are_never_exceeded(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    rules = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, suppress=(EOT,))  # never ends by itself
    prompt = [[100] * 430 + PROMPTS[0]]
    encoded = demo_engine.select(encoded, [0])
    found = demo_engine.generate(encoded, request(prompts=prompt, rules=rules, timestamps=False, max_new_tokens=440))
    assert found[0].n_tokens == demo_engine.dims.n_text_ctx - 433


def test_not_a_number_ends_its_row_and_leaves_the_others(demo_engine: ReferenceEngine, encoded: Encoded) -> None:
    encoded = Encoded(encoded.hidden.clone())
    encoded.hidden[0] = math.nan
    for temperature in (0.0, 0.8):
        found = demo_engine.generate(encoded, request(temperature=temperature, max_new_tokens=10))
        assert found[0].tokens == [] and math.isnan(found[0].avg_logprob)
        assert found[1].n_tokens == 10 and math.isfinite(found[1].avg_logprob)


@pytest.mark.parametrize(
    "changes",
    [{"prompts": [[1], [1, 2]]}, {"prompts": []}, {"max_new_tokens": 0}, {"temperature": 0.5, "beam_size": 2}],
    ids=str,
)
def test_requests_no_engine_can_run_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"prompts|max_new_tokens|beam"):
        request(**changes)


def test_a_closed_engine_refuses_work_and_closes_twice(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.encode(torch.zeros(1, 80, 3000))
