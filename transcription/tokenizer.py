"""Text <-> token ids of one checkpoint, its special tokens and the languages it knows.

In: a checkpoint folder (tokenizer files, generation_config.json, config.json). Out: a WhisperTokens.

Every Whisper vocabulary has the same order (openai/whisper, tokenizer.py): text, <|endoftext|>, <|startoftranscript|>,
languages, tasks, <|startoflm|>, <|startofprev|>, <|nospeech|>, <|notimestamps|>, then 1501 timestamps, 20 ms each.
The ids differ (99 or 100 languages, English-only, the demo checkpoint's own vocabulary), so they are looked up, never
counted. A checkpoint knows the languages of generation_config.lang_to_id; without that entry, all that are tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import WhisperTokenizer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from errors import ModelUnavailableError, NotWhisperError, OptionError
from model_loader.engine import TokenRules
from model_loader.files import read_object
from transcription.transcript import UNSPACED_LANGUAGES

LANGUAGE_NAMES: dict[str, str] = {code: name.title() for code, name in LANGUAGES.items()}
"""English name by code, for every language any Whisper knows."""

TIMESTAMP_STEP_S = 0.02
"""Seconds between neighbouring timestamp tokens: two encoder input frames of 10 ms."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to whose last token is still to come."""

_LATEST_FIRST_TIMESTAMP = 50
"""The first timestamp is at most 1 s into the window, as in openai/whisper, unless the checkpoint allows more."""


@dataclass(frozen=True, slots=True)
class WhisperTokens:
    """The vocabulary of one checkpoint."""

    eot: int
    sot: int
    sot_prev: int
    no_speech: int
    no_timestamps: int
    transcribe: int | None
    """None, like translate, in English-only checkpoints, whose prompt names no language and no task."""
    translate: int | None
    languages: dict[str, int]
    """Token id by language code; empty for an English-only checkpoint."""
    suppress: tuple[int, ...]
    """Never produced."""
    begin_suppress: tuple[int, ...]
    """Never produced as the first token."""
    latest_first_timestamp: int
    """Highest timestamp index allowed as the first token."""
    _tokenizer: Any = field(repr=False)

    @classmethod
    def from_folder(cls, folder: Path) -> WhisperTokens:
        """Read the files of a checkpoint folder.

        Raises NotWhisperError if its vocabulary is not Whisper's, ModelUnavailableError if a file is damaged.
        """
        try:
            tokenizer = WhisperTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NotWhisperError(
                f"The checkpoint in {folder} has no usable Whisper tokenizer (tokenizer.json, or vocab.json and "
                "merges.txt); fetch the complete checkpoint or choose another model."
            ) from error
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        config = {**_read_settings(folder / "config.json"), **_read_settings(folder / "generation_config.json")}
        ids = _special_ids(vocabulary, folder)
        languages = _known_languages(vocabulary, config)
        return cls(
            **ids,
            transcribe=vocabulary.get("<|transcribe|>") if languages else None,
            translate=vocabulary.get("<|translate|>") if languages else None,
            languages=languages,
            suppress=_suppressed(config.get("suppress_tokens"), ids, languages),
            begin_suppress=tuple(config.get("begin_suppress_tokens") or ()),
            latest_first_timestamp=max(int(config.get("max_initial_timestamp_index") or 0), _LATEST_FIRST_TIMESTAMP),
            _tokenizer=tokenizer,
        )

    @property
    def timestamp_begin(self) -> int:
        """Id of <|0.00|>."""
        return self.no_timestamps + 1

    @property
    def is_multilingual(self) -> bool:
        return bool(self.languages)

    def encode(self, text: str) -> list[int]:
        """Text to ids, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to text; special tokens and timestamps are left out."""
        text_ids = [token for token in tokens if token < self.eot]
        return str(self._tokenizer.decode(text_ids, clean_up_tokenization_spaces=False))

    def timestamp_s(self, token: int) -> float | None:
        """Seconds from the start of the window, or None if the token is no timestamp."""
        if token < self.timestamp_begin:
            return None
        return round((token - self.timestamp_begin) * TIMESTAMP_STEP_S, 2)

    def prompt(self, language: str, task: str, *, previous_text: str = "", limit: int = 223) -> list[int]:
        """The ids that every hypothesis starts with.

        previous_text: words and names, given as the text before this window; its last `limit` tokens are kept.
        """
        start = [self.sot]
        if self.is_multilingual:
            task_id = self.translate if task == "translate" else self.transcribe
            assert task_id is not None
            start += [self.languages[language], task_id]
        if not previous_text.strip():
            return start
        return [self.sot_prev, *self.encode(" " + previous_text.strip())[-limit:], *start]

    def normalise(self, text: str, language: str) -> str:
        """Text as Whisper's published word error rates compare it: numbers, spelling, case and punctuation made equal.

        English has rules of its own; in languages written without spaces every character becomes a word.
        """
        if language == "en":
            spelling = getattr(self._tokenizer, "english_spelling_normalizer", None) or {}
            return str(EnglishTextNormalizer(spelling)(text)).strip()
        return str(BasicTextNormalizer(split_letters=language in UNSPACED_LANGUAGES)(text)).strip()

    def rules(self) -> TokenRules:
        """What a hypothesis may contain, for the engine."""
        return TokenRules(
            eot=self.eot,
            no_timestamps=self.no_timestamps,
            timestamp_begin=self.timestamp_begin,
            suppress=self.suppress,
            begin_suppress=self.begin_suppress,
            max_initial_timestamp_index=self.latest_first_timestamp,
        )

    def resolve_language(self, given: str | None, model: str) -> str | None:
        """A code the checkpoint knows, or None to detect it. Accepts codes and English names; raises OptionError."""
        word = (given or "").strip().lower()
        if word in ("", "auto"):
            return None if self.is_multilingual else "en"
        code = word if word in LANGUAGE_NAMES else TO_LANGUAGE_CODE.get(word)
        known = self.languages or {"en": 0}
        if code in known:
            return str(code)
        names = ", ".join(f"{c} ({LANGUAGE_NAMES.get(c, c)})" for c in sorted(known))
        listed = names if len(known) <= 12 else f"one of its {len(known)} languages, for example en, es, zh"
        raise OptionError(f"{model} does not know the language '{given}'; choose {listed}, or leave it to be detected.")


def _special_ids(vocabulary: dict[str, int], folder: Path) -> dict[str, int]:
    """The tokens every Whisper checkpoint has."""
    try:
        no_timestamps = vocabulary["<|notimestamps|>"]
        return {
            "eot": vocabulary["<|endoftext|>"],
            "sot": vocabulary["<|startoftranscript|>"],
            "sot_prev": vocabulary["<|startofprev|>"],
            "no_timestamps": no_timestamps,
            # Older checkpoints call it <|nocaptions|>; it stands before <|notimestamps|> in all of them.
            "no_speech": vocabulary.get("<|nospeech|>", no_timestamps - 1),
        }
    except KeyError as error:
        raise NotWhisperError(
            f"The tokenizer in {folder} lacks Whisper's special token {error}; choose a Whisper checkpoint."
        ) from error


def _known_languages(vocabulary: dict[str, int], config: dict[str, Any]) -> dict[str, int]:
    """Language code -> token id; empty for English-only checkpoints, whose vocabulary still lists the tokens."""
    if not config.get("is_multilingual", int(config.get("vocab_size", 0)) != 51864):
        return {}
    listed: dict[str, int] = config.get("lang_to_id") or {
        word: token for word, token in vocabulary.items() if re.fullmatch(r"<\|\w{2,3}\|>", word)
    }
    codes = {word.strip("<|>"): token for word, token in listed.items()}
    return {code: token for code, token in codes.items() if code in LANGUAGE_NAMES}


def _suppressed(listed: list[int] | None, ids: dict[str, int], languages: dict[str, int]) -> tuple[int, ...]:
    """The checkpoint's list, plus the special tokens that never belong into a hypothesis."""
    never = {ids["sot"], ids["sot_prev"], ids["no_speech"], *languages.values()}
    return tuple(sorted(never.union(token for token in listed or () if token >= 0)))


def _read_settings(path: Path) -> dict[str, Any]:
    """An object, or an empty one where the file is missing: generation_config.json is optional.

    Raises ModelUnavailableError if it is none, or what is read here is not what Whisper has there.
    """
    settings = read_object(path) if path.is_file() else {}
    for key, is_right in _SETTINGS.items():
        if settings.get(key) is not None and not is_right(settings[key]):
            raise ModelUnavailableError(
                f"{path} is damaged: {key} is {json.dumps(settings[key])[:60]}. Fetch the model again, or choose "
                "another one."
            )
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "suppress_tokens": _are_numbers,
    "begin_suppress_tokens": _are_numbers,
    "max_initial_timestamp_index": _is_number,
    "lang_to_id": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "vocab_size": _is_number,
}
"""What is read of the files, where it is there."""
