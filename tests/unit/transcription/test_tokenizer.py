"""The vocabulary of a checkpoint: the demo's own, English-only ones, and folders that lack files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errors import ModelUnavailableError, NotWhisperError, OptionError
from tests.fakes import DEMO, demo_tokens
from transcription.tokenizer import LANGUAGE_NAMES, WhisperTokens

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "normalizer.json", "config.json")


def make_folder(folder: Path, generation: dict | None) -> Path:
    """The demo's tokenizer with another generation_config.json, or none."""
    for name in FILES:
        shutil.copy(DEMO / name, folder / name)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def test_special_tokens_are_looked_up() -> None:
    tokens = demo_tokens()
    assert (tokens.eot, tokens.sot, tokens.sot_prev) == (4396, 4397, 4500)
    assert (tokens.no_speech, tokens.no_timestamps, tokens.timestamp_begin) == (4501, 4502, 4503)
    assert set(tokens.languages) == {"de", "en", "es", "fr", "ru", "zh"}, "only what the checkpoint was trained on"


@pytest.mark.parametrize("text", ["The cat sat.", "Größe", "С добрым утром", "今天天气很好", "naïve café, 7:30"])
def test_text_survives_the_round_trip(text: str) -> None:
    tokens = demo_tokens()
    assert tokens.decode(tokens.encode(text)) == text


def test_special_tokens_and_timestamps_are_not_text() -> None:
    tokens = demo_tokens()
    ids = [tokens.timestamp_begin, *tokens.encode(" hello"), tokens.timestamp_begin + 100, tokens.eot]
    assert tokens.decode(ids) == " hello"
    assert [tokens.timestamp_s(i) for i in (ids[0], ids[1], ids[-2])] == [0.0, None, 2.0]


def test_prompt_names_language_and_task() -> None:
    tokens = demo_tokens()
    assert tokens.prompt("fr", "transcribe") == [4397, 4404, 4498]
    assert tokens.prompt("fr", "translate") == [4397, 4404, 4497]
    with_text = tokens.prompt("en", "transcribe", previous_text="Sotto and Whisper", limit=3)
    assert with_text[0] == tokens.sot_prev and with_text[4:] == tokens.prompt("en", "transcribe")
    assert with_text[1:4] == tokens.encode(" Sotto and Whisper")[-3:]


def test_english_only_checkpoint_names_neither(tmp_path: Path) -> None:
    tokens = WhisperTokens.from_folder(make_folder(tmp_path, {"is_multilingual": False}))
    assert tokens.prompt("en", "transcribe") == [tokens.sot]
    assert not tokens.is_multilingual and tokens.translate is None
    assert tokens.resolve_language(None, "x.en") == "en"
    with pytest.raises(OptionError, match="en \\(English\\)"):
        tokens.resolve_language("de", "x.en")


def test_without_a_language_list_every_language_token_counts(tmp_path: Path) -> None:
    tokens = WhisperTokens.from_folder(make_folder(tmp_path, None))
    assert len(tokens.languages) == 99 and tokens.languages["ja"] > tokens.sot
    assert tokens.latest_first_timestamp == 50
    assert set(tokens.languages.values()) < set(tokens.suppress), "a language token is never part of a text"


def test_rules_forbid_special_tokens() -> None:
    rules = demo_tokens().rules()
    assert {4397, 4500, 4501} < set(rules.suppress)
    assert rules.begin_suppress == (220,)
    assert not any(token < rules.eot for token in rules.suppress)


@pytest.mark.parametrize(
    ("given", "code"),
    [(None, None), ("", None), ("auto", None), ("en", "en"), ("EN", "en"), ("German", "de"), ("mandarin", "zh")],
)
def test_language_may_be_given_by_code_or_name(given: str | None, code: str | None) -> None:
    assert demo_tokens().resolve_language(given, "demo") == code


@pytest.mark.parametrize("given", ["ja", "klingon", "e n"])
def test_a_language_the_checkpoint_does_not_know_is_refused_with_the_list(given: str) -> None:
    with pytest.raises(OptionError, match=rf"demo does not know the language '{given}'.*de \(German\)"):
        demo_tokens().resolve_language(given, "demo")


def test_folder_without_a_whisper_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotWhisperError):
        WhisperTokens.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ('{"suppress_tokens": "1"}', "suppress_tokens is"),
        ('{"begin_suppress_tokens": ["x"]}', "begin_suppress_tokens is"),
        ('{"lang_to_id": [1]}', "lang_to_id is"),
        ('{"max_initial_timestamp_index": true}', "max_initial_timestamp_index is true"),
    ],
)
def test_a_damaged_generation_config_is_a_sentence(content: str, part: str, tmp_path: Path) -> None:
    (make_folder(tmp_path, None) / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelUnavailableError, match=rf"generation_config\.json .*{part}"):
        WhisperTokens.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Mr. Smith's colour isn't $20.", "en", "mister smith is color is not $20"),
        ("Grüß Gott, Welt!", "de", "grüß gott welt"),
        ("你好，世界", "zh", "你 好 世 界"),
    ],
)
def test_normalisation_is_whispers_own(text: str, language: str, expected: str) -> None:
    assert demo_tokens().normalise(text, language) == expected


def test_every_language_has_a_name() -> None:
    assert len(LANGUAGE_NAMES) == 100 and LANGUAGE_NAMES["yue"] == "Cantonese"
