"""Projections that modules of the loaded model compute themselves: bitsandbytes' 4 bits, our int8 by int8.

In: linear layers of one input, each with its own kernels. Out: one callable, their outputs behind each other. The fast
engine runs it inside its captured step and encoder, where nothing of it may make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from model_loader.census import module_tensors
from model_loader.fast.packing import PackedLinear
from model_loader.float8_linear import Float8Linear
from model_loader.int8_linear import Int8Linear

_OURS = (torch.nn.Linear, PackedLinear, Float8Linear)
"""Layers whose weights the fast engine takes for its own kernels; by exact class, as bitsandbytes derives from one."""


def has_kernels_of_its_own(module: Any) -> bool:
    """Whether this linear layer must be called to be computed."""
    return type(module) not in _OURS


class Joined:
    """[..., n_in] in the compute format, or int8 where `rounding` says so -> [..., n_out] in the compute format."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = tuple(_fused(modules))
        self.n_in = int(self.modules[0].in_features)
        self.n_out = sum(int(module.out_features) for module in self.modules)

    @property
    def nothing(self) -> torch.Tensor:
        """An empty tensor on its device: what stands where a projection of ours has its weight."""
        return next(self.tensors()).new_empty(0)

    @property
    def rounding(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scale and zero point (float32 scalars) of int8 inputs that it takes as well as floats; None: floats alone."""
        first = self.modules[0]
        if len(self.modules) == 1 and isinstance(first, Int8Linear) and first.is_static:
            return first.input_scale, first.input_zero
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.modules) == 1:
            result: torch.Tensor = self.modules[0](x)
            return result
        # Each into its place at once: joined afterwards, keys and values of all layers would be there twice.
        out = x.new_empty(*x.shape[:-1], self.n_out)
        start = 0
        for module in self.modules:
            out[..., start : start + module.out_features] = module(x)
            start += module.out_features
        return out

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds, scales among them."""
        for module in self.modules:
            yield from module_tensors(module)


def _fused(modules: Sequence[Any]) -> Sequence[Any]:
    """int8 layers that round their input alike as one product; others as they are."""
    if len(modules) > 1 and all(isinstance(module, Int8Linear) for module in modules):
        joined = Int8Linear.joined(modules)
        if joined is not None:
            return (joined,)
    return modules
