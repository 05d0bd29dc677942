"""The accuracy benchmark on the demo model: counting, drift, and the figures of a few recordings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.accuracy import Tally, main, read_recordings


def test_errors_are_summed_before_dividing() -> None:
    tally = Tally()
    tally.add("one two three four", "one too three four")  # 1 of 4
    tally.add("yes", "no yes")  # 1 of 1
    assert (tally.n_errors, tally.n_words, tally.percent) == (2, 5, 40.0)


def test_a_limit_takes_both_kinds_of_each_language(root: Path) -> None:
    few = read_recordings(root / "benchmarks" / "heldout", limit=4)
    assert len(few) == len({recording.window.index for recording in few}) == 24
    for language in ("en", "es", "fr", "de", "ru", "zh"):
        assert {r.kind for r in few if r.language == language} == {"common", "natural"}
    assert max(recording.window.samples.size for recording in few) <= 480_000


@pytest.fixture
def few(root: Path, tmp_path: Path) -> Path:
    """A held-out set of two recordings, the shortest English one and the shortest Mandarin one."""
    heldout = root / "benchmarks" / "heldout"
    manifest = json.loads((heldout / "manifest.json").read_text(encoding="utf-8"))
    rows = [row for row in manifest if row["file"] in ("en-common-02.opus", "zh-common-08.opus")]
    (tmp_path / "manifest.json").write_text(json.dumps(rows))
    for row in rows:
        shutil.copy(heldout / row["file"], tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_demo_model_hears_nearly_everything_in_fp32_and_bf16(
    few: Path, short_demo: Path, short_windows: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The yardstick end to end: real weights, real recordings. bf16 is asked for first; fp32 still is the reference."""
    options = ["--model", str(short_demo), "--heldout", str(few), "--limit", "1", "--device", "cpu"]
    assert main(["--precisions", "bf16,fp32", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    fp32, bf16 = json.loads(lines[-1])["results"]
    assert (fp32["precision"], fp32["effective"]) == ("fp32", "fp32")
    assert fp32["wer"] < 8 and abs(bf16["wer"] - fp32["wer"]) < 3
    assert fp32["language_found"] == bf16["language_found"] == 100
    assert (fp32["drift"], fp32["n_identical"]) == (0.0, 2)
    assert bf16["drift"] < 4 and bf16["n_identical"] >= 1
    assert lines[-2].startswith("bf16")


def test_an_unknown_precision_is_a_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--precisions", "fp33"]) == 2
    assert "fp33" in capsys.readouterr().err
