"""The table 'Does it fit', and predicted beside measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_loader.device import DeviceInfo
from model_loader.fit import fit_rows
from model_loader.header import find_header
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS
from ui import fit_view

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"


@pytest.fixture(scope="module")
def t4() -> DeviceInfo:
    return DeviceInfo("cuda", 0, "T4", (7, 5), 16 * 2**30, 2)


def test_every_precision_has_a_row_with_colour_or_reason(t4: DeviceInfo) -> None:
    rows = fit_rows(find_header("large-v3", offline=True), t4, 6 * 2**30, 8)
    html = fit_view.fits(rows, "en")
    assert all(f">{name}<" in html for name in PRECISIONS)
    assert "Fits. " in html and "Does not fit. fp32 of" in html and "T4 has 7.5" in html


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_before_a_checkpoint_is_known_the_table_says_so(locale: str) -> None:
    assert "<table" not in fit_view.fits((), locale) and fit_view.fits((), locale)


def test_predicted_stands_beside_measured_with_the_reason_of_auto() -> None:
    engine = load_engine("demo", "auto", device="cpu", warm_up=False)
    engine.close()
    html = fit_view.predicted(engine.report, "en")
    assert "Predicted" in html and "Measured" in html and "fp32 of demo needs" in html
    assert fit_view.predicted(replace(engine.report, prediction=None), "en") == ""
