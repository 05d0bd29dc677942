"""What the benchmark of speed does for its real-time factor."""

from __future__ import annotations

from typing import Any

from benchmarks.speed import random_waveforms, transcribe
from model_loader.engine import GenerateRequest, TokenSequence
from tests.fakes import FakeSharedEngine, demo_tokens


def test_the_whole_path_is_from_waveforms_to_text() -> None:
    """Ids of a larger vocabulary become text too, so that no work is left out."""
    tokens = demo_tokens()
    said = tokens.encode(" good morning")

    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return TokenSequence([said[0], *(token + 10 * tokens.eot for token in said[1:])], -0.1, len(said), True)

    engine: Any = FakeSharedEngine(script)
    prompt = tokens.prompt("en", "transcribe")
    request = GenerateRequest([prompt, prompt], 8, tokens.rules())
    assert transcribe(engine, random_waveforms(2), request, tokens) == [" good morning"] * 2
    features = [order.features for _, order, _ in engine.orders]
    assert [list(each.shape) for each in features] == [[80, 3000]] * 2 and not features[0].equal(features[1])
