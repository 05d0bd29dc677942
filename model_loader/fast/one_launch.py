"""All decoder layers of a step in one launch: sizes, arguments and shared memory of cuda/layers.cu.

In: packed weights and the Slots of a batch. Out: a launch that does what step.py's eight operations a layer do. The
kernel's text is compiled for these very sizes (nvrtc.py); nothing here touches a GPU before OneLaunch is made.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from errors import DeviceError
from model_loader.fast.census import projections
from model_loader.fast.packing import Format
from model_loader.fast.slots import MAX_ROWS, Slots
from model_loader.fast.weights import HEAD_WIDTH, DecoderWeights

if TYPE_CHECKING:
    from model_loader.fast.nvrtc import Kernel

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cuda" / "layers.cu"
CHUNK = 128
"""Inputs that a warp takes at once; the width must be a multiple."""
CAPABILITY = (8, 0)
"""The oldest GPU with matrix products of bfloat16 and loads past the L1 cache."""
_TILE = 16
_MAX_SPLITS = 6
_PART = HEAD_WIDTH + 4
_STATS = 2 * MAX_ROWS * 128
_PROJECTION_BYTES = 32


class Arguments(ctypes.Structure):
    """As in layers.cu: addresses, then how many elements or bytes lie between two layers."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "layers", "x", "x_copy", "stats", "last_stats", "query", "attended", "inner", "self_keys", "self_values",
            "cross_keys", "cross_values", "cross_scale", "position", "finished", "tokens", "token_table",
            "position_table", "parts", "barrier",
        )),
        *((name, ctypes.c_uint64) for name in ("self_stride", "cross_stride", "scale_stride")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the kernel is compiled for."""

    width: int
    inner: int
    n_layers: int
    n_text_ctx: int
    n_audio_ctx: int
    n_rows: int
    format: Format
    dtype: torch.dtype
    cross_8bit: bool
    eps: float
    n_blocks: int
    """As many as multiprocessors: all must run at once, for they wait for each other."""
    workers: int = 0
    """Warps of a block that work, beside one that minds the barrier; 0 takes as many as share out chunks evenly."""

    @property
    def n_heads(self) -> int:
        return self.width // HEAD_WIDTH

    @property
    def n_warps(self) -> int:
        chunks = self.width // CHUNK
        return self.workers or next((n for n in (10, 8, 12, 9) if chunks % n == 0), 8)

    @property
    def n_threads(self) -> int:
        return 32 * (self.n_warps + 1)

    @property
    def macros(self) -> dict[str, str]:
        """For the preprocessor."""
        names = {
            "D": self.width, "F": self.inner, "H": self.n_heads, "L": self.n_layers, "T": self.n_text_ctx,
            "S": self.n_audio_ctx, "R": self.n_rows, "GRID": self.n_blocks, "NW": self.n_warps,
        }  # fmt: skip
        flags = {"FORMAT": int(self.format), "BF16": int(self.dtype == torch.bfloat16), "CROSS8": int(self.cross_8bit)}
        return {f"SIZE_{k}": str(v) for k, v in names.items()} | {
            **{k: str(v) for k, v in flags.items()},
            "EPS": f"{self.eps!r}f",
        }

    @property
    def n_outs(self) -> int:
        """Of x that one block makes at once: OUTS(D) of block.cuh."""
        if self.n_rows <= 8:
            return min(48, _ceil(self.width, self.n_blocks))
        return _TILE * min(3, _ceil(self.width // _TILE, self.n_blocks))

    @property
    def n_parts(self) -> int:
        """Of x, each with sums of its own: what one block makes at once, in tiles of 16."""
        return _ceil(self.width, self.n_outs) * _ceil(self.n_outs, _TILE)

    @property
    def shared_bytes(self) -> int:
        """Of one block: SHARED_BYTES of block.cuh."""
        rows, warps, width = self.n_rows, self.n_warps, self.width
        items = _ceil(rows * self.n_heads, self.n_blocks) + 1
        red = max(warps * rows * (3 * _TILE + 4), max(items, warps) * warps * _PART)
        own_x = _ceil(_ceil(width, self.n_outs), self.n_blocks) * rows * _ceil(self.n_outs, _TILE) * _TILE
        floats = red + items * _PART + own_x + 2 * 3 * 48
        pairs = warps * rows + rows + rows % 2
        joined = 2 * rows * width if rows <= 4 else 0
        return 12 * _PROJECTION_BYTES + 4 * floats + 8 * pairs + joined + 4 * (3 * rows + 1)


def sizes_of(weights: DecoderWeights, n_rows: int, n_blocks: int, *, quantised: bool) -> Sizes:
    """n_blocks: the GPU's multiprocessors. quantised: the audio cache holds bytes."""
    first = weights.layers[0]
    return Sizes(
        width=weights.d_model,
        inner=first.fc1.n_out,
        n_layers=len(weights.layers),
        n_text_ctx=weights.n_text_ctx,
        n_audio_ctx=weights.n_audio_ctx,
        n_rows=n_rows,
        format=first.qkv.format,
        dtype=weights.dtype,
        cross_8bit=quantised,
        eps=weights.eps,
        n_blocks=n_blocks,
    )


def why_not_one_launch(weights: DecoderWeights, n_rows: int, *, quantised: bool) -> str | None:
    """Why these rows do not run in one launch on their GPU, as a clause; None where they do."""
    from model_loader.fast.nvrtc import compiled, expanded, is_available, options_for

    properties = torch.cuda.get_device_properties(weights.device)
    reason = unfit(weights, (properties.major, properties.minor))
    if reason is not None:
        return reason
    if not is_available():
        return "NVIDIA's run-time compiler or the package cuda-bindings is missing"
    sizes = sizes_of(weights, n_rows, properties.multi_processor_count, quantised=quantised)
    room = int(getattr(properties, "shared_memory_per_block_optin", 0))
    if sizes.shared_bytes > room:
        return f"a block needs {sizes.shared_bytes} bytes of shared memory and may take {room}"
    try:
        compiled(expanded(SOURCE), options_for(sizes.macros, weights.device))
    except DeviceError as error:  # another compiler or GPU than it was tried with: the other kernels serve
        logger.warning("event=one_launch_not_compiled reason='%s'", error)
        return "its kernel could not be compiled"
    return None


def unfit(weights: DecoderWeights, capability: tuple[int, int]) -> str | None:
    """Why these weights do not run in one launch, as a clause; None where they do."""
    if capability < CAPABILITY:
        return f"the GPU's compute capability {capability[0]}.{capability[1]} is below {CAPABILITY[0]}.{CAPABILITY[1]}"
    if weights.dtype not in (torch.float16, torch.bfloat16):
        return "the matrix units it uses compute in 16 bits"
    if weights.d_model % CHUNK or weights.layers[0].fc1.n_out % CHUNK:
        return f"its width is no multiple of {CHUNK}"
    formats = {packed.format for layer in weights.layers for packed in projections(layer)}
    if Format.MODULES in formats:
        return "its projections have kernels of their own"
    if len(formats) > 1:
        return "its projections are of several formats"
    if weights.dtype == torch.bfloat16 and formats != {Format.FLOAT}:
        return "bfloat16 cannot hold 8-bit weights exactly"
    return None


class Memory:
    """What a launch needs beside weights and Slots; kept alive as long as its addresses are used."""

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        device = weights.device
        addresses = [
            [packed.weight.data_ptr(), packed.scale.data_ptr(), packed.bias.data_ptr(), _address(packed.colsum)]
            for layer in weights.layers
            for packed in projections(layer)
        ]
        self.layers = torch.tensor(addresses, dtype=torch.int64).to(device)
        self.stats = torch.zeros(_STATS, device=device)
        """Sums of x_copy and of its squares between operations: [128, MAX_ROWS, 2]."""
        self.last_stats = torch.zeros(_STATS, device=device)
        """The same behind the last layer: [2, MAX_ROWS, 128], a column for each part of x."""
        cells = slots.n_rows * weights.n_heads
        self.parts = torch.zeros(cells * _MAX_SPLITS * _PART, device=device)
        self.barrier = torch.zeros(2, dtype=torch.int32, device=device)


def arguments(weights: DecoderWeights, slots: Slots, memory: Memory) -> Arguments:
    """The addresses of everything; the kernel reads and writes the Slots in place."""
    return Arguments(
        memory.layers.data_ptr(), slots.x.data_ptr(), slots.x_copy.data_ptr(), memory.stats.data_ptr(),
        memory.last_stats.data_ptr(), slots.query.data_ptr(), slots.attended_copy.data_ptr(),
        slots.inner_copy.data_ptr(),
        slots.self_keys.data_ptr(), slots.self_values.data_ptr(), slots.cross_keys.data_ptr(),
        slots.cross_values.data_ptr(), slots.cross_scale.data_ptr(), slots.position.data_ptr(),
        slots.finished.data_ptr(), slots.tokens.data_ptr(), weights.tokens.data_ptr(),
        weights.positions.data_ptr(), memory.parts.data_ptr(), memory.barrier.data_ptr(),
        slots.self_keys.stride(0), slots.cross_keys.stride(0) * slots.cross_keys.element_size(),
        slots.cross_scale.stride(0),
    )  # fmt: skip


def compile_ahead(weights: DecoderWeights, rows: Sequence[int], *, quantised: bool) -> None:
    """Compile for these numbers of rows, several at once: one takes two to four seconds of a processor, once."""
    from model_loader.fast.nvrtc import compiled, expanded, options_for

    n_blocks = torch.cuda.get_device_properties(weights.device).multi_processor_count
    text = expanded(SOURCE)
    each = [options_for(sizes_of(weights, n, n_blocks, quantised=quantised).macros, weights.device) for n in rows]
    with ThreadPoolExecutor(min(len(each), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda options: compiled(text, options), each))


class OneLaunch:
    """The compiled kernel with its arguments, for one Slots on one GPU."""

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        from model_loader.fast.nvrtc import compile_kernel

        n_blocks = torch.cuda.get_device_properties(weights.device).multi_processor_count
        self._sizes = sizes_of(weights, slots.n_rows, n_blocks, quantised=slots.quantised)
        self._kernel: Kernel = compile_kernel(
            SOURCE, "decoder_layers", self._sizes.macros, weights.device, shared_bytes=self._sizes.shared_bytes
        )
        self.memory = Memory(weights, slots)
        self.n_parts = self._sizes.n_parts
        self._arguments = arguments(weights, slots, self.memory)

    def __call__(self) -> None:
        """On the current stream: embedding and all layers. Leaves x, x_copy and last_stats."""
        self._kernel.launch(self._sizes.n_blocks, self._sizes.n_threads, self._arguments)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
