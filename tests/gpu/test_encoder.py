"""The encoder's kernels on a real GPU: every choice of EncoderTuning against plain torch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.encoder import TILES, Bench, prepare
from benchmarks.shapes import Shape
from model_loader.fast.encoder import encode, preferred_attention
from model_loader.fast.encoder_ops import TorchEncoderOps
from model_loader.fast.graph import Captured
from model_loader.fast.triton_encoder import EncoderTuning, ProductTile, TritonEncoderOps
from model_loader.fast.weights import Norm, Projection
from model_loader.float8_linear import FLOAT8, has_float8_products, scale_for, to_float8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPE = Shape(384, 3, 1, 6, n_mels=80)
PLACE = torch.device("cuda")
TUNINGS = {
    "default": EncoderTuning(),
    "torch's convolutions": EncoderTuning(stem="torch"),
    "residual in the norm": EncoderTuning(residual="norm"),
    "gelu in the product": EncoderTuning(gelu="product", tile=ProductTile(128, 128, 64, 3, 4, 2)),
    "all products ours": EncoderTuning(gelu="product", float8="product", tile=ProductTile(128, 128, 64, 3, 4, 0)),
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    with torch.no_grad():
        return prepare(SHAPE, 3, 1, PLACE)


@pytest.fixture(autouse=True)
def attention() -> object:
    with torch.no_grad(), preferred_attention(PLACE):
        yield


@pytest.mark.parametrize("name", TUNINGS)
def test_every_choice_computes_the_same_in_16_bits(bench: Bench, name: str) -> None:
    found = encode(bench.floats, TritonEncoderOps(bench.floats, TUNINGS[name]), bench.features)[:2].float()
    assert float((found - bench.expected).norm() / bench.expected.norm()) < 3e-3


@pytest.mark.parametrize("name", TUNINGS)
def test_every_choice_computes_the_same_in_float8(bench: Bench, name: str) -> None:
    if bench.float8 is None:
        pytest.skip("this GPU does not multiply float8")
    plain = encode(bench.float8, TorchEncoderOps(), bench.features)[:2].float()
    found = encode(bench.float8, TritonEncoderOps(bench.float8, TUNINGS[name]), bench.features)[:2].float()
    to_fp32, to_plain = (float((found - other).norm() / other.norm()) for other in (bench.expected, plain))
    assert to_fp32 < 0.1 and to_plain < to_fp32


def test_a_captured_encoder_computes_what_it_does_uncaptured(bench: Bench) -> None:
    for weights in (bench.floats, bench.float8):
        if weights is None:
            continue
        ops = TritonEncoderOps(weights, TUNINGS["gelu in the product"])
        graph = Captured(lambda x, w=weights, o=ops: encode(w, o, x), "encoder", has_state=False)
        for shift in (0, 1):
            features = bench.features + shift
            torch.testing.assert_close(graph(features), encode(weights, ops, features))
        graph.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 1280])
def test_residual_and_norm_are_torchs(bench: Bench, dtype: torch.dtype, width: int) -> None:
    x, y = (3 * torch.randn(2, 1500, width, device=PLACE).to(dtype) for _ in range(2))
    x[0, 0, :2] = torch.finfo(dtype).max if dtype == torch.float16 else 100.0
    norm = Norm(torch.randn(width, device=PLACE).to(dtype), torch.randn(width, device=PLACE).to(dtype), 1e-5)
    same = Projection(torch.eye(width, device=PLACE, dtype=dtype), torch.zeros(width, device=PLACE, dtype=dtype))
    clamp = dtype == torch.float16
    expected = TorchEncoderOps().add_norm(x, y, same, norm, None, clamp=clamp)
    found = TritonEncoderOps(bench.floats).add_norm(x.clone(), y, same, norm, None, clamp=clamp)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gelu_is_exact_to_the_format(bench: Bench, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 100_001, device=PLACE).to(dtype)
    ahead = Projection(x[None], x)
    expected = torch.nn.functional.gelu(x.double()).to(dtype)
    found = TritonEncoderOps(bench.floats).activated(x.clone(), ahead)
    step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=1e-6)


def test_float8_is_rounded_as_torch_rounds_it(bench: Bench) -> None:
    if bench.float8 is None:
        pytest.skip("this GPU does not multiply float8")
    x = 3 * torch.randn(4, 1500, 256, device=PLACE, dtype=torch.float16)
    scale = scale_for(torch.tensor(9.0, device=PLACE))  # so that some values lie beyond the range
    ahead = Projection(x.to(FLOAT8), x, torch.ones((), device=PLACE), scale)
    expected = to_float8(x, scale).float()
    found = TritonEncoderOps(bench.float8)._taken(x, ahead).float()
    assert found.isfinite().all() and (found != expected).float().mean() < 1e-3  # ties, by 1 / scale


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("n_rows", [1500, 4500])
def test_our_product_is_torchs_whatever_the_tile(bench: Bench, tile: ProductTile, n_rows: int) -> None:
    """1,500 rows do not fill the last tile."""
    weight = 0.05 * torch.randn(512, 384, device=PLACE, dtype=torch.float16)
    bias, x = torch.randn(512, device=PLACE, dtype=torch.float16), torch.randn(n_rows, 384, device=PLACE).half()
    ops = TritonEncoderOps(bench.floats, EncoderTuning(gelu="product", tile=tile))
    plain = Projection(weight, bias)
    torch.testing.assert_close(
        ops.expand(x, plain, plain), TorchEncoderOps().expand(x, plain, plain), rtol=3e-3, atol=3e-3
    )
    if not has_float8_products(PLACE):
        return
    scales = scale_for(weight.abs().amax()), scale_for(x.abs().amax())
    small = Projection(to_float8(weight, scales[0]), bias, scales[0], scales[1])
    rounded = to_float8(x, scales[1])
    expected = TorchEncoderOps().expand(rounded, small, plain)
    torch.testing.assert_close(ops.expand(rounded, small, plain), expected, rtol=5e-3, atol=5e-3)
