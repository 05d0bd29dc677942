"""Train the demo model: `python -m training.train --work FOLDER`.

In: <work>/speech. Out: <work>/checkpoint.pt (weights, their running mean, optimiser, progress).

The schedule follows the wall clock: --minutes is the whole of it, over all calls; --stop-after ends this call early and
the next one resumes. --max-steps ends sooner and then also drives the schedule. --phases are window lengths with their
share of the time: short windows first, because they teach letters at a fifth of the price.
Arithmetic: fp32 weights and optimiser, matrix products in bf16 through autocast on a GPU; bf16 has fp32's range, so
there is no loss scaling. What gets exported is a running mean of the weights (EMA).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from audio.constants import WINDOW_S
from errors import DeviceError
from training.augment import Augmenter, TrainingLogMel, compose
from training.dataset import Planner, SpeechStore, WindowBatch, WindowStream
from training.model import AlignmentTeacher, CtcHead, ModelSize, build_model, decode, encode, token_loss
from training.speech import DEMO
from transcription.tokenizer import WhisperTokens

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
_WARM_UP = 0.04
"""Of the schedule."""
_LAST_RATE = 0.004
"""Of the highest learning rate."""
_SAVE_EVERY_S = 60.0
_SMALLEST_PEAK = 2e-4


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides a training run."""

    work: Path
    minutes: float = 20.0
    stop_after_min: float = 60.0
    max_steps: int = 0
    """0: only the clock ends the run."""
    phases: tuple[tuple[float, float], ...] = ((6.0, 0.20), (12.0, 0.18), (30.0, 0.62))
    """(window seconds, share of the time)."""
    batch_size: int = 128
    """Of 30-s windows; shorter windows get proportionally more, times 0.8."""
    peak_rate: float = 1.4e-3
    decoder_dropout: float = 0.1
    size: ModelSize = field(default_factory=ModelSize)
    augments: bool = True
    n_workers: int = 0
    device: str = "auto"
    log_every: int = 50
    seed: int = 1234

    @property
    def sizes(self) -> list[tuple[float, int]]:
        """(window seconds, windows in a batch) of each phase."""
        return [(window_s, self._n_windows(window_s)) for window_s, _ in self.phases]

    def _n_windows(self, window_s: float) -> int:
        if window_s >= WINDOW_S:
            return self.batch_size
        scaled = int(self.batch_size * WINDOW_S / window_s * 0.8)
        return scaled if scaled < 8 else scaled // 8 * 8

    def phase_at(self, progress: float) -> int:
        """Index of the phase at a progress of 0 to 1."""
        total = sum(share for _, share in self.phases)
        end = 0.0
        for index, (_, share) in enumerate(self.phases):
            end += share / total
            if progress < end:
                return index
        return len(self.phases) - 1


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then half a cosine."""
    if progress < _WARM_UP:
        return peak * progress / _WARM_UP
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))
    return peak * max(_LAST_RATE, falling)


@dataclass(slots=True)
class Losses:
    """Sums over steps since the last report, on the device: reading them is the loop's only wait."""

    sums: torch.Tensor
    """[5]: decoder, CTC, alignment, gradient norm, steps"""

    def add(self, decoder: torch.Tensor, ctc: torch.Tensor, alignment: torch.Tensor, norm: torch.Tensor) -> None:
        values = (decoder, ctc, alignment, norm, torch.ones((), device=self.sums.device))
        self.sums += torch.stack([value.detach().float() for value in values])

    def take(self) -> dict[str, float]:
        values = (self.sums / self.sums[4].clamp(min=1)).tolist()
        self.sums.zero_()
        return dict(zip(("decoder", "ctc", "alignment", "norm"), values, strict=False))


class Trainer:
    """Model, optimiser and running mean, step by step."""

    def __init__(self, plan: Plan, words: WhisperTokens, n_vocab: int) -> None:
        self.plan, self.words = plan, words
        name = ("cuda" if torch.cuda.is_available() else "cpu") if plan.device == "auto" else plan.device
        self.device = torch.device(name)
        torch.manual_seed(plan.seed)
        self.model: Any = build_model(plan.size, words, n_vocab).to(self.device).train()
        for layer in self.model.model.decoder.layers:
            layer.dropout = plan.decoder_dropout
        self.ctc = CtcHead(plan.size.d_model, words.eot).to(self.device)
        self.teacher = AlignmentTeacher(self.model.model.decoder)
        self.log_mel = TrainingLogMel(plan.size.n_mels).to(self.device)
        self.augment = Augmenter(self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] + list(self.ctc.parameters())
        self.mean = [p.detach().clone() for p in self.parameters]
        self.optimiser = self._optimiser()
        self.losses = Losses(torch.zeros(5, device=self.device))
        self.step, self.peak_rate = 0, plan.peak_rate

    def _optimiser(self) -> torch.optim.Optimizer:
        """AdamW; biases and norms do not decay."""
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-8, fused=self.device.type == "cuda")

    def features(self, sound: torch.Tensor, batch: WindowBatch) -> torch.Tensor:
        """float32 [n, n_mels, n_frames]"""
        with torch.no_grad():
            waveforms = compose(sound, batch)
            if not self.plan.augments:
                return torch.as_tensor(self.log_mel(waveforms))
            louder = self.augment.louder_elsewhere(waveforms.shape[0])
            return self.augment.mask(self.log_mel(self.augment(waveforms), louder))

    def train_on(self, features: torch.Tensor, batch: WindowBatch, progress: float) -> None:
        """One step of the optimiser."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(progress, self.peak_rate)
        decoder_loss, ctc_loss, alignment_loss = self.forward(features, batch)
        ctc_weight, alignment_weight = (1.0 if progress < 0.15 else 0.3), (0.5 if progress < 0.35 else 0.2)
        loss = decoder_loss + ctc_weight * ctc_loss + alignment_weight * alignment_loss
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        with torch.no_grad():
            keep = min(0.9985, (1 + self.step) / (20 + self.step))
            for average, parameter in zip(self.mean, self.parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - keep)
        self.losses.add(decoder_loss, ctc_loss, alignment_loss, norm)

    def forward(self, features: torch.Tensor, batch: WindowBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(decoder, CTC, alignment) losses."""
        inputs, labels, spans, text = (x.to(self.device) for x in (batch.inputs, batch.labels, batch.spans, batch.text))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            heard = encode(self.model.model.encoder, features)
            logits = self.model.proj_out(decode(self.model.model.decoder, inputs, heard))
            ctc_logits = self.ctc(heard)
            alignment_loss = self.teacher.loss(heard, spans)
        decoder_loss = token_loss(logits, labels, self.words.timestamp_begin)
        return decoder_loss, self.ctc.loss(ctc_logits, text, batch.text_lengths), alignment_loss

    def is_finite(self) -> bool:
        return bool(torch.stack([p.detach().float().sum() for p in self.parameters]).isfinite().all())

    def save(self, file: Path, elapsed_s: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "ctc": self.ctc.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "mean": self.mean,
            "step": self.step,
            "elapsed_s": elapsed_s,
            "size": asdict(self.plan.size),
        }
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def restore(self, file: Path) -> float:
        """Go on from a checkpoint; returns the seconds of training it stands for."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ctc.load_state_dict(state["ctc"])
        self.optimiser.load_state_dict(state["optimiser"])
        for average, saved in zip(self.mean, state["mean"], strict=True):
            average.copy_(saved)
        self.step = int(state["step"])
        return float(state["elapsed_s"])


def train(plan: Plan) -> dict[str, float]:
    """Train until the schedule, this call's time or max_steps ends; returns the last reported losses.

    Raises MachineError without speech, DeviceError if the loss stays infinite after returns to a good checkpoint.
    """
    called_s = time.monotonic()
    words = WhisperTokens.from_folder(DEMO)
    store = SpeechStore(plan.work / "speech")
    # Planning processes start before CUDA does in this one: a fork with a CUDA context is not usable.
    phase = multiprocessing.Value("i", 0)
    batches = _stream(plan, store, words, phase)
    batch = next(batches)
    trainer = Trainer(plan, words, n_vocab=words.timestamp_begin + 1501)
    file = plan.work / CHECKPOINT
    before_s = trainer.restore(file) if file.exists() else 0.0
    sound = store.sound(trainer.device)
    logger.info("event=training device=%s hours=%.1f step=%d", trainer.device, store.hours, trainer.step)
    started_s = saved_s = time.monotonic()
    report: dict[str, float] = {}
    while True:
        now_s = time.monotonic()
        elapsed_s = before_s + now_s - started_s
        progress = max(elapsed_s / (plan.minutes * 60), trainer.step / plan.max_steps if plan.max_steps else 0.0)
        if progress >= 1 or now_s - called_s > plan.stop_after_min * 60:
            break
        phase.value = plan.phase_at(progress)
        trainer.train_on(trainer.features(sound, batch), batch, progress)
        batch = next(batches)
        if trainer.step % plan.log_every == 0:
            report = trainer.losses.take()
            _log(trainer, batch, progress, report)
            if not all(map(math.isfinite, report.values())):
                _go_back(trainer, file)
            elif now_s - saved_s > _SAVE_EVERY_S:
                trainer.save(file, elapsed_s)
                saved_s = now_s
    if trainer.is_finite():
        trainer.save(file, before_s + time.monotonic() - started_s)
    return report or trainer.losses.take()


def _stream(plan: Plan, store: SpeechStore, words: WhisperTokens, phase: Any) -> Iterator[WindowBatch]:
    """Batches, planned ahead in worker processes. The seed is new in every call, so a resumed run sees new windows."""
    stream = WindowStream(Planner(store, words), time.time_ns() % 2**32, phase, plan.sizes)
    if plan.n_workers == 0:
        return iter(stream)
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=plan.n_workers, prefetch_factor=3, multiprocessing_context="fork"
    )
    return iter(loader)


def _go_back(trainer: Trainer, file: Path) -> None:
    """After an infinite loss: the last good checkpoint with smaller steps."""
    if not file.exists() or trainer.peak_rate < _SMALLEST_PEAK:
        raise DeviceError("The training loss is not finite and going back did not help. Start again with a new --work.")
    trainer.restore(file)
    trainer.peak_rate *= 0.6
    logger.warning("event=went_back step=%d peak_rate=%.1e", trainer.step, trainer.peak_rate)


def _log(trainer: Trainer, batch: WindowBatch, progress: float, report: dict[str, float]) -> None:
    losses = " ".join(f"{name}={value:.3f}" for name, value in report.items())
    windows = f"{len(batch.speed)}x{batch.sound_starts.shape[1]} window_s={batch.window_s:.0f}"
    logger.info("step=%d progress=%.3f windows=%s %s", trainer.step, progress, windows, losses)


def _parse_phases(text: str) -> tuple[tuple[float, float], ...]:
    """'6:.20,12:.18,30:.62'"""
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((float(window_s), float(share)) for window_s, share in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    default = Plan(Path())
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the demo model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run, with speech/ in it")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="the whole schedule (default: 20)")
    parser.add_argument("--stop-after", type=float, default=default.stop_after_min, help="minutes of this call")
    parser.add_argument("--max-steps", type=int, default=0, help="end after so many steps (default: by the clock)")
    parser.add_argument("--phases", type=_parse_phases, default=default.phases, help="window seconds:share,...")
    parser.add_argument("--batch", type=int, default=default.batch_size, help="30-s windows in a batch (default: 128)")
    parser.add_argument("--peak", type=float, default=default.peak_rate, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 4), help="planning processes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        train(
            Plan(
                options.work,
                minutes=options.minutes,
                stop_after_min=options.stop_after,
                max_steps=options.max_steps,
                phases=options.phases,
                batch_size=options.batch,
                peak_rate=options.peak,
                n_workers=options.workers,
            )
        )


if __name__ == "__main__":
    main()
