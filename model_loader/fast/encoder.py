"""Features -> the encoder's output, from fused weights. The order of a layer is written here once.

The same arithmetic as transformers' WhisperEncoder (a test compares them at fp32), with one projection for queries,
keys and values, and residual and LayerNorm in one operation. On a GPU: attention by cuDNN where it can, which takes
1.00 ms for a layer of 32 windows of large-v3 on an H200 against FlashAttention's 1.30.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_loader.fast.encoder_ops import EncoderOps
from model_loader.fast.weights import EncoderWeights

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's implementations, in the order they are tried."""


def encode(weights: EncoderWeights, ops: EncoderOps, features: torch.Tensor) -> torch.Tensor:
    """[n, n_mels, 3000] in the weights' format -> [n, 1500, d_model]."""
    x = ops.stem(weights, features)
    layers = weights.layers
    normed = ops.norm(x, layers[0].norm1, layers[0].qkv)
    following = [(layer.norm1, layer.qkv) for layer in layers[1:]] + [(weights.norm, None)]
    clamp = x.dtype == torch.float16
    for layer, (next_norm, next_projection) in zip(layers, following, strict=True):
        attended = ops.attend(ops.project(normed, layer.qkv), layer.out)
        x, normed = ops.add_norm(x, attended, layer.out, layer.norm2, layer.fc1, clamp=False)
        inner = ops.expand(normed, layer.fc1, layer.fc2)
        x, normed = ops.add_norm(x, inner, layer.fc2, next_norm, next_projection, clamp=clamp)
    return normed


@contextmanager
def preferred_attention(device: torch.device) -> Iterator[None]:
    """On a GPU, the fastest attention that takes these shapes; on a CPU there is one."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([*ATTENTION.values()], set_priority=True):
        yield
