"""What cards of each compute capability refuse, with the nearest row that runs: no such card is needed to know."""

from __future__ import annotations

from functools import partial

import pytest

from errors import UnavailablePrecisionError
from model_loader.device import DeviceInfo
from model_loader.loader import refuse_unavailable
from model_loader.precision import PRECISIONS

CARDS = {
    # name: capability, {row refused: the nearest that runs}; fp8 has a test of its own
    "GTX 980": (
        (5, 2),
        dict.fromkeys(
            (
                "fp16-autocast",
                "fp16",
                "bf16",
                "int8",
                "int4",
                "bnb-int8",
                "bnb-nf4",
                "bnb-fp4",
                "int8-static",
                "int8-dynamic",
            ),
            "fp32",
        ),
    ),
    "P100": ((6, 0), {"bf16": "fp16", "bnb-int8": "fp16", "int8-static": "fp16", "int8-dynamic": "fp16"}),
    "V100": ((7, 0), {"bf16": "fp16", "bnb-int8": "fp16", "int8-static": "fp16", "int8-dynamic": "fp16"}),
    "T4": ((7, 5), {"bf16": "fp16"}),
    "A100": ((8, 0), {}),
    "RTX 3060": ((8, 6), {}),
    "L4": ((8, 9), {}),
    "H100": ((9, 0), {}),
    "B200": ((10, 0), {}),
    "RTX 5090": ((12, 0), {}),
}
NEEDS = {
    "fp16-autocast": "5.3",
    "fp16": "5.3",
    "bf16": "8.0",
    "int8": "5.3",
    "int4": "5.3",
    "bnb-int8": "7.5",
    "bnb-nf4": "6.0",
    "bnb-fp4": "6.0",
    "int8-static": "7.5",
    "int8-dynamic": "7.5",
}


def card(name: str) -> DeviceInfo:
    return DeviceInfo("cuda", 0, name, CARDS[name][0], 16 * 2**30, 8)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_refuses_what_it_cannot_run_and_nothing_else(name: str) -> None:
    refused = {row.name for row in PRECISIONS.values() if row.unavailable(card(name))}
    assert refused - {"fp8"} == set(CARDS[name][1])
    assert refused.isdisjoint({"fp32"})


@pytest.mark.skipif("fp8" not in PRECISIONS, reason="there is no row fp8")
@pytest.mark.parametrize("name", CARDS)
def test_fp8_runs_from_8_9_on(name: str) -> None:
    reason = PRECISIONS["fp8"].unavailable(card(name))
    assert (reason is None) == (CARDS[name][0] >= (8, 9))
    assert reason is None or "needs a GPU of compute capability 8.9 or newer" in reason


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, (_, rows) in CARDS.items() for row in rows])
def test_a_refusal_names_need_card_and_nearest_row(name: str, row: str) -> None:
    have = ".".join(map(str, CARDS[name][0]))
    with pytest.raises(UnavailablePrecisionError) as caught:
        refuse_unavailable(PRECISIONS[row], card(name))
    nearest = CARDS[name][1][row]
    assert str(caught.value) == (
        f"{row} needs a GPU of compute capability {NEEDS[row]} or newer; {name} has {have}. Choose {nearest}."
    )
    assert PRECISIONS[nearest].unavailable(card(name)) is None


@pytest.mark.parametrize(
    "capability", [(5, 2), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
)
def test_every_refusal_leads_to_a_row_that_runs(capability: tuple[int, int]) -> None:
    device = DeviceInfo("cuda", 0, "a GPU", capability, 2**34, 8)
    for row in PRECISIONS.values():
        reason = row.unavailable(device)
        if reason is not None:
            nearest = reason.rstrip(".").rpartition("Choose ")[2]
            assert PRECISIONS[nearest].unavailable(device) is None, reason


def test_a_row_that_needs_8_9_is_refused_on_an_a100_and_runs_on_an_l4() -> None:
    """As float8 rows will: the requirement is part of the row."""
    from dataclasses import replace

    from model_loader.precision import _capability

    row = replace(PRECISIONS["bf16"], name="made-up-fp8", refusal=partial(_capability, needed=(8, 9)))
    assert row.unavailable(card("L4")) is None and row.unavailable(card("H100")) is None
    assert row.unavailable(card("A100")) == (
        "made-up-fp8 needs a GPU of compute capability 8.9 or newer; A100 has 8.0. Choose fp16."
    )
