"""Our int8 x int8 layers on a real GPU: Triton against the library's product, and the kernel that really ran."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model_loader.int8_linear import Int8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = [(1, 1280, 1280), (3, 384, 1536), (16, 1280, 5120), (33, 5120, 1280), (1500, 1280, 3840), (3000, 256, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_static", [True, False], ids=["static", "dynamic"])
def test_the_kernels_compute_what_the_library_does(shape: tuple[int, int, int], is_static: bool) -> None:
    n_rows, n_in, n_out = shape
    torch.manual_seed(0)
    weight, bias = torch.randn(n_out, n_in, device="cuda") * 0.02, torch.randn(n_out, device="cuda")
    x = (torch.randn(n_rows, n_in, device="cuda") * 2 + 0.5).half()
    span = (float(x.min()), float(x.max())) if is_static else None
    layer = Int8Linear.from_weights(weight, bias, dtype=torch.float16, input_range=span)
    got, library, exact = layer(x).float(), layer._on_int_mm(x).float(), x.float() @ weight.t() + bias
    # One level of the input may round the other way: half a step of one of n_in products.
    assert (got - library).norm() / library.norm() < 2e-3
    assert (got - exact).norm() / exact.norm() < 0.03


def test_the_product_runs_in_our_kernel_and_in_no_floating_point_one() -> None:
    x = torch.randn(64, 1280, device="cuda", dtype=torch.float16)
    weight = torch.randn(1280, 1280, device="cuda") * 0.02
    layer = Int8Linear.from_weights(weight, None, dtype=torch.float16, input_range=(-4.0, 4.0))
    layer(x)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as recorded:
        layer(x)
        torch.cuda.synchronize()
    kernels = [event.name for event in recorded.events() if event.device_type.name == "CUDA"]
    assert any("_multiply_kernel" in name for name in kernels)
    assert not any("gemm" in name.lower() for name in kernels)
