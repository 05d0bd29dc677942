"""A comparison on a real GPU: every precision in a worker process of its own, and no column left empty.

It listens to an example recording, so ffmpeg and the speech detector are needed here, unlike in the other GPU tests.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model_loader.device import DeviceInfo
from model_loader.memory import read_memory, read_point
from model_loader.pool import EnginePool
from transcription.comparison import COLUMNS, terminal_table
from transcription.interface import CompareRow
from transcription.options import TranscribeOptions
from transcription.pipeline import LocalTranscriber

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(
        not (shutil.which("ffmpeg") or find_spec("imageio_ffmpeg")) or not find_spec("silero_vad"),
        reason="needs ffmpeg and silero-vad, to listen to a recording",
    ),
]

PRECISIONS = ("fp32", "fp16", "int8", "int8-static", "bnb-nf4", "bnb-int8")
FAST = {*PRECISIONS} - {"bnb-int8"}
REPEATS = 3
MIB = 2**20


@pytest.fixture(scope="module")
def rows(gpu: DeviceInfo, calibrations: Path, root: Path) -> dict[str, CompareRow]:
    """The example of two and a half minutes, so that the counter of energy and the meter of use have time to move."""
    pool = EnginePool(device="cuda", offline=True, calibrations=calibrations)
    transcriber = LocalTranscriber(pool, model="demo", precision="fp16", device=gpu, engine="auto")
    text = "Good morning, and welcome to the library."
    names = [name for name in PRECISIONS if not name.startswith("bnb-") or find_spec("bitsandbytes")]
    found: dict[str, CompareRow] = {}
    for row in transcriber.compare(
        root / "examples" / "town-walk.flac", names, TranscribeOptions(), reference_text=text, repeats=REPEATS
    ):
        found[row.precision] = row  # a row comes again once it can be held to the base
    transcriber.close()
    print(terminal_table(list(found.values()), list(found)))
    assert list(found) == names
    return found


def _can_read(name: str) -> bool:
    """Whether this card and driver give the figure at all: containers hide processes, some cards count no energy."""
    torch.zeros(1, device="cuda")
    gpu = next(gpu for gpu in read_memory().gpus if gpu.cuda_index == 0)
    if name == "energy_j":
        return gpu.energy_j is not None
    if name in ("before_bytes", "peak_bytes", "left_bytes"):
        return read_point(torch.device("cuda:0")).process_bytes is not None
    return True


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.key)
def test_every_column_of_every_row_is_measured(column, rows: dict[str, CompareRow]) -> None:
    if not _can_read(column.key):
        pytest.skip(f"this driver gives no {column.key}")
    values = {name: getattr(row, column.key) for name, row in rows.items()}
    assert None not in values.values(), values


def test_every_row_is_what_was_asked_for(rows: dict[str, CompareRow]) -> None:
    for name, row in rows.items():
        assert row.error is None and row.effective == name
        assert row.engine == ("fast" if name in FAST else "reference")
        assert "attention implementation: " in row.proof and row.driver and len(row.warm_runs_s) == REPEATS
        assert row.language == "en" and row.verdict


def test_figures_agree_with_each_other(rows: dict[str, CompareRow]) -> None:
    for row in rows.values():
        assert row.peak_allocated_bytes is not None and row.weights_bytes is not None and row.warm_s is not None
        assert row.peak_allocated_bytes > row.weights_bytes
        if row.peak_bytes is not None:  # the driver's figure holds the context too
            assert row.peak_bytes > row.peak_allocated_bytes + 100 * MIB
        assert row.first_text_s is not None and row.first_text_s <= row.warm_s
        assert row.real_time_factor == pytest.approx((row.audio_s or 0) / row.warm_s)
        assert row.utilisation_percent is None or 0 <= row.utilisation_percent <= 100
        if row.energy_j is not None:  # between an idle card and the most that any card draws
            assert 20 < row.energy_j / row.warm_s < 1500
    weights = {name: row.weights_bytes or 0 for name, row in rows.items()}
    assert weights["int8-static"] < weights["int8"] < weights["fp16"] < weights["fp32"]
