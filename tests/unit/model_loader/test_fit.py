"""The prediction against what was measured and counted; verdicts, batches, auto; headers from disk and from a Hub."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import make_checkpoint
from errors import (
    ModelUnavailableError,
    NotWhisperError,
    OptionError,
    UnavailablePrecisionError,
    UnknownModelError,
)
from model_loader.calibration import calibrated_home
from model_loader.device import DeviceInfo, describe_device
from model_loader.fast.slots import MAX_ROWS, make_slots
from model_loader.fit import (
    FAST_ROWS,
    MIB,
    Verdict,
    by_accuracy,
    choose_precision,
    fit_rows,
    foresee,
    max_batch,
    predict,
    verdict,
)
from model_loader.header import (
    KNOWN,
    Calibrated,
    Header,
    describe,
    find_header,
    known_headers,
    read_folder,
    whisper_shapes,
)
from model_loader.loader import load_engine
from model_loader.plan import GPUS, parse_batches, selection_matrix, usable_bytes
from model_loader.pool import EnginePool
from model_loader.precision import PRECISIONS, Precision
from tests.calibrated import calibrate_demo
from tests.short import make_short
from tests.unit.model_loader.hub_server import serve

GpuOf = Callable[..., DeviceInfo]
GIB = 2**30

MEASURED = {
    # row: (batch, new tokens, weights counted, peak in use), MiB in torch's allocator on an H200, large-v3 shape
    "fp32": [(1, 64, 5888, 6420)],
    "fp16-autocast": [(1, 64, 5888, 7957)],
    "fp16": [(1, 64, 2944, 3227), (32, 128, 2945, 11353)],
    "bf16": [(1, 64, 2944, 3227)],
    "bnb-int8": [(1, 64, 1547, 1831), (32, 128, 1548, 9917)],
    "bnb-nf4": [(1, 64, 867, 1151)],
    "bnb-fp4": [(1, 64, 867, 1151)],
    "int8-static": [(1, 48, 1553, 1833), (32, 16, 1553, 9496)],
    "int8-dynamic": [(1, 48, 1549, 1884), (32, 16, 1549, 9541)],
}
MEASURED_FAST = {
    # row on the fast engine: weights counted, peak in use with batches of 1 and 32, MiB as above
    "fp32": (5889, 7047, 26447),
    "fp16": (2946, 3535, 13245),
    "bf16": (2946, 3536, 13243),
    "int8": (2248, 2716, 8793),
    "int4": (1907, 2400, 8478),
    "fp8": (1698, 2166, 8244),
    "bnb-nf4": (868, 1496, 11197),
    "bnb-fp4": (868, 1496, 11198),
    "int8-static": (1554, 2140, 11840),
    "int8-dynamic": (1551, 2137, 11839),
}
PEAK_WITHIN = {"int8-dynamic": 0.03}
"""Others: 2 %. 10 % is the margin of a green verdict."""


@pytest.fixture(scope="module")
def large() -> Header:
    return next(header for header in known_headers() if header.name == "large-v3")


@pytest.fixture(scope="module")
def demo() -> Header:
    return find_header("demo", offline=True)


# --- predicted and measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURED)
def test_prediction_is_near_what_an_h200_measured(name: str, large: Header, gpu_of: GpuOf) -> None:
    for batch, tokens, weights_mib, peak_mib in MEASURED[name]:
        found = predict(large, PRECISIONS[name], batch, tokens=tokens, device=gpu_of(9, 0))
        assert found.weights_bytes / MIB == pytest.approx(weights_mib, rel=0.01)
        assert found.peak_bytes / MIB == pytest.approx(peak_mib, rel=PEAK_WITHIN.get(name, 0.02))
        assert found.weights_bytes + found.cache_bytes + found.working_bytes == found.peak_bytes


def test_every_row_that_the_fast_engine_runs_was_measured_there() -> None:
    assert set(MEASURED_FAST) == {name for name, row in PRECISIONS.items() if row.fast}


@pytest.mark.parametrize("name", MEASURED_FAST)
def test_prediction_is_near_what_an_h200_measured_on_the_fast_engine(name: str, large: Header, gpu_of: GpuOf) -> None:
    weights_mib, *peaks_mib = MEASURED_FAST[name]
    for batch, peak_mib in zip((1, 32), peaks_mib, strict=True):
        found = predict(large, PRECISIONS[name], batch, device=gpu_of(9, 0), engine="fast")
        assert found.weights_bytes / MIB == pytest.approx(weights_mib, rel=0.01)
        assert found.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.04)


CPU_ROWS = ["fp32", "bf16", "int8", "int4", "bnb-int8", "bnb-nf4", "int8-dynamic"]


@pytest.mark.parametrize("name", CPU_ROWS)
def test_predicted_weights_are_what_the_census_counts(name: str, demo: Header, cpu: DeviceInfo) -> None:
    engine = load_engine("demo", name, device="cpu", warm_up=False)
    report = engine.report
    engine.close()
    assert (report.model, report.is_demo, report.effective) == ("demo", True, name)
    assert report.prediction is not None
    assert report.prediction.weights_bytes == pytest.approx(report.weights_bytes, rel=0.05)
    assert report.prediction == predict(demo, PRECISIONS[name], tokens=8, device=cpu)


@pytest.mark.parametrize(
    "name", [row.name for row in PRECISIONS.values() if row.fast and row.unavailable(describe_device("cpu")) is None]
)
def test_the_fast_engines_caches_and_weights_are_as_predicted(
    name: str, short_demo: Path, calibrations: Path, cpu: DeviceInfo
) -> None:
    demo = read_folder(short_demo)
    engine = load_engine(str(short_demo), name, engine="fast", device="cpu", warm_up=False, calibrations=calibrations)
    found = predict(demo, PRECISIONS[name], 3, device=cpu, engine="fast")
    assert found.weights_bytes == pytest.approx(engine.report.weights_bytes, rel=0.01)
    slots = make_slots(engine._loaded.decoder, 3, quantised=engine._quantised)  # type: ignore[union-attr]
    assert found.cache_bytes == pytest.approx(slots.n_bytes, rel=0.001)
    assert engine.report.prediction == predict(demo, PRECISIONS[name], tokens=8, device=cpu, engine="fast")
    engine.close()


def test_the_fast_engine_is_predicted_by_powers_of_two_up_to_its_limit(large: Header, gpu_of: GpuOf) -> None:
    def cache(batch: int, name: str = "fp16") -> int:
        return predict(large, PRECISIONS[name], batch, device=gpu_of(9, 0), engine="auto").cache_bytes

    assert FAST_ROWS == MAX_ROWS
    assert cache(5) == cache(8) == 8 * cache(1) and cache(200) == cache(32) == 32 * cache(1)
    assert 0.6 < cache(1, "int8") / cache(1) < 0.65, "1500 of 1948 positions take half"
    slow, fast = (predict(large, PRECISIONS["bnb-int8"], engine=engine) for engine in ("reference", "auto"))
    assert slow == fast and slow.engine == "reference", "auto leaves it to the reference engine"


def test_caches_grow_with_windows_and_tokens(large: Header) -> None:
    row = PRECISIONS["fp16"]
    one = predict(large, row, 1, tokens=0)
    # Keys and values, 32 layers, 1500 positions and 4 of the prompt, 1280 numbers of 2 bytes.
    assert one.cache_bytes == 2 * 32 * 1504 * 1280 * 2
    assert predict(large, row, 8, tokens=0).cache_bytes == 8 * one.cache_bytes
    assert predict(large, row, 1, tokens=10_000).cache_bytes == 2 * 32 * (1500 + 448) * 1280 * 2


def test_a_row_converted_after_reading_needs_the_unconverted_model_too(large: Header) -> None:
    packed, stock = predict(large, PRECISIONS["int8"]), predict(large, PRECISIONS["bnb-int8"])
    assert packed.load_peak_bytes > predict(large, PRECISIONS["fp16"]).weights_bytes > packed.weights_bytes
    assert stock.load_peak_bytes < 1.1 * stock.weights_bytes


def test_autocast_holds_16_bit_copies_of_the_weights(large: Header) -> None:
    mixed, full = predict(large, PRECISIONS["fp16-autocast"]), predict(large, PRECISIONS["fp32"])
    assert mixed.weights_bytes == full.weights_bytes
    assert mixed.working_bytes - full.working_bytes == pytest.approx(
        2 * (large.decoder_linear + 51866 * 1280), rel=0.05
    )


def test_the_context_is_apart_and_only_on_a_gpu(demo: Header, cpu: DeviceInfo, gpu_of: GpuOf) -> None:
    assert predict(demo, PRECISIONS["fp32"], device=cpu).context_bytes == 0
    assert predict(demo, PRECISIONS["fp32"], device=gpu_of(9, 0)).context_bytes > 0


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)
def test_every_row_is_predicted_smaller_or_equal_to_fp32(row: Precision, large: Header) -> None:
    found = predict(large, row)
    assert 0 < found.weights_bytes <= predict(large, PRECISIONS["fp32"]).weights_bytes


def test_a_new_row_appears_by_itself(monkeypatch: pytest.MonkeyPatch, large: Header, gpu_of: GpuOf) -> None:
    row = replace(PRECISIONS["bf16"], name="made-up", aliases=(), bytes_per_weight=0.25, linear_class="Mine")
    monkeypatch.setitem(PRECISIONS, row.name, row)
    assert fit_rows(large, gpu_of(9, 0), 16 * GIB)[-1].precision == "made-up"
    assert predict(large, row).weights_bytes < predict(large, PRECISIONS["bnb-nf4"]).weights_bytes


# --- verdict, batch, auto ---------------------------------------------------------------------------------------------


def test_verdict_has_a_colour_and_a_sentence_with_figures(large: Header) -> None:
    found = predict(large, PRECISIONS["fp16"], 8)
    needed = found.needed_bytes
    assert verdict(found, 24 * GIB) == Verdict(
        "green", "fp16 of large-v3 needs 5.1 GiB for 8 windows at a time; 24.0 GiB are free."
    )
    assert verdict(found, needed + 1).colour == "amber" and "may just fit" in verdict(found, needed + 1).sentence
    assert verdict(found, needed - 1).colour == "red" and "but only 5.1 GiB" in verdict(found, needed - 1).sentence


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_largest_batch_is_the_last_that_is_green(large: Header, engine: str) -> None:
    row, free = PRECISIONS["fp16"], 10 * GIB
    most = max_batch(large, row, free, engine=engine)
    assert verdict(predict(large, row, most, engine=engine), free).colour == "green"
    assert verdict(predict(large, row, most + 1, engine=engine), free).colour != "green"
    assert max_batch(large, row, GIB) == 0
    assert max_batch(large, row, 10_000 * GIB, engine="reference") == 256


def test_no_larger_batch_is_promised_than_the_rows_engine_decodes(large: Header) -> None:
    plenty, stock = 10_000 * GIB, PRECISIONS["bnb-int8"]
    assert {max_batch(large, PRECISIONS["fp16"], plenty, engine=engine) for engine in ("fast", "auto")} == {MAX_ROWS}
    assert max_batch(large, stock, plenty) == 256, "the fast engine does not run it"


def test_a_batch_of_nothing_is_refused(large: Header) -> None:
    with pytest.raises(OptionError, match="batch of 0"):
        predict(large, PRECISIONS["fp16"], 0)


def test_rows_by_accuracy_go_from_fp32_down_and_prefer_the_fast_of_equals() -> None:
    names = [row.name for row in by_accuracy()]
    assert names[0] == "fp32" and names.index("fp16") < names.index("fp16-autocast")
    tolerances = [row.tolerance for row in by_accuracy()]
    assert tolerances == sorted(tolerances)


@pytest.mark.parametrize(
    ("free_gib", "capability", "expected"),
    [(140, (9, 0), "fp32"), (15, (9, 0), "fp16"), (15, (5, 2), "fp32"), (14, (7, 5), "fp16")],
)
def test_auto_takes_the_most_accurate_with_room_for_the_batch(
    free_gib: float, capability: tuple[int, int], expected: str, large: Header, gpu_of: GpuOf
) -> None:
    choice = choose_precision(large, gpu_of(*capability), int(free_gib * GIB), batch=16)
    assert choice.row.name == expected
    assert choice.reason.endswith(".") and f"{free_gib}.0 GiB" in choice.reason


def test_auto_wants_room_for_the_batch_not_for_one_window(large: Header, gpu_of: GpuOf) -> None:
    free = 10 * GIB
    assert choose_precision(large, gpu_of(8, 0), free, batch=1).row.name == "fp32"
    choice = choose_precision(large, gpu_of(8, 0), free, batch=16)
    assert choice.row.name == "fp16" and "fp32 of large-v3 needs" in choice.reason


def test_auto_where_nothing_has_room_takes_what_needs_least_and_says_so(large: Header, gpu_of: GpuOf) -> None:
    tight = choose_precision(large, gpu_of(8, 0), 2 * GIB, batch=64)
    assert tight.row.name in ("bnb-nf4", "bnb-fp4") and "has room for" in tight.reason
    none = choose_precision(large, gpu_of(8, 0), GIB // 4, batch=1)
    assert "needs the least" in none.reason and "No precision of large-v3 has room" in none.reason


def test_auto_never_takes_a_row_that_needs_a_calibration(large: Header, gpu_of: GpuOf) -> None:
    for free in range(1, 32):
        row = choose_precision(large, gpu_of(9, 0), free * GIB).row
        assert not row.needs_calibration


def test_a_calibrated_folder_has_one_row_and_auto_takes_it(
    calibrations: Path, short_demo: Path, cpu: DeviceInfo, gpu_of: GpuOf
) -> None:
    header = read_folder(calibrated_home(short_demo, calibrations))
    assert header.calibrated is not None and header.n_weights == read_folder(short_demo).n_weights
    rows = fit_rows(header, cpu, GIB)
    assert [row.precision for row in rows if row.unavailable is None] == ["int8-static"]
    assert all("calibrated 8-bit weights only" in str(row.unavailable) for row in rows if row.unavailable)
    choice = choose_precision(header, cpu, GIB)
    assert choice.row.name == "int8-static" and "holds calibrated 8-bit weights only" in choice.reason
    with pytest.raises(UnavailablePrecisionError, match=r"int8-static needs .*7\.5"):
        choose_precision(header, gpu_of(6, 0), GIB)


def test_layers_that_a_calibration_kept_wide_are_predicted_so(
    least_folder: Path, tmp_path: Path, speech_features: torch.Tensor, cpu: DeviceInfo
) -> None:
    short = make_short(least_folder, tmp_path / "short")
    kept = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"]
    home = calibrate_demo(tmp_path / "home", speech_features, device="cpu", model=str(short), kept=kept)
    engine = load_engine(str(short), "int8-static", device="cpu", warm_up=False, calibrations=home)
    engine.close()
    shapes = read_folder(short).shapes
    header = read_folder(calibrated_home(short, home))
    assert header.calibrated == Calibrated(
        sum(math.prod(shapes[f"{name}.weight"]) for name in kept), sum(shapes[f"{name}.weight"][0] for name in kept)
    )
    found = predict(header, PRECISIONS["int8-static"], tokens=8, device=cpu)
    assert engine.report.prediction == replace(found, model=engine.report.model)
    assert found.weights_bytes == pytest.approx(engine.report.weights_bytes, rel=0.01)
    assert found.weights_bytes > 1.05 * predict(read_folder(short), PRECISIONS["int8-static"], device=cpu).weights_bytes


def test_less_room_than_for_the_usual_batch_is_said_with_what_there_is_room_for(large: Header, cpu: DeviceInfo) -> None:
    row = PRECISIONS["fp32"]
    free = predict(large, row, 2, device=cpu, engine="auto").needed_bytes * 1.1
    seen = foresee(large, row, cpu, int(free) + 1)
    assert seen.verdict.colour != "green" and "There is room for 2 at a time" in seen.verdict.warning
    assert seen.choice is None and seen.prediction.batch == 4
    assert foresee(large, row, cpu, 100 * GIB).verdict.foretold == ""
    assert "room for" not in foresee(large, row, cpu, GIB).verdict.warning
    assert str(foresee(large, None, cpu, 100 * GIB).choice).endswith("most accurate row.")


def test_auto_loads_what_it_chose_and_reports_why(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = EnginePool(device="cpu", warm_up=False)
    with pool.borrow(str(toy_folder), "auto") as first:
        assert first.report.requested == first.report.effective == "fp32"
        assert f"fp32 of {toy_folder.name} needs" in str(first.report.precision_choice)
    with pool.borrow(str(toy_folder), "auto") as again, pool.borrow(str(toy_folder), "fp32") as named:
        assert again is first and named is first
    assert pool.unload(str(toy_folder), "auto") == 1
    needed = predict(read_folder(toy_folder), PRECISIONS["bf16"], 4, device=first.report.device).needed_bytes
    monkeypatch.setattr("model_loader.loader.free_bytes", lambda device: int(1.15 * needed))
    with pool.borrow(str(toy_folder), "auto") as tight:
        assert tight.report.effective != "fp32" and f"fp32 of {toy_folder.name} needs" in str(
            tight.report.precision_choice
        )
    pool.close()


def test_a_precision_by_name_has_no_choice_to_explain(toy_folder: Path) -> None:
    engine = load_engine(str(toy_folder), "bf16", device="cpu", warm_up=False)
    assert engine.report.precision_choice is None
    engine.close()


# --- headers ----------------------------------------------------------------------------------------------------------


def test_published_sizes_give_the_tensors_of_a_real_file(toy_folder: Path) -> None:
    read = read_folder(toy_folder)
    assert read.source == "file" and read.shapes == dict(whisper_shapes(read.sizes))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 37.8),
        ("base", 72.6),
        ("small", 241.7),
        ("medium", 763.9),
        ("large-v3", 1543.5),
        ("large-v3-turbo", 808.9),
    ],
)
def test_known_sizes_have_the_published_number_of_weights(name: str, millions: float) -> None:
    assert next(iter(KNOWN)) == "tiny" and len(KNOWN) == 6
    header = find_header(name, offline=True)
    assert header.n_weights / 1e6 == pytest.approx(millions, abs=0.06)
    assert header.name == f"openai/whisper-{name}"
    assert find_header(f"openai/whisper-{name}", offline=True) == header


def test_shards_are_added_up(tmp_path: Path, toy_folder: Path) -> None:
    sharded = make_checkpoint("toy", tmp_path / "shards", max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert read_folder(sharded, "toy") == read_folder(toy_folder, "toy")


def test_an_untied_copy_of_the_head_is_not_counted_twice() -> None:
    shapes = dict(whisper_shapes(KNOWN["tiny"]))
    again = {**shapes, "proj_out.weight": shapes["model.decoder.embed_tokens.weight"]}
    assert describe("x", KNOWN["tiny"], again, "file") == describe("x", KNOWN["tiny"], shapes, "file")


def test_weights_in_another_format_are_calculated_from_config(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copy(toy_folder / "config.json", tmp_path)
    found = read_folder(tmp_path, "toy")
    assert found.source == "config" and found.n_weights == read_folder(toy_folder).n_weights


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [
        ('{"model_type": "gpt2"}', NotWhisperError, "not a Whisper"),
        ('{"model_type": "whisper", "d_model": 4}', ModelUnavailableError, "encoder_layers"),
        ("{", ModelUnavailableError, "cannot be read"),
        (None, NotWhisperError, "no config.json"),
    ],
)
def test_a_bad_folder_is_a_sentence(content: str | None, error: type[Exception], part: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=part):
        find_header(str(tmp_path))


def test_a_damaged_header_is_a_sentence(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copy(toy_folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelUnavailableError, match=r"header of .* cannot be read"):
        read_folder(tmp_path)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_hub_header_is_read_without_the_weights(is_sharded: bool, toy_folder: Path, tmp_path: Path) -> None:
    folder = make_checkpoint("toy", tmp_path / "s", max_shard_size="300KB") if is_sharded else toy_folder
    cache = tmp_path / "cache"
    with serve({"some/whisper": folder}) as hub:
        found = find_header("some/whisper", mirror=hub.address, cache_dir=cache)
        ranges = [wanted for _, path, wanted in hub.requests if path.endswith(".safetensors") and wanted]
    assert found == replace(read_folder(folder, "some/whisper"), source="hub")
    assert len(ranges) == len(list(folder.glob("*.safetensors"))) and set(ranges) == {"bytes=0-100000"}
    assert hub.sent_bytes < 1.1 * sum(min(p.stat().st_size, 100_001) for p in folder.glob("*.safetensors")) + 50_000
    assert not list(cache.rglob("*.safetensors"))


def test_hub_problems_are_sentences(toy_folder: Path, tmp_path: Path) -> None:
    with serve({"some/whisper": toy_folder}) as hub:
        with pytest.raises(UnknownModelError, match="knows no model 'some/other'"):
            find_header("some/other", mirror=hub.address, cache_dir=tmp_path)
        hub.refuses = 503
        with pytest.raises(ModelUnavailableError, match="could not be fetched"):
            find_header("some/whisper", mirror=hub.address, cache_dir=tmp_path)
        assert find_header("large-v3", mirror=hub.address, cache_dir=tmp_path).source == "config"
    with pytest.raises(ModelUnavailableError, match="--offline"):
        find_header("some/whisper", offline=True, cache_dir=tmp_path)
    with pytest.raises(UnknownModelError, match="There is no model 'large-v9'"):
        find_header("large-v9", offline=True)


def test_a_cached_checkpoint_is_read_where_it_lies(toy_folder: Path, tmp_path: Path) -> None:
    commit = "a" * 40
    folder = tmp_path / "models--openai--whisper-tiny"
    shutil.copytree(toy_folder, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    found = find_header("tiny", offline=True, cache_dir=tmp_path)
    assert found.source == "file" and found.sizes.d_model == 64


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_matrix_has_every_card_and_size_and_bigger_cards_never_hold_less() -> None:
    cells = {(cell.gpu, cell.model): cell for cell in selection_matrix()}
    assert len(cells) == len(GPUS) * len(KNOWN)
    for model in KNOWN:
        small, big = cells["RTX 4060 (8 GB)", model], cells["H200 (141 GB)", model]
        assert all(big.fitting[name] >= batch for name, batch in small.fitting.items())
    assert cells["H200 (141 GB)", "large-v3"].precision == "fp32"
    assert cells["RTX 4060 (8 GB)", "large-v3"].fitting.get("fp32", 0) < 16
    assert "bf16" not in cells["T4 (16 GB)", "tiny"].fitting and "bf16" in cells["A10G (24 GB)", "tiny"].fitting
    json.dumps([cell.fitting for cell in cells.values()])


def test_the_context_is_taken_off_a_card() -> None:
    card = GPUS[0]
    assert usable_bytes(card) < card.total_mib * MIB - 256 * MIB


@pytest.mark.parametrize("text", ["", "0", "a,b", "1,300", "-1"])
def test_a_wrong_list_of_batches_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--batch is"):
        parse_batches(text)
    assert parse_batches("1, 8,32,") == (1, 8, 32)
