"""What the benchmark of many callers says of its figures."""

from __future__ import annotations

import json

import pytest

from benchmarks import load


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(40, 0, -1)]
    assert load.nearest_rank(values, 0.95) == 38 and load.nearest_rank(values, 0.5) == 20
    assert load.nearest_rank(values[:10], 0.95) == 40, "of ten values the largest"
    assert load.nearest_rank([3.0], 0.5) == 3


def test_growth_clients_and_fairness_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "FAIR_SAMPLES", 1)
    monkeypatch.setattr(load, "MIN_SAMPLES", 2)
    arguments = ["--shape", "least", "--device", "cpu", "--windows", "2,1", "--clients", "2", "--each", "1"]
    assert load.main([*arguments, "--behind", "6", "--tokens", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["windows"] for line in found["growth"]] == [1, 2], "shortest first"
    assert [line["tokens"] for line in found["growth"]] == [2, 4]
    assert all(line["RSS_MiB"] > 0 and line["MiB"] > 0 for line in found["growth"])
    (clients,) = found["clients"]
    assert clients["windows"] == 2 and clients["p95_ms"] >= clients["p50_ms"] > 0
    assert [(line["window"], line["where"]) for line in found["fairness"]] == [
        ("clip", "alone"), ("urgent", "alone"), ("clip", "behind 6 windows"), ("urgent", "behind 6 windows"),
    ]  # fmt: skip
    assert all(line["samples"] >= 1 and line["worst_times"] >= line["p50_times"] > 0 for line in found["fairness"])
