"""Fallback, silence, out-of-memory, nonsense and cancelling, over an engine that says what its script says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audio.windows import Window
from errors import CancelledError, OutOfMemoryError
from model_loader.engine import GenerateRequest, TokenSequence
from tests.fakes import FakeEngine, always, demo_tokens, fake_report, hypothesis
from transcription.decode import Decoder, compression_ratio
from transcription.options import TranscribeOptions

GOOD = (0.0, "the cat sat on the mat", 2.0)
LOOP = (0.0, "again " * 60, 2.0)


def windows(count: int, length_s: float = 4.0) -> list[Window]:
    samples = np.zeros(round(length_s * 16_000), dtype=np.float32)
    return [Window(i, 5.0 * i, samples, 3.0) for i in range(count)]


def decoder(**options: object) -> Decoder:
    return Decoder(demo_tokens(), TranscribeOptions(**options))  # type: ignore[arg-type]


def texts(results: list) -> list[str]:
    return [demo_tokens().decode(result.tokens).strip() for result in results]


def test_only_failing_windows_are_decoded_again() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return hypothesis(LOOP if row == 1 and request.temperature < 0.4 else GOOD)

    engine = FakeEngine(script)
    results = decoder().decode(engine, windows(3), "en")
    assert engine.batches == [[0, 1, 2], [1], [1]]
    assert [request.temperature for request in engine.requests] == [0.0, 0.2, 0.4]
    assert [result.temperature for result in results] == [0.0, 0.4, 0.0]
    assert texts(results) == ["the cat sat on the mat"] * 3
    assert engine.n_encoded == 3, "nothing is encoded twice"


@pytest.mark.parametrize(
    ("avg_logprob", "no_speech", "n_attempts", "is_empty"),
    [
        (-0.5, 0.0, 1, False),
        (-0.5, 0.9, 1, False),  # sure of its words: 'no speech' alone does not silence it
        (-1.5, 0.0, 6, False),
        (-1.5, 0.9, 1, True),  # silence: neither decoded again nor kept
        (-1.0, 0.9, 1, False),  # the limit itself passes
    ],
)
def test_thresholds_follow_whisper(avg_logprob: float, no_speech: float, n_attempts: int, is_empty: bool) -> None:
    engine = FakeEngine(always(GOOD, avg_logprob=avg_logprob), no_speech=no_speech)
    (result,) = decoder().decode(engine, windows(1), "en")
    assert len(engine.requests) == n_attempts
    assert (result.tokens == ()) is is_empty
    assert result.no_speech_prob == pytest.approx(no_speech, abs=1e-4)


def test_when_every_temperature_fails_the_best_attempt_is_kept_and_said() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        if request.temperature == 0.6:
            return hypothesis(GOOD, avg_logprob=-1.2)
        return hypothesis(LOOP, avg_logprob=-0.1)

    taking = decoder()
    (result,) = taking.decode(FakeEngine(script), windows(1), "en")
    assert result.temperature == 0.6
    assert len(taking.warnings) == 1 and "0:00 to 0:04" in taking.warnings[0]


def test_beams_only_at_temperature_zero() -> None:
    engine = FakeEngine(always(GOOD, avg_logprob=-2.0))
    decoder(beam_size=5).decode(engine, windows(1), "en")
    assert [request.beam_size for request in engine.requests] == [5, 1, 1, 1, 1, 1]


def test_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        if len(request.prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hypothesis((0.0, f"window {row % 100}", 2.0))

    engine, taking = FakeEngine(script), decoder()
    results = taking.decode(engine, windows(8), "en")
    assert [result.window.index for result in results] == list(range(8))
    assert max(len(batch) for batch in engine.batches[2:]) == 2
    assert taking.batch_limit == 2
    assert any("8 windows at once" in warning for warning in taking.warnings)
    n_requests = len(engine.requests)
    taking.decode(engine, windows(4), "en")
    assert all(len(request.prompts) <= 2 for request in engine.requests[n_requests:]), "the limit is remembered"


def test_out_of_memory_with_one_window_is_an_error_with_advice() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="smaller precision or model"):
        decoder().decode(FakeEngine(script), windows(2), "en")


def test_cancelling_stops_between_attempts() -> None:
    engine = FakeEngine(always(GOOD, avg_logprob=-2.0))
    taking = Decoder(demo_tokens(), TranscribeOptions(), should_stop=lambda: len(engine.requests) == 2)
    with pytest.raises(CancelledError):
        taking.decode(engine, windows(1), "en")
    assert len(engine.requests) == 2
    assert engine.requests[0].should_stop is taking.should_stop


@pytest.mark.parametrize("where", ["first_logits", "generate"])
def test_numbers_that_are_not_finite_are_said_and_not_sampled_from(where: str) -> None:
    engine = FakeEngine(always(GOOD, avg_logprob=math.nan), not_finite=where == "first_logits")
    taking = decoder()
    (result,) = taking.decode(engine, windows(1), "en")
    assert result.tokens == ()
    assert len(engine.requests) == (0 if where == "first_logits" else 1)
    assert len(taking.warnings) == 1 and "not finite at precision fp32" in taking.warnings[0]
    assert taking.not_finite == taking.warnings[0] and "itself is damaged" in taking.not_finite


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp16", "use bf16 or fp32 for this"), ("int8", "use bf16 or fp32"), ("bf16", "use fp32")]
)
def test_no_precision_is_recommended_against_itself(precision: str, advice: str) -> None:
    taking = decoder()
    engine = FakeEngine(always(GOOD), not_finite=True, report=fake_report(effective=precision))
    taking.decode(engine, windows(1), "en")
    assert advice in taking.not_finite and f"at precision {precision}," in taking.not_finite


def test_text_that_ran_out_of_tokens_is_continued_from_its_last_timestamp() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        if row == 0:
            return hypothesis((0.0, "the first half", 1.5), (1.5, "cut in the mid", None), finished=False)
        return hypothesis((0.0, "the second half", 2.0))

    results = decoder().decode(FakeEngine(script), windows(1), "en")
    assert texts(results) == ["the first half", "the second half"]
    assert [result.window.start_s for result in results] == [0.0, 1.5]
    assert results[1].window.samples.size == round(2.5 * 16_000)


def test_a_hypothesis_without_a_timestamp_to_continue_from_is_kept_as_it_is() -> None:
    results = decoder().decode(FakeEngine(always((0.0, "no end", None), finished=False)), windows(1), "en")
    assert texts(results) == ["no end"]


def test_looking_at_the_language_first_encodes_once() -> None:
    engine, taking, batch = FakeEngine(always(GOOD)), decoder(), windows(2)
    assert taking.first_logits(engine, batch).shape == (2, 6004)
    taking.decode(engine, batch, "en")
    assert engine.n_encoded == 2
    taking.decode(engine, batch, "en")
    assert engine.n_encoded == 4, "what was seen is not kept any longer"


def test_prompt_and_room_for_new_tokens() -> None:
    engine = FakeEngine(always(GOOD))
    decoder(prompt="Sotto, " * 300).decode(engine, windows(1), "de")
    (request,) = engine.requests
    tokens = demo_tokens()
    assert request.prompts[0][0] == tokens.sot_prev
    assert request.prompts[0][-3:] == [tokens.sot, tokens.languages["de"], tokens.transcribe]
    assert len(request.prompts[0]) + request.max_new_tokens <= 448


def test_compression_ratio_tells_repetition() -> None:
    assert compression_ratio("") == 0.0
    assert compression_ratio("the cat sat on the mat") < 2.4 < compression_ratio("again " * 60)
