"""A calibration of the demo checkpoint for tests, made without recordings on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model_loader.calibration import (
    CalibrationReport,
    calibrated_home,
    quantise_model,
    record_activations,
    save_calibrated,
    weight_files,
)
from model_loader.engine import GenerateRequest, TokenRules
from model_loader.loader import load_engine

RULES = TokenRules(4396, 4502, 4503, tuple(range(4397, 4502)), (220,), 1500)


def calibrate_demo(
    home: Path, features: torch.Tensor, *, device: str, model: str = "demo", kept: Sequence[str] = ()
) -> Path:
    """Decode the features [n, 80, 3000] as English, quantise, and save below `home`, which is returned.

    kept: layers left in 16 bits.
    """
    engine = load_engine(model, "fp32", device=device, warm_up=False)
    with record_activations(engine.network) as activations:
        encoded = engine.encode(features)
        engine.generate(encoded, GenerateRequest([[4397, 4398, 4498]] * len(features), 120, RULES))
    quantised = quantise_model(engine.network, activations)
    quantised.keep_16_bit(kept)
    weights = weight_files(engine.report.folder)
    report = CalibrationReport("demo", None, {"en": 30.0 * len(features)}, {}, weights, quantised.layers, {})
    folder = calibrated_home(engine.report.folder, home)
    save_calibrated(engine.network, engine.report.folder, folder, report)
    engine.close()
    return home
