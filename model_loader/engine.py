"""A warm model: features -> encoder output -> tokens. Knows ids, never text, languages or stopping thresholds.

Engine is what transcription needs of one; ReferenceEngine runs transformers' own generation loop (GenerationMixin.
generate: greedy, sampling, beam search) over encoder outputs computed once per window, at any precision on any device.
Whisper's own `generate` is not used: it runs the encoder again for language, silence and each temperature, decides on
fallback and seeking by itself, and keeps all scores to do so.

Shapes: features float32 [n_windows, n_mels, 3000]; encoder output [n_windows, 1500, d_model].
An engine serves one caller at a time; the pool sees to that.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import log_softmax
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from errors import DeviceError, OutOfMemoryError
from model_loader.alignment import Attended, alignment_heads, attend
from model_loader.memory import engines_on_gpus, forget_weights, note_weights, read_point

if TYPE_CHECKING:
    from model_loader.loader import LoadReport
    from model_loader.precision import Precision

logger = logging.getLogger(__name__)

_MIB = 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a checkpoint that callers must match."""

    n_mels: int
    n_vocab: int
    n_text_ctx: int
    """Positions of the decoder: prompt and new tokens together."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a hypothesis may contain: plain ids of one vocabulary."""

    eot: int
    no_timestamps: int
    timestamp_begin: int
    """Id of <|0.00|>; all ids from here on are timestamps."""
    suppress: tuple[int, ...] = ()
    """Never produced."""
    begin_suppress: tuple[int, ...] = ()
    """Never produced as the first token."""
    max_initial_timestamp_index: int | None = None
    """Latest timestamp allowed as the first token, counted in steps of 20 ms; None: any."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One batch of hypotheses. Raises ValueError for what no engine can run."""

    prompts: list[list[int]]
    """A row per window, all of one length (they share the positions of one cache)."""
    max_new_tokens: int
    rules: TokenRules
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 samples, reproducibly for one seed and one batch."""
    beam_size: int = 1
    """Above 1 only at temperature 0."""
    seed: int = 0
    timestamps: bool = True
    """Apply Whisper's timestamp rules. False needs <|notimestamps|> at the end of each prompt."""
    should_stop: Callable[[], bool] | None = None
    """Asked before every token; True ends all rows with what they have."""

    def __post_init__(self) -> None:
        if not self.prompts or len({len(prompt) for prompt in self.prompts}) != 1 or not self.prompts[0]:
            raise ValueError("prompts must be one non-empty row per window, all of the same length")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature > 0 and self.beam_size > 1:
            raise ValueError("beam search does not sample: beam_size above 1 needs temperature 0")


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One hypothesis."""

    tokens: list[int]
    """Without the prompt, <|endoftext|> and padding."""
    avg_logprob: float
    """Mean natural log-probability of the tokens and of <|endoftext|> if it came; NaN if the model computed NaN."""
    n_tokens: int
    """len(tokens)."""
    finished: bool
    """<|endoftext|> came before the limit or a stop."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's output, on the engine's device and in its format: [n_windows, 1500, d_model]."""

    hidden: torch.Tensor

    @property
    def n_windows(self) -> int:
        return int(self.hidden.shape[0])


class Engine(Protocol):
    """A warm model at one precision on one device, for one caller at a time."""

    @property
    def report(self) -> LoadReport: ...

    @property
    def dims(self) -> Dims: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, features: torch.Tensor) -> Encoded:
        """features: float32 [n_windows, n_mels, 3000], any device. Raises OutOfMemoryError."""
        ...

    def first_logits(self, encoded: Encoded) -> torch.Tensor:
        """Logits after <|startoftranscript|> alone: float32 [n_windows, n_vocab] on the CPU."""
        ...

    def generate(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        """One hypothesis per window, in order. Raises OutOfMemoryError."""
        ...

    def select(self, encoded: Encoded, indices: Sequence[int]) -> Encoded:
        """These windows, in this order."""
        ...

    def attend(self, encoded: Encoded, tokens: Sequence[int], n_frames: int) -> Attended:
        """Where a hypothesis of one window looks, prompt and end included, among its first n_frames of 20 ms."""
        ...

    def close(self) -> None:
        """Give the memory back. Idempotent; every other call afterwards raises RuntimeError."""
        ...


class ReferenceEngine:
    """transformers' generation over encoder outputs computed once per window."""

    def __init__(self, model: Any, row: Precision, report: LoadReport) -> None:
        """model: WhisperForConditionalGeneration on its device, in the row's format."""
        self._model: Any = model.eval()
        self._row = row
        self._report = report
        self._device: torch.device = model.device
        config = model.config
        self._dims = Dims(int(config.num_mel_bins), int(config.vocab_size), int(config.max_target_positions))
        self._sot = int(config.decoder_start_token_id)
        # The checkpoint's own generation settings (suppressed tokens, lengths) would be mixed into ours.
        model.generation_config = GenerationConfig(decoder_start_token_id=self._sot, max_length=self._dims.n_text_ctx)
        note_weights(id(self), _place(self._device), report.weights_bytes)

    @property
    def report(self) -> LoadReport:
        return self._report

    @report.setter
    def report(self, report: LoadReport) -> None:
        """The loader adds what it learns while warming up."""
        self._report = report

    @property
    def network(self) -> Any:
        """The WhisperForConditionalGeneration itself, for measuring what flows through it (calibration)."""
        return self._loaded

    @property
    def dims(self) -> Dims:
        return self._dims

    @property
    def device(self) -> torch.device:
        return self._device

    def encode(self, features: torch.Tensor) -> Encoded:
        with self._computing():
            features = features.to(self._device, self._input_dtype, non_blocking=True)
            return Encoded(self._loaded.model.encoder(features).last_hidden_state)

    def first_logits(self, encoded: Encoded) -> torch.Tensor:
        with self._computing():
            start = torch.full((encoded.n_windows, 1), self._sot, device=self._device)
            return self._logits(start, encoded.hidden)[:, -1].float().cpu()

    def generate(self, encoded: Encoded, request: GenerateRequest) -> list[TokenSequence]:
        if len(request.prompts) != encoded.n_windows:
            raise ValueError(f"{len(request.prompts)} prompts for {encoded.n_windows} windows")
        prompts = torch.tensor(request.prompts, device=self._device)  # [n_windows, n_prompt]
        judge = _Judge(request, prompts.shape[1], self._dims.n_vocab, self._device)
        # One autocast block around the whole loop: leaving it would drop the 16-bit copies of the weights.
        with self._computing(), _seeded(request.seed, self._device):
            output = GenerationMixin.generate(
                self._loaded,
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
                decoder_input_ids=prompts,
                generation_config=self._generation_config(request, prompts.shape[1]),
                logits_processor=LogitsProcessorList([judge]),
                stopping_criteria=StoppingCriteriaList([_Stop(request.should_stop)] if request.should_stop else []),
            )
            if request.beam_size > 1:
                logprobs = self._score(encoded, output, prompts.shape[1])
            else:
                logprobs = judge.logprobs(output)
            rows = output[:, prompts.shape[1] :].tolist()
        return [
            _to_sequence(row, row_logprobs, request.rules.eot)
            for row, row_logprobs in zip(rows, logprobs.tolist(), strict=True)
        ]

    def select(self, encoded: Encoded, indices: Sequence[int]) -> Encoded:
        return Encoded(encoded.hidden[torch.tensor(list(indices), device=encoded.hidden.device)])

    def attend(self, encoded: Encoded, tokens: Sequence[int], n_frames: int) -> Attended:
        config = self._loaded.config
        heads = alignment_heads(self._report.folder, config.decoder_layers, config.decoder_attention_heads)
        with self._computing():
            return attend(self._loaded, heads, encoded.hidden, tokens, n_frames)

    def close(self) -> None:
        if self._model is None:
            return
        self._model = None
        forget_weights(id(self))
        release(self._device)
        phases = replace(self._report.phases, after_unload=read_point(self._device))
        self._report = replace(self._report, phases=phases)
        logger.info("event=engine_closed model=%s precision=%s", self._report.model, self._report.effective)

    @property
    def _loaded(self) -> Any:
        if self._model is None:
            raise RuntimeError("this engine is closed")
        return self._model

    @property
    def _input_dtype(self) -> torch.dtype:
        """Of the features: the format of the first convolution's weights (autocast casts by itself)."""
        dtype: torch.dtype = self._loaded.model.encoder.conv1.weight.dtype
        return dtype

    def _logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Without a cache: [n, n_tokens] and [n, 1500, d_model] -> [n, n_tokens, n_vocab]."""
        states = self._loaded.model.decoder(input_ids=tokens, encoder_hidden_states=hidden, use_cache=False)
        logits: torch.Tensor = self._loaded.proj_out(states.last_hidden_state)
        return logits

    def _score(self, encoded: Encoded, output: torch.Tensor, n_prompt: int) -> torch.Tensor:
        """Log-probabilities of chosen tokens, [n, n_new], in one more pass, a row at a time.

        For beam search, whose rows change places; keeping all scores instead would cost n_beams * n_new * n_vocab * 4
        bytes a window (230 MB at 5 beams and 224 tokens). Not masked by the rules, as transformers' own beam scores.
        """
        rows = []
        for index in range(output.shape[0]):
            tokens = output[index : index + 1]
            logits = self._logits(tokens[:, :-1], encoded.hidden[index : index + 1])[0, n_prompt - 1 :].float()
            rows.append(log_softmax(logits, dim=-1).gather(1, tokens[0, n_prompt:, None])[:, 0])
        return torch.stack(rows)

    def _generation_config(self, request: GenerateRequest, n_prompt: int) -> GenerationConfig:
        """Every setting that matters is said here: transformers fills in defaults (top_k 50) for what is not."""
        choice: dict[str, Any] = {"do_sample": False, "num_beams": request.beam_size}
        if request.beam_size > 1:
            choice |= {"length_penalty": 1.0, "early_stopping": False}
        if request.temperature > 0:
            choice |= {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            **choice,
            max_length=min(n_prompt + request.max_new_tokens, self._dims.n_text_ctx),
            eos_token_id=request.rules.eot,
            pad_token_id=request.rules.eot,
            bos_token_id=request.rules.eot,
            decoder_start_token_id=self._sot,
            use_cache=True,
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients, the row's arithmetic, and errors of the device as ours.

        no_grad, not inference_mode: under inference_mode autocast keeps no 16-bit copies and casts at every call.
        """
        with device_errors(self._report, self._device), torch.no_grad(), arithmetic(self._row, self._device.type):
            yield


class _Judge(LogitsProcessor):  # type: ignore[misc]
    """Whisper's token rules as tensor operations, and the log-probabilities of what was chosen.

    The same masks as transformers' SuppressTokensAtBegin, SuppressTokens and WhisperTimeStamp processors in the order
    Whisper's generate applies them (a test compares them), without the latter's loop over rows, which waits for the GPU
    about four times a row and token.

    A row whose logits are NaN is ended at once, its log-probability kept as NaN: sampling from NaN would bring down
    the CUDA context of the whole process.
    """

    def __init__(self, request: GenerateRequest, n_prompt: int, n_vocab: int, device: torch.device) -> None:
        rules = request.rules
        self._rules, self._n_prompt, self._timestamps = rules, n_prompt, request.timestamps
        self._tracks = request.beam_size == 1
        self._ids = torch.arange(n_vocab, device=device)  # [n_vocab]
        self._never = _mask(rules.suppress, n_vocab, device)
        if request.timestamps:
            self._never[rules.no_timestamps] = True
        self._never_first = self._never | _mask(rules.begin_suppress, n_vocab, device)
        if request.timestamps:
            self._never_first |= self._ids < rules.timestamp_begin
            if rules.max_initial_timestamp_index is not None:
                self._never_first |= self._ids > rules.timestamp_begin + rules.max_initial_timestamp_index
        self._is_timestamp = self._ids >= rules.timestamp_begin
        self._is_text = self._ids < rules.eot
        self._last: torch.Tensor | None = None  # log-probabilities of the newest step, [n, n_vocab]
        self._chosen: list[torch.Tensor] = []  # [n] each

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: [n, n_prompt + n_new]; scores: float32 logits (log-probabilities in beam search) [n, n_vocab]."""
        new = input_ids[:, self._n_prompt :]
        broken = scores.isnan().any(dim=-1, keepdim=True)
        mask = self._never_first if new.shape[1] == 0 else self._never
        mask = mask | self._timestamp_mask(new) if self._timestamps and new.shape[1] else mask.expand_as(scores)
        scores = scores.masked_fill(mask, -math.inf)
        if self._timestamps:
            # The timestamps together beat the best text token: then it must be a timestamp.
            begin = self._rules.timestamp_begin
            total = scores[:, begin:].logsumexp(dim=-1, keepdim=True)
            best_text = scores[:, :begin].amax(dim=-1, keepdim=True)
            scores = scores.masked_fill((total > best_text) & ~self._is_timestamp, -math.inf)
        if self._tracks:
            self._note(new)
            self._last = log_softmax(scores, dim=-1)
        ended = torch.where(self._ids == self._rules.eot, 0.0, -math.inf)
        return torch.where(broken, ended, scores)

    def logprobs(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the new tokens of the finished loop, float32 [n, n_new]."""
        self._note(output[:, self._n_prompt :])
        return torch.stack(self._chosen, dim=1)

    def _note(self, new: torch.Tensor) -> None:
        """Look up the choice made from the step before."""
        if self._last is not None:
            self._chosen.append(self._last.gather(1, new[:, -1:])[:, 0])

    def _timestamp_mask(self, new: torch.Tensor) -> torch.Tensor:
        """Timestamps come in pairs, except before <|endoftext|>, and never run backwards. [n, n_vocab], True: no."""
        begin = self._rules.timestamp_begin
        after_timestamp = new[:, -1:] >= begin
        after_pair = after_timestamp & (new[:, -2:-1] >= begin) if new.shape[1] > 1 else after_timestamp
        after_single = after_timestamp & ~after_pair
        latest = torch.where(new >= begin, new, -1).amax(dim=-1, keepdim=True)
        # After text the next one must be later than the last; the second of a pair may repeat the first.
        earliest = torch.where(after_single, latest, latest + 1)
        return (
            (after_pair & self._is_timestamp)
            | (after_single & self._is_text)
            | (self._is_timestamp & (self._ids < earliest) & (latest >= 0))
        )


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends every row when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), device=input_ids.device)


def arithmetic(row: Precision, device_kind: str) -> AbstractContextManager[object]:
    """The block inside which the row's model computes as the row says."""
    if not row.autocast:
        return nullcontext()
    return torch.autocast(device_kind, dtype=getattr(torch, row.compute_dtype_on(device_kind)))


@contextmanager
def device_errors(report: LoadReport, device: torch.device) -> Iterator[None]:
    """What goes wrong on the device while computing, as our errors: DeviceError, OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(
                f"{report.device.label} failed while computing ({str(error).splitlines()[0]}). Restart "
                "Sotto; if it fails again, choose --device cpu."
            ) from error
        if not is_out_of_memory(error):
            raise
        # The traceback holds the tensors of the failed attempt; without it they can be freed.
        error.__traceback__ = None
        release(device)
        raise OutOfMemoryError(
            f"The memory of {report.device.label} does not suffice for this batch at {report.effective}. Decode fewer "
            "windows at once, choose a smaller precision or model, or close other programs that use the device."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own class on a GPU; on a CPU a RuntimeError of the allocator or Python's MemoryError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release(device: torch.device, *, fresh: object = None) -> None:
    """Collect what is unreachable; return torch's reserve to the driver, on a CPU the heap's to the system.

    fresh: an engine that has computed nothing yet.
    """
    gc.collect()
    if device.type == "cuda":
        if not engines_on_gpus(but=id(fresh)):
            # 32 MiB that nothing else ever returns. A captured graph writes there at every replay, and nobody asks
            # whether it is still torch's: with another engine alive it stays.
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed tensors below 32 MiB: 580 MiB of a closed GPT-2 (fp32) stayed resident, now 23.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def freed_at_once(device: torch.device) -> Iterator[None]:
    """On a processor, what a load frees goes back to the system at once; it takes a model apart and builds another.

    glibc would keep freed tensors below 32 MiB, in holes that larger ones do not fit into: a model of 922 MiB took
    1,305 to load, and 1,000 this way. Afterwards its largest threshold holds, which it reaches by itself as well:
    activations must not be mapped anew each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _MIB)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of this device for the block, and put their state back afterwards."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _mask(ids: Sequence[int], n_vocab: int, device: torch.device) -> torch.Tensor:
    mask = torch.zeros(n_vocab, dtype=torch.bool, device=device)
    if ids:
        mask[torch.tensor(ids, device=device)] = True
    return mask


def _to_sequence(row: list[int], logprobs: list[float], eot: int) -> TokenSequence:
    """row: new tokens, then <|endoftext|> as end and padding; logprobs: one per token of the row."""
    finished = eot in row
    tokens = row[: row.index(eot)] if finished else row
    counted = logprobs[: len(tokens) + finished]
    return TokenSequence(tokens, sum(counted) / len(counted) if counted else math.nan, len(tokens), finished)


def _place(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
