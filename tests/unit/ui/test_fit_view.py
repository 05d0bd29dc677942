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
from transcription.interface import PrecisionStatus
from ui import fit_view

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"


@pytest.fixture(scope="module")
def t4() -> DeviceInfo:
    return DeviceInfo("cuda", 0, "T4", (7, 5), 16 * 2**30, 2)


def test_every_precision_has_a_row_with_colour_or_reason(t4: DeviceInfo) -> None:
    rows = fit_rows(find_header("large-v3", offline=True), t4, 6 * 2**30, 8)
    html = fit_view.fits(rows, "en")
    assert all(f">{name}<" in html for name in PRECISIONS)
    for colour in ("green", "red"):
        assert f'class="fit {colour}" aria-hidden="true">{fit_view.MARKS[colour]}<' in html
    assert "Fits. " in html and "Does not fit. fp32 of" in html and "T4 has 7.5" in html


def test_a_choice_says_in_sign_colour_and_words_whether_it_fits(t4: DeviceInfo) -> None:
    rows = fit_rows(find_header("large-v3", offline=True), t4, 6 * 2**30, 8)
    assert len(set(fit_view.MARKS.values())) == 3
    line = fit_view.choice("fp32", rows, "en")
    assert 'class="fit red"' in line and "Does not fit. fp32 of" in line
    assert fit_view.choice("fp8", rows, "en") == fit_view.choice("", rows, "en") == ""
    known = [PrecisionStatus("fp32", "", None, fit="red"), PrecisionStatus("int8", "", None, fit="green")]
    html = fit_view.choices([*known, PrecisionStatus("fp8", "", "No.", fit="green")], "en")
    assert "</span> Fits: int8<" in html and "</span> Does not fit: fp32<" in html
    assert fit_view.choices([PrecisionStatus("fp32", "", None)], "en") == ""


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_before_a_checkpoint_is_known_the_table_says_so(locale: str) -> None:
    assert "<table" not in fit_view.fits((), locale) and fit_view.fits((), locale)


def test_predicted_stands_beside_measured_with_the_reason_of_auto() -> None:
    engine = load_engine("demo", "auto", device="cpu", warm_up=False)
    engine.close()
    html = fit_view.predicted(engine.report, "en")
    assert "Predicted" in html and "Measured" in html and "fp32 of demo needs" in html
    assert "(process, libraries included)" in html, "a processor's figure is that of the whole process"
    assert fit_view.predicted(replace(engine.report, prediction=None), "en") == ""
