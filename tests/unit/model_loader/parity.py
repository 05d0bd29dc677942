"""What every row of PRECISIONS has to show on the demo checkpoint; a row that a test makes up, too."""

from __future__ import annotations

import math
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch

from model_loader.engine import GenerateRequest, ReferenceEngine, TokenRules
from model_loader.loader import load_engine
from model_loader.precision import Precision
from tests.unit.model_loader.conftest import ENGLISH, EOT, N_WEIGHTS, NO_TIMESTAMPS, SOT, TRANSCRIBE

PROMPT = [SOT, ENGLISH, TRANSCRIBE]
RULES = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, tuple(range(EOT + 1, NO_TIMESTAMPS)), (220,), 1500)

Reference = tuple[torch.Tensor, torch.Tensor]
"""fp32's greedy text of the English recording with its prompt [1, n], and log-probabilities [1, n, n_vocab]."""


def make_reference(engine: ReferenceEngine, features: torch.Tensor) -> Reference:
    """engine: at fp32. features: float32 [n, n_mels, n_frames]; of the first window."""
    encoded = engine.encode(features[:1])
    text = engine.generate(encoded, GenerateRequest([PROMPT], 120, RULES))[0].tokens
    tokens = torch.tensor([PROMPT + text])
    with torch.no_grad():
        return tokens, engine._logits(tokens, encoded.hidden).log_softmax(-1)


def check_parity(
    row: Precision, folder: Path, calibrations: Path, features: torch.Tensor, reference: Reference
) -> None:
    """The row loads, is proven and stays within its tolerance of fp32."""
    # No warm-up: the text below takes the same path.
    engine = load_engine(str(folder), row.name, device="cpu", warm_up=False, calibrations=calibrations)
    report = engine.report
    assert (report.requested, report.effective, report.folder) == (row.name, row.name, folder)
    linears = [line for line in report.census.lines if line.is_linear]
    assert {(x.module_class, x.dtype) for x in linears} == row.linears and len(linears) == len(row.linears)
    # Ten attention projections and two feed-forward layers: 6 + 4 blocks of 6, 4 more in each decoder block.
    if row.linear_class.startswith("Linear"):  # layer by layer; other rows may join layers
        assert linears[0].n_modules == 6 * 6 + 4 * 10
    assert report.census.n_weights == pytest.approx(N_WEIGHTS, rel=0.01)
    biases_and_rows = 256 * 6 * 4
    assert linears[0].n_bytes == pytest.approx(linears[0].n_weights * row.bytes_per_weight + biases_and_rows, rel=0.06)

    encoded = engine.encode(features[:1])
    tokens, expected = reference
    with torch.no_grad():
        drift = (engine._logits(tokens, encoded.hidden).float().log_softmax(-1) - expected).abs().mean()
    assert float(drift) <= max(row.tolerance, 1e-4)
    text = engine.generate(encoded, GenerateRequest([PROMPT], 120, RULES))[0]
    assert text.finished and math.isfinite(text.avg_logprob)
    # Nearly the same words; how many differ is measured by the benchmark of accuracy.
    same = SequenceMatcher(None, text.tokens, tokens[0, len(PROMPT) :].tolist(), autojunk=False).ratio()
    assert same == 1.0 if row.name == "fp32" else same > 0.7
    engine.close()
