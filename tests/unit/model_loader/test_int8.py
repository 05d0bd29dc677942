"""Our int8 x int8 layers and their calibration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.precision import calibrate
from errors import CalibrationMissingError, ModelUnavailableError, UnavailablePrecisionError
from model_loader.calibration import (
    MANIFEST,
    CalibrationReport,
    calibrated_home,
    linear_layers,
    quantise_model,
    rank,
    record_activations,
    save_calibrated,
    smoothing_groups,
    weight_files,
)
from model_loader.convert.int8 import load_int8_dynamic, load_int8_static
from model_loader.device import DeviceInfo
from model_loader.header import find_header
from model_loader.int8_linear import Int8Linear, integer_product, quantise_weight, static_scale
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS
from model_loader.weights import resolve_checkpoint


def _layer(n_in: int = 64, n_out: int = 48) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(n_in, n_out)


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (40, 64)])
def test_an_int8_layer_is_close_to_the_layer_it_came_from(is_static: bool, shape: tuple[int, ...]) -> None:
    layer, x = _layer(), torch.randn(shape) * 2 + 0.7
    span = (float(x.min()), float(x.max())) if is_static else None
    quantised = Int8Linear.from_weights(layer.weight, layer.bias, dtype=torch.float32, input_range=span)
    exact, got = layer(x), quantised(x)
    assert got.shape == exact.shape
    assert (got - exact).norm() / exact.norm() < 0.02


def test_the_product_is_made_of_int8_and_obeys_its_scales() -> None:
    """A poisoned scale changes the result by exactly its factor: nothing computes from floating-point weights."""
    layer, x = _layer(), torch.randn(5, 64)
    quantised = Int8Linear.from_weights(layer.weight, None, dtype=torch.float32, input_range=(-4.0, 4.0))
    before = quantised(x)
    quantised.weight_scale *= 3.0
    quantised.fold()
    assert torch.allclose(quantised(x), 3.0 * before, rtol=1e-5)
    quantised.weight.zero_()
    quantised.fold()
    assert quantised(x).abs().max() == 0
    assert {b.dtype for name, b in quantised.named_buffers() if name == "weight"} == {torch.int8}


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("n_in", [1, 256, 1024, 1025, 5120])
def test_the_product_is_that_of_whole_numbers(
    n_in: int, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_loader.int8_linear.has_int8_instructions", lambda: has_instructions)
    dice = torch.Generator().manual_seed(n_in)
    rows, weight = (torch.randint(-128, 128, (n, n_in), dtype=torch.int8, generator=dice) for n in (7, 5))
    rows[0], weight[0] = -128, 127  # the largest sum there is
    expected = rows.long() @ weight.long().t()
    assert torch.equal(integer_product(rows, weight), expected.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(integer_product(rows, weight), expected.float())


@pytest.mark.parametrize("input_range", [(-3.0, 2.0), None], ids=["static", "dynamic"])
def test_outputs_in_pieces_are_the_same_to_the_last_bit(
    input_range: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _layer()
    quantised = Int8Linear.from_weights(layer.weight, layer.bias, dtype=torch.float32, input_range=input_range)
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(4))
    whole = quantised(x)
    monkeypatch.setattr("model_loader.int8_linear.OUTPUTS_A_PASS", 7)
    assert torch.equal(quantised(x), whole) and whole.abs().max() > 0


def test_a_static_layer_clips_what_was_never_measured() -> None:
    layer = _layer()
    quantised = Int8Linear.from_weights(layer.weight, layer.bias, dtype=torch.float32, input_range=(-1.0, 1.0))
    inside, outside = torch.full((1, 64), 1.0), torch.full((1, 64), 50.0)
    assert torch.allclose(quantised(inside), quantised(outside), atol=1e-3)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.17, 18.0), (0.5, 2.0), (0.0, 0.0), (-3.0, -1.0)])
def test_static_levels_hold_zero_and_the_whole_range(low: float, high: float) -> None:
    scale, zero = static_scale(low, high)
    assert -128 <= zero <= 127
    for value in (0.0, low, high):
        level = min(max(round(value / scale) + zero, -128), 127)
        assert abs((level - zero) * scale - value) <= scale


def test_weights_round_to_the_nearest_level_of_their_channel() -> None:
    weight = torch.randn(7, 32)
    quantised, scale = quantise_weight(weight)
    assert quantised.dtype == torch.int8 and quantised.abs().max() == 127
    assert ((quantised.float() * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()


def test_smoothing_changes_no_output_before_rounding(toy_folder: Path, speech_features: torch.Tensor) -> None:
    """Factors move from one module into the next; put back in floating point, the model computes what it did."""
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False)
    model = engine.network
    features = torch.nn.functional.pad(speech_features[:1], (0, 3000 - speech_features.shape[2]))
    tokens = torch.tensor([[1, 2, 3, 4]])
    with record_activations(model) as activations, torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=tokens).logits
    quantised = quantise_model(model, activations)
    assert any(layer.exponent > 0 for layer in quantised.layers)
    quantised.keep_16_bit([layer.name for layer in quantised.layers])
    with torch.no_grad():
        got = model(input_features=features, decoder_input_ids=tokens).logits
    assert torch.allclose(got, expected, atol=1e-3)
    engine.close()


def test_groups_name_every_layer_but_the_second_of_each_block(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False)
    grouped = [name for group in smoothing_groups(engine.network) for name in group.layers]
    assert len(grouped) == len(set(grouped))
    assert {name.rsplit(".", 1)[1] for name in set(linear_layers(engine.network)) - set(grouped)} == {"fc2"}
    engine.close()


def test_a_layer_that_was_never_run_is_named(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False)
    with pytest.raises(ValueError, match="saw no activations"):
        quantise_model(engine.network, {})
    engine.close()


def test_a_report_is_saved_and_read_whole(calibrations: Path, short_demo: Path, tmp_path: Path) -> None:
    folder = calibrated_home(short_demo, calibrations)
    report = CalibrationReport.load(folder)
    assert len(report.layers) == 76 and report.ranked[0].output_error >= report.ranked[-1].output_error
    report = replace(report, model="other")
    report.save(tmp_path)
    assert CalibrationReport.load(tmp_path) == report


def test_layers_kept_at_16_bits_stay_so_through_saving(least_folder: Path, tmp_path: Path) -> None:
    engine = load_engine(str(least_folder), "fp32", device="cpu", warm_up=False)
    model = engine.network
    with record_activations(model) as activations, torch.no_grad():
        model(input_features=torch.randn(1, 80, 3000), decoder_input_ids=torch.tensor([[1, 2, 3, 4]]))
    quantised = quantise_model(model, activations)
    names = [layer.name for layer in rank(quantised.layers)]
    quantised.keep_16_bit(names[:2])
    kept = {name: quantised.floating[name].weight.half() for name in names[:2]}
    report = CalibrationReport("least", None, {}, {}, (), quantised.layers, {})
    save_calibrated(model, least_folder, tmp_path, report)
    engine.close()
    engine = load_engine(str(tmp_path), "int8-static", device="cpu", warm_up=False)
    loaded = {name: engine.network.get_submodule(name) for name in names}
    assert {name for name in names if isinstance(loaded[name], torch.nn.Linear)} == set(kept)
    assert all(torch.equal(loaded[name].weight, weight) for name, weight in kept.items())
    assert all(isinstance(loaded[name], Int8Linear) for name in names[2:])
    engine.close()


class Watch(TorchDispatchMode):
    """Every tensor of numbers wider than 8 bits that comes into being, by (format, shape); those on 'meta' are none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.itemsize > 1:
                self.seen.add((tensor.dtype, tuple(tensor.shape)))
        return found


def test_a_calibrated_folder_loads_without_a_wider_copy_of_any_8_bit_weight(
    calibrations: Path, short_demo: Path, cpu: DeviceInfo
) -> None:
    folder = calibrated_home(short_demo, calibrations)
    with Watch() as watch:
        model = load_int8_static(PRECISIONS["int8-static"], folder, cpu.torch_device)
    weights = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, Int8Linear)}
    assert watch.seen, "bias and scale, at least"
    assert not {(dtype, shape) for dtype, shape in watch.seen if shape in weights}
    with Watch() as watch:
        load_int8_dynamic(PRECISIONS["int8-dynamic"], short_demo, cpu.torch_device)
    assert {shape for _, shape in watch.seen} >= weights, "it would have been seen: this one reads them in 16 bits"


def test_folding_makes_no_wider_copy_of_a_weight() -> None:
    """Not even inside an operation, where only torch's own account sees it."""
    layer = Int8Linear(512, 2048, is_static=True, dtype=torch.float32)
    layer.weight.random_(-127, 128)
    layer.input_scale.fill_(0.5)
    layer.input_zero.fill_(3.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        layer.fold()
    assert torch.equal(layer.folded_bias, -1.5 * layer.weight.long().sum(dim=1).float())
    largest = max(event.self_cpu_memory_usage for event in told.events())
    assert 0 < largest < layer.weight.nbytes


def test_a_calibrated_folder_loads_by_itself_and_only_at_its_precision(calibrations: Path, short_demo: Path) -> None:
    folder = str(calibrated_home(short_demo, calibrations))
    engine = load_engine(folder, "static", device="cpu", warm_up=False)
    assert engine.report.effective == "int8-static"
    engine.close()
    with pytest.raises(UnavailablePrecisionError, match="calibrated 8-bit weights only"):
        load_engine(folder, "fp32", device="cpu")


def test_auto_takes_the_only_row_of_a_calibrated_folder(calibrations: Path, short_demo: Path) -> None:
    engine = load_engine(str(calibrated_home(short_demo, calibrations)), "auto", device="cpu", warm_up=False)
    engine.close()
    assert engine.report.effective == "int8-static" and "so auto takes int8-static" in str(
        engine.report.precision_choice
    )
    assert not engine.report.is_demo, "other weights than the demo's, whatever its manifest calls them"


def test_the_demo_in_8_bits_is_the_demo(
    calibrations: Path, short_demo: Path, demo_folder: Path, tmp_path: Path, cpu: DeviceInfo
) -> None:
    folder = Path(shutil.copytree(calibrated_home(short_demo, calibrations), tmp_path / "copy"))
    replace(CalibrationReport.load(folder), weights=weight_files(demo_folder)).save(folder)
    assert resolve_checkpoint(str(folder), device=cpu).is_demo


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda values: [], "holds a list"),
        (lambda values: None, "holds null"),
        (lambda values: {"layers": [{"name": "x"}]}, "model is missing"),
        (lambda values: {**values, "layers": [{"name": "x"}]}, "low is missing"),
        (lambda values: {**values, "layers": 3}, "layers is 3"),
        (lambda values: {**values, "languages": {"en": "x"}}, "languages is"),
        (lambda values: {name: values[name] for name in values if name != "versions"}, "versions is missing"),
    ],
)
def test_a_damaged_manifest_is_a_sentence_wherever_it_is_met(
    damage: Callable[[Any], Any], part: str, calibrations: Path, short_demo: Path, tmp_path: Path
) -> None:
    home = Path(shutil.copytree(calibrations, tmp_path / "home"))
    folder = calibrated_home(short_demo, home)
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(damage(values)), encoding="utf-8")
    said = rf"int8_static\.json, .*{part}.*Calibrate again"
    with pytest.raises(ModelUnavailableError, match=said):
        load_engine(str(short_demo), "int8-static", device="cpu", calibrations=home)
    with pytest.raises(ModelUnavailableError, match=said):
        load_engine(str(folder), "auto", device="cpu")
    with pytest.raises(ModelUnavailableError, match=said):
        find_header(str(folder))


def test_what_a_later_version_adds_to_a_manifest_is_passed_over(
    calibrations: Path, short_demo: Path, tmp_path: Path
) -> None:
    folder = calibrated_home(short_demo, calibrations)
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps({**values, "added": 1}), encoding="utf-8")
    assert CalibrationReport.load(tmp_path) == CalibrationReport.load(folder)


def test_a_missing_calibration_is_a_sentence_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(CalibrationMissingError, match=r"start\.sh calibrate --model demo"):
        load_engine("demo", "int8-static", device="cpu", calibrations=tmp_path)


def test_weights_saved_over_calibrated_ones_are_not_passed_over(
    least_folder: Path, tmp_path: Path, cpu: DeviceInfo
) -> None:
    """A fine-tune in the same folder has the same size; a copy of the same weights has another time."""
    checkpoint, home = tmp_path / "checkpoint", tmp_path / "calibrations"
    shutil.copytree(least_folder, checkpoint)
    calibrate(str(checkpoint), home, cpu)
    file = checkpoint / "model.safetensors"
    os.utime(file, ns=(0, 0))
    load_engine(str(checkpoint), "int8-static", device="cpu", warm_up=False, calibrations=home).close()
    n_bytes, weights = file.stat().st_size, load_file(file)
    save_file({name: tensor * 0 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == n_bytes
    with pytest.raises(CalibrationMissingError, match="have changed since they were calibrated"):
        load_engine(str(checkpoint), "int8-static", device="cpu", warm_up=False, calibrations=home)
