"""Layers with kernels of their own, joined: the same numbers as one by one, rounded once where that is the same."""

from __future__ import annotations

import pytest
import torch

from model_loader.fast.encoder_ops import TorchEncoderOps
from model_loader.fast.modules import Joined, has_kernels_of_its_own
from model_loader.fast.weights import Norm, Projection, project
from model_loader.int8_linear import Int8Linear, to_int8

WIDTH = 64


def int8(n_out: int, seed: int, input_range: tuple[float, float] | None = (-3.0, 2.5)) -> Int8Linear:
    dice = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(n_out, WIDTH, generator=dice), torch.randn(n_out, generator=dice)
    return Int8Linear.from_weights(weight, bias, dtype=torch.float32, input_range=input_range)


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("input_range", [(-3.0, 2.5), None], ids=["static", "dynamic"])
def test_int8_layers_of_one_input_become_one_product_with_the_same_results(
    input_range: tuple[float, float] | None,
) -> None:
    layers = [int8(n_out, n_out, input_range) for n_out in (64, 32, 96)]
    joined = Joined(layers)
    assert len(joined.modules) == 1 and (joined.n_in, joined.n_out) == (WIDTH, 192)
    x = inputs()
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert sum(t.numel() for t in joined.tensors() if t.dtype == torch.int8) == 192 * WIDTH


@pytest.mark.parametrize("other", ["range", "class"])
def test_layers_that_round_their_input_differently_stay_apart(other: str) -> None:
    second = int8(32, 2, (-9.0, 9.0)) if other == "range" else torch.nn.Linear(WIDTH, 32)
    layers = [int8(64, 1), second]
    joined = Joined(layers)
    assert joined.modules == tuple(layers) and joined.rounding is None
    x = inputs()
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_an_input_rounded_ahead_gives_the_same_result_to_the_last_bit() -> None:
    joined = Joined([int8(64, 1), int8(64, 2)])
    assert joined.rounding is not None
    scale, zero = joined.rounding
    projection = Projection(torch.empty(0), torch.empty(0), input_scale=scale, input_zero=zero, joined=joined)
    ops, x = TorchEncoderOps(), inputs()
    norm = Norm(torch.ones(WIDTH), torch.zeros(WIDTH), 1e-5)
    rounded = ops.norm(x, norm, projection)
    assert rounded.dtype == torch.int8
    plain = ops.norm(x, norm, None)
    assert torch.equal(rounded, to_int8(plain, scale, zero))
    assert torch.equal(project(rounded, projection), joined(plain))


def test_layers_whose_weights_our_kernels_take_are_told_apart() -> None:
    class Derived(torch.nn.Linear):
        """As bitsandbytes' layers derive from it."""

    assert not has_kernels_of_its_own(torch.nn.Linear(4, 4))
    assert has_kernels_of_its_own(Derived(4, 4)) and has_kernels_of_its_own(int8(4, 0))
