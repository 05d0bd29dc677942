"""FastEngine: the Engine of model_loader/engine.py on a captured decoder step and a captured encoder.

Many may use it at once: a scheduler (scheduler.py) puts the windows of all callers into rows (rows.py) and refills a
row as soon as it is free. encode, first_logits and generate hand their windows to it and wait. Batches of the encoder
are cut into powers of two, so that a few graphs serve all. On a CPU the same code runs without graphs.

Not here: beam search, whose hypotheses change places in the caches, and word times, which need the weights of
attention; both run on transformers, loaded when first asked for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from errors import CancelledError
from model_loader.alignment import Attended
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
from model_loader.fast.graph import Capture, CaptureCost, Captured, share_memory
from model_loader.fast.one_launch import OneLaunch, compile_ahead, why_not_one_launch
from model_loader.fast.processor import lay_out
from model_loader.fast.rows import Rows, power_of_two_below
from model_loader.fast.scheduler import ENCODED_TOGETHER, Scheduler
from model_loader.fast.slots import MAX_ROWS, Slots
from model_loader.fast.step import Ops, WindowOps
from model_loader.fast.torch_ops import TorchOps, TorchWindowOps
from model_loader.fast.weights import DecoderWeights, EncoderWeights, take_decoder, take_encoder, unsupported
from model_loader.fit import DEFAULT_BATCHES
from model_loader.memory import forget_weights, note_weights, read_point
from model_loader.orders import WindowOrder, WindowOutcome

if TYPE_CHECKING:
    from model_loader.loader import LoadReport
    from model_loader.precision import Precision

logger = logging.getLogger(__name__)


def refusal(row: Precision, config: Mapping[str, Any]) -> str | None:
    """Why the fast engine cannot run this row of a checkpoint (config: its config.json), a sentence; None: it can."""
    if not row.fast:
        return f"{row.name} runs on transformers' generate: {row.why_reference}."
    reason = unsupported(config)
    return None if reason is None else f"The checkpoint runs on transformers' generate: {reason}."


@dataclass(slots=True)
class _Network:
    """What holds memory of the weights; dropped as one when the engine is closed."""

    encoder: EncoderWeights
    encoder_ops: EncoderOps
    decoder: DecoderWeights


class FastEngine:
    """A SharedEngine (orders.py): a warm model on one device, for any number of callers."""

    def __init__(self, model: Any, row: Precision, report: LoadReport, *, reference: Callable[[], ReferenceEngine],
                 max_rows: int = 0) -> None:  # fmt: skip
        """model: WhisperForConditionalGeneration on its device in the row's format; it is used up.

        reference: loads the same checkpoint for beam search and word times. max_rows: windows decoded together, 0 for
        as many as the kernels hold (on a CPU: as fit the cores).
        """
        config = model.config
        self._row, self._device = row, model.device
        self._dims = Dims(int(config.num_mel_bins), int(config.vocab_size), int(config.max_target_positions))
        self._sot = int(config.decoder_start_token_id)
        self._make_reference = reference
        self._reference: ReferenceEngine | None = None
        self._search_turn = threading.Lock()
        self._on_gpu = self._device.type == "cuda"
        self._has_triton = self._on_gpu and has_triton(self._device)
        self._window_ops = self._make_window_ops()
        with torch.no_grad():
            encoder = take_encoder(model)
            encoder_ops = self._make_encoder_ops(encoder)
            decoder = take_decoder(model, getattr(torch, row.compute_dtype_on(self._device.type)))
        refuse_mixture(encoder, decoder, row)
        if not self._on_gpu:
            lay_out(packed for layer in decoder.layers for packed in projections(layer))
        self._quantised = decoder.packs_audio
        self._network: _Network | None = _Network(encoder, encoder_ops, decoder)
        self._pool = share_memory() if self._on_gpu else None
        self._encoders: dict[int, Captured] = {}
        self._scheduler: Scheduler | None = Scheduler(
            Rows(decoder, self._window_ops, self._make_ops, quantised=self._quantised),
            self._encode,
            sot=self._sot,
            device=self.device,
            limit=max_rows or (MAX_ROWS if self._on_gpu else DEFAULT_BATCHES["cpu"]),
            guard=self._guard,
        )
        census = take_packed_census(encoder, decoder, "triton" if self._has_triton else "sdpa")
        census = replace(census, left_wide=report.census.left_wide)  # joined layers cannot be counted any more
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
        encoders = tuple(graph.capture for graph in self._encoders.values() if graph.capture is not None)
        return encoders + self._serving.captures

    @property
    def max_rows(self) -> int:
        """Windows decoded together at most; less after memory ran out, none once it is closed."""
        return 0 if self._scheduler is None else self._scheduler.limit

    def step_bytes(self, n_rows: int, n_past: int) -> int:
        """What one step must read at the very least: projections, head, and the caches of rows with n_past tokens."""
        decoder = self._loaded.decoder
        packed = [p for layer in decoder.layers for p in projections(layer)] + [decoder.head]
        weights = sum(t.numel() * t.element_size() for p in packed for t in p.tensors)
        values = 2 * len(decoder.layers) * decoder.d_model * n_rows  # keys and values of one position
        size = decoder.tokens.element_size()
        return weights + values * (decoder.n_audio_ctx * (1 if self._quantised else size) + n_past * size)

    def submit(self, order: WindowOrder, *, job: Hashable, urgent: bool = False) -> Future[WindowOutcome]:
        self._check(order)
        return self._serving.submit(order, job=job, urgent=urgent)

    def compile(self) -> None:
        """Have the kernels of every number of rows ready, which takes no memory; nothing on a CPU."""
        decoder, most = self._loaded.decoder, self.max_rows
        if self._why_not_at_once(1) is None:
            rows = sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})
            compile_ahead(decoder, rows, quantised=self._quantised)

    def capture(self) -> None:
        """Take the memory of all rows and capture every graph now; nothing on a CPU.

        The report says what it cost, unless somebody's windows came first: then graphs are captured as they are needed.
        Raises OutOfMemoryError, DeviceError.
        """
        if not self._on_gpu:
            return
        started_s, before = time.perf_counter(), read_point(self._device).reserved_bytes or 0
        self.compile()
        has_all = self._serving.capture()
        size = 1
        while size <= min(ENCODED_TOGETHER, self.max_rows):
            self.encode(torch.zeros(size, self._dims.n_mels, 3000))
            size *= 2
        n_bytes = (read_point(self._device).reserved_bytes or 0) - before
        cost = CaptureCost(len(self.captures), time.perf_counter() - started_s, n_bytes)
        if has_all and self._report.captured is None:  # another call finds all of it there
            self._report = replace(self._report, captured=cost)

    def encode(self, features: torch.Tensor) -> Encoded:
        hidden, done = self._serving.call(lambda: self._encode_all(features))
        if done is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            hidden.record_stream(stream)
        return Encoded(hidden)

    def first_logits(self, encoded: Encoded) -> torch.Tensor:
        orders = [WindowOrder(None, encoded=window) for window in _windows(encoded)]
        logits = [outcome.first_logits for outcome in self._outcomes(orders)]
        return torch.stack([row for row in logits if row is not None])

    def generate(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        if len(request.prompts) != encoded.n_windows:
            raise ValueError(f"{len(request.prompts)} prompts for {encoded.n_windows} windows")
        if request.beam_size > 1:
            return self._search(encoded, request)
        orders = [
            WindowOrder(
                request.rules,
                tuple(prompt),
                encoded=window,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed,
                timestamps=request.timestamps,
                needs_first_logits=False,
                should_stop=request.should_stop,
            )
            for prompt, window in zip(request.prompts, _windows(encoded), strict=True)
        ]
        return [outcome.sequence for outcome in self._outcomes(orders)]

    def select(self, encoded: Encoded, indices: Sequence[int]) -> Encoded:
        if self._on_gpu:
            encoded.hidden.record_stream(torch.cuda.current_stream(self.device))
        return Encoded(encoded.hidden[torch.tensor(list(indices), device=encoded.hidden.device)])

    def attend(self, encoded: Encoded, tokens: Sequence[int], n_frames: int) -> Attended:
        """On transformers' model: kernels that never hold the weights of attention cannot show them."""
        with self._search_turn:
            return self._on_reference().attend(encoded, tokens, n_frames)

    def close(self) -> None:
        if self._scheduler is None:
            return
        self._scheduler.close()
        for graph in self._encoders.values():
            graph.release()
        self._encoders.clear()
        self._network = self._pool = self._scheduler = None
        if self._reference is not None:
            self._reference.close()
        forget_weights(id(self))
        release(self._device)
        phases = replace(self._report.phases, after_unload=read_point(self._device))
        self._report = replace(self._report, phases=phases)
        logger.info("event=engine_closed model=%s precision=%s", self._report.model, self._report.effective)

    # --- orders -------------------------------------------------------------------------------------------------------

    def _check(self, order: WindowOrder) -> None:
        """Raises ValueError for sizes that the device would choke on, RuntimeError once closed."""
        dims, sizes = self._dims, list(self._loaded.encoder.positions.shape)
        if order.features is not None and tuple(order.features.shape) != (dims.n_mels, 3000):
            raise ValueError(f"features of a window are [{dims.n_mels}, 3000], not {list(order.features.shape)}")
        if order.encoded is not None and list(order.encoded.hidden.shape[1:]) != sizes:
            raise ValueError(f"encoder output of a window is {sizes}, not {list(order.encoded.hidden.shape[1:])}")
        dtype = self._loaded.encoder.positions.dtype
        if order.encoded is not None and order.encoded.hidden.dtype != dtype:
            raise ValueError(f"encoder output of this engine is {dtype}, not {order.encoded.hidden.dtype}")
        if len(order.prompt) >= dims.n_text_ctx:
            raise ValueError(f"a prompt of {len(order.prompt)} tokens leaves no room in {dims.n_text_ctx} positions")

    def _outcomes(self, orders: Sequence[WindowOrder]) -> list[WindowOutcome]:
        """Of orders that are a job of their own, in order."""
        job = object()
        futures = [self.submit(order, job=job) for order in orders]
        return [_outcome(order, future) for order, future in zip(orders, futures, strict=True)]

    def _search(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        """Beam search, on transformers' generate; one caller at a time."""
        with self._search_turn:
            return self._on_reference().generate(encoded, request)

    def _on_reference(self) -> ReferenceEngine:
        """The same checkpoint once more, on transformers; loaded when first needed. Raises OutOfMemoryError."""
        if self._reference is None:
            logger.info("event=reference_beside_fast reason='beam search and word times run on transformers'")
            with self._guard():
                self._reference = self._make_reference()
        return self._reference

    # --- the encoder, on the scheduler's thread -----------------------------------------------------------------------

    def _encode_all(self, features: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """[n, n_mels, 3000] of any number -> hidden, and the event after which it is there (None on a CPU)."""
        parts, start, n = [], 0, features.shape[0]
        while start < n:
            size = min(power_of_two_below(n - start), MAX_ROWS)
            parts.append(self._encode(features[start : start + size]))
            start += size
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hidden, torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        """[n, n_mels, 3000], n a power of two -> [n, 1500, d_model], a tensor of its own."""
        network = self._loaded
        with preferred_attention(self.device):
            features = features.to(self._device, network.encoder.positions.dtype, non_blocking=True)
            if not self._on_gpu:
                return encode(network.encoder, network.encoder_ops, features)
            hidden: torch.Tensor = self._encoder_for(features.shape[0])(features)
            return hidden.clone()

    # --- what runs it -------------------------------------------------------------------------------------------------

    def _encoder_for(self, n: int) -> Captured:
        if n not in self._encoders:
            run = partial(encode, self._loaded.encoder, self._loaded.encoder_ops)
            self._encoders[n] = Captured(run, f"encoder of {n} windows", has_state=False, pool=self._pool)
        return self._encoders[n]

    def _make_ops(self, slots: Slots) -> Ops:
        if not self._has_triton:
            return TorchOps(self._loaded.decoder, slots)
        from model_loader.fast.triton_ops import ModuleOps, TritonOps

        decoder = self._loaded.decoder
        if decoder.runs_modules:
            return ModuleOps(decoder, slots)
        one_launch = OneLaunch(decoder, slots) if self._why_not_at_once(slots.n_rows) is None else None
        return TritonOps(decoder, slots, one_launch=one_launch)

    def _why_not_at_once(self, n_rows: int) -> str | None:
        """Why a step of so many rows does not run in one launch, as a clause; None where it does."""
        if not self._has_triton:
            return "our own kernels do not run here"
        return why_not_one_launch(self._loaded.decoder, n_rows, quantised=self._quantised)

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

    @property
    def _serving(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("this engine is closed")
        return self._scheduler

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """The device's errors as ours."""
        with device_errors(self._report, self.device):
            yield


def _windows(encoded: Encoded) -> list[Encoded]:
    return [Encoded(encoded.hidden[index : index + 1]) for index in range(encoded.n_windows)]


def _outcome(order: WindowOrder, future: Future[WindowOutcome]) -> WindowOutcome:
    """Stopped before it began: no tokens."""
    try:
        return future.result()
    except CancelledError:
        assert order.encoded is not None
        return WindowOutcome(TokenSequence([], math.nan, 0, False), None, order.encoded)


def _place(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
