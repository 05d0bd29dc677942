"""Every row that runs on a CPU, from the checkpoint to tokens; the proof; what cannot be loaded."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import EffectivePrecisionError, ModelUnavailableError, OutOfMemoryError
from model_loader.calibration import linear_layers, replace_layer
from model_loader.convert import bnb
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import GenerateRequest, ReferenceEngine, TokenRules
from model_loader.fast.engine import FastEngine
from model_loader.fit import Foresight
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision
from tests.unit.model_loader.conftest import EOT, NO_TIMESTAMPS
from tests.unit.model_loader.hub_server import serve
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


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("int8-dynamic", "", r"15 linear layers are Linear float32, not Int8Linear int8"),
        ("int8", "decoder.layers.0.fc", r"2 linear layers are Linear float32, not PackedLinear int8"),
    ],
)
def test_a_conversion_cannot_excuse_the_layers_that_it_left_out(
    name: str, left: str, message: str, monkeypatch: pytest.MonkeyPatch, least_folder: Path
) -> None:
    """It says of all but one layer that they are to stay as they were. Which may is the row's to say."""

    def convert(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
        done, wide = own(row, folder, device), PRECISIONS["fp32"].convert(PRECISIONS["fp32"], folder, device)
        names = [x for x in linear_layers(wide) if left in x and x != "model.encoder.layers.0.fc1"]
        for layer in names:
            replace_layer(done, layer, wide.get_submodule(layer))
        done.kept_linears = names  # type: ignore[assignment]
        return done

    own = PRECISIONS[name].convert
    monkeypatch.setitem(PRECISIONS, name, replace(PRECISIONS[name], convert=convert))
    with pytest.raises(EffectivePrecisionError, match=f"{name} was requested, but {message}"):
        load_engine(str(least_folder), name, device="cpu")


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


# --- whether it fits, foretold ----------------------------------------------------------------------------------------


def test_whether_it_fits_is_told_before_a_byte_of_weights_is_read_and_never_stops_a_load(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where nothing at all is free: the prediction may be wrong."""
    order: list[Any] = []
    convert = PRECISIONS["fp32"].convert

    def read(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
        order.append("read")
        return convert(row, folder, device)

    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], convert=read))
    monkeypatch.setattr("model_loader.loader.free_bytes", lambda device: 1)
    engine = load_engine(str(toy_folder), "fp32", device="cpu", warm_up=False, on_fit=order.append)
    engine.close()
    seen, then = order
    assert then == "read" and seen.verdict.colour == "red" and engine.report.verdict == seen.verdict
    assert "fp32 of" in seen.verdict.warning and seen.prediction.batch == 4, "the batch that the program decodes"
    assert [r.levelname for r in caplog.records if "event=may_not_fit colour=red" in r.getMessage()] == ["WARNING"]


def test_what_fits_is_told_too_and_nothing_is_warned_of(toy_folder: Path) -> None:
    told: list[Foresight] = []
    engine = load_engine(str(toy_folder), "auto", device="cpu", warm_up=False, on_fit=told.append)
    engine.close()
    assert [seen.verdict.colour for seen in told] == ["green"] and told[0].verdict.warning == ""
    assert told[0].row.name == engine.report.effective and told[0].choice == engine.report.precision_choice


def test_a_checkpoint_left_to_the_reference_engine_is_foretold_for_that(toy_folder: Path) -> None:
    told: list[Foresight] = []
    engine = load_engine(str(toy_folder), "fp32", engine="auto", device="cpu", warm_up=False, on_fit=told.append)
    engine.close()
    assert engine.report.engine == told[0].prediction.engine == "reference"


def test_a_load_that_runs_out_of_memory_has_told_its_verdict(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("model_loader.loader._load", full)
    monkeypatch.setattr("model_loader.loader.free_bytes", lambda device: 1)
    told: list[Foresight] = []
    with pytest.raises(OutOfMemoryError, match="does not fit into the memory"):
        load_engine(str(toy_folder), "fp32", device="cpu", on_fit=told.append)
    assert [seen.verdict.colour for seen in told] == ["red"]


def test_of_a_download_it_is_told_before_the_weights_come(toy_folder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    cache = tmp_path / "cache"

    def note(seen: Foresight) -> None:
        told.append((seen.header.source, bool(list(cache.rglob("model.safetensors")))))

    with serve({"some/whisper": toy_folder}) as hub:
        load_engine(
            "some/whisper", "fp32", device="cpu", warm_up=False, mirror=hub.address, cache_dir=cache, on_fit=note
        ).close()
    assert told == [("config", False), ("file", True)]


@pytest.mark.parametrize("changes", [{"dropout": "x"}, {"dtype": "foo"}, {"architectures": 5}])
def test_what_transformers_refuses_of_a_config_is_a_sentence(
    changes: dict[str, Any], tmp_path: Path, toy_folder: Path
) -> None:
    """And of a folder of the user's own it does not say to fetch it."""
    folder = _copy(toy_folder, tmp_path / "config")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(ModelUnavailableError, match=r"cannot be read \(config\.json: .*Copy or save it there again"):
        load_engine(str(folder), "fp32", device="cpu")


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
