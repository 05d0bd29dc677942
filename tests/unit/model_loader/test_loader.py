"""Every row that runs on a CPU, from the checkpoint to tokens; the proof; what cannot be loaded."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import EffectivePrecisionError, ModelUnavailableError, OutOfMemoryError
from model_loader.convert import bnb
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import GenerateRequest, ReferenceEngine, TokenRules
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision
from tests.unit.model_loader.conftest import EOT, NO_TIMESTAMPS
from tests.unit.model_loader.parity import PROMPT, Reference, check_parity

CPU_ROWS = [row for row in PRECISIONS.values() if row.unavailable(describe_device("cpu")) is None]


@pytest.mark.parametrize("row", CPU_ROWS, ids=lambda row: row.name)
def test_every_row_loads_is_proven_and_stays_within_its_tolerance(
    row: Precision,
    short_demo: Path,
    calibrations: Path,
    speech_features: torch.Tensor,
    reference: Reference,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check_parity(row, short_demo, calibrations, speech_features, reference)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_report_has_all_phases_and_times(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "fp32", device="cpu")
    report = engine.report
    assert report.load_s > 0 and report.warm_up_s is not None and report.warm_up_s > 0
    phases = report.phases
    assert phases.after_warm_up is not None and phases.after_unload is None
    resident = [p.process_bytes for p in (phases.before, phases.after_load, phases.after_warm_up, phases.peak)]
    assert all(value is not None and value > 2**20 for value in resident)
    assert resident[-1] == max(resident)
    assert phases.after_load.allocated_bytes is None  # torch keeps no account of main memory
    engine.close()
    assert engine.report.phases.after_unload is not None


def test_the_load_lasts_until_the_fast_engine_has_packed_its_weights(
    monkeypatch: pytest.MonkeyPatch, least_folder: Path
) -> None:
    def slow(*args: Any, **kwargs: Any) -> FastEngine:
        time.sleep(0.5)
        return FastEngine(*args, **kwargs)

    monkeypatch.setattr("model_loader.loader.FastEngine", slow)
    engine = load_engine(str(least_folder), "int8", engine="fast", device="cpu", warm_up=False)
    assert engine.report.load_s > 0.5
    assert engine.report.phases.after_load != engine.report.phases.before
    engine.close()


@pytest.mark.parametrize(("precision", "engine"), [("int8", "fast"), ("int8-dynamic", "reference"), ("fp32", "fast")])
def test_kernels_that_cannot_run_are_part_of_the_report(precision: str, engine: str) -> None:
    from model_loader import loader

    gpu = DeviceInfo("cuda", 0, "NVIDIA Test", (9, 0), 2**34, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "lacks_triton", lambda device: "Triton needs a C compiler.")
        assert loader._missing_kernels(engine, PRECISIONS[precision], gpu) == "Triton needs a C compiler."
        assert loader._missing_kernels("reference", PRECISIONS["fp16"], gpu) == "", "nothing of ours would run"
    assert loader._missing_kernels(engine, PRECISIONS[precision], describe_device("cpu")) == ""


def test_weights_counted_are_the_tensors_bytes(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "bf16", device="cpu", warm_up=False)
    expected = sum(p.numel() * 2 for p in engine._loaded.parameters())  # the tied head is listed once
    assert engine.report.weights_bytes == expected
    assert engine.report.attention == "sdpa"
    engine.close()


def test_a_conversion_that_did_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    lazy = replace(PRECISIONS["bnb-int8"], convert=PRECISIONS["fp32"].convert, stored_dtype="float32")
    monkeypatch.setitem(PRECISIONS, "bnb-int8", lazy)
    with pytest.raises(
        EffectivePrecisionError, match=r"bnb-int8 was requested, but 32 linear layers are Linear float32"
    ):
        load_engine(str(toy_folder), "8bit", device="cpu")


def test_one_layer_left_out_is_an_error(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    monkeypatch.setattr(bnb, "HEAD", "fc1")  # leaves fc1 alone, and converts the head
    with pytest.raises(EffectivePrecisionError, match=r"4 linear layers are Linear bfloat16, not Linear8bitLt int8"):
        load_engine(str(toy_folder), "8bit", device="cpu")


def test_the_wrong_kind_of_four_bits_is_an_error(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    row = PRECISIONS["bnb-nf4"]
    swapped = replace(row, convert=lambda _, folder, device: row.convert(PRECISIONS["bnb-fp4"], folder, device))
    monkeypatch.setitem(PRECISIONS, "bnb-nf4", swapped)
    with pytest.raises(EffectivePrecisionError, match="Linear4bit fp4, not Linear4bit nf4"):
        load_engine(str(toy_folder), "4bit", device="cpu")


def test_a_row_that_computes_otherwise_than_it_says_is_an_error(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    """fp16-autocast on a CPU, with autocast forgotten."""
    row = replace(PRECISIONS["fp16-autocast"], autocast=False, refusal=lambda device: None)
    monkeypatch.setitem(PRECISIONS, row.name, row)
    with pytest.raises(EffectivePrecisionError, match="layers compute in float32, not float16"):
        load_engine(str(toy_folder), row.name, device="cpu")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_every_class_of_both_sides_is_asked_what_it_computes_in(
    side: str, monkeypatch: pytest.MonkeyPatch, least_folder: Path
) -> None:
    """fp32 with feed-forward layers of another class, on one side, which return 16 bits."""

    class Halved(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).bfloat16()

    def convert(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
        model = full(row, folder, device)
        for name, module in model.named_modules():
            if side in name.split(".") and name.endswith("fc1"):
                module.__class__ = Halved
        return model

    full = PRECISIONS["fp32"].convert
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], convert=convert))
    with pytest.raises(EffectivePrecisionError, match="layers compute in bfloat16 and float32, not float32"):
        load_engine(str(least_folder), "fp32", engine="reference", device="cpu", warm_up=False)


def test_autocast_casts_each_weight_once_for_a_whole_generation(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    row = replace(PRECISIONS["fp16-autocast"], refusal=lambda device: None)  # a CPU can, slowly
    monkeypatch.setitem(PRECISIONS, row.name, row)
    engine = load_engine(str(toy_folder), row.name, device="cpu", warm_up=False)
    encoded = engine.encode(torch.zeros(1, 80, 3000))
    rules = TokenRules(EOT, NO_TIMESTAMPS, NO_TIMESTAMPS + 1, suppress=(EOT,))

    def casts(n_tokens: int) -> int:
        """Copies of matrices as large as a weight; activations of one position are smaller."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
            engine.generate(encoded, GenerateRequest([PROMPT], n_tokens, rules))
        shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
        return sum(1 for shape in shapes if len(shape) == 2 and shape[0] >= 64)

    assert casts(2) == casts(5) == 2 * 10 + 1  # both decoder blocks and the head, once
    engine.close()


def test_a_package_that_is_there_but_broken_is_named(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    def broken(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
        raise ImportError("libbitsandbytes_cpu.so: cannot open shared object file")

    monkeypatch.setitem(PRECISIONS, "bnb-int8", replace(PRECISIONS["bnb-int8"], convert=broken))
    with pytest.raises(EffectivePrecisionError, match="bnb-int8 cannot be made here: libbitsandbytes_cpu"):
        load_engine(str(toy_folder), "8bit", device="cpu")


def test_missing_weights_are_an_error_not_noise(tmp_path: Path, toy_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _copy(toy_folder, tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.fc2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailableError, match=r"lacks 1 of its weights \(model.decoder.layers.1.fc2.weight"):
        load_engine(str(folder), "fp32", device="cpu")


def test_weights_of_another_shape_are_an_error(tmp_path: Path, toy_folder: Path) -> None:
    folder = _copy(toy_folder, tmp_path / "shape")
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"vocab_size": 6004', '"vocab_size": 6005'), encoding="utf-8")
    with pytest.raises(ModelUnavailableError, match=r"lacks 1 of its weights.*do not fit its config"):
        load_engine(str(folder), "fp32", device="cpu")


def test_running_out_of_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    def full(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], convert=full))
    with pytest.raises(OutOfMemoryError, match=r"does not fit into the memory of CPU.*smaller precision"):
        load_engine(str(toy_folder), "fp32", device="cpu")


def test_running_out_of_memory_while_decoding_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, demo_engine: ReferenceEngine
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(demo_engine._loaded.model.encoder, "forward", full)
    with pytest.raises(OutOfMemoryError, match="Decode fewer windows at once"):
        demo_engine.encode(torch.zeros(1, 80, 3000))


def test_a_load_logs_one_event(caplog: pytest.LogCaptureFixture, toy_folder: Path) -> None:
    with caplog.at_level(logging.INFO, logger="model_loader"):
        load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False).close()
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["event=engine_loaded", "event=engine_closed"]


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
