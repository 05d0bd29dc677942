"""The table: names, reasons, and that a new row appears by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from errors import UnavailablePrecisionError, UnknownPrecisionError
from model_loader.device import DeviceInfo
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS, Precision, automatic_precision, resolve_precision

GpuOf = Callable[..., DeviceInfo]


def test_aliases_name_rows_whatever_the_case() -> None:
    assert resolve_precision("8bit").name == "bnb-int8"
    assert resolve_precision(" 4BIT ").name == "bnb-nf4"
    assert resolve_precision("bnb_fp4").name == "bnb-fp4"


def test_no_name_or_alias_is_used_twice() -> None:
    names = [name for row in PRECISIONS.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


def test_unknown_name_lists_rows_and_a_close_one() -> None:
    with pytest.raises(UnknownPrecisionError, match=r"'fp61'.*fp32.*bnb-nf4.*Did you mean fp16"):
        resolve_precision("fp61")


def test_auto_without_a_checkpoint_is_the_most_accurate_row(cpu: DeviceInfo, gpu_of: GpuOf) -> None:
    assert resolve_precision(" AUTO ", cpu).name == "fp32"
    assert automatic_precision(gpu_of(8, 0)).name == "fp32"


# Cards: Maxwell 5.2, Pascal 6.1, Volta 7.0, T4 7.5, A100 8.0, 3090 8.6, 4090 8.9, H100 9.0, B200 10.0
REFUSED = {
    (5, 2): {"fp16", "fp16-autocast", "bf16", "int8", "int4", "fp8", "bnb-int8", "bnb-nf4", "bnb-fp4"},
    (6, 1): {"bf16", "fp8", "bnb-int8"},
    (7, 0): {"bf16", "fp8", "bnb-int8"},
    (7, 5): {"bf16", "fp8"},
    (8, 0): {"fp8"},
    (8, 6): {"fp8"},
    (8, 9): set(),
    (9, 0): set(),
    (10, 0): set(),
}


@pytest.mark.parametrize("capability", REFUSED, ids=str)
def test_rows_refused_by_compute_capability(capability: tuple[int, int], gpu_of: GpuOf) -> None:
    device = gpu_of(*capability)
    rows = [PRECISIONS[name] for name in ("fp32", *REFUSED[5, 2])]
    assert {row.name for row in rows if row.unavailable(device)} == REFUSED[capability]


def test_a_refusal_names_the_card_the_need_and_the_nearest_row(gpu_of: GpuOf) -> None:
    reason = PRECISIONS["bf16"].unavailable(gpu_of(7, 5, "Tesla T4"))
    assert reason == "bf16 needs a GPU of compute capability 8.0 or newer; Tesla T4 has 7.5. Choose fp16."


@pytest.mark.parametrize("name", ["fp16", "fp16-autocast"])
def test_fp16_is_refused_on_a_cpu_before_anything_is_read(name: str) -> None:
    with pytest.raises(UnavailablePrecisionError, match=r"needs a GPU.*Choose bf16"):
        load_engine("no/such-model", name, device="cpu", offline=True)


def test_without_bitsandbytes_its_rows_are_refused(monkeypatch: pytest.MonkeyPatch, cpu: DeviceInfo) -> None:
    monkeypatch.setattr("model_loader.precision.find_spec", lambda name: None)
    refused = {row.name: row.unavailable(cpu) for row in PRECISIONS.values() if row.name.startswith("bnb")}
    assert all(reason and "not installed" in reason for reason in refused.values()) and len(refused) == 3


def test_a_new_row_is_known_by_name_and_loads(monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> None:
    row = replace(PRECISIONS["bf16"], name="made-up", aliases=("mine",))
    monkeypatch.setitem(PRECISIONS, row.name, row)
    engine = load_engine(str(toy_folder), "mine", device="cpu", warm_up=False)
    assert (engine.report.requested, engine.report.effective) == ("made-up", "made-up")
    engine.close()


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)
def test_what_is_shown_on_every_machine_calls_no_row_faster(row: Precision) -> None:
    """Which is faster depends on the machine: int8 is on a GPU, and is not on a processor."""
    words = f"{row.label} {row.description}".lower()
    assert not [word for word in ("fast", "quick", "speed", "slow") if word in words]


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)
def test_alternatives_are_rows_and_end_with_one_that_always_runs(
    row: Precision, cpu: DeviceInfo, gpu_of: GpuOf
) -> None:
    assert all(name in PRECISIONS for name in row.alternatives)
    for device in (cpu, gpu_of(5, 2)):
        assert any(PRECISIONS[name].unavailable(device) is None for name in row.alternatives)
