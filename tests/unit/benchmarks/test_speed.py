"""The benchmarks of speed and load from end to end on the least shape: what their last line of JSON holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import load, speed
from benchmarks.shapes import make_checkpoint

SMALL = ["--shape", "least", "--device", "cpu", "--tokens", "2"]
CIRCUMSTANCES = {"benchmark", "date", "model", "device", "driver", "python", "packages"}


@pytest.fixture(scope="module", autouse=True)
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Written once for both."""
    folder = make_checkpoint("least", tmp_path_factory.mktemp("least"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (load, speed):
            patch.setattr(module, "make_checkpoint", lambda shape, place: folder)
        yield


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
    assert text["clip_s"] == 27.0 and text["text_ms"] > 0
    assert lines[0].split()[:3] == ["engine", "precision", "batch"]
    assert sum("times as fast" in line for line in lines) == 1


def test_load_has_a_row_for_each_number_of_clients_and_of_windows(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main([*SMALL, "--clients", "1,2", "--each", "1", "--windows", "2,4"]) == 0
    lines, found = last_line(capsys)
    assert CIRCUMSTANCES | {"row", "rows", "tokens", "clients", "growth"} <= set(found)
    assert [(row["clients"], row["windows"]) for row in found["clients"]] == [(1, 1), (2, 2)]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] and row["rtf"] > 0 for row in found["clients"])
    assert [(row["windows"], row["sound"], row["tokens"]) for row in found["growth"]] == [
        (2, "1 min", 4), (4, "2 min", 8),
    ]  # fmt: skip
    assert all(row["MiB"] > 0 and row["s_a_window"] > 0 for row in found["growth"])
    assert lines[0].split() == list(found["clients"][0])
