"""What benchmarks.engines counts, on numbers that are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from audio.windows import Window
from benchmarks.engines import Task, _errors, _margin, _Pass
from tests.fakes import N_VOCAB, demo_tokens

TASK = Task("a.wav", "en", Window(0, 0.0, np.zeros(16_000, dtype=np.float32), 1.0))
TOKENS = demo_tokens()
BEGIN = TOKENS.timestamp_begin


class Judge:
    """A reference engine whose logits are given, and which keeps what it was asked to read."""

    def __init__(self, **logits: float) -> None:
        self.dims = SimpleNamespace(n_mels=80)
        self.device = torch.device("cpu")
        self._logits = torch.full((1, 1, N_VOCAB), -40.0)
        for token, value in logits.items():
            self._logits[0, 0, int(token[1:])] = value
        self.read: list[int] = []

    def encode(self, features: torch.Tensor) -> Any:
        return SimpleNamespace(hidden=torch.zeros(1, 1500, 4))

    def network(self, *, encoder_outputs: Any, decoder_input_ids: torch.Tensor) -> Any:
        self.read = decoder_input_ids[0].tolist()
        return SimpleNamespace(logits=self._logits)


def test_a_margin_is_taken_where_two_hypotheses_part() -> None:
    judge: Any = Judge(t20=3.0, t30=2.75)
    assert _margin(judge, TOKENS, TASK, [1, 2], [10, 20, 5], [10, 30, 5]) == pytest.approx(0.25, abs=1e-5)
    assert judge.read == [1, 2, 10], "prompt and shared tokens, no more"
    assert _margin(judge, TOKENS, TASK, [1, 2], [10, 20], [10, 20, 5]) == 0.0


def test_text_against_a_timestamp_is_a_near_tie_where_all_timestamps_together_weigh_as_much() -> None:
    spread = {f"t{BEGIN + i}": 1.0 for i in range(8)}
    judge: Any = Judge(t20=1.0 + float(np.log(8)), **spread)
    assert _margin(judge, TOKENS, TASK, [], [20], [BEGIN]) == pytest.approx(0.0, abs=1e-5)
    assert _margin(judge, TOKENS, TASK, [], [20], [21]) > 30


def test_errors_are_relative_by_layer_and_end_with_each_window() -> None:
    torch.manual_seed(0)
    n_steps, n_layers, lengths = 4, 2, [4, 2]
    truth = _Pass(torch.randn(2, 5, 8), torch.randn(n_steps, n_layers, 2, 8), torch.randn(n_steps, 2, 9))
    layers, logprobs = truth.layers.clone(), truth.logprobs.clone()
    layers[:, 1] *= 1.03
    logprobs += 0.5
    logprobs[0, 0, int(truth.logprobs[0, 0].argmin())] += 100.0
    layers[2:, :, 1], logprobs[2:, 1] = 1e6, 1e6  # behind the second window's end
    errors = _errors(_Pass(truth.hidden * 1.01, layers, logprobs), truth, lengths)
    assert errors["encoder, %"] == pytest.approx(1.0, abs=0.01)
    assert errors["layer 1, %"] == 0.0 and errors["layer 2, %"] == pytest.approx(3.0, abs=0.01)
    expected = ((0.5**2 * (6 * 9 - 1) + 100.5**2) / (6 * 9)) ** 0.5
    assert errors["logits, nats"] == pytest.approx(expected, rel=1e-3)
    assert errors["other choice, %"] == pytest.approx(100 / 6, abs=0.01)
