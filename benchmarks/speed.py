"""How fast each precision decodes on the fast engine, beside transformers in the same run.

    python -m benchmarks.speed                                      large-v3 shape on a GPU: 5 minutes on an H200
    python -m benchmarks.speed --rows fp16,int8 --skip compiled     less of it
    python -m benchmarks.speed --shape tiny --batches 1 --tokens 32 on a CPU
    python -m benchmarks.speed --shape demo --batches 1,4 --tokens 32   the demo model itself

Weights are random, but for the demo model's; sizes and arithmetic are those of the real checkpoint; every window gets
exactly --tokens tokens.
    ms/token   generate() for --tokens tokens after a prompt of three, encoder output given, over --tokens
    ms/step    what one more token takes: time for --tokens tokens less time for a quarter of them, over the difference
    floor      bytes a step must read (projections, head, caches) over --bandwidth; share = floor / ms a step
    encoder    ms a window, features on the device
    share      behind it: FLOPs of the encoder over --teraflops, over the time measured
    RTF        seconds of sound (30 a window) over seconds. Ours from waveforms in main memory to text, as the product
               does it: log-mel features on the device, windows handed to the scheduler, the language logits among the
               results, tokens to text with the demo model's tokenizer. Peers' from features on the device to tokens,
               which is less work: what that difference costs us counts against us. whole: the same in milliseconds
Peers, in fp16 (fp32 on a CPU): transformers' generate as it is, and with a static cache and torch.compile; bitsandbytes
through it; openai/whisper; faster-whisper in 16 (32) and 8 bits. Then the time to a 27 s clip's first words and to its
text, warm. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audio.constants import SAMPLE_RATE, WINDOW_SAMPLES
from audio.decode import decode_all
from benchmarks.memory import circumstances, random_features, request_of, run, say
from benchmarks.peers import (
    Missing,
    Result,
    Work,
    measure_faster_whisper,
    measure_openai,
    measure_transformers,
    repeated,
    timings,
)
from benchmarks.shapes import DEMO_FOLDER, SHAPES, make_checkpoint, wav_bytes
from model_loader.device import describe_device
from model_loader.engine import GenerateRequest
from model_loader.fast.engine import FastEngine
from model_loader.loader import load_engine
from model_loader.orders import WindowOrder
from model_loader.precision import PRECISIONS
from transcription.decode import log_mel_of
from transcription.options import TranscribeOptions
from transcription.run import Desk, LocalRun
from transcription.tokenizer import WhisperTokens
from transcription.transcript import Transcript

SECTIONS = ("fast", "transformers", "compiled", "bnb-int8", "bnb-nf4", "openai", "faster")
DEMO = "demo"
CLIP_S = 27.0
PATHS = {
    "default": "speech detected and language looked at",
    "told": "windows every 25 s and the language given",
}
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "town-walk.flac"
COLUMNS = (
    ("engine", "engine"),
    ("row", "precision"),
    ("batch", "batch"),
    ("token_ms", "ms/token"),
    ("token_spread_ms", "+-"),
    ("step_ms", "ms/step"),
    ("floor_ms", "floor"),
    ("floor_share", "share"),
    ("encoder_ms", "encoder ms/window"),
    ("encoder_spread_ms", "+-"),
    ("encoder_share", "share"),
    ("rtf", "RTF"),
    ("window_ms", "whole, ms"),
)
"""Key in the JSON, heading in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    device = describe_device(arguments.device)
    on_gpu = device.kind == "cuda"
    shape = arguments.shape or ("large-v3" if on_gpu else "tiny")
    rows = (
        arguments.rows.split(",") if arguments.rows else ["fp16", "int8", "int4", "fp8"] if on_gpu else ["fp32", "int8"]
    )
    skipped = set(arguments.skip.split(",")) | (set() if on_gpu else {"compiled"})
    work = Work(tuple(_numbers(arguments.batches)), arguments.tokens, arguments.repeats, arguments.device)
    results: list[Result] = []
    captures: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sotto-") as place:
        if shape == DEMO:
            folder = DEMO_FOLDER
        else:
            say(f"writing a checkpoint of shape {shape}")
            folder = make_checkpoint(shape, Path(place) / shape)
        for row in rows if "fast" not in skipped else ():
            say(f"fast {row}")
            found, captures[row], texts[row] = measure_fast(folder, row, work, arguments)
            results += found
            say_measured(found)
        others, missing = measure_peers(folder, work, skipped, arguments)
        results += others
    print(table(results))
    for row, text in texts.items():
        for how, path in PATHS.items():
            first, whole = text[how]["first_words_ms"], text[how]["text_ms"]
            print(f"{row}: {CLIP_S:.0f} s clip, {path}: first words {first} ms, all of its text {whole} ms, warm.")
    for line in [*(f"{peer.engine}: {peer.reason}" for peer in missing), *comparisons(results)]:
        print(line)
    sizes = {"tokens": arguments.tokens, "bandwidth_tb_s": arguments.bandwidth, "repeats": arguments.repeats}
    left_out = {peer.engine: peer.reason for peer in missing}
    figures = {"rows": results, "captures": captures, "first_text": texts, "missing": left_out}
    print(json.dumps({**circumstances("speed", device, shape), **sizes, **figures}))
    return 0


def measure_peers(
    folder: Path, work: Work, skipped: set[str], arguments: argparse.Namespace
) -> tuple[list[Result], list[Missing]]:
    """All that were not skipped; a missing one is told apart."""
    place = describe_device(arguments.device).torch_device
    on_gpu, row = place.type == "cuda", "fp16" if place.type == "cuda" else "fp32"
    compiled = replace(work, batches=tuple(_numbers(arguments.compiled_batches)))
    peers: dict[str, Callable[[], list[Result] | Missing]] = {
        "transformers": lambda: measure_transformers(folder, row, work),
        "compiled": lambda: measure_transformers(folder, row, compiled, compiled=True),
        "bnb-int8": lambda: measure_transformers(folder, "bnb-int8", work),
        "bnb-nf4": lambda: measure_transformers(folder, "bnb-nf4", work),
        "openai": lambda: measure_openai(folder, row, work, place),
        "faster": lambda: measure_faster_whisper(
            folder, ("float16", "int8_float16") if on_gpu else ("float32", "int8"), work, place
        ),
    }
    results: list[Result] = []
    missing: list[Missing] = []
    for name, measure in peers.items():
        if name in skipped:
            continue
        say(name)
        try:
            found = measure()
        except Exception as error:  # a peer's fault does not take with it what was measured before
            found = Missing(name, f"failed: {error}")
        if isinstance(found, Missing):
            missing.append(found)
        else:
            results += found
            say_measured(found)
    return results, missing


def say_measured(results: Sequence[Result]) -> None:
    """What is there already, on standard error: a run that is cut off has not been for nothing."""
    for r in results:
        say(f"  batch {r['batch']}: {r['token_ms']} ms a token, encoder {r['encoder_ms']} ms a window, RTF {r['rtf']}")


def measure_fast(
    folder: Path, row: str, work: Work, arguments: argparse.Namespace
) -> tuple[list[Result], list[Any], dict[str, Any]]:
    """A result per batch size, what every graph cost, and the time to the first text."""
    batch = max(work.batches)
    engine = load_engine(str(folder), row, engine="fast", device=arguments.device, offline=True, batch=batch)
    assert isinstance(engine, FastEngine)
    engine.capture()
    results = [
        {"engine": "fast", "row": row, **_measure_batch(engine, n, work, arguments, folder)} for n in work.batches
    ]
    captures = [{"name": c.name, "capture_s": round(c.capture_s, 3), "n_bytes": c.n_bytes} for c in engine.captures]
    text = first_text(engine, arguments)
    engine.close()
    return results, captures, text


def _measure_batch(engine: FastEngine, n: int, work: Work, arguments: argparse.Namespace, folder: Path) -> Result:
    """Of n windows at once."""
    features = random_features(engine, n).to(engine.device)
    encoded = engine.encode(features)
    request = request_of(engine, n, work.n_tokens)
    waveforms = random_waveforms(n)
    tokens = WhisperTokens.from_folder(DEMO_FOLDER)

    def whole() -> list[str]:
        return transcribe(engine, waveforms, request, tokens)

    found = timings(
        lambda: engine.generate(encoded, request), lambda: engine.encode(features), whole, n, engine.device, work
    )
    n_early = max(1, work.n_tokens // 4)
    early = request_of(engine, n, n_early)
    early_s, _ = repeated(lambda: engine.generate(encoded, early), work, engine.device)
    step_ms = (found["token_ms"] * work.n_tokens - 1000 * early_s) / max(1, work.n_tokens - n_early)
    found |= {"batch": n, "step_ms": round(step_ms, 4)}
    if engine.device.type != "cuda":
        return found  # bandwidth and FLOPs are a GPU's
    floor_ms = engine.step_bytes(n, (n_early + work.n_tokens) // 2) / arguments.bandwidth / 1e9
    encoder_floor_ms = encoder_flops(folder) / arguments.teraflops / 1e9
    return found | {
        "floor_ms": round(floor_ms, 3),
        "floor_share": round(floor_ms / step_ms, 3),
        "encoder_share": round(encoder_floor_ms / found["encoder_ms"], 3),
    }


def random_waveforms(n: int) -> list[npt.NDArray[np.float32]]:
    """Noise, 30 s each: float32 [480000]."""
    random = np.random.default_rng(0)
    return [0.1 * random.standard_normal(WINDOW_SAMPLES, dtype=np.float32) for _ in range(n)]


def transcribe(
    engine: FastEngine, waveforms: Sequence[npt.NDArray[np.float32]], request: GenerateRequest, tokens: WhisperTokens
) -> list[str]:
    """Windows of sound [n_samples] to their texts as a run does it (transcription/flow.py): one by one, all at once in
    the engine. The weights are random: ids that the tokenizer lacks are brought into its range."""
    log_mel = log_mel_of(engine)
    orders = (
        WindowOrder(request.rules, tuple(prompt), features=log_mel([window])[0], max_new_tokens=request.max_new_tokens)
        for prompt, window in zip(request.prompts, waveforms, strict=True)
    )
    futures = [engine.submit(order, job=0) for order in orders]
    written = [future.result().sequence.tokens for future in futures]
    return [tokens.decode([token % tokens.eot for token in sequence]) for sequence in written]


def first_text(engine: FastEngine, arguments: argparse.Namespace) -> dict[str, Any]:
    """From submitting a clip of one window to its first words and to all of its text, warm: reading, windows, features,
    tokens, segments. The first words are there (run.draft) while their window is being decoded.

    The sound is the long example's beginning, so that the speech detector has work; the weights are random, so the
    window is given --tokens tokens at one temperature. Each way of PATHS.
    """
    sound = decode_all(EXAMPLE)[: round(CLIP_S * SAMPLE_RATE)]
    tokens = WhisperTokens.from_folder(DEMO_FOLDER)
    desk = Desk(
        borrow=lambda: nullcontext(engine),
        tokens_of=lambda _: tokens,
        model="random",
        precision=engine.report.effective,
        engine="fast",
    )
    forced = TranscribeOptions(temperatures=(0.0,), max_new_tokens=arguments.tokens)
    told = replace(forced, language="en", windows="fixed")

    def run(options: TranscribeOptions) -> Transcript:
        with closing(LocalRun(wav_bytes(sound), options, desk)) as working:
            for _ in working:
                pass
        return working.transcript

    found: dict[str, Any] = {"clip_s": CLIP_S}
    for how, options in (("default", forced), ("told", told)):
        run(options)
        runs = [run(options) for _ in range(arguments.repeats)]
        first_s = [transcript.first_text_s for transcript in runs if transcript.first_text_s is not None]
        found[how] = {
            "first_words_ms": round(1000 * statistics.median(first_s), 1) if first_s else None,
            "text_ms": round(1000 * statistics.median(transcript.elapsed_s for transcript in runs), 1),
        }
    return found


def encoder_flops(folder: Path) -> float:
    """Of one window: products of the layers and of attention, and both convolutions."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    d, n, layers = config["d_model"], config["max_source_positions"], config["encoder_layers"]
    layer = 2 * n * (4 * d * d + 2 * d * config["encoder_ffn_dim"]) + 4 * n * n * d
    return float(layers * layer + 2 * 3 * d * (2 * n * config["num_mel_bins"] + n * d))


def comparisons(results: Sequence[dict[str, Any]]) -> list[str]:
    """How often faster than transformers in this run, batch by batch."""
    lines = []
    for peer in (r for r in results if r["engine"] != "fast"):
        for ours in (r for r in results if r["engine"] == "fast" and r["batch"] == peer["batch"]):
            times = peer["token_ms"] / ours["token_ms"]
            lines.append(
                f"batch {peer['batch']}: {ours['row']} takes {ours['token_ms']:.3f} ms a token, {peer['engine']} "
                f"{peer['row']} {peer['token_ms']:.3f}: {times:.1f} times as fast; from sound to text, against "
                f"features to tokens, {ours['rtf'] / peer['rtf']:.1f} times."
            )
    return lines


def table(results: Sequence[dict[str, Any]]) -> str:
    """Aligned columns."""
    lines = [[heading for _, heading in COLUMNS]]
    lines += [[str(result.get(key, "-")) for key, _ in COLUMNS] for result in results]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES, DEMO], help="default: large-v3 on a GPU, tiny on a CPU")
    fast = ", ".join(name for name, row in PRECISIONS.items() if row.fast)
    parser.add_argument(
        "--rows", default="", help=f"of {fast}; default: fp16,int8,int4,fp8 on a GPU, fp32,int8 on a CPU"
    )
    parser.add_argument("--batches", default="1,32", help="windows decoded together; default: 1,32")
    parser.add_argument("--compiled-batches", default="1", help="the same for the compiled peer, 70 s each; default: 1")
    parser.add_argument("--tokens", type=int, default=128, help="tokens for every window; default: 128")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each figure; default: 5")
    parser.add_argument("--skip", default="", help=f"sections left out, of {','.join(SECTIONS)}")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="of the floor, in TB/s; default: 4.3, an H200's")
    parser.add_argument(
        "--teraflops", type=float, default=790.0, help="of the encoder's floor; default: 790, an H200's"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run(main)
