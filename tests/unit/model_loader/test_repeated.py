"""Thirty loads and unloads of every row leave no main memory behind."""

from __future__ import annotations

from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest

from benchmarks.precision import calibrate
from benchmarks.shapes import make_checkpoint
from model_loader.device import describe_device
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision
from tests.repeated import ROUNDS, memory_after_each

ROWS = [row for row in PRECISIONS.values() if row.unavailable(describe_device("cpu")) is None]


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(a checkpoint of one layer on each side, the folder of its calibration)."""
    folder = tmp_path_factory.mktemp("least")
    model = str(make_checkpoint("least", folder / "checkpoint"))
    calibrate(model, folder / "calibrations", describe_device("cpu"))
    return model, folder / "calibrations"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_thirty_loads_leave_no_main_memory_behind(row: Precision, least: tuple[str, Path]) -> None:
    """Of both engines in turn where the row runs on both. Of two series the better: what a load leaves behind shows in
    each, what another thread of these tests takes meanwhile does not."""
    model, calibrations = least
    how = {"device": "cpu", "warm_up": False, "calibrations": calibrations}
    one = load_engine(model, row.name, **how)
    one.close()
    engines = ("reference", "fast") if row.fast else ("reference",)
    allowed, grown = one.report.weights_bytes / 20, [_growth(model, row.name, engines=engines, **how)]
    if grown[0] >= allowed:
        grown.append(_growth(model, row.name, engines=engines, **how))
    assert min(grown) < allowed, grown


def _growth(model: str, precision: str, **how: Any) -> float:
    """Bytes a load. The heap settles in the first five and wavers by a model and more; a line through the rest rises by
    what stays behind: no twentieth of a model each time, no tenth where only one of two engines leaves it."""
    resident = [after.process_bytes or 0 for after in memory_after_each(model, precision, **how)]
    assert len(resident) == ROUNDS and min(resident) > 0
    settled = resident[5:]
    return linear_regression(range(len(settled)), settled).slope
