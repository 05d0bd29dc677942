"""The candidate without outliers: a row for as long as it is measured, on the fast engine, with another result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.llm_int8 import CANDIDATE, candidate
from benchmarks.shapes import make_checkpoint
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS


def test_the_candidate_is_captured_and_looks_for_no_outliers(tmp_path: Path) -> None:
    folder = str(make_checkpoint("least", tmp_path / "least"))
    with candidate():
        engine = load_engine(folder, CANDIDATE, engine="auto", device="cpu", warm_up=False)
        assert engine.report.engine == "fast"
        layers = engine._loaded.decoder.layers[0].fc1.joined  # type: ignore[union-attr]
        assert layers is not None and layers.modules[0].state.threshold == 0.0
        found = layers(torch.randn(3, layers.n_in, dtype=torch.float16))
        assert found.shape == (3, layers.n_out) and bool(found.isfinite().all())
        engine.close()
    stock = load_engine(folder, "bnb-int8", engine="auto", device="cpu", warm_up=False)
    assert stock.report.engine == "reference"
    assert stock.network.model.decoder.layers[0].fc1.state.threshold == 6.0  # type: ignore[union-attr]
    stock.close()


def test_the_table_is_as_before_whatever_happens() -> None:
    before = dict(PRECISIONS)
    with pytest.raises(RuntimeError, match="by the way"), candidate():
        assert CANDIDATE in PRECISIONS
        raise RuntimeError("by the way")
    assert before == PRECISIONS
