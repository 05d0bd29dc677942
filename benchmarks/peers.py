"""What others need for the same work: transformers, openai/whisper and faster-whisper on the same random weights.

Each measure_* takes a checkpoint folder and returns a result per batch size, in the columns of benchmarks.speed; all
decode exactly as many tokens, greedily, with the least of rules that the package allows. A peer that is not installed,
or cannot run here, is a Missing with the reason: the table says it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import random_features, request_of, timed
from model_loader.engine import ReferenceEngine
from model_loader.loader import load_engine

WINDOW_S = 30.0
SLOW_S = 1.0
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What to measure."""

    batches: tuple[int, ...]
    n_tokens: int
    repeats: int
    device: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that could not be measured."""

    engine: str
    reason: str


def repeated(run: Callable[[], object], work: Work, place: torch.device) -> tuple[float, float]:
    """Seconds: median and half the range of the repeats, after two that load, compile and capture; a run of over a
    second is repeated twice, after one."""
    run()
    if (first_s := timed(run, place)) > SLOW_S:
        times = [first_s, timed(run, place)]
    else:
        times = [timed(run, place) for _ in range(work.repeats)]
    return statistics.median(times), (max(times) - min(times)) / 2


def timings(
    decode: Callable[[], object], encode: Callable[[], object], whole: Callable[[], object], n_windows: int,
    place: torch.device, work: Work,
) -> Result:  # fmt: skip
    """In the columns of benchmarks.speed, see `repeated`."""
    (decode_s, decode_spread), (encode_s, encode_spread), (whole_s, _) = (
        repeated(run, work, place) for run in (decode, encode, whole)
    )
    return {
        "token_ms": round(1000 * decode_s / work.n_tokens, 4),
        "token_spread_ms": round(1000 * decode_spread / work.n_tokens, 4),
        "encoder_ms": round(1000 * encode_s / n_windows, 3),
        "encoder_spread_ms": round(1000 * encode_spread / n_windows, 3),
        "rtf": round(n_windows * WINDOW_S / whole_s, 1),
        "window_ms": round(1000 * whole_s, 1),
    }


# --- transformers ----------------------------------------------------------------------------------------------------


def measure_transformers(folder: Path, row: str, work: Work, *, compiled: bool = False) -> list[Result]:
    """transformers' own generate, greedy and without any rule for tokens. compiled: static cache, torch.compile."""
    engine = load_engine(str(folder), row, engine="reference", device=work.device, offline=True, warm_up=False)
    assert isinstance(engine, ReferenceEngine)
    model, results = engine.network, []
    for n in work.batches:
        features = random_features(engine, n).to(engine.device, model.dtype)
        hidden = engine.encode(features).hidden
        generate = _generate(model, request_of(engine, n, work.n_tokens).prompts, work.n_tokens, compiled)

        def decode(hidden: Any = hidden, generate: Any = generate) -> None:
            generate(hidden)

        def encode(features: Any = features) -> None:
            engine.encode(features)

        def whole(features: Any = features, generate: Any = generate) -> None:
            generate(engine.encode(features).hidden)

        name = "transformers, compiled" if compiled else "transformers"
        found = timings(decode, encode, whole, n, engine.device, work)
        results.append({"engine": name, "row": row, "batch": n, **found})
    engine.close()
    return results


def _generate(model: Any, prompts: list[list[int]], n_tokens: int, compiled: bool) -> Callable[[torch.Tensor], Any]:
    """A function of the encoder's output that decodes exactly n_tokens."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    tokens = torch.tensor(prompts, device=model.device)
    static = {"cache_implementation": "static"} if compiled else {}
    settings = GenerationConfig(
        max_length=tokens.shape[1] + n_tokens,
        do_sample=False,
        eos_token_id=None,  # nothing ends a row
        pad_token_id=prompts[0][0],
        bos_token_id=prompts[0][0],
        decoder_start_token_id=prompts[0][0],
        use_cache=True,
        **static,
    )

    def generate(hidden: torch.Tensor) -> Any:
        with torch.no_grad():
            output = GenerationMixin.generate(
                model,
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                decoder_input_ids=tokens,
                generation_config=settings,
            )
        assert output.shape[1] == tokens.shape[1] + n_tokens
        return output

    return generate


# --- openai/whisper --------------------------------------------------------------------------------------------------


def measure_openai(folder: Path, row: str, work: Work, place: torch.device) -> list[Result] | Missing:
    """openai/whisper's modules and its key-value cache at this shape, its weights random too; fp16 or fp32."""
    try:
        whisper = _import_whisper()
    except ImportError as error:
        return Missing("openai-whisper", f"not installed here ({error})")
    model, results = _openai_model(whisper, folder, place), []
    for n in work.batches:
        features = torch.randn(n, model.dims.n_mels, 3000, device=place, dtype=torch.float16 if row == "fp16" else None)
        with torch.no_grad():
            hidden = model.encoder(features)

        def decode(hidden: Any = hidden) -> None:
            _openai_decode(whisper, model, hidden, work.n_tokens)

        def encode(features: Any = features) -> Any:
            with torch.no_grad():
                return model.encoder(features)

        def whole(encode: Any = encode) -> None:
            _openai_decode(whisper, model, encode(), work.n_tokens)

        found = timings(decode, encode, whole, n, place, work)
        results.append({"engine": "openai-whisper", "row": row, "batch": n, **found})
    return results


def _import_whisper() -> Any:
    """The package. Its word alignment, which is not used here, wants numba, 60 MB: without it an empty one will do."""
    try:
        import numba  # noqa: F401
    except ImportError:
        stand_in: Any = types.ModuleType("numba")
        stand_in.jit = lambda *_, **__: lambda function: function
        sys.modules["numba"] = stand_in
    import whisper

    return whisper


def _openai_model(whisper: Any, folder: Path, place: torch.device) -> Any:
    from transformers import WhisperConfig

    config = WhisperConfig.from_pretrained(folder)
    dims = whisper.model.ModelDimensions(
        n_mels=config.num_mel_bins,
        n_audio_ctx=config.max_source_positions,
        n_audio_state=config.d_model,
        n_audio_head=config.encoder_attention_heads,
        n_audio_layer=config.encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.max_target_positions,
        n_text_state=config.d_model,
        n_text_head=config.decoder_attention_heads,
        n_text_layer=config.decoder_layers,
    )
    with place:
        model = whisper.model.Whisper(dims)
    for parameter in model.parameters():  # positions are torch.empty there
        torch.nn.init.normal_(parameter, std=0.02)
    # In fp16 too its weights stay float32 and are cast at every call, to the features' format.
    return model.eval().to(place)


def _openai_decode(whisper: Any, model: Any, hidden: torch.Tensor, n_tokens: int) -> None:
    """decoding.py's main loop without its token rules: exactly n_tokens behind a prompt of three."""
    tokens = torch.tensor([[1, 2, 3]] * hidden.shape[0], device=hidden.device)
    inference = whisper.decoding.PyTorchInference(model, initial_token_length=3)
    try:
        with torch.no_grad():
            for _ in range(n_tokens):
                logits = inference.logits(tokens, hidden)[:, -1]
                tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    finally:
        inference.cleanup_caching()


# --- faster-whisper --------------------------------------------------------------------------------------------------


def measure_faster_whisper(
    folder: Path, rows: Sequence[str], work: Work, place: torch.device
) -> list[Result] | Missing:
    """CTranslate2, which faster-whisper runs on, with the checkpoint converted. rows: its compute types."""
    name = "faster-whisper"
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        return Missing(name, f"CTranslate2 is not installed here ({error})")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="sotto-") as scratch:
        TransformersConverter(str(folder)).convert(f"{scratch}/converted")
        for row in rows:
            try:
                model = ctranslate2.models.Whisper(
                    f"{scratch}/converted",
                    device=place.type,
                    compute_type=row,
                    intra_threads=torch.get_num_threads() if place.type == "cpu" else 0,
                )
                results += _ctranslate2_results(ctranslate2, model, name, row, work)
            except (RuntimeError, ValueError) as error:
                return Missing(name, f"it cannot run here: {str(error).splitlines()[0]}")
    return results


def _ctranslate2_results(ctranslate2: Any, model: Any, name: str, row: str, work: Work) -> list[Result]:
    results = []
    for n in work.batches:
        random = torch.randn(n, model.n_mels, 3000, generator=torch.Generator().manual_seed(0)).numpy()
        features = ctranslate2.StorageView.from_array(random)
        hidden = model.encode(features)

        def decode(given: Any = hidden, n: int = n) -> None:
            # Ids of the vocabulary that shapes.py puts beside the weights: start, English, transcribe, no timestamps.
            found = model.generate(
                given,
                [[4397, 4398, 4498, 4502]] * n,
                beam_size=1,
                max_length=2 * work.n_tokens,  # it counts the prompt in, half of what is given at most
                suppress_blank=False,
                suppress_tokens=[4396],
            )
            made = {len(one.sequences_ids[0]) for one in found}
            assert made == {work.n_tokens}, f"{made} tokens instead of {work.n_tokens}"

        def encode(features: Any = features) -> None:
            model.encode(features).to_device(ctranslate2.Device.cpu)  # which waits

        found = timings(decode, encode, lambda f=features, d=decode: d(f), n, torch.device("cpu"), work)  # type: ignore[misc]
        results.append({"engine": name, "row": row, "batch": n, **found})
    return results
