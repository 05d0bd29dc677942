"""Token rules against transformers' own processors, thousands of rows at once; draws; what a row's state becomes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from model_loader.engine import TokenRules
from model_loader.fast.choosing import choose, gumbel_noise, mask_logits
from model_loader.fast.slots import RuleTensors, Slots, mix_seed

N_VOCAB, EOT, NO_TIMESTAMPS = 120, 60, 69
BEGIN = NO_TIMESTAMPS + 1
PROMPT = [61, 62, 63]
RULES = TokenRules(EOT, NO_TIMESTAMPS, BEGIN, suppress=(5, 61, 62, 63), begin_suppress=(7,),
                   max_initial_timestamp_index=20)  # fmt: skip


def rows(n: int, *, timestamps: bool = True, temperature: float = 0.0, seed: int = 0) -> Slots:
    """Slots that hold the state of n rows and nothing of a model."""
    numbers = {name: torch.zeros(n, dtype=torch.int32) for name in ("last_timestamp", "finished")}
    nothing = torch.empty(0, 0)
    return Slots(
        n_rows=n,
        **dict.fromkeys(
            ("x", "x_copy", "query", "attended", "attended_copy", "inner", "inner_copy", "self_keys", "self_values",
             "cross_keys", "cross_values", "cross_scale", "state"), nothing,
        ),
        logits=torch.zeros(n, N_VOCAB),
        tokens=torch.tensor([PROMPT + [0] * 61] * n, dtype=torch.int32),
        position=torch.full((n,), len(PROMPT) - 1, dtype=torch.int32),
        prompt_length=torch.full((n,), len(PROMPT), dtype=torch.int32),
        limit=torch.full((n,), 50, dtype=torch.int32),
        logprob=torch.zeros(n),
        timed=torch.full((n,), int(timestamps), dtype=torch.int32),
        inv_temperature=torch.full((n,), 1 / temperature if temperature else 0.0),
        seed=torch.full((n,), mix_seed(seed, temperature), dtype=torch.int32),
        **numbers,
    )  # fmt: skip


def rules() -> RuleTensors:
    tensors = RuleTensors.on(torch.device("cpu"), N_VOCAB)
    tensors.load(RULES)
    return tensors


def processors(timestamps: bool) -> list:
    settings = GenerationConfig(eos_token_id=EOT, no_timestamps_token_id=NO_TIMESTAMPS, max_initial_timestamp_index=20)
    found = [
        SuppressTokensAtBeginLogitsProcessor([7], begin_index=len(PROMPT)),
        SuppressTokensLogitsProcessor(list(RULES.suppress)),
    ]
    return [*found, WhisperTimeStampLogitsProcessor(settings, begin_index=len(PROMPT))] if timestamps else found


@pytest.mark.parametrize("timestamps", [True, False])
def test_masks_are_those_of_transformers_on_thousands_of_hypotheses(timestamps: bool) -> None:
    """200 rows, 30 steps each, on logits that lean to text, to neither, or to timestamps."""
    generator = torch.Generator().manual_seed(1)
    slots, tensors = rows(200, timestamps=timestamps), rules()
    compared = 0
    for step in range(30):
        logits = 3 * torch.randn(200, N_VOCAB, generator=generator)
        logits[:, BEGIN:] += torch.tensor([-4.0, 0.0, 4.0])[torch.randint(3, (200, 1), generator=generator)]
        logits[:, EOT] -= 4  # few end early
        history = slots.tokens[:, : len(PROMPT) + step].long()
        expected = logits
        for processor in processors(timestamps):
            expected = processor(history, expected)
        found = mask_logits(logits, slots, tensors)
        alive = slots.finished == 0
        assert torch.equal(found[alive], expected[alive])
        compared += int(alive.sum())
        # Go on with draws, so that the histories are as different as the rules allow.
        slots.logits.copy_(found)
        slots.inv_temperature.fill_(1.0)
        slots.seed.copy_(torch.arange(200, dtype=torch.int32) + 1000 * step)
        choose(slots, tensors)
    assert compared > 2000


def test_the_likeliest_allowed_token_is_written_behind_the_others() -> None:
    slots, tensors = rows(1, timestamps=False), rules()
    for token in (10, 11, EOT):
        slots.logits.fill_(0.0)
        slots.logits[0, token] = 9.0
        slots.logits[0, 5] = 20.0  # suppressed
        choose(slots, tensors)
    assert slots.tokens[0, 3:6].tolist() == [10, 11, EOT]
    assert slots.finished.tolist() == [1] and slots.position.tolist() == [5]
    # softmax over 116 allowed tokens, 115 in the first step: 7 must not begin
    expected = sum(9 - math.log(math.exp(9) + n - 1) for n in (115, 116, 116))
    assert slots.logprob.item() == pytest.approx(expected, abs=1e-5)


def test_a_finished_row_stands_still() -> None:
    slots, tensors = rows(2), rules()
    slots.finished[0] = 1
    before = slots.tokens[0].clone(), slots.logprob[0].clone()
    slots.logits.normal_()
    choose(slots, tensors)
    assert torch.equal(slots.tokens[0], before[0]) and slots.logprob[0] == before[1]
    assert slots.position.tolist() == [2, 3]


def test_inside_the_prompt_a_step_only_moves_on() -> None:
    slots, tensors = rows(1), rules()
    slots.position.zero_()
    slots.logits.normal_()
    choose(slots, tensors)
    assert slots.position.tolist() == [1] and slots.tokens[0, :4].tolist() == [*PROMPT, 0]
    assert slots.logprob.item() == 0.0


def test_the_limit_ends_a_row() -> None:
    slots, tensors = rows(1, timestamps=False), rules()
    slots.limit.fill_(2)
    for _ in range(4):
        slots.logits.zero_()
        slots.logits[0, 10] = 9.0
        choose(slots, tensors)
    assert slots.tokens[0, 3:].tolist() == [10, 10] + [0] * 59 and slots.finished.item() == 1


def test_not_a_number_ends_its_row_only() -> None:
    slots, tensors = rows(2, timestamps=False), rules()
    slots.logits[0, 90] = math.nan
    slots.logits[1, 10] = 9.0
    choose(slots, tensors)
    assert slots.tokens[:, 3].tolist() == [EOT, 10] and slots.finished.tolist() == [1, 0]
    assert math.isnan(slots.logprob[0]) and math.isfinite(slots.logprob[1])


def test_draws_follow_the_softmax() -> None:
    """20,000 rows with seeds of their own; three standard deviations of every frequency."""
    n = 20_000
    slots, tensors = rows(n, timestamps=False, temperature=0.7), rules()
    slots.seed.copy_(torch.arange(n, dtype=torch.int32))
    slots.logits.copy_(torch.linspace(2, -2, N_VOCAB).expand(n, -1))
    expected = (mask_logits(slots.logits[:1], slots.first(1), tensors)[0] / 0.7).softmax(-1)
    choose(slots, tensors)
    found = torch.bincount(slots.tokens[:, 3].long(), minlength=N_VOCAB) / n
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4 * spread + 1e-4).all()
    assert found[5] == 0 and found[7] == 0


def test_draws_repeat_for_a_seed_and_differ_between_seeds_and_temperatures() -> None:
    def draw(seed: int, temperature: float) -> list[int]:
        slots, tensors = rows(1, timestamps=False, temperature=temperature, seed=seed), rules()
        slots.logits.copy_(torch.linspace(1, -1, N_VOCAB))
        for _ in range(20):
            choose(slots, tensors)
        return slots.tokens[0].tolist()

    assert draw(1, 0.5) == draw(1, 0.5)
    assert draw(1, 0.5) != draw(2, 0.5) != draw(2, 0.6)


def test_noise_is_that_of_the_philox_generator() -> None:
    """Known answers of Philox 4x32-10, Random123's kat_vectors, for counter 0 and key 0."""
    noise = gumbel_noise(torch.tensor([0], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), 1)
    word = 0x6627E8D5
    uniform = word * 4.6566127342e-10
    assert noise.item() == pytest.approx(-math.log(-math.log(uniform)), abs=1e-5)


@pytest.mark.parametrize("index", [None, 0, 30])
def test_the_first_timestamp_is_no_later_than_allowed(index: int | None) -> None:
    tensors = RuleTensors.on(torch.device("cpu"), N_VOCAB)
    tensors.load(TokenRules(EOT, NO_TIMESTAMPS, BEGIN, max_initial_timestamp_index=index))
    allowed = mask_logits(torch.zeros(1, N_VOCAB), rows(1), tensors)[0].isfinite().nonzero()[:, 0].tolist()
    last = N_VOCAB - 1 if index is None else BEGIN + index
    assert allowed == list(range(BEGIN, last + 1))
