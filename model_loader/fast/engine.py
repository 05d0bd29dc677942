"""FastEngine: the Engine of model_loader/engine.py on a captured decoder step and a captured encoder.

A batch is padded to the next power of two with rows that stand still (encoder: cut into powers of two), so that six
graphs of each kind serve every batch. Their memory is taken when a batch first needs it, and kept. The host only
launches steps: every few it looks at what was finished a few steps before, so it never waits for the step in flight.
On a CPU the same code runs without graphs and looks after every token.

Not here: beam search, whose hypotheses change places in the caches; it runs on transformers' generate, loaded when
first asked for.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from model_loader.device import has_triton
from model_loader.engine import (
    Dims,
    Encoded,
    GenerateRequest,
    ReferenceEngine,
    TokenSequence,
    device_errors,
    release,
)
from model_loader.fast.census import projections, refuse_mixture, take_packed_census
from model_loader.fast.encoder import encode, preferred_attention
from model_loader.fast.encoder_ops import EncoderOps, TorchEncoderOps
from model_loader.fast.graph import Capture, Captured, share_memory
from model_loader.fast.packing import Format
from model_loader.fast.slots import MAX_ROWS, RuleTensors, Slots, make_slots
from model_loader.fast.step import Ops, WindowOps, decoder_step
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderWeights, EncoderWeights, take_decoder, take_encoder, unsupported
from model_loader.memory import forget_weights, note_weights, read_point

if TYPE_CHECKING:
    from model_loader.loader import LoadReport
    from model_loader.precision import Precision

logger = logging.getLogger(__name__)

CHECK_EVERY = 4
"""Steps between two looks at what is finished, on a GPU; a row's end is seen 4 to 8 steps late."""


def refusal(row: Precision, config: Mapping[str, Any]) -> str | None:
    """Why the fast engine cannot run this row of a checkpoint (config: its config.json), a sentence; None: it can."""
    if not row.fast:
        return f"{row.name} runs on transformers' generate: its layers have no kernel for the fast engine's step."
    reason = unsupported(config)
    return None if reason is None else f"The checkpoint runs on transformers' generate: {reason}."


@dataclass(slots=True)
class _Step:
    """A decoder step for so many rows."""

    slots: Slots
    run: Callable[[], Any]
    run_in_prompt: Callable[[], Any]
    """The same without the head where that is another function, on a CPU."""


@dataclass(slots=True)
class _Network:
    """All that holds memory; dropped as one when the engine is closed."""

    encoder: EncoderWeights
    decoder: DecoderWeights
    rules: RuleTensors


class FastEngine:
    """A warm model on one device, for one caller at a time."""

    def __init__(self, model: Any, row: Precision, report: LoadReport, *, reference: Callable[[], ReferenceEngine],
                 tuning: Any = None) -> None:  # fmt: skip
        """model: WhisperForConditionalGeneration on its device in the row's format; it is used up.

        reference: loads the same checkpoint for beam search. tuning: triton_ops.Tuning, for benchmarks.
        """
        config = model.config
        self._row, self._device = row, model.device
        self._dims = Dims(int(config.num_mel_bins), int(config.vocab_size), int(config.max_target_positions))
        self._sot = int(config.decoder_start_token_id)
        self._tuning = tuning
        self._make_reference = reference
        self._reference: ReferenceEngine | None = None
        self._on_gpu = self._device.type == "cuda"
        self._has_triton = self._on_gpu and has_triton(self._device)
        self._window_ops = self._make_window_ops()
        with torch.no_grad():
            encoder = take_encoder(model)
            self._encoder_ops = self._make_encoder_ops(encoder)
            decoder = take_decoder(model, getattr(torch, row.compute_dtype_on(self._device.type)))
        refuse_mixture(encoder, decoder, row)
        self._quantised = decoder.layers[0].qkv.format is not Format.FLOAT
        self._network: _Network | None = _Network(encoder, decoder, RuleTensors.on(self._device, decoder.n_vocab))
        self._pool = share_memory() if self._on_gpu else None
        self._encoders: dict[int, Captured] = {}
        self._slots: Slots | None = None
        self._steps: dict[int, _Step] = {}
        self._crossed: tuple[Any, int, int, int] | None = None
        """Whose keys and values the audio cache holds: (weak reference, version, first window, windows)."""
        census = take_packed_census(encoder, decoder, "triton" if self._has_triton else "sdpa")
        self._report = replace(report, census=census, engine="fast")
        note_weights(id(self), _place(self._device), census.n_bytes)

    @property
    def report(self) -> LoadReport:
        return self._report

    @report.setter
    def report(self, report: LoadReport) -> None:
        """The loader adds what it learns while warming up."""
        self._report = report

    @property
    def dims(self) -> Dims:
        return self._dims

    @property
    def device(self) -> torch.device:
        device: torch.device = self._device
        return device

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What every graph cost so far."""
        graphs = [*self._encoders.values(), *(step.run for step in self._steps.values())]
        return tuple(g.capture for g in graphs if isinstance(g, Captured) and g.capture is not None)

    def step_bytes(self, n_rows: int, n_past: int) -> int:
        """What one step must read at the very least: projections, head, and the caches of rows with n_past tokens."""
        decoder = self._loaded.decoder
        packed = [p for layer in decoder.layers for p in projections(layer)] + [decoder.head]
        weights = sum(t.numel() * t.element_size() for p in packed for t in p.tensors)
        values = 2 * len(decoder.layers) * decoder.d_model * n_rows  # keys and values of one position
        size = decoder.tokens.element_size()
        return weights + values * (decoder.n_audio_ctx * (1 if self._quantised else size) + n_past * size)

    def encode(self, features: torch.Tensor) -> Encoded:
        network = self._loaded
        with self._computing():
            dtype = network.encoder.positions.dtype
            features = features.to(self._device, dtype, non_blocking=True)
            if not self._on_gpu:
                return Encoded(encode(network.encoder, self._encoder_ops, features))
            n, (length, width) = features.shape[0], network.encoder.positions.shape
            hidden = torch.empty(n, length, width, dtype=dtype, device=self._device)
            start = 0
            while start < n:
                size = min(_power_of_two_below(n - start), MAX_ROWS)
                hidden[start : start + size] = self._encoder_for(size)(features[start : start + size])
                start += size
            return Encoded(hidden)

    def first_logits(self, encoded: Encoded) -> torch.Tensor:
        with self._computing():
            parts = []
            for start in range(0, encoded.n_windows, MAX_ROWS):
                n = min(MAX_ROWS, encoded.n_windows - start)
                step = self._step_for(n)
                self._fill_cross(step.slots, encoded.hidden, start, n)
                step.slots.start([[self._sot]] * n, max_new_tokens=1, temperature=0.0, seed=0, timestamps=False)
                step.run()
                parts.append(step.slots.logits[:n].cpu())
            return torch.cat(parts)

    def generate(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        if len(request.prompts) != encoded.n_windows:
            raise ValueError(f"{len(request.prompts)} prompts for {encoded.n_windows} windows")
        if request.beam_size > 1:
            return self._search(encoded, request)
        found: list[TokenSequence] = []
        with self._computing():
            self._loaded.rules.load(request.rules)
            for start in range(0, encoded.n_windows, MAX_ROWS):
                prompts = request.prompts[start : start + MAX_ROWS]
                step = self._step_for(len(prompts))
                self._fill_cross(step.slots, encoded.hidden, start, len(prompts))
                self._run(step, prompts, request)
                found += _sequences(step.slots, len(prompts), len(prompts[0]), request.rules.eot)
        return found

    def select(self, encoded: Encoded, indices: Sequence[int]) -> Encoded:
        return Encoded(encoded.hidden[torch.tensor(list(indices), device=encoded.hidden.device)])

    def close(self) -> None:
        if self._network is None:
            return
        self._drop_slots()
        for graph in self._encoders.values():
            graph.release()
        self._encoders.clear()
        self._network = self._pool = None
        if self._reference is not None:
            self._reference.close()
        forget_weights(id(self))
        release(self._device)
        phases = replace(self._report.phases, after_unload=read_point(self._device))
        self._report = replace(self._report, phases=phases)
        logger.info("event=engine_closed model=%s precision=%s", self._report.model, self._report.effective)

    # --- the decoder --------------------------------------------------------------------------------------------------

    def _run(self, step: _Step, prompts: list[list[int]], request: GenerateRequest) -> None:
        """Prompt and new tokens, until every row has finished or somebody asks to stop."""
        slots = step.slots
        slots.start(
            prompts,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            timestamps=request.timestamps,
        )
        n_prompt = len(prompts[0])
        n_steps = n_prompt - 1 + min(request.max_new_tokens, self._dims.n_text_ctx - n_prompt)
        watch = _Watch(slots.finished)
        for index in range(n_steps):
            if index % watch.every == 0:
                if request.should_stop is not None and request.should_stop():
                    return
                if watch.all_finished():
                    return
            if index < n_prompt - 1:
                step.run_in_prompt()
            else:
                step.run()

    def _step_for(self, n: int) -> _Step:
        """The step for n windows; makes its slots and graph, or larger slots, when first needed."""
        network = self._loaded
        rows = _power_of_two_above(n) if self._on_gpu else n
        if self._slots is None or rows > self._slots.n_rows:
            self._drop_slots()  # first, so that both never sit in memory together
            self._slots = make_slots(network.decoder, rows, quantised=self._quantised)
        if rows not in self._steps:
            slots = self._slots.first(rows)
            run = partial(decoder_step, network.decoder, self._make_ops(slots), network.rules)
            if self._on_gpu:
                graph = Captured(run, f"decoder step of {rows} rows", has_state=True, pool=self._pool)
                self._steps[rows] = _Step(slots, graph, graph)
            else:
                self._steps[rows] = _Step(slots, run, partial(run, in_prompt=True))
        return self._steps[rows]

    def _fill_cross(self, slots: Slots, hidden: torch.Tensor, start: int, n: int) -> None:
        """Keys and values of n windows for all layers; nothing to do if the cache holds them already.

        A window at a time: one projection of large-v3 makes 246 MB, for 32 windows it would be as much as the cache.
        """
        crossed = self._crossed
        place = (hidden._version, start, n)
        if crossed is not None and crossed[0]() is hidden and crossed[1:] == place:
            return
        self._crossed = None
        weight, bias = self._loaded.decoder.cross
        for row in range(n):
            projected = linear(hidden[start + row], weight, bias)
            self._window_ops.store_cross(projected, slots, row)
        self._crossed = (weakref.ref(hidden), *place)

    def _drop_slots(self) -> None:
        for step in self._steps.values():
            if isinstance(step.run, Captured):
                step.run.release()
        self._steps.clear()
        self._slots = self._crossed = None

    def _search(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        """Beam search, on transformers' generate."""
        if self._reference is None:
            logger.info("event=beam_search_on_reference reason='a fast row holds one hypothesis'")
            self._reference = self._make_reference()
        return self._reference.generate(encoded, request)

    # --- what runs it -------------------------------------------------------------------------------------------------

    def _encoder_for(self, n: int) -> Captured:
        if n not in self._encoders:
            run = partial(encode, self._loaded.encoder, self._encoder_ops)
            self._encoders[n] = Captured(run, f"encoder of {n} windows", has_state=False, pool=self._pool)
        return self._encoders[n]

    def _make_ops(self, slots: Slots) -> Ops:
        if not self._has_triton:
            return TorchOps(self._loaded.decoder, slots)
        from model_loader.fast.triton_ops import TritonOps

        return TritonOps(self._loaded.decoder, slots, self._tuning)

    def _make_window_ops(self) -> WindowOps:
        if not self._has_triton:
            return TorchWindowOps()
        from model_loader.fast.triton_ops import TritonWindowOps

        return TritonWindowOps()

    def _make_encoder_ops(self, encoder: EncoderWeights) -> EncoderOps:
        if not self._has_triton:
            return TorchEncoderOps()
        from model_loader.fast.triton_encoder import TritonEncoderOps

        return TritonEncoderOps(encoder)

    @property
    def _loaded(self) -> _Network:
        if self._network is None:
            raise RuntimeError("this engine is closed")
        return self._network

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients, this GPU, its errors as ours."""
        here = torch.cuda.device(self._device) if self._on_gpu else torch.no_grad()
        try:
            with device_errors(self._report, self.device), torch.no_grad(), here, preferred_attention(self.device):
                yield
        except BaseException:
            self._crossed = None  # half a batch may be in the cache
            raise


class _Watch:
    """Has every row finished? On a GPU the answer is as old as the last question: nobody waits for a step in flight."""

    def __init__(self, finished: torch.Tensor) -> None:
        """finished: int32 [R]."""
        self._finished = finished
        self._is_late = finished.device.type == "cuda"
        self.every = CHECK_EVERY if self._is_late else 1
        """Steps between two questions."""
        if self._is_late:
            self._copy = torch.zeros(finished.shape, dtype=finished.dtype, pin_memory=True)
            self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ask()

    def all_finished(self) -> bool:
        if not self._is_late:
            return bool(self._finished.all())
        self._arrived.synchronize()
        answer = bool(self._copy.all())
        self._ask()
        return answer

    def _ask(self) -> None:
        self._copy.copy_(self._finished, non_blocking=True)
        self._arrived.record()


def _sequences(slots: Slots, n: int, n_prompt: int, eot: int) -> list[TokenSequence]:
    """What the first n rows have written behind their prompts. Waits for the GPU."""
    positions, logprobs = slots.position[:n].tolist(), slots.logprob[:n].tolist()
    found = []
    for row, position, logprob in zip(slots.tokens[:n].tolist(), positions, logprobs, strict=True):
        new = row[n_prompt : position + 1]
        finished = bool(new) and new[-1] == eot
        tokens = new[:-1] if finished else new
        found.append(TokenSequence(tokens, logprob / len(new) if new else math.nan, len(tokens), finished))
    return found


def _power_of_two_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _place(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
