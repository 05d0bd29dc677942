"""Whether the fast engine says what the reference says, and how far each format is from fp32, layer by layer.

    python -m benchmarks.engines                                the demo checkpoint, whole held-out set
    python -m benchmarks.engines --audio FOLDER --limit 2       other recordings too, fewer of the set

Part one: every window through both engines at each of --precisions, greedily, with timestamps; their tokens are
compared one by one. Where they part, both candidates are scored by the reference's own logits behind the tokens that
they share: margin is how much likelier (in nats) its choice is there. A near-tie has a margin that rounding reaches.
Part two: the tokens that fp32 writes are read by the decoder in each of --formats, behind that row's own encoder and
audio cache, in plain torch; errors are relative (of the encoder's output, of the residual behind every layer) or in
nats (root mean square over the vocabulary's log probabilities; and how often the likeliest token is another).
Prints two tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from audio.decode import decode_blocks
from audio.windows import Window, cut_windows
from benchmarks.accuracy import HELDOUT, find_recordings
from benchmarks.load import table
from benchmarks.memory import circumstances, run, say
from errors import AudioError
from model_loader.device import DeviceInfo, describe_device
from model_loader.engine import Engine, ReferenceEngine
from model_loader.fast.packing import Packed
from model_loader.fast.slots import RuleTensors, Slots, make_slots
from model_loader.fast.step import decoder_step
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderWeights, project, take_decoder
from model_loader.loader import load_engine
from model_loader.precision import PRECISIONS
from transcription.calibrate import AUDIO_SUFFIXES
from transcription.decode import Decoder, log_mel_of
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens

LAYER_WINDOWS = 2
"""Of each language, for part two."""


@dataclass(frozen=True, slots=True)
class Task:
    """A window and the language to decode it in."""

    name: str
    language: str
    window: Window


@dataclass(slots=True)
class Agreement:
    """Both engines at one precision."""

    precision: str
    n_windows: int = 0
    n_tokens: int = 0
    n_other: int = 0
    """Windows whose tokens differ."""
    margins: list[float] = field(default_factory=list)
    """Where they part, in nats."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    device = describe_device(arguments.device)
    tasks = find_tasks(arguments)
    agreements, errors = [], []
    with torch.no_grad():
        for precision in filter(None, arguments.precisions.split(",")):
            agreements.append(compare_engines(arguments.model, precision, device, tasks, arguments.batch_size))
            say(str(agreements[-1]))
        if arguments.formats:
            errors = layer_errors(arguments.model, arguments.formats.split(","), device, tasks)
    rows = [
        {"precision": a.precision, "windows": a.n_windows, "tokens": a.n_tokens, "differ": a.n_other,
         "largest margin": round(max(a.margins), 4) if a.margins else None}
        for a in agreements
    ]  # fmt: skip
    print(table(rows) if rows else "")
    print(table(errors) if errors else "")
    print(json.dumps({**circumstances("engines", device, arguments.model), "engines": rows, "layers": errors}))
    return 0


def find_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Windows of the held-out set, and of the sound files in --audio that can be read."""
    recordings = find_recordings(arguments.windows, arguments.heldout, arguments.limit)
    tasks = [Task(r.file, r.language, r.window) for r in recordings]
    for path in sorted(arguments.audio.rglob("*")) if arguments.audio else ():
        if path.suffix.lower() not in AUDIO_SUFFIXES:
            continue
        try:
            with decode_blocks(path) as reader:
                found = list(cut_windows(reader, "vad"))
        except AudioError as error:
            say(f"{path.name} is left out: {error}")
            continue
        tasks += [Task(path.name, arguments.audio_language, window) for window in found]
    return tasks


def compare_engines(model: str, precision: str, device: DeviceInfo, tasks: Sequence[Task], batch: int) -> Agreement:
    """Every window through both engines."""
    place, found = str(device.torch_device), Agreement(precision)
    reference = load_engine(model, precision, engine="reference", device=place, warm_up=False)
    fast = load_engine(model, precision, engine="fast", device=place, warm_up=False)
    assert isinstance(reference, ReferenceEngine)
    tokens = WhisperTokens.from_folder(reference.report.folder)
    try:
        for language in dict.fromkeys(task.language for task in tasks):
            same = sorted((t for t in tasks if t.language == language), key=lambda t: t.window.samples.size)
            for start in range(0, len(same), batch):
                part = same[start : start + batch]
                prompt, expected = _written(reference, tokens, part)
                _, other = _written(fast, tokens, part)
                for index, (one, two) in enumerate(zip(expected, other, strict=True)):
                    found.n_windows += 1
                    found.n_tokens += len(one)
                    if one != two:
                        found.n_other += 1
                        found.margins.append(_margin(reference, tokens, part[index], prompt, one, two))
    finally:
        reference.close()
        fast.close()
    return found


def _written(engine: Engine, tokens: WhisperTokens, tasks: Sequence[Task]) -> tuple[list[int], list[list[int]]]:
    """(prompt, tokens of each window) at temperature 0."""
    decoder = Decoder(tokens, TranscribeOptions(temperatures=(0.0,)))
    request = decoder.request(engine, len(tasks), tasks[0].language, 0.0)
    features = log_mel_of(engine)([task.window.samples for task in tasks])
    sequences = engine.generate(engine.encode(features), request)
    return list(request.prompts[0]), [[*s.tokens, *([tokens.eot] if s.finished else [])] for s in sequences]


def _margin(reference: ReferenceEngine, tokens: WhisperTokens, task: Task, prompt: list[int], one: list[int],
            two: list[int]) -> float:  # fmt: skip
    """How much likelier the reference's token is where the two part; where one is a timestamp and the other is not, how
    far the sum over timestamps is from the likeliest text, if that is less."""
    n_shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    if n_shared == min(len(one), len(two)):
        return 0.0  # one goes on where the other met the limit of tokens
    hidden = reference.encode(log_mel_of(reference)([task.window.samples])).hidden
    ids = torch.tensor([[*prompt, *one[:n_shared]]], device=reference.device)
    logits = reference.network(encoder_outputs=(hidden,), decoder_input_ids=ids).logits[0, -1].float()
    logprobs = logits.log_softmax(0)
    mine, theirs = one[n_shared], two[n_shared]
    margins = [abs(float(logprobs[mine] - logprobs[theirs]))]
    begin = tokens.timestamp_begin
    if (mine >= begin) != (theirs >= begin):
        margins.append(abs(float(logprobs[begin:].logsumexp(0) - logprobs[: tokens.eot].max())))
    return min(margins)


# --- layer by layer ---------------------------------------------------------------------------------------------------


class _Watching(TorchOps):
    """Keeps the residual behind every layer."""

    def __init__(self, weights: DecoderWeights, slots: Slots) -> None:
        super().__init__(weights, slots)
        self.seen: list[torch.Tensor] = []

    def add_inner(self, packed: Packed) -> None:
        super().add_inner(packed)
        self.seen.append(self.slots.x.cpu().clone())


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one row computes over the same tokens."""

    hidden: torch.Tensor  # [R, 1500, D]
    layers: torch.Tensor  # [n_steps, L, R, D]
    logprobs: torch.Tensor  # [n_steps, R, n_vocab]


def layer_errors(model: str, names: Sequence[str], device: DeviceInfo, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """A record of each row: relative errors against fp32, layer by layer."""
    few = [
        task
        for language in dict.fromkeys(t.language for t in tasks)
        for task in [t for t in tasks if t.language == language][:LAYER_WINDOWS]
    ]
    texts: list[list[int]] = []
    truth: _Pass | None = None
    records = []
    for name in ["fp32", *names]:
        say(f"layers of {name}")
        engine = load_engine(model, name, engine="reference", device=str(device.torch_device), warm_up=False)
        assert isinstance(engine, ReferenceEngine)
        tokens = WhisperTokens.from_folder(engine.report.folder)
        if not texts:
            for task in few:
                prompt, (written,) = _written(engine, tokens, [task])
                texts.append([*prompt, *written])
        found = _read(engine, few, texts)
        if truth is None:
            truth = found
        else:
            records.append({"row": name, **_errors(found, truth, [len(text) for text in texts])})
        engine.close()
    return records


def _read(engine: ReferenceEngine, tasks: Sequence[Task], texts: Sequence[Sequence[int]]) -> _Pass:
    """Every text through the decoder, a token a step, all windows side by side."""
    dtype = getattr(torch, PRECISIONS[engine.report.requested].compute_dtype_on(engine.device.type))
    hidden = engine.encode(log_mel_of(engine)([task.window.samples for task in tasks])).hidden
    weights = take_decoder(engine.network, dtype)
    slots = make_slots(weights, len(texts), quantised=weights.packs_audio)
    for row, text in enumerate(texts):
        TorchWindowOps().store_cross(project(hidden[row].to(dtype), weights.cross), slots, row)
        slots.begin(row, text, max_new_tokens=1, temperature=0.0, seed=0, timestamps=False)
    slots.prompt_length.fill_(slots.tokens.shape[1])  # nobody chooses a token
    rules = RuleTensors.on(engine.device, weights.n_vocab)
    ops = _Watching(weights, slots)
    layers, logprobs = [], []
    for _ in range(max(map(len, texts))):
        ops.seen.clear()
        decoder_step(weights, ops, rules)
        layers.append(torch.stack(ops.seen))
        logprobs.append(slots.logits.log_softmax(-1).cpu())
    return _Pass(hidden.float().cpu(), torch.stack(layers), torch.stack(logprobs))


def _errors(found: _Pass, truth: _Pass, lengths: Sequence[int]) -> dict[str, Any]:
    """Over every step of every window, and nothing behind a window's end."""
    n_steps = truth.layers.shape[0]
    lives = torch.arange(n_steps)[:, None] < torch.tensor(lengths)  # [n_steps, R]
    by_layer = {
        f"layer {layer + 1}, %": _relative(found.layers[:, layer][lives], truth.layers[:, layer][lives])
        for layer in range(truth.layers.shape[1])
    }
    mine, theirs = found.logprobs[lives], truth.logprobs[lives]
    return {
        "encoder, %": _relative(found.hidden, truth.hidden),
        **by_layer,
        "logits, nats": round(float((mine - theirs).square().mean().sqrt()), 4),
        "other choice, %": round(100 * float((mine.argmax(-1) != theirs.argmax(-1)).float().mean()), 2),
    }


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return round(100 * float((found - truth).norm() / truth.norm()), 3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Both engines, token by token.")
    parser.add_argument("--model", default="demo", help="checkpoint: demo, a folder or a Hub name (default: demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precisions", default="fp32,fp16,bf16", help="for part one (default: fp32,fp16,bf16)")
    parser.add_argument("--formats", default="bf16,int8,int4,fp8", help="for part two (default: bf16,int8,int4,fp8)")
    parser.add_argument("--limit", type=int, default=0, help="held-out recordings per language; 0 for all (default)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows decoded together (default: 16)")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="folder with manifest.json and its recordings")
    parser.add_argument("--windows", type=Path, metavar="FILE", help="as in benchmarks.accuracy: no ffmpeg is needed")
    parser.add_argument("--audio", type=Path, metavar="FOLDER", help="sound files that are decoded too")
    parser.add_argument("--audio-language", default="en", help="of those (default: en)")
    return parser


if __name__ == "__main__":
    run(main)
