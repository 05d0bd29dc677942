"""Products of bfloat16 with 8- and 4-bit weights on a processor, against the unpacked weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from model_loader.fast import processor
from model_loader.fast.packing import Format, Packed, pack
from model_loader.fast.processor import is_faster, lay_out, multiply
from model_loader.loader import load_engine
from tests.unit.model_loader.fast.test_packing import weight


def packed(form: Format) -> Packed:
    return pack(weight(48, 256), torch.randn(48), form, torch.float32)


@pytest.mark.parametrize("n_rows", [1, 5, 32])
@pytest.mark.parametrize(("form", "n_rounded"), [(Format.INT8, 2), (Format.INT4, 3)])
def test_the_products_are_those_of_the_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, form: Format, n_rounded: int, n_rows: int
) -> None:
    """n_rounded: inputs and sums, and in 4 bits the scales, to 8 bits of mantissa: each moves a product by 2^-9 at
    most."""
    monkeypatch.setattr(processor, "is_faster", lambda form: True)
    whole = packed(form)
    unpacked, n_bytes = whole.dense(), whole.weight.numel()
    lay_out([whole])
    assert whole.is_laid_out and whole.weight.numel() * whole.weight.element_size() == n_bytes
    x = torch.randn(n_rows, 256)
    error = (multiply(x, whole) - whole.bias - linear(x, unpacked)).abs()
    assert (error <= n_rounded * 2**-9 * linear(x.abs(), unpacked.abs()) + 1e-6).all()


def test_floats_stay_as_they_are_and_so_do_others_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "is_faster", lambda form: form is Format.INT4)
    eight, four, plain = (packed(form) for form in (Format.INT8, Format.INT4, Format.FLOAT))
    lay_out([eight, four, plain])
    assert [part.is_laid_out for part in (eight, four, plain)] == [False, True, False]
    assert eight.weight.dtype == torch.uint8
    with pytest.raises(AssertionError):
        four.dense()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_proof_says_what_the_products_compute_in(
    monkeypatch: pytest.MonkeyPatch, least_folder: Path, name: str
) -> None:
    said = {}
    for is_there in (False, True):
        monkeypatch.setattr(processor, "is_faster", lambda form, there=is_there: there)
        engine = load_engine(str(least_folder), name, engine="fast", device="cpu", warm_up=False)
        said[is_there] = engine.report.census.summary
        engine.close()
    assert said[False].endswith("computing in float32")
    assert said[True].endswith("computing in float32, packed weights in bfloat16")


def test_whether_it_is_faster_is_tried_once_and_torch_may_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    is_faster.cache_clear()
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert not is_faster(Format.INT8) and not is_faster(Format.INT8)
    assert is_faster.cache_info().misses == 1
    is_faster.cache_clear()
