"""Packed weights: what goes in comes out, within half a step of the scale; joined, scaled and folded ones as well."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from model_loader.fast.packing import Format, PackedLinear, fold_norm, join, pack, scaled


def weight(n_out: int, n_in: int, seed: int = 0) -> torch.Tensor:
    """Rows of different size, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_out, n_in, generator=generator) * torch.logspace(-3, 1, n_out)[:, None]
    values[1] = 0
    return values


@pytest.mark.parametrize("n_in", [128, 384, 1280])
def test_8_bits_are_within_half_a_step(n_in: int) -> None:
    values = weight(24, n_in)
    packed = pack(values, None, Format.INT8, torch.float32)
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (24, n_in)
    assert ((packed.dense() - values).abs() <= 0.5001 * packed.scale[:, None]).all()
    assert packed.dense()[1].eq(0).all()


@pytest.mark.parametrize("n_in", [128, 384, 1280])
def test_4_bits_are_within_a_step_and_two_fill_a_byte(n_in: int) -> None:
    values = weight(24, n_in)
    packed = pack(values, None, Format.INT4, torch.float32)
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (24, n_in // 2)
    assert packed.scale.dtype == torch.float16 and packed.scale.shape == (24, n_in // 128)
    error = (packed.dense() - values).view(24, -1, 128)
    # Half a step inside the range, which ends at 7 steps where the largest value may be 7.5 / 0.8 = 9.4.
    assert (error.abs() <= 2.4 * packed.scale.float()[..., None]).all()
    assert error[2:].norm() / values[2:].norm() < 0.12
    assert packed.dense()[1].eq(0).all()


def test_4_bit_scales_beat_the_plain_maximum() -> None:
    values = torch.randn(64, 1280, generator=torch.Generator().manual_seed(3))
    scale = values.view(64, -1, 128).abs().amax(-1, keepdim=True) / 7.5
    plain = ((values.view(64, -1, 128) / scale).round().clamp(-8, 7) * scale).view(64, -1)
    packed = pack(values, None, Format.INT4, torch.float32).dense()
    assert (packed - values).norm() < 0.97 * (plain - values).norm()


@pytest.mark.parametrize("value", range(16))
def test_every_4_bit_value_survives_in_every_place(value: int) -> None:
    """Against the layout as written: byte j of a group holds input j low, input j + 64 high."""
    packed = pack(weight(2, 256), None, Format.INT4, torch.float32)
    packed.weight.zero_()
    packed.scale.fill_(1.0)
    for place in (0, 63, 64, 127, 128, 255):
        group, inside = divmod(place, 128)
        packed.weight[0] = 0x88
        shift = 4 * (inside // 64)
        byte = group * 64 + inside % 64
        packed.weight[0, byte] = (0x88 & ~(0xF << shift)) | (value << shift)
        expected = torch.zeros(256)
        expected[place] = value - 8
        assert torch.equal(packed.dense()[0], expected)


def test_a_width_without_whole_groups_takes_8_bits_and_says_so() -> None:
    packed = pack(weight(8, 192), None, Format.INT4, torch.float32)
    assert packed.format is Format.INT8
    assert PackedLinear(packed).stored_dtype == "int8"


@pytest.mark.parametrize(("form", "name"), [(Format.INT8, "int8"), (Format.INT4, "int4"), (Format.FLOAT, "float16")])
def test_the_stored_format_is_read_off_the_tensor(form: Format, name: str) -> None:
    assert PackedLinear(pack(weight(8, 256), None, form, torch.float16)).stored_dtype == name


@pytest.mark.parametrize("form", [Format.FLOAT, Format.INT8, Format.INT4])
def test_joined_and_scaled_projections_are_the_single_ones(form: Format) -> None:
    parts = [pack(weight(8, 256, seed), torch.randn(8), form, torch.float32) for seed in range(3)]
    whole = join([scaled(parts[0], 0.125), *parts[1:]])
    # To the bit, for 0.125 is a power of two; a 16-bit scale of weights around 1e-4 has fewer bits below 2^-14.
    expected = torch.cat([parts[0].dense() * 0.125, *(p.dense() for p in parts[1:])])
    torch.testing.assert_close(whole.dense(), expected, rtol=0.0, atol=3e-7 if form is Format.INT4 else 0.0)
    assert torch.equal(whole.bias, torch.cat([parts[0].bias * 0.125, *(p.bias for p in parts[1:])]))


def test_a_folded_norm_computes_the_same() -> None:
    norm = torch.nn.LayerNorm(256)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    values, bias, x = weight(16, 256), torch.randn(16), 3 + 2 * torch.randn(7, 256)
    folded, offset = fold_norm(values, bias, norm)
    with torch.no_grad():
        expected = linear(norm(x), values, bias)
    torch.testing.assert_close(linear(layer_norm(x, (256,)), folded, offset), expected, rtol=1e-4, atol=1e-4)


def test_a_packed_layer_computes_with_its_weights() -> None:
    packed = pack(weight(16, 256), torch.randn(16), Format.INT8, torch.float32)
    x = torch.randn(2, 3, 256)
    torch.testing.assert_close(PackedLinear(packed)(x), linear(x, packed.dense(), packed.bias))
