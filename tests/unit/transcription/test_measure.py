"""What a measured row says of the weights that made it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.fakes import fake_report
from transcription import measure
from transcription.options import TranscribeOptions


def test_a_row_names_its_weights_by_commit_or_by_their_hash(tmp_path: Path) -> None:
    """As sha256sum gives it, of one file and of several; nothing is read where a commit says it."""
    order, steps = measure.MeasureOrder(b"", TranscribeOptions(), "demo", "fp32", ""), []
    report = fake_report(revision="0123abcd", folder=tmp_path)
    assert measure._identified(order, report, steps.append) == {"model": "demo", "revision": "0123abcd"}
    assert steps == []
    report = fake_report(revision=None, folder=tmp_path)
    assert measure._identified(order, report, steps.append)["revision"] is None
    (tmp_path / "model-00002.safetensors").write_bytes(b"two")
    two = hashlib.sha256(b"two").hexdigest()
    assert measure._identified(order, report, steps.append)["revision"] == f"sha256:{two[:16]}"
    (tmp_path / "model-00001.safetensors").write_bytes(b"one")
    lines = f"{hashlib.sha256(b'one').hexdigest()}  model-00001.safetensors\n{two}  model-00002.safetensors\n"
    both = hashlib.sha256(lines.encode()).hexdigest()
    assert measure._identified(order, report, steps.append)["revision"] == f"sha256:{both[:16]}"
