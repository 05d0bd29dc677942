"""Forward passes, losses and the schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from training.model import AlignmentTeacher, CtcHead, ModelSize, build_model, decode, encode, taught_layers, token_loss
from training.speech import DEMO
from training.train import Plan, learning_rate
from transcription.tokenizer import WhisperTokens

SMALL = ModelSize(d_model=32, encoder_layers=2, decoder_layers=2, heads=2)


@pytest.fixture(scope="module")
def words() -> WhisperTokens:
    return WhisperTokens.from_folder(DEMO)


@pytest.fixture(scope="module")
def model(words: WhisperTokens) -> Any:
    torch.manual_seed(0)
    return build_model(SMALL, words, n_vocab=words.timestamp_begin + 1501).eval()


def test_our_forward_equals_that_of_transformers(model: Any) -> None:
    features = torch.randn(2, 80, 3000)
    inputs = torch.randint(0, 1000, (2, 7))
    with torch.no_grad():
        heard = encode(model.model.encoder, features)
        ours = model.proj_out(decode(model.model.decoder, inputs, heard))
        theirs = model(input_features=features, decoder_input_ids=inputs, use_cache=False).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_short_windows_use_the_first_positions(model: Any) -> None:
    with torch.no_grad():
        assert encode(model.model.encoder, torch.randn(1, 80, 600)).shape == (1, 300, 32)


def test_a_right_answer_costs_less_and_a_neighbouring_timestamp_little(words: WhisperTokens) -> None:
    begin, n_vocab = words.timestamp_begin, words.timestamp_begin + 1501

    def loss(predicted: int, wanted: int) -> float:
        logits = torch.zeros(1, 1, n_vocab)
        logits[0, 0, predicted] = 12.0
        return token_loss(logits, torch.tensor([[wanted]]), begin, smoothing=0.0).item()

    assert loss(5, 5) < 0.1 < loss(6, 5)
    assert loss(begin + 100, begin + 100) < loss(begin + 101, begin + 100) < loss(begin + 110, begin + 100)
    assert loss(5, 5) < loss(begin + 100, begin + 100)  # a timestamp is never quite certain


def test_unlabelled_positions_do_not_count(words: WhisperTokens) -> None:
    logits = torch.randn(1, 3, words.timestamp_begin + 1501)
    alone = token_loss(logits[:, :1], torch.tensor([[7]]), words.timestamp_begin)
    padded = token_loss(logits, torch.tensor([[7, -100, -100]]), words.timestamp_begin)
    assert alone.item() == pytest.approx(padded.item())


def test_ctc_loss_falls_when_the_text_is_predicted() -> None:
    head = CtcHead(8, n_text=10)
    text, lengths = torch.tensor([[3, 4]]), torch.tensor([2])
    flat = torch.zeros(1, 6, 11)
    right = flat.clone()
    for position, token in enumerate([3, 3, 10, 4, 4, 10]):
        right[0, position, token] = 9.0
    assert head.loss(right, text, lengths) < 0.1 < head.loss(flat, text, lengths)


def test_the_alignment_loss_rewards_looking_where_the_word_is(model: Any, words: WhisperTokens) -> None:
    """After a few steps on one example the taught head looks into the true spans."""
    teacher = AlignmentTeacher(model.model.decoder)
    heard = torch.randn(1, 300, 32)
    inputs = torch.tensor([[words.sot, 11, 12, 13]])
    spans = torch.tensor([[[-1.0, -1.0], [0.5, 1.0], [1.0, 1.6], [4.0, 4.4]]])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        decode(model.model.decoder, inputs, heard)
        loss = teacher.loss(heard, spans)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0]


def test_the_taught_heads_are_those_of_the_shipped_model() -> None:
    assert taught_layers(4) == [1, 2]
    assert [taught_layers(n) for n in (1, 2)] == [[0], [0, 1]]


def test_timestamps_begin_in_order(model: Any, words: WhisperTokens) -> None:
    embeddings = model.model.decoder.embed_tokens.weight[words.timestamp_begin :]
    near = torch.nn.functional.cosine_similarity(embeddings[700], embeddings[701], dim=0)
    far = torch.nn.functional.cosine_similarity(embeddings[700], embeddings[900], dim=0)
    assert near > far


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(p / 100, 1.0) for p in range(101)]
    assert rates[0] == 0 and max(rates) == pytest.approx(1.0, abs=0.01) and rates.index(max(rates)) == 4
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.004)


def test_phases_follow_progress() -> None:
    plan = Plan(Path())
    assert [plan.phase_at(p) for p in (0.0, 0.19, 0.21, 0.37, 0.39, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert plan.sizes == [(6.0, 512), (12.0, 256), (30.0, 128)]
    assert math.isclose(sum(share for _, share in plan.phases), 1.0)
