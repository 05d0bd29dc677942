"""Shards of speech -> training windows: which utterances sound when, and the labels for what is heard.

In: <work>/speech. Out: WindowBatch: arrays that say where the sound lies (the device puts it together, augment.compose)
and what decoder, CTC head and alignment loss should learn.

A window is planned like a stretch of a real recording: one utterance, a few, or as many as fit; one speaker or several;
pauses from none to 3 s; it may begin and end in the middle of an utterance; half of the windows carry timestamps, some
a prompt of previous text, a few hold no speech. Labels follow Whisper's format, in which a last segment that the
window's end cuts off gives only its start.
Planning is plain Python and runs ahead in worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from audio.constants import SAMPLE_RATE
from errors import MachineError
from training.speech import SHARE
from training.units import LANGUAGES
from transcription.tokenizer import TIMESTAMP_STEP_S, WhisperTokens

Ints = npt.NDArray[np.int64]

MOST_SLOTS = 20
"""Utterances in one window."""
MOST_DECODER_TOKENS = 352
"""Positions used in training; the model has 448."""
MOST_CTC_TOKENS = 300
_LAST_TIMESTAMP = 1500
_EDGE_S = 0.03
"""A word this much over the border still counts as heard."""
_NOWHERE = (-1.0, -1.0)
_TIMESTAMP_SPAN_S = 0.2
"""Where a timestamp token looks: the beginning or end of its segment."""
_NEVER = 1 << 30


class SpeechStore:
    """All shards of a run: the index in memory, the sound in files.

    Per utterance: offsets, lengths (samples), languages, first_unit; per unit: starts, ends (samples), first_token.
    """

    def __init__(self, folder: Path) -> None:
        """Raises MachineError if there is no speech."""
        self.files = sorted(folder.glob("shard_*.npz"))
        if not self.files:
            raise MachineError(f"There is no speech in {folder}; run python -m training.speech first.")
        shards = [np.load(file) for file in self.files]
        self.shard_samples = [int(shard["n_samples"]) for shard in shards]
        base = np.concatenate([[0], np.cumsum(self.shard_samples)])
        self.n_samples = int(base[-1])

        def joined(name: str) -> Ints:
            return np.concatenate([shard[name] for shard in shards]).astype(np.int64)

        self.offsets = np.concatenate([s["offsets"] + start for s, start in zip(shards, base[:-1], strict=True)])
        self.lengths, self.languages = joined("lengths"), joined("languages")
        self.starts, self.ends = joined("starts"), joined("ends")
        self.tokens, self.n_tokens = joined("tokens"), joined("n_tokens")
        self.first_unit = np.concatenate([[0], np.cumsum(joined("n_units"))])
        self.first_token = np.concatenate([[0], np.cumsum(self.n_tokens)])
        self.by_language = [np.flatnonzero(self.languages == index) for index in range(len(LANGUAGES))]

    @property
    def hours(self) -> float:
        return self.n_samples / SAMPLE_RATE / 3600

    def unit_tokens(self, first: int, end: int) -> list[int]:
        """Tokens of the units first..end-1."""
        return [int(token) for token in self.tokens[self.first_token[first] : self.first_token[end]]]

    def utterance_tokens(self, utterance: int) -> list[int]:
        return self.unit_tokens(int(self.first_unit[utterance]), int(self.first_unit[utterance + 1]))

    def sound(self, device: torch.device) -> torch.Tensor:
        """int16 [n_samples] of all shards on the device: 220 h are 25 GB."""
        out = torch.empty(self.n_samples, dtype=torch.int16, device=device)
        position, step = 0, 1 << 26
        for file, n_samples in zip(self.files, self.shard_samples, strict=True):
            pcm = np.memmap(file.with_suffix(".pcm"), dtype=np.int16, mode="r", shape=(n_samples,))
            for start in range(0, n_samples, step):
                piece = torch.from_numpy(np.array(pcm[start : start + step]))
                out[position + start : position + start + len(piece)].copy_(piece)
            position += n_samples
        return out


@dataclass(frozen=True, slots=True)
class Slot:
    """One utterance in a window. start may be negative: the window then begins inside it."""

    offset: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class HeardSegment:
    """What of an utterance falls into the window. units: first and end index; spans: seconds, one per token."""

    start_s: float
    end_s: float
    units: tuple[int, int]
    is_cut: bool
    spans: list[tuple[float, float]]


@dataclass(slots=True)
class PlannedWindow:
    """One window: sound, labels, and where in the sound each label is heard (seconds; _NOWHERE for none)."""

    language: int
    timestamps: bool
    speed: float = 1.0
    slots: list[Slot] = field(default_factory=list)
    segments: list[HeardSegment] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    @property
    def is_silent(self) -> bool:
        return not self.segments

    @property
    def fits(self) -> bool:
        n_decoder = len(self.labels) + len(self.prompt) + 6
        return n_decoder <= MOST_DECODER_TOKENS and len(self.text) <= MOST_CTC_TOKENS


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """n windows of window_s seconds, all tensors on the CPU.

    sound_*: int64 [n, MOST_SLOTS]; speed: float32 [n]; inputs, labels: int64 [n, n_tokens], labels -100 where nothing
    is learnt; spans: float32 [n, n_tokens, 2] seconds; text: int64 [n, n_text] padded, text_lengths: int64 [n].
    """

    window_s: float
    sound_offsets: torch.Tensor
    sound_lengths: torch.Tensor
    sound_starts: torch.Tensor
    speed: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor
    spans: torch.Tensor
    text: torch.Tensor
    text_lengths: torch.Tensor


class Planner:
    """Plans windows at random."""

    def __init__(
        self, store: SpeechStore, vocabulary: WhisperTokens, *, silence: float = 0.04, prompts: float = 0.12
    ) -> None:
        """silence: share of windows without speech; prompts: share with previous text."""
        self._store, self._vocabulary = store, vocabulary
        self._silence, self._prompts = silence, prompts
        self._language_ids = [vocabulary.languages[code] for code in LANGUAGES]
        self._present = [index for index in range(len(LANGUAGES)) if len(store.by_language[index])]
        weights = np.array([SHARE[LANGUAGES[index]] for index in self._present])
        self._weights = weights / weights.sum()

    def window(self, rng: np.random.Generator, window_s: float) -> PlannedWindow:
        language = self._present[int(rng.choice(len(self._present), p=self._weights))]
        plan = PlannedWindow(language, timestamps=bool(rng.random() < 0.5))
        if rng.random() >= self._silence:
            self._place(plan, rng, window_s)
        self._label(plan, window_s)
        return plan

    def _place(self, plan: PlannedWindow, rng: np.random.Generator, window_s: float) -> None:
        """Choose utterances and their times."""
        store, pool = self._store, self._store.by_language[plan.language]
        draw = rng.random()
        style = "one" if draw < 0.27 else "few" if draw < 0.42 else "full"
        count = {"one": 1, "few": int(rng.integers(2, 5)), "full": MOST_SLOTS}[style]
        plan.speed = 1.0 if rng.random() < 0.5 else float(rng.uniform(0.90, 1.12))
        in_order, short_gaps = rng.random() < 0.6, rng.random() < 0.7
        first = int(rng.integers(len(pool)))
        at_s = 0.0 if style == "full" and rng.random() < 0.15 else self._lead_s(rng)
        begins_inside = style == "full" and rng.random() < 0.45
        while len(plan.slots) < count and at_s < window_s - 0.3:
            index = first + len(plan.slots) if in_order else int(rng.integers(len(pool)))
            utterance = int(pool[index % len(pool)])
            length_s = float(store.lengths[utterance]) / plan.speed / SAMPLE_RATE
            if style != "full" and at_s + length_s > window_s:
                if plan.slots:
                    break
                at_s = max(0.0, window_s - length_s)
            if begins_inside and not plan.slots:
                at_s = -float(rng.uniform(0.08, 0.92)) * length_s
            self._add(plan, utterance, at_s, window_s)
            at_s += length_s + self._gap_s(rng, short_gaps)
        if rng.random() < self._prompts:
            plan.prompt = self._previous_text(pool, first, int(rng.integers(1, 4)))

    @staticmethod
    def _lead_s(rng: np.random.Generator) -> float:
        return float(rng.uniform(0, 1.2) if rng.random() < 0.7 else rng.uniform(0, 3.0))

    @staticmethod
    def _gap_s(rng: np.random.Generator, short_gaps: bool) -> float:
        draw = rng.random()
        if draw < 0.5:
            return float(rng.uniform(0.1, 0.6))
        return float(rng.uniform(0, 0.12) if draw < 0.5 + 0.25 * short_gaps else rng.uniform(0.6, 3.0))

    def _previous_text(self, pool: Ints, first: int, count: int) -> list[int]:
        before = [int(pool[(first - back) % len(pool)]) for back in range(count, 0, -1)]
        tokens = [token for utterance in before for token in self._store.utterance_tokens(utterance)]
        return tokens[-60:]

    def _add(self, plan: PlannedWindow, utterance: int, at_s: float, window_s: float) -> None:
        """Put an utterance at at_s and note which of its units are heard."""
        store = self._store
        offset, length = int(store.offsets[utterance]), int(store.lengths[utterance])
        plan.slots.append(Slot(offset, length, round(at_s * SAMPLE_RATE)))
        first, end = int(store.first_unit[utterance]), int(store.first_unit[utterance + 1])
        scale = plan.speed * SAMPLE_RATE
        starts_s = store.starts[first:end] / scale + at_s
        ends_s = store.ends[first:end] / scale + at_s
        heard = np.flatnonzero((starts_s >= -_EDGE_S) & (ends_s <= window_s + _EDGE_S))
        is_cut = bool(ends_s[-1] > window_s + _EDGE_S)
        if len(heard):
            low, high = int(heard[0]), int(heard[-1]) + 1
            spans = [
                (float(starts_s[unit]), float(ends_s[unit]))
                for unit in range(low, high)
                for _ in range(int(store.n_tokens[first + unit]))
            ]
            start_s, end_s = max(0.0, float(starts_s[low])), min(window_s, float(ends_s[high - 1]))
            plan.segments.append(HeardSegment(start_s, end_s, (first + low, first + high), is_cut, spans))
        elif is_cut:
            plan.segments.append(HeardSegment(max(0.0, at_s), window_s, (first, first), True, []))

    def _label(self, plan: PlannedWindow, window_s: float) -> None:
        """Text for the CTC head, tokens for the decoder, and the place of each in the sound."""
        for index, segment in enumerate(plan.segments):
            text = self._store.unit_tokens(*segment.units)
            plan.text += text
            if not plan.timestamps:
                plan.labels += text
                plan.spans += segment.spans
                continue
            start, end = self._timestamp_ids(segment)
            start_span = (segment.start_s, segment.start_s + _TIMESTAMP_SPAN_S)
            if segment.is_cut and index > 0 and (window_s - segment.start_s < 10 or not text):
                plan.labels.append(start)
                plan.spans.append(start_span)
            elif text:
                plan.labels += [start, *text, end]
                plan.spans += [start_span, *segment.spans, (segment.end_s - _TIMESTAMP_SPAN_S, segment.end_s)]
        if plan.timestamps and not plan.labels:
            plan.labels, plan.spans = [self._vocabulary.timestamp_begin], [_NOWHERE]

    def _timestamp_ids(self, segment: HeardSegment) -> tuple[int, int]:
        begin = self._vocabulary.timestamp_begin
        start = begin + round(segment.start_s / TIMESTAMP_STEP_S)
        end = max(start + 1, begin + round(segment.end_s / TIMESTAMP_STEP_S))
        return start, min(end, begin + _LAST_TIMESTAMP)

    def batch(self, rng: np.random.Generator, n_windows: int, window_s: float) -> WindowBatch:
        plans: list[PlannedWindow] = []
        while len(plans) < n_windows:
            plan = self.window(rng, window_s)
            if plan.fits:
                plans.append(plan)
        return self._stack(plans, window_s)

    def _stack(self, plans: list[PlannedWindow], window_s: float) -> WindowBatch:
        n = len(plans)
        rows = [self._decoder_row(plan) for plan in plans]
        n_tokens = (
            -(-max(len(row.tokens) for row in rows) // 16) * 16
        )  # multiples of 16: fewer shapes for the allocator
        sound = np.zeros((3, n, MOST_SLOTS), np.int64)
        sound[2] = _NEVER
        inputs = np.full((n, n_tokens), self._vocabulary.eot, np.int64)
        labels = np.full((n, n_tokens), -100, np.int64)
        spans = np.full((n, n_tokens, 2), -1, np.float32)
        text = np.zeros((n, max(8, max(len(plan.text) for plan in plans))), np.int64)
        for i, (plan, row) in enumerate(zip(plans, rows, strict=True)):
            for k, slot in enumerate(plan.slots):
                sound[:, i, k] = slot.offset, slot.length, slot.start
            end = len(row.tokens) - 1
            inputs[i, :end] = row.tokens[:-1]
            labels[i, row.n_prefix - 1 : end] = row.tokens[row.n_prefix :]
            labels[i, row.sot] = row.language_label
            if not plan.is_silent:
                labels[i, row.sot + 1] = row.tokens[row.sot + 2]
            if plan.spans:
                spans[i, row.n_prefix - 1 : row.n_prefix - 1 + len(plan.spans)] = plan.spans
            text[i, : len(plan.text)] = plan.text
        return WindowBatch(
            window_s=window_s,
            sound_offsets=torch.from_numpy(sound[0]),
            sound_lengths=torch.from_numpy(sound[1]),
            sound_starts=torch.from_numpy(sound[2]),
            speed=torch.tensor([plan.speed for plan in plans], dtype=torch.float32),
            inputs=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            spans=torch.from_numpy(spans),
            text=torch.from_numpy(text),
            text_lengths=torch.tensor([len(plan.text) for plan in plans]),
        )

    def _decoder_row(self, plan: PlannedWindow) -> _DecoderRow:
        """Prompt, start tokens, labels and end, and what <|startoftranscript|> should predict."""
        words = self._vocabulary
        assert words.transcribe is not None
        language_id = self._language_ids[plan.language]
        head = [words.sot_prev, *plan.prompt] if plan.prompt else []
        prefix = [*head, words.sot, language_id, words.transcribe]
        if not plan.timestamps:
            prefix.append(words.no_timestamps)
        return _DecoderRow(
            tokens=[*prefix, *plan.labels, words.eot],
            n_prefix=len(prefix),
            sot=len(head),
            language_label=words.no_speech if plan.is_silent else language_id,
        )


@dataclass(frozen=True, slots=True)
class _DecoderRow:
    tokens: list[int]
    n_prefix: int
    sot: int
    """Position of <|startoftranscript|>, after the prompt."""
    language_label: int


class WindowStream(torch.utils.data.IterableDataset[WindowBatch]):
    """Endless batches; `phase` is shared memory, so worker processes follow the trainer from phase to phase."""

    def __init__(self, planner: Planner, seed: int, phase: Any, sizes: list[tuple[float, int]]) -> None:
        """sizes: (window seconds, windows in a batch) of each phase; phase: multiprocessing.Value('i')."""
        self._planner, self._seed, self._phase, self._sizes = planner, seed, phase, sizes

    def __iter__(self) -> Iterator[WindowBatch]:
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        rng = np.random.default_rng([self._seed, worker.id if worker else 0])
        while True:
            window_s, n_windows = self._sizes[self._phase.value]
            yield self._planner.batch(rng, n_windows, window_s)
