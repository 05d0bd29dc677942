"""The encoder's operations with Triton kernels between the products, and in them where that is faster.

EncoderTuning holds every choice that a measurement decides; `python -m benchmarks.encoder` tries them and says which is
best. What a choice must not change is the result, up to rounding: tests hold each against plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import conv2d

from model_loader.fast.encoder_ops import TorchEncoderOps, clamp_limit
from model_loader.fast.weights import EncoderWeights, Norm, Projection
from model_loader.float8_linear import FLOAT8

_PASS_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class ProductTile:
    """How kernels/product.py cuts a product."""

    rows: int = 128
    outputs: int = 256
    columns: int = 64
    """Of 16-bit floats; of float8 twice as many."""
    stages: int = 3
    warps: int = 8
    programs: int = 1
    """A multiprocessor, each working through several tiles; 0: a program a tile."""


@dataclass(frozen=True, slots=True)
class EncoderTuning:
    """Choices of one GPU generation."""

    gelu: str = "pass"
    """pass: the library's product, then one pass in place. product: in our product's epilogue."""
    residual: str = "product"
    """norm: added by the LayerNorm's kernel. product: the library's product adds to x itself, where it is one of floats
    in the compute format."""
    float8: str = "library"
    """Products of float8: torch's (library) or ours (product)."""
    stem: str = "channels_last"
    """Convolutions with channels last, or as torch does them (torch)."""
    tile: ProductTile = field(default_factory=ProductTile)
    norm_warps: int = 4
    pass_warps: int = 4


class TritonEncoderOps(TorchEncoderOps):
    """EncoderOps on an NVIDIA GPU with Triton. What is not overridden here is torch's own."""

    def __init__(self, weights: EncoderWeights, tuning: EncoderTuning | None = None) -> None:
        from model_loader.fast.kernels import activation, norm, product

        self._activation, self._norm, self._product = activation, norm, product
        self._tuning = tuning or EncoderTuning()
        device = weights.positions.device
        is_cuda = device.type == "cuda"
        self._can_fetch_tiles = is_cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        self._offsets = self._residual_biases(weights)

    def stem(self, weights: EncoderWeights, features: torch.Tensor) -> torch.Tensor:
        if self._tuning.stem == "torch":
            return super().stem(weights, features)
        x = self._convolve(features, weights.conv1, stride=1)
        x = self._pass(x, x, gelu=True)
        x = self._convolve(x.transpose(1, 2), weights.conv2, stride=2)
        return self._pass(x, x, gelu=True, add=weights.positions)

    def norm(self, x: torch.Tensor, norm: Norm, ahead: Projection | None) -> torch.Tensor:
        return self.normed(x, None, norm, ahead, clamp=False)

    def project(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        if x.dtype == FLOAT8 and self._tuning.float8 == "product" and self.has_product(projection):
            return self._multiply(x, projection, None, gelu=False)
        return super().project(x, projection)

    def expand(self, x: torch.Tensor, projection: Projection, ahead: Projection) -> torch.Tensor:
        if self._tuning.gelu == "product" and ahead.input_zero is None and self.has_product(projection):
            return self._multiply(x, projection, ahead.input_scale, gelu=True)
        return self.activated(self.project(x, projection), ahead)

    def add_norm(
        self,
        x: torch.Tensor,
        inner: torch.Tensor,
        projection: Projection,
        norm: Norm,
        ahead: Projection | None,
        *,
        clamp: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._adds_itself(projection):
            rows = x.view(-1, x.shape[-1])
            rows.addmm_(inner.reshape(-1, inner.shape[-1]), projection.weight.t())
            return x, self.normed(x, None, norm, ahead, clamp=clamp)
        return x, self.normed(x, self.project(inner, projection), norm, ahead, clamp=clamp)

    def _taken(self, x: torch.Tensor, ahead: Projection | None) -> torch.Tensor:
        if ahead is None or ahead.input_scale is None:
            return x
        return self._pass(x, torch.empty_like(x, dtype=_dtype_for(ahead, x)), gelu=False, ahead=ahead)

    def activated(self, inner: torch.Tensor, ahead: Projection) -> torch.Tensor:
        """gelu(inner) as `ahead` takes it; in place where that is the same format."""
        out = inner if ahead.input_scale is None else torch.empty_like(inner, dtype=_dtype_for(ahead, inner))
        return self._pass(inner, out, gelu=True, ahead=ahead)

    def normed(
        self, x: torch.Tensor, y: torch.Tensor | None, norm: Norm, ahead: Projection | None, *, clamp: bool
    ) -> torch.Tensor:
        """LN(x + y) as `ahead` takes it; y is added to x in place."""
        width = x.shape[-1]
        scale, zero, rounding = _rounding(ahead, x)
        offset = self._offsets.get(id(norm))
        out = torch.empty_like(x, dtype=_dtype_for(ahead, x))
        self._norm.add_norm[(x.numel() // width,)](
            x, x if y is None else y, x if offset is None else offset, norm.gamma, norm.beta, out,
            scale, zero, width, norm.eps, clamp_limit(x.dtype) if clamp else 0.0,
            BD=1 << (width - 1).bit_length(), ADD=y is not None, OFFSET=offset is not None, CLAMP=clamp,
            ROUND=rounding, VIA=self._activation.DTYPES[x.dtype], num_warps=self._tuning.norm_warps,
        )  # fmt: skip
        return out

    def _pass(self, x: torch.Tensor, out: torch.Tensor, *, gelu: bool, add: torch.Tensor | None = None,
              ahead: Projection | None = None) -> torch.Tensor:  # fmt: skip
        """One pass over x into out (kernels/activation.py, activate)."""
        n = x.numel()
        scale, zero, rounding = _rounding(ahead, x)
        self._activation.activate[(-(-n // _PASS_BLOCK),)](
            x, x if add is None else add, out, scale, zero, n, n if add is None else add.numel(),
            BLOCK=_PASS_BLOCK, GELU=gelu, ADD=add is not None, ROUND=rounding,
            VIA=self._activation.DTYPES[x.dtype], EXACT=x.dtype == torch.float32, num_warps=self._tuning.pass_warps,
        )  # fmt: skip
        return out

    def _convolve(
        self, features: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], *, stride: int
    ) -> torch.Tensor:
        """[n, n_in, T] -> [n, T / stride, n_out] in this order in memory, without transposing the output."""
        weight, bias = pair
        last = torch.channels_last
        x = conv2d(
            features[:, :, None].contiguous(memory_format=last),
            weight[:, :, None].contiguous(memory_format=last),
            bias,
            stride=(1, stride),
            padding=(0, 1),
        )
        return x[:, :, 0].transpose(1, 2).contiguous()

    def _adds_itself(self, projection: Projection) -> bool:
        """Whether the product adds to the residual, its bias left out."""
        return self._tuning.residual == "product" and projection.joined is None and projection.weight.dtype != FLOAT8

    def _residual_biases(self, weights: EncoderWeights) -> dict[int, torch.Tensor]:
        """float32 [d_model] by LayerNorm: the biases that the residual lacks before it.

        A LayerNorm that adds another projection's output writes the residual back, these biases in it.
        """
        found: dict[int, torch.Tensor] = {}
        lacking: torch.Tensor | None = None
        following = [layer.norm1 for layer in weights.layers[1:]] + [weights.norm]
        for layer, next_norm in zip(weights.layers, following, strict=True):
            for projection, norm in ((layer.out, layer.norm2), (layer.fc2, next_norm)):
                adds_itself = self._adds_itself(projection)
                if adds_itself:
                    bias = projection.bias.float()
                    lacking = bias if lacking is None else lacking + bias
                if lacking is not None:
                    found[id(norm)] = lacking
                if not adds_itself:
                    lacking = None
        return found

    def has_product(self, projection: Projection) -> bool:
        """Whether our product serves these sizes on this GPU."""
        if projection.joined is not None:
            return False
        n_out, n_in = projection.weight.shape
        tile = self._tuning.tile
        columns = _columns(tile, projection.weight)
        serves = n_out % tile.outputs == 0 and n_in % columns == 0 and projection.weight.dtype != torch.float32
        return self._can_fetch_tiles and serves

    def _multiply(
        self, x: torch.Tensor, projection: Projection, out_scale: torch.Tensor | None, *, gelu: bool
    ) -> torch.Tensor:
        """kernels/product.py, product."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        weight, bias, tile = projection.weight, projection.bias, self._tuning.tile
        n_out, n_in = weight.shape
        rows = x.reshape(-1, n_in)
        out = torch.empty((rows.shape[0], n_out), dtype=bias.dtype if out_scale is None else FLOAT8, device=rows.device)
        columns = _columns(tile, weight)
        n_tiles = -(-rows.shape[0] // tile.rows) * (n_out // tile.outputs)
        programs = min(n_tiles, tile.programs * self._multiprocessors) if tile.programs else n_tiles
        arguments: dict[str, Any] = {
            "BM": tile.rows, "BN": tile.outputs, "BK": columns, "GROUP": 8, "PROGRAMS": programs,
            "FLATTEN": tile.programs > 0, "SCALED": projection.weight_scale is not None, "GELU": gelu,
            "FLOAT8": out_scale is not None, "EXACT": False, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        self._product.product[(programs,)](
            TensorDescriptor.from_tensor(rows, [tile.rows, columns]),
            TensorDescriptor.from_tensor(weight, [tile.outputs, columns]),
            *(bias, out, _or(projection.input_scale, bias), _or(projection.weight_scale, bias), _or(out_scale, bias)),
            *(rows.shape[0], n_out, n_in),
            **arguments,
        )
        return out.view(*x.shape[:-1], n_out)


def _rounding(ahead: Projection | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scale, zero point and ROUND (kernels/activation.py) of what `ahead` takes."""
    if ahead is None or ahead.input_scale is None:
        return stand_in, stand_in, 0
    if ahead.input_zero is None:
        return ahead.input_scale, stand_in, 1
    return ahead.input_scale, ahead.input_zero, 2


def _dtype_for(ahead: Projection | None, x: torch.Tensor) -> torch.dtype:
    """Of what `ahead` takes: x's where it takes floats as they are."""
    if ahead is None or ahead.input_scale is None:
        return x.dtype
    return FLOAT8 if ahead.input_zero is None else torch.int8


def _columns(tile: ProductTile, weight: torch.Tensor) -> int:
    """Columns fetched at once: as many bytes in either format."""
    return tile.columns * 2 // weight.element_size()


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow must still be one."""
    return stand_in if tensor is None else tensor
