"""The example recordings and the held-out set against their manifests, and the example script."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio.constants import SAMPLE_RATE
from audio.decode import decode_all

LANGUAGES = ("en", "es", "fr", "de", "ru", "zh")


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    manifest: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text(encoding="utf8"))
    return manifest


def check_sentences(row: dict[str, Any], samples: np.ndarray) -> None:
    """Sound where the manifest has sentences, silence between them, and texts that add up."""
    glue = "" if row["language"] == "zh" else " "
    assert glue.join(sentence["text"] for sentence in row["sentences"]) == row["text"]
    end_s = 0.0
    for sentence in row["sentences"]:
        assert end_s <= sentence["start_s"] < sentence["end_s"] <= row["seconds"] + 0.01
        spoken = samples[round(sentence["start_s"] * SAMPLE_RATE) : round(sentence["end_s"] * SAMPLE_RATE)]
        pause = samples[round(end_s * SAMPLE_RATE) + 800 : round(sentence["start_s"] * SAMPLE_RATE) - 800]
        assert np.sqrt(np.mean(spoken**2)) > 0.02
        assert pause.size == 0 or np.sqrt(np.mean(pause**2)) < 0.005
        end_s = sentence["end_s"]


def test_there_is_an_example_for_each_language_and_a_long_one(root: Path) -> None:
    manifest = read_manifest(root / "examples")
    short = [row for row in manifest if row["seconds"] <= 16]
    assert sorted(row["language"] for row in short) == sorted(LANGUAGES)
    long = [row for row in manifest if row["seconds"] > 60]
    assert len(long) == 1 and 120 <= long[0]["seconds"] <= 180
    pauses = np.diff([x for s in long[0]["sentences"] for x in (s["start_s"], s["end_s"])])[1::2]
    assert (pauses > 3).sum() >= 3 and (pauses < 0.5).sum() >= 3
    assert len({sentence["voice"] for sentence in long[0]["sentences"]}) >= 3


def test_examples_are_what_the_manifest_says(root: Path) -> None:
    folder = root / "examples"
    manifest = read_manifest(folder)
    assert {row["file"] for row in manifest} == {file.name for file in folder.glob("*.flac")}
    for row in manifest:
        assert row["label"] and row["voice"] and row["licence"]
        samples = decode_all(folder / row["file"])
        assert samples.size / SAMPLE_RATE == pytest.approx(row["seconds"], abs=0.01)
        check_sentences(row, samples)


def test_the_example_texts_are_those_of_the_scripts(root: Path) -> None:
    scripts = tomllib.loads((root / "examples" / "scripts.toml").read_text(encoding="utf8"))["recording"]
    by_file = {row["file"]: row for row in read_manifest(root / "examples")}
    assert {script["file"] for script in scripts} == set(by_file)
    for script in scripts:
        assert len(script["lines"]) == len(by_file[script["file"]]["sentences"])


def test_the_held_out_set_is_complete_and_small(root: Path) -> None:
    folder = root / "benchmarks" / "heldout"
    manifest = read_manifest(folder)
    assert {row["file"] for row in manifest} == {file.name for file in folder.glob("*.opus")}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    sentences = tomllib.loads((folder / "sentences.toml").read_text(encoding="utf8"))
    for language in LANGUAGES:
        rows = [row for row in manifest if row["language"] == language]
        for kind, texts in sentences[language].items():
            spoken = [s for row in rows if row["kind"] == kind for s in row["sentences"]]
            assert len(spoken) == len(texts)
        assert sum(len(sentence["words"]) for row in rows for sentence in row["sentences"]) > 400
        assert sum(len(row["sentences"]) > 1 for row in rows) >= 6


def test_held_out_recordings_hold_their_sentences_and_words(root: Path) -> None:
    folder = root / "benchmarks" / "heldout"
    for row in read_manifest(folder)[::9]:
        samples = decode_all(folder / row["file"])
        assert samples.size / SAMPLE_RATE == pytest.approx(row["seconds"], abs=0.1)
        assert samples.size <= 30 * SAMPLE_RATE
        check_sentences(row, samples)
        for sentence in row["sentences"]:
            words = sentence["words"]
            assert 0 <= words[0][1] - sentence["start_s"] < 0.15 and words[-1][2] == sentence["end_s"]
            assert all(start_s <= end_s for _, start_s, end_s in words)


@pytest.mark.slow
def test_the_example_script_prints_the_words_of_a_recording(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run as people run it, from another folder, but in this process: its imports cost ten times the work."""
    recording = root / "examples" / "german.flac"
    script = root / "examples" / "transcribe_file.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [str(script.parent), *(place for place in sys.path if place not in ("", str(root)))]
    )
    monkeypatch.setattr(sys, "argv", [str(script), str(recording), "--model", "demo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert sys.path[0] == str(root), "where a new process finds the packages"
    row = next(row for row in read_manifest(root / "examples") if row["file"] == "german.flac")
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line[17:].strip() for line in lines) == row["text"]
    assert float(lines[0].split()[0]) == pytest.approx(row["sentences"][0]["start_s"], abs=0.3)


def test_the_example_script_says_in_a_sentence_what_is_wrong(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transcribe_file.py", str(tmp_path / "nowhere.wav"), "--model", "demo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(root / "examples" / "transcribe_file.py"), run_name="__main__")
    assert ended.value.code == 2 and "nowhere.wav" in capsys.readouterr().err
