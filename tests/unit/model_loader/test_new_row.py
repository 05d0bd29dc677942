"""One row and one function: a made-up precision is in the table, and with no other edit wherever precisions are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch

import app
import cli
from errors import EffectivePrecisionError
from model_loader.convert.cast import load_cast
from model_loader.precision import PRECISIONS, Precision
from settings import Settings
from tests.unit.model_loader.parity import Reference, check_parity
from tests.unit.test_docs import precisions_table
from transcription.interface import Transcriber
from ui.blocks import build_ui
from ui.page import Facts
from ui.tabs import compare, transcribe

NAME, LABEL = "rounded", "rounded · made up for a test"


def round_weights(row: Precision, folder: Path, device: torch.device) -> torch.nn.Module:
    """The one function: weights with bfloat16's bits, kept and multiplied in 32."""
    model = load_cast(row, folder, device)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Precision:
    """The one row."""
    made = replace(PRECISIONS["fp32"], name=NAME, aliases=(), label=LABEL, tolerance=0.05, convert=round_weights)
    monkeypatch.setitem(PRECISIONS, NAME, made)
    return made


@pytest.fixture
def transcriber(tmp_path: Path) -> Iterator[Transcriber]:
    """The app's own, with nothing loaded."""
    found = cli.build_transcriber(Settings(model="demo", device="cpu", offline=True, work_dir=tmp_path))
    yield found
    found.close()


def printed(capsys: pytest.CaptureFixture[str], work: Path, command: str) -> Any:
    argv = [command, "--json", "--model", "demo", "--device", "cpu", "--offline", "--work-dir", str(work)]
    assert cli.main(argv, serve=app.serve, examples=work) == 0
    return json.loads(capsys.readouterr().out)


def test_a_made_up_row_appears_everywhere_with_no_other_edit(
    row: Precision, transcriber: Transcriber, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    short_demo: Path, calibrations: Path, speech_features: torch.Tensor, reference: Reference,
) -> None:  # fmt: skip
    listed = {entry["name"]: entry for entry in printed(capsys, tmp_path, "precisions")}
    assert (listed[NAME]["label"], listed[NAME]["available"]) == (LABEL, True)
    planned = {entry["precision"]: entry for entry in printed(capsys, tmp_path, "plan")["precisions"]}
    assert planned[NAME]["batches"] and planned[NAME]["max_batch"] > 0
    assert f"| `{NAME}` |" in precisions_table()

    facts = Facts.of(transcriber.status())
    assert (LABEL, NAME) in transcribe._menus(facts, "en")[0].choices
    assert (LABEL, NAME) in compare._menus(facts, "en")[0].choices

    async def build() -> gr.Blocks:  # inside a running loop: outside one, Gradio leaves its own open
        return build_ui(transcriber)

    blocks = asyncio.run(build())
    assert f"compare-words-{NAME}" in {block.elem_id for block in blocks.blocks.values()}, "a place for its text"

    check_parity(row, short_demo, calibrations, speech_features, reference)


def test_a_made_up_row_that_does_not_do_what_it_says_is_found_out(
    row: Precision, monkeypatch: pytest.MonkeyPatch, short_demo: Path, calibrations: Path,
    speech_features: torch.Tensor, reference: Reference,
) -> None:  # fmt: skip
    """Else the body could pass over anything."""
    monkeypatch.setitem(PRECISIONS, NAME, replace(row, stored_dtype="bfloat16", convert=PRECISIONS["fp32"].convert))
    with pytest.raises((AssertionError, EffectivePrecisionError)):
        check_parity(replace(row, tolerance=0.0), short_demo, calibrations, speech_features, reference)
