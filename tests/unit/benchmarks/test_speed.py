"""The benchmark of speed from end to end on the least shape, and what it does for its real-time factor."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import speed
from benchmarks.speed import random_waveforms, transcribe
from model_loader.engine import GenerateRequest, TokenSequence
from tests.fakes import FakeSharedEngine, demo_tokens

SMALL = ["--shape", "least", "--device", "cpu", "--tokens", "2"]
CIRCUMSTANCES = {"benchmark", "date", "model", "device", "driver", "python", "packages"}


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """(what was printed above it, the JSON)."""
    *lines, last = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(last)
    return lines, found


def test_speed_has_a_row_for_each_engine_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """The fast engine and transformers; other Whispers are not installed everywhere."""
    skip = ["--skip", "compiled,bnb-int8,bnb-nf4,openai,faster"]
    assert speed.main([*SMALL, "--rows", "fp32", "--batches", "1", "--repeats", "1", *skip]) == 0
    lines, found = last_line(capsys)
    assert CIRCUMSTANCES | {"rows", "captures", "first_text", "missing", "tokens", "repeats"} <= set(found)
    rows = found["rows"]
    assert [(r["engine"], r["row"], r["batch"]) for r in rows] == [("fast", "fp32", 1), ("transformers", "fp32", 1)]
    for row in rows:
        assert min(row[key] for key in ("token_ms", "encoder_ms", "rtf", "window_ms")) > 0
        assert {"token_spread_ms", "encoder_spread_ms"} <= set(row)
        assert not {"floor_ms", "floor_share", "encoder_share"} & set(row), "bandwidth and FLOPs are a GPU's"
    assert "step_ms" in rows[0] and found["missing"] == {}
    text = found["first_text"]["fp32"]
    assert text["clip_s"] == 27.0 and text["told"]["text_ms"] > 0 and text["default"]["text_ms"] > 0
    assert lines[0].split()[:3] == ["engine", "precision", "batch"]
    assert sum("times as fast" in line for line in lines) == 1


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
