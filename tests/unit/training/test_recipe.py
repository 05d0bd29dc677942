"""Every stage of the recipe at toy size, end to end: text, speech, training, resuming, export, evaluation."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errors import UnknownModelError
from training.evaluate import evaluate
from training.export import export
from training.model import ModelSize, build_model
from training.speech import DEMO, make_speech
from training.synthesis import Synthesizer
from training.text import build_lines, write_lines
from training.train import CHECKPOINT, Plan, train
from training.units import LANGUAGES
from transcription.tokenizer import WhisperTokens

TINY = ModelSize(d_model=32, encoder_layers=1, decoder_layers=2, heads=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, synthesizer: Synthesizer) -> Path:
    """A run with text and about half a minute of speech."""
    folder = tmp_path_factory.mktemp("run")
    for language in LANGUAGES:
        write_lines(folder / "text", language, build_lines(language, n_grammar=30))
    hours = make_speech(folder, hours=0.02, minutes=1, n_workers=1)
    assert set(hours) == set(LANGUAGES) and sum(hours.values()) >= 0.02
    return folder


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    torch.manual_seed(0)
    plan = Plan(work, minutes=60, phases=((6.0, 0.7), (12.0, 0.3)), batch_size=1, size=TINY, log_every=1, max_steps=5)
    with pytest.MonkeyPatch.context() as patch:  # five steps learn little: the same windows every time
        patch.setattr("training.train.time.time_ns", count(1).__next__)
        first = train(Plan(work, minutes=60, phases=((6.0, 1.0),), batch_size=1, size=TINY, log_every=1, max_steps=1))
        assert torch.load(work / CHECKPOINT, weights_only=True)["step"] == 1
        last = train(plan)  # goes on where the first call ended
    state = torch.load(work / CHECKPOINT, weights_only=True)
    assert state["step"] == 5
    assert last["decoder"] < first["decoder"], (first, last)
    return work


def test_speech_that_exists_is_kept(work: Path) -> None:
    before = (work / "speech" / "shard_00.pcm").stat().st_mtime_ns
    make_speech(work, hours=5, minutes=5, n_workers=1)
    assert (work / "speech" / "shard_00.pcm").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_export_is_a_checkpoint_that_transformers_and_the_evaluation_load(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate._MOST_TOKENS", 20)  # it finds no end
    folder = tmp_path / "model"
    export(trained, folder)
    assert json.loads((folder / "generation_config.json").read_text())["alignment_heads"] == [[0, 0], [1, 0]]
    assert max(file.stat().st_size for file in folder.iterdir()) < 16_000_000
    result = evaluate(folder, limit=1)
    assert set(result.by_language) == set(LANGUAGES)
    assert all(score.n_words > 0 for score in result.by_language.values())
    assert sum(score.n_errors for score in result.by_language.values()) > 0  # five steps teach nobody to listen
    assert result.n_quiet == 4


def test_the_export_holds_the_running_mean_not_the_last_weights(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    state = torch.load(trained / CHECKPOINT, weights_only=True)
    words = WhisperTokens.from_folder(DEMO)
    model = build_model(TINY, words, n_vocab=words.timestamp_begin + 1501)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    means = dict(zip(names, state["mean"], strict=False))
    assert len(means) > 30
    for name, mean in means.items():
        assert torch.equal(exported[name], mean.half())
    assert any(not torch.equal(mean, state["model"][name]) for name, mean in means.items())


def test_export_without_training_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"training\.train"):
        export(tmp_path, tmp_path / "model")
