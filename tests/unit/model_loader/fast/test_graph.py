"""When a function is captured; capturing itself needs a GPU (tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from model_loader.fast.graph import Captured


def test_a_first_run_that_failed_is_run_again_before_anything_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are loaded or compiled while capturing would break it."""
    runs: list[str] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        runs.append("run")
        if len(runs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    def capture(arguments: tuple[torch.Tensor, ...]) -> None:
        runs.append("capture")
        raise KeyboardInterrupt

    graph = Captured(work, "an encoder", has_state=False)
    monkeypatch.setattr(graph, "_capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        graph(torch.zeros(1))
    with pytest.raises(KeyboardInterrupt):
        graph(torch.zeros(1))
    assert runs == ["run", "run", "capture"]
