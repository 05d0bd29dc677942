"""A run over a model whose numbers are not finite: text is missing, and nobody is told that nobody spoke."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import soundfile

from errors import ModelError
from model_loader.device import describe_device
from model_loader.engine import GenerateRequest, TokenSequence
from tests.fakes import FakeEngine, FakePool, hypothesis
from transcription.options import TranscribeOptions
from transcription.pipeline import LocalTranscriber
from transcription.transcript import NO_SPEECH

OPTIONS = TranscribeOptions(language="en", windows="fixed")


def make(n_finite: int) -> tuple[LocalTranscriber, Any]:
    """A transcriber whose model says words in so many windows, and no numbers after them."""

    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return hypothesis((0.0, "words", 1.0)) if row < n_finite else hypothesis(avg_logprob=math.nan)

    pool: Any = FakePool(FakeEngine(script))
    return LocalTranscriber(pool, device=describe_device("cpu")), pool


def minute() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0.0, 0.1, 60 * 16_000), 16_000, format="WAV")
    return file.getvalue()


def test_without_any_text_the_run_fails() -> None:
    run = make(n_finite=0)[0].transcribe(minute(), OPTIONS)
    with pytest.raises(ModelError, match=r"not finite at precision fp32.*itself is damaged"):
        list(run)
    assert NO_SPEECH not in run.warnings and run.transcript.text == ""
    assert run.progress.eta_s == 0.0 and not run.is_cancelled, "it has ended"


def test_with_some_text_it_is_a_warning() -> None:
    run = make(n_finite=1)[0].transcribe(minute(), OPTIONS)
    assert [segment.text for segment in run] == ["words"]
    assert "not finite" in run.warnings[0] and NO_SPEECH not in run.warnings


@pytest.mark.parametrize(("is_loaded", "phase"), [(True, "ready"), (False, "failed")])
def test_a_warm_up_that_fails_ends_the_loading(is_loaded: bool, phase: str) -> None:
    transcriber, pool = make(n_finite=0)
    pool.loaded = pool.loaded if is_loaded else list
    transcriber.prepare()
    status = transcriber.status()
    assert status.phase == phase and "not finite" in status.message
