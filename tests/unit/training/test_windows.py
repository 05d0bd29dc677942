"""Planned windows: labels against sound, and how sound and features are put together. No synthesiser needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from audio.features import LogMel
from training.augment import Augmenter, TrainingLogMel, compose
from training.dataset import MOST_CTC_TOKENS, MOST_DECODER_TOKENS, Planner, SpeechStore, WindowBatch
from training.speech import DEMO, ShardWriter
from training.synthesis import Utterance
from training.units import Unit
from transcription.tokenizer import WhisperTokens

N_UTTERANCES = 12
UNITS = (Unit(" seven", "seven"), Unit(" green", "green"), Unit(" boats.", "boats"))


@pytest.fixture(scope="module")
def words() -> WhisperTokens:
    return WhisperTokens.from_folder(DEMO)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, words: WhisperTokens) -> SpeechStore:
    """Two shards of utterances of 1.5 s; the samples of utterance k all have the value 100 * (k + 1)."""
    folder = tmp_path_factory.mktemp("speech")
    for shard_index in range(2):
        with (folder / f"shard_{shard_index:02d}.pcm").open("wb") as pcm:
            shard = ShardWriter(pcm, words)
            for index in range(N_UTTERANCES // 2):
                value = 100 * (shard_index * N_UTTERANCES // 2 + index + 1)
                samples = np.full(24_000, value, np.int16)
                utterance = Utterance(samples, (0, 8_000, 16_000), (8_000, 16_000, 24_000))
                shard.add(utterance, UNITS, "en" if index % 2 else "fr")
        shard.write_index(folder / f"shard_{shard_index:02d}.npz")
    return SpeechStore(folder)


def windows(store: SpeechStore, words: WhisperTokens, count: int, window_s: float) -> list:  # type: ignore[type-arg]
    planner, rng = Planner(store, words), np.random.default_rng(0)
    return [planner.window(rng, window_s) for _ in range(count)]


def test_the_store_finds_utterances_of_all_shards(store: SpeechStore, words: WhisperTokens) -> None:
    sound = store.sound(torch.device("cpu"))
    assert store.n_samples == len(sound) == N_UTTERANCES * 24_000
    for utterance in range(N_UTTERANCES):
        offset = int(store.offsets[utterance])
        assert (sound[offset : offset + 24_000] == 100 * (utterance + 1)).all()
        assert words.decode(store.utterance_tokens(utterance)) == " seven green boats."


@pytest.mark.parametrize("window_s", [6.0, 30.0])
def test_labels_match_what_sounds_in_the_window(store: SpeechStore, words: WhisperTokens, window_s: float) -> None:
    seen_timestamps = seen_silence = seen_cut = 0
    for plan in windows(store, words, 150, window_s):
        assert len(plan.spans) == len(plan.labels)
        text = [token for token in plan.labels if token < words.eot]
        assert text == plan.text[: len(text)]  # of a segment that the window's end cuts off only the start is told
        assert text == plan.text or (plan.timestamps and plan.segments[-1].is_cut)
        times = [words.timestamp_s(token) for token in plan.labels if token >= words.timestamp_begin]
        assert times == sorted(times)
        assert all(0 <= time <= window_s for time in times)
        for token, (start_s, end_s) in zip(plan.labels, plan.spans, strict=True):
            if token < words.eot:
                assert -0.03 <= start_s < end_s <= window_s + 0.03
        seen_timestamps += bool(times)
        seen_silence += plan.is_silent
        seen_cut += any(segment.is_cut for segment in plan.segments)
    assert seen_timestamps > 40 and seen_silence > 0 and seen_cut > 10


def test_a_batch_is_shifted_by_one_and_learns_only_behind_the_prompt(store: SpeechStore, words: WhisperTokens) -> None:
    planner = Planner(store, words, prompts=1.0, silence=0.0)
    batch = planner.batch(np.random.default_rng(2), 16, 30.0)
    assert batch.inputs.shape == batch.labels.shape and batch.inputs.shape[1] <= MOST_DECODER_TOKENS
    assert batch.text.shape[1] <= MOST_CTC_TOKENS
    for inputs, labels in zip(batch.inputs, batch.labels, strict=True):
        assert int(inputs[0]) == words.sot_prev
        sot = int((inputs == words.sot).nonzero()[0])
        assert (labels[:sot] == -100).all()
        assert int(labels[sot]) == int(inputs[sot + 1]) in words.languages.values()
        assert int(labels[sot + 1]) == words.transcribe
        learnt = (labels >= 0).nonzero().flatten()
        last = int(learnt[-1])
        assert int(labels[last]) == words.eot
        shifted = [i for i in learnt.tolist() if i < last]
        assert labels[shifted].tolist() == inputs[[i + 1 for i in shifted]].tolist()


def test_a_silent_window_is_labelled_no_speech(store: SpeechStore, words: WhisperTokens) -> None:
    batch = Planner(store, words, silence=1.0).batch(np.random.default_rng(2), 4, 6.0)
    assert (batch.labels[:, 0] == words.no_speech).all()
    assert not compose(store.sound(torch.device("cpu")), batch).any()
    assert (batch.text_lengths == 0).all()


def one_window(offset: int, length: int, start: int, *, speed: float = 1.0, window_s: float = 4.0) -> WindowBatch:
    nothing = torch.zeros((1, 1), dtype=torch.long)
    never = 1 << 30
    return WindowBatch(
        window_s,
        torch.tensor([[offset, 0]]),
        torch.tensor([[length, 0]]),
        torch.tensor([[start, never]]),
        torch.tensor([speed]),
        nothing,
        nothing,
        torch.zeros((1, 1, 2)),
        nothing,
        torch.zeros(1, dtype=torch.long),
    )


def test_compose_puts_an_utterance_where_it_belongs() -> None:
    sound = torch.arange(32_000, dtype=torch.int16)
    out = compose(sound, one_window(offset=1_000, length=8_000, start=16_000))[0] * 32768
    assert out.shape == (64_000,)
    assert not out[:16_000].any() and not out[24_000:].any()
    assert torch.equal(out[16_000:23_999], torch.arange(1_000, 8_999).float())


def test_compose_begins_inside_an_utterance_that_starts_before_the_window() -> None:
    sound = torch.arange(32_000, dtype=torch.int16)
    out = compose(sound, one_window(offset=0, length=20_000, start=-5_000))[0] * 32768
    assert torch.equal(out[:100], torch.arange(5_000, 5_100).float())


def test_compose_reads_faster_at_a_higher_speed() -> None:
    sound = torch.arange(32_000, dtype=torch.int16)
    out = compose(sound, one_window(offset=0, length=20_000, start=0, speed=1.25))[0] * 32768
    assert out[8_000] == pytest.approx(10_000, abs=1)
    assert not out[16_001:].any()


def test_training_features_equal_those_of_the_program() -> None:
    waveform = torch.randn(1, 480_000, generator=torch.Generator().manual_seed(1)) * 0.1
    ours = TrainingLogMel(80)(waveform)
    assert torch.allclose(ours, LogMel(80)([waveform[0].numpy()]), atol=1e-4)


def test_a_louder_passage_elsewhere_raises_the_floor() -> None:
    waveform = torch.zeros(1, 16_000)
    waveform[:, 8_000:8_400] = 0.5
    log_mel = TrainingLogMel(80)
    assert log_mel(waveform, torch.ones(1, 1, 1)).min() > log_mel(waveform).min()


def test_augmentation_disturbs_but_stays_in_range_and_is_reproducible() -> None:
    waveform = torch.sin(torch.arange(32_000) / 8).repeat(8, 1) * 0.3
    results = []
    for _ in range(2):
        augment = Augmenter(torch.device("cpu"), torch.Generator().manual_seed(5))
        results.append(augment(waveform))
    assert torch.equal(results[0], results[1])
    assert results[0].abs().max() <= 1 and results[0].isfinite().all()
    assert not torch.allclose(results[0], waveform)


def test_masks_cover_a_part_of_the_features() -> None:
    features = torch.randn(8, 80, 600)
    masked = Augmenter(torch.device("cpu"), torch.Generator().manual_seed(5)).mask(features)
    share = (masked != features).float().mean().item()
    assert 0.01 < share < 0.4


def test_a_folder_without_speech_is_named(tmp_path: Path) -> None:
    from errors import MachineError

    with pytest.raises(MachineError, match=r"training\.speech"):
        SpeechStore(tmp_path)
