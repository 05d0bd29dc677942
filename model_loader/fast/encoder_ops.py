"""The encoder's operations: what they are, and each in plain torch. A CPU runs these; so does a GPU without Triton.

A layer is six operations, named in encoder.py. Each hands its result on in the format that the projection behind it
takes: the compute format, or 8 bits (then it is rounded here, once, and read by all that need it).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import conv1d, gelu, layer_norm, scaled_dot_product_attention

from model_loader.fast.weights import HEAD_WIDTH, EncoderWeights, Norm, Projection, project
from model_loader.float8_linear import to_float8
from model_loader.int8_linear import to_int8


class EncoderOps(Protocol):
    """Operations on one batch of windows. ahead: the projection that takes the result; None: the compute format."""

    def stem(self, weights: EncoderWeights, features: torch.Tensor) -> torch.Tensor:
        """Both convolutions and the positions: [n, n_mels, 3000] -> [n, 1500, d_model]."""
        ...

    def norm(self, x: torch.Tensor, norm: Norm, ahead: Projection | None) -> torch.Tensor:
        """LN(x)."""
        ...

    def project(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """[n, 1500, n_in] as the projection takes it -> [n, 1500, n_out] in the compute format."""
        ...

    def attend(self, fused: torch.Tensor, ahead: Projection) -> torch.Tensor:
        """Self-attention without mask: queries, keys and values [n, 1500, 3 * d_model] -> [n, 1500, d_model]."""
        ...

    def expand(self, x: torch.Tensor, projection: Projection, ahead: Projection) -> torch.Tensor:
        """gelu(projected x)."""
        ...

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
        """(x + projected inner, LN of it); x may be overwritten, and belongs to these operations in between.

        clamp: inside the format's range, as transformers in fp16.
        """
        ...


class TorchEncoderOps:
    """EncoderOps in plain torch."""

    def stem(self, weights: EncoderWeights, features: torch.Tensor) -> torch.Tensor:
        x = gelu(conv1d(features, *weights.conv1, padding=1))
        x = gelu(conv1d(x, *weights.conv2, stride=2, padding=1))
        return (x.transpose(1, 2) + weights.positions).contiguous()

    def norm(self, x: torch.Tensor, norm: Norm, ahead: Projection | None) -> torch.Tensor:
        return self._taken(layer_norm(x, (x.shape[-1],), norm.gamma, norm.beta, norm.eps), ahead)

    def project(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        return project(x, projection)

    def attend(self, fused: torch.Tensor, ahead: Projection) -> torch.Tensor:
        n, length, width = fused.shape
        parts = fused.view(n, length, 3, width // 3 // HEAD_WIDTH, HEAD_WIDTH)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()  # [n, H, 1500, 64]
        found = scaled_dot_product_attention(query, key, value, scale=HEAD_WIDTH**-0.5)
        # FlashAttention and cuDNN lay their output out as [n, 1500, H, 64] already: then nothing is copied.
        return self._taken(found.transpose(1, 2).reshape(n, length, width // 3), ahead)

    def expand(self, x: torch.Tensor, projection: Projection, ahead: Projection) -> torch.Tensor:
        return self._taken(gelu(self.project(x, projection)), ahead)

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
        x = x + self.project(inner, projection)
        if clamp:
            limit = clamp_limit(x.dtype)
            x = x.clamp(min=-limit, max=limit)
        return x, self.norm(x, norm, ahead)

    def _taken(self, x: torch.Tensor, ahead: Projection | None) -> torch.Tensor:
        """x in the format that `ahead` takes."""
        if ahead is None or ahead.input_scale is None:
            return x
        if ahead.input_zero is not None:
            return to_int8(x, ahead.input_scale, ahead.input_zero)
        return to_float8(x, ahead.input_scale)


def clamp_limit(dtype: torch.dtype) -> float:
    """Where transformers' WhisperEncoderLayer cuts the residual off in fp16."""
    return torch.finfo(dtype).max - 1000
