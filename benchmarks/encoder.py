"""Where the encoder's time goes, and which of its variants is right and fastest.

    python -m benchmarks.encoder                                  large-v3 shape, 32 windows, on a GPU
    python -m benchmarks.encoder --shape toy --batch 2            the same code at a tiny shape, on a CPU too
    python -m benchmarks.encoder --skip tiles                     without trying tiles of our own product

Weights are random, sizes and arithmetic those of the real checkpoint. First each part alone (products, attention,
passes, convolutions, keys and values for the decoder) in every way there is, then whole encoders: as it is by default,
with one choice changed, and with the best of every part. Every whole encoder is held against plain torch in fp32 on the
first two windows: relative error |y - y32| / |y32|. Times are medians of --repeats runs, for all windows of the batch
(parts, one layer) or per window (whole encoders). Prints tables, the best choices as an EncoderTuning and an attention,
and one last line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from benchmarks.memory import circumstances, run, say
from benchmarks.shapes import SHAPES, Shape
from model_loader.convert.fp8 import convert_encoder
from model_loader.device import describe_device, has_triton
from model_loader.fast.encoder import ATTENTION, encode, preferred_attention
from model_loader.fast.encoder_ops import EncoderOps, TorchEncoderOps
from model_loader.fast.triton_encoder import EncoderTuning, ProductTile, TritonEncoderOps
from model_loader.fast.weights import HEAD_WIDTH, EncoderWeights, Projection, take_encoder
from model_loader.float8_linear import has_float8_products, to_float8

TILES = (
    ProductTile(128, 256, 64, 3, 8, 1),
    ProductTile(128, 256, 64, 4, 8, 0),
    ProductTile(128, 128, 64, 3, 4, 2),
    ProductTile(128, 128, 64, 3, 4, 0),
    ProductTile(128, 128, 64, 4, 8, 1),
    ProductTile(256, 128, 64, 3, 8, 1),
)
WARPS = (1, 2, 4, 8)
CROSS_WINDOWS = (1, 2, 4)
"""Windows whose keys and values for the decoder are projected at once."""
N_CHECKED = 2
"""Windows computed in fp32 for comparison."""


@dataclass(slots=True)
class Bench:
    """What everything is measured on."""

    device: torch.device
    shape: Shape
    batch: int
    repeats: int
    floats: EncoderWeights
    float8: EncoderWeights | None
    """None where the device does not multiply float8."""
    features: torch.Tensor
    expected: torch.Tensor
    """fp32 output of the first windows."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    variants: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.floats.positions.dtype

    @property
    def layer(self) -> Any:
        return self.floats.layers[0]

    @property
    def runs_triton(self) -> bool:
        return self.device.type == "cuda" and has_triton(self.device)

    def random(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*sizes, device=self.device)).to(self.dtype)

    def part(self, name: str, way: str, work: Callable[[], Any], *, flops: float = 0.0, n_bytes: float = 0.0) -> None:
        """Time one way to do a part. flops, n_bytes: of all windows, for the rate reached."""
        try:
            ms, spread = self.time_ms(work)
        except (RuntimeError, ValueError, TypeError) as error:  # a way that this torch or this GPU does not know
            self.parts.append({"part": name, "way": way, "ms": None, "why": str(error).splitlines()[0][:120]})
            return
        found = {"part": name, "way": way, "ms": round(ms, 4), "spread_ms": round(spread, 4)}
        if flops:
            found["tflop_s"] = round(flops / ms / 1e9, 1)
        if n_bytes:
            found["tb_s"] = round(n_bytes / ms / 1e9, 2)
        self.parts.append(found)

    def time_ms(self, work: Callable[[], Any]) -> tuple[float, float]:
        """(median, half the range) after two runs that load and compile."""
        for _ in range(2):
            work()
        times = []
        for _ in range(self.repeats):
            self._wait()
            started_s = time.perf_counter()
            work()
            self._wait()
            times.append(1000 * (time.perf_counter() - started_s))
        return statistics.median(times), (max(times) - min(times)) / 2

    def best(self, part: str, default: str) -> str:
        """The fastest way of a part that ran."""
        ran = [found for found in self.parts if found["part"] == part and found["ms"] is not None]
        return str(min(ran, key=lambda found: found["ms"])["way"]) if ran else default

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def prepare(shape: Shape, batch: int, repeats: int, device: torch.device) -> Bench:
    """Random weights in the device's 16-bit format (fp32 on a CPU), the same in float8, and the fp32 answer."""
    model = _encoder_model(shape, device)
    torch.manual_seed(1)
    features = torch.randn(batch, shape.n_mels, 3000, device=device)
    with preferred_attention(device):
        plain = take_encoder(copy.deepcopy(model))
        expected = encode(plain, TorchEncoderOps(), features[:N_CHECKED])
        del plain
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = model.to(dtype)
    float8 = None
    if device.type == "cpu" or has_float8_products(device):
        rounded = copy.deepcopy(model)
        convert_encoder(rounded)
        float8 = take_encoder(rounded)
    floats = take_encoder(model)
    return Bench(device, shape, batch, repeats, floats, float8, features.to(dtype), expected)


def _encoder_model(shape: Shape, device: torch.device) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=shape.n_heads * HEAD_WIDTH,
        encoder_layers=shape.encoder_layers,
        decoder_layers=1,
        encoder_attention_heads=shape.n_heads,
        decoder_attention_heads=shape.n_heads,
        encoder_ffn_dim=4 * shape.n_heads * HEAD_WIDTH,
        decoder_ffn_dim=64,
        num_mel_bins=shape.n_mels,
        vocab_size=64,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    )
    torch.manual_seed(0)
    with device:
        model: Any = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    for module in model.model.encoder.layers.modules():  # away from the neutral values of a new model
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.2)
        elif isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.normal_(0.0, 0.2)
    return model


# --- parts: one layer, all windows ------------------------------------------------------------------------------------


def measure_products(bench: Bench, *, tiles: bool) -> None:
    """The four products of a layer: library in 16 bits and float8, ours with every tile."""
    n_rows = bench.batch * 1500
    for name in ("qkv", "out", "fc1", "fc2"):
        projection: Projection = getattr(bench.layer, name)
        n_out, n_in = projection.weight.shape
        flops = 2.0 * n_rows * n_out * n_in
        x = bench.random(bench.batch, 1500, n_in)
        bench.part(f"product {name}", "16-bit", partial(linear, x, projection.weight, projection.bias), flops=flops)
        small: Projection = getattr((bench.float8 or bench.floats).layers[0], name)
        if small.input_scale is not None:
            x8 = to_float8(x, small.input_scale)
            bench.part(f"product {name}, float8", "library", partial(TorchEncoderOps().project, x8, small), flops=flops)
            if bench.device.type == "cuda":
                _float8_flavours(bench, name, x8, small, flops)
    residual, inner = bench.random(n_rows, bench.layer.fc2.weight.shape[0]), bench.random(n_rows, n_in)
    weight = bench.layer.fc2.weight.t()
    bench.part("product fc2", "16-bit, added to the residual", lambda: residual.addmm_(inner, weight), flops=flops)
    if tiles and bench.runs_triton:
        _tiles(bench, n_rows)


def _float8_flavours(bench: Bench, name: str, x: torch.Tensor, p: Projection, flops: float) -> None:
    """What torch._scaled_mm can do besides one scale a tensor with fast sums; for the record."""
    assert p.input_scale is not None and p.weight_scale is not None
    rows, weight = x.view(-1, x.shape[-1]), p.weight.t()
    per_row = torch.ones(rows.shape[0], 1, device=x.device)
    per_output = torch.ones(1, weight.shape[1], device=x.device)
    for way, scales, fast, dtype in (
        ("library, exact sums", (p.input_scale, p.weight_scale), False, p.bias.dtype),
        ("library, scales by row and output", (per_row, per_output), True, torch.bfloat16),
    ):
        bench.part(
            f"product {name}, float8",
            way,
            partial(torch._scaled_mm, rows, weight, *scales, out_dtype=dtype, use_fast_accum=fast),
            flops=flops,
        )


def _tiles(bench: Bench, n_rows: int) -> None:
    """Our product with GELU behind it, for fc1."""
    for label, weights in (("fc1 and gelu", bench.floats), ("fc1 and gelu, float8", bench.float8)):
        if weights is None:
            continue
        layer = weights.layers[0]
        n_out, n_in = layer.fc1.weight.shape
        x = bench.random(bench.batch, 1500, n_in)
        x = x if layer.fc1.input_scale is None else to_float8(x, layer.fc1.input_scale)
        flops = 2.0 * n_rows * n_out * n_in
        for tile in TILES:
            ops = TritonEncoderOps(weights, EncoderTuning(gelu="product", tile=tile))
            if ops.has_product(layer.fc1):
                bench.part(label, repr(tile), partial(ops.expand, x, layer.fc1, layer.fc2), flops=flops)
        ops = TritonEncoderOps(weights, EncoderTuning())
        bench.part(label, "library and a pass", partial(ops.expand, x, layer.fc1, layer.fc2), flops=flops)


def measure_passes(bench: Bench) -> None:
    """Attention, LayerNorm, GELU, convolutions, and keys and values for the decoder."""
    n, width = bench.batch, bench.floats.positions.shape[1]
    size = bench.floats.positions.element_size()
    one = n * 1500 * width * size
    fused = bench.random(n, 1500, 3 * width)
    query, key, value = fused.view(n, 1500, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind()
    for way, backend in ATTENTION.items() if bench.device.type == "cuda" else (("math", ATTENTION["math"]),):
        if way == "math" and n > 4:
            continue  # its scores would take gigabytes

        def attend(backend: Any = backend) -> None:
            with sdpa_kernel([backend]):
                scaled_dot_product_attention(query, key, value)

        bench.part("attention", way, attend, flops=4.0 * n * 1500 * 1500 * width)
    inner = bench.random(n, 1500, 4 * width)
    bench.part("gelu", "torch", lambda: gelu(inner), n_bytes=8 * one)
    bench.part("stem", "torch", lambda: TorchEncoderOps().stem(bench.floats, bench.features))
    if bench.runs_triton:
        _triton_passes(bench, inner, one)
    weight, bias = bench.random(64 * width, width, scale=0.02), bench.random(64 * width)
    for windows in CROSS_WINDOWS:
        hidden = bench.random(windows, 1500, width)
        flops = 2.0 * windows * 1500 * width * 64 * width
        bench.part(f"keys and values, {windows} windows", "16-bit", partial(linear, hidden, weight, bias), flops=flops)


def _triton_passes(bench: Bench, inner: torch.Tensor, one: int) -> None:
    y, x = bench.random(bench.batch, 1500, inner.shape[-1] // 4), bench.random(bench.batch, 1500, inner.shape[-1] // 4)
    for label, weights in (("", bench.floats), (", float8", bench.float8)):
        if weights is None:
            continue
        layer = weights.layers[0]
        out_bytes = 0.5 if label else 1.0
        for warps in WARPS:
            ops = TritonEncoderOps(weights, EncoderTuning(norm_warps=warps, pass_warps=warps))
            bench.part(
                f"norm{label}",
                str(warps),
                partial(ops.normed, x, y, layer.norm2, layer.fc1, clamp=False),
                n_bytes=(3 + out_bytes) * one,
            )
            bench.part(
                f"gelu{label}",
                str(warps),
                partial(ops.activated, inner, layer.fc2),
                n_bytes=4 * (1 + out_bytes) * one,
            )
    ops = TritonEncoderOps(bench.floats, EncoderTuning(stem="channels_last"))
    bench.part("stem", "channels_last", lambda: ops.stem(bench.floats, bench.features))


# --- whole encoders ---------------------------------------------------------------------------------------------------


def measure_variants(bench: Bench) -> dict[str, Any]:
    """Every variant with its error; the best choices by row. Returns {row: choices of the fastest}."""
    chosen: dict[str, Any] = {}
    attention = bench.best("attention", "math")
    for row, weights in (("16-bit", bench.floats), ("float8", bench.float8)):
        if weights is None:
            continue
        tried = _tunings(bench, row) if bench.runs_triton else {}
        _variant(bench, row, "plain torch", weights, TorchEncoderOps(), attention)
        for name, tuning in tried.items():
            _variant(bench, row, name, weights, TritonEncoderOps(weights, tuning), attention)
        ran = [found for found in bench.variants if found["row"] == row and found["ms"] is not None]
        best = min(ran, key=lambda found: found["ms"])
        taken = tried.get(best["variant"])
        chosen[row] = {**best, "attention": attention, "tuning": asdict(taken) if taken else None}
    return chosen


def _tunings(bench: Bench, row: str) -> dict[str, EncoderTuning]:
    """By default, with one choice changed, and with all of the parts' best."""
    suffix = ", float8" if row == "float8" else ""
    tuned = EncoderTuning(
        norm_warps=int(bench.best(f"norm{suffix}", "4")),
        pass_warps=int(_best_number(bench, f"gelu{suffix}", 8)),
        stem=bench.best("stem", "channels_last"),
    )
    way = bench.best(f"fc1 and gelu{suffix}", "library and a pass")
    tiles = {repr(tile): tile for tile in TILES}
    own = [f for f in bench.parts if f["part"] == f"fc1 and gelu{suffix}" and f["way"] in tiles and f["ms"]]
    tile = tiles[min(own, key=lambda found: found["ms"])["way"]] if own else TILES[0]
    found = {"default": EncoderTuning(), "best warps and stem": tuned}
    found["gelu in the product"] = replace(tuned, gelu="product", tile=tile)
    found["residual in the norm"] = replace(tuned, residual="norm")
    if row == "float8":
        found["all products ours"] = replace(tuned, gelu="product", float8="product", tile=tile)
    if own and way == "library and a pass":
        say(f"{row}: the library with a pass behind it is faster than every tile of ours")
    return found


def _best_number(bench: Bench, part: str, default: int) -> str:
    ran = [f for f in bench.parts if f["part"] == part and f["ms"] is not None and f["way"].isdigit()]
    return str(min(ran, key=lambda found: found["ms"])["way"]) if ran else str(default)


def _variant(bench: Bench, row: str, name: str, weights: EncoderWeights, ops: EncoderOps, attention: str) -> None:
    found: dict[str, Any] = {"row": row, "variant": name, "ms": None, "spread_ms": None, "error": None}
    bench.variants.append(found)
    try:
        with sdpa_kernel([ATTENTION[attention]]):
            output = encode(weights, ops, bench.features)[:N_CHECKED].float()
            found["error"] = float(f"{float((output - bench.expected).norm() / bench.expected.norm()):.2e}")
            ms, spread = bench.time_ms(lambda: encode(weights, ops, bench.features))
    except (RuntimeError, ValueError, TypeError) as error:
        found["why"] = str(error).splitlines()[0][:120]
        return
    found["ms"], found["spread_ms"] = round(ms / bench.batch, 4), round(spread / bench.batch, 4)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Aligned columns, the first left."""
    lines = [[*columns], *([str(row.get(c, "") if row.get(c) is not None else "-") for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    place = describe_device(arguments.device)
    device = place.torch_device
    shape = arguments.shape or ("large-v3" if place.kind == "cuda" else "toy")
    say(f"encoder of shape {shape}, {arguments.batch} windows")
    # fp32, for comparison, means fp32; as when a model is loaded.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    with torch.no_grad():
        bench = prepare(SHAPES[shape], arguments.batch, arguments.repeats, device)
        say("products")
        measure_products(bench, tiles="tiles" not in arguments.skip.split(","))
        say("passes")
        measure_passes(bench)
        say("whole encoders")
        chosen = measure_variants(bench)
    print("One layer, all windows (ms)")
    print(table(bench.parts, ("part", "way", "ms", "spread_ms", "tflop_s", "tb_s", "why")))
    print("\nWhole encoder (ms a window; error against fp32)")
    print(table(bench.variants, ("row", "variant", "ms", "spread_ms", "error", "why")))
    for row, found in chosen.items():
        print(f"\nBest for {row}: {found['variant']}, attention {found['attention']}, {found['ms']} ms a window.")
        print(f"    {found['tuning']}")
    record = {**circumstances("encoder", place, shape), "batch": arguments.batch, "parts": bench.parts}
    print(json.dumps({**record, "variants": bench.variants, "best": chosen}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="default: large-v3 on a GPU, toy on a CPU")
    parser.add_argument("--batch", type=int, default=32, help="windows encoded together; default: 32")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each figure; default: 7")
    parser.add_argument("--skip", default="", help="tiles: do not try those of our own product")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run(main)
