"""Compiled kernels are kept, and the kernel's text is whole; the compiler itself needs a GPU's libraries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_loader.fast import nvrtc
from model_loader.fast.one_launch import SOURCE, unfit
from model_loader.fast.packing import Format
from tests.unit.model_loader.fast.test_one_launch import make_weights


def test_the_text_holds_every_included_file_once() -> None:
    text = nvrtc.expanded(SOURCE)
    assert "#include" not in text and "#pragma once" not in text
    for name in ("struct Shared {", "struct SelfAttention {", "struct Linear {", "DEVICE void mma("):
        assert text.count(name) == 1


def test_a_kernel_is_compiled_once_for_a_text_and_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def compile_(text: str, options: tuple[str, ...]) -> bytes:
        asked.append(options)
        return f"{text} {options}".encode()

    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(nvrtc, "_cache_folder", lambda: tmp_path / "kernels")
    for options in (("-DA=1",), ("-DA=2",), ("-DA=1",)):
        nvrtc.compiled.cache_clear()  # as in a later start
        assert nvrtc.compiled("text", options) == f"text {options}".encode()
    assert asked == [("-DA=1",), ("-DA=2",)]
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    nvrtc.compiled.cache_clear()


def test_a_full_disk_does_not_keep_a_kernel_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(nvrtc, "_compile", lambda text, options: b"code")
    monkeypatch.setattr(nvrtc, "_cache_folder", lambda: tmp_path / "file" / "kernels")
    nvrtc.compiled.cache_clear()
    assert nvrtc.compiled("text", ()) == b"code"
    nvrtc.compiled.cache_clear()


def test_what_does_not_run_in_one_launch_is_told_why() -> None:
    weights = make_weights(Format.FLOAT, torch.float16, 128)
    assert unfit(weights, (8, 0)) is None
    assert "compute capability 7.5 is below 8.0" in str(unfit(weights, (7, 5)))
    assert "compute in 16 bits" in str(unfit(replace(weights, dtype=torch.float32), (9, 0)))
    eight_bits = make_weights(Format.INT8, torch.float16, 128)
    assert unfit(eight_bits, (9, 0)) is None
    assert "bfloat16" in str(unfit(replace(eight_bits, dtype=torch.bfloat16), (9, 0)))
