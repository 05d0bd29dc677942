"""A sentence as units: what is written beside what is said, unit by unit.

In: a line of text. Out: units, the atoms that word times are measured for: words, or characters in Mandarin.

Two notations carry what a synthesiser should say where it differs from what is written:
    12~twelve, 9:30~nine_thirty      written~spoken, underscores for blanks (punctuation follows the spoken form)
    你好。<TAB>ni3 hao3.              Mandarin: the characters, a tab, one syllable of pinyin with tone per character
The second exists because eSpeak NG guesses the readings of characters one by one, and guesses many of them wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LANGUAGES = ("en", "es", "fr", "de", "ru", "zh")
"""What the demo model knows, in the order of its shards."""

_CHARACTER = re.compile("[\u4e00-\u9fff][，。？！、]*")
_CHINESE_STOPS = str.maketrans("，、。？！", ",,.?!")


@dataclass(frozen=True, slots=True)
class Unit:
    """One word (with its leading blank, as the vocabulary has it) or one Chinese character."""

    written: str
    spoken: str


def parse_units(line: str, language: str) -> list[Unit]:
    """Split a line. A Mandarin line without pinyin gets it from pypinyin. Raises ValueError if the two do not match."""
    if language == "zh":
        text, _, syllables = line.partition("\t")
        return _chinese_units(text, syllables or to_pinyin(text))
    return [_word_unit(word) for word in line.split()]


def written_text(line: str, language: str) -> str:
    """The sentence as a person writes it, which is what a transcript is compared with."""
    if language == "zh":
        return line.partition("\t")[0]
    return " ".join(unit.written.strip() for unit in parse_units(line, language))


def to_pinyin(text: str) -> str:
    """Readings in context, one syllable with tone number per character: '你好。' -> 'ni3 hao3.'"""
    from pypinyin import Style, lazy_pinyin  # a development package: only Mandarin synthesis needs it

    syllables: list[str] = []
    for piece in re.split("([，。？！、])", text):
        if piece and piece in "，。？！、":
            if syllables:
                syllables[-1] += piece.translate(_CHINESE_STOPS)
        elif piece:
            syllables += lazy_pinyin(piece, style=Style.TONE3, neutral_tone_with_five=True, v_to_u=False)
    return " ".join(syllables)


def _chinese_units(text: str, syllables: str) -> list[Unit]:
    characters, readings = _CHARACTER.findall(text), syllables.split(" ")
    if len(characters) != len(readings):
        raise ValueError(f"{text!r} has {len(characters)} characters but {len(readings)} syllables: {syllables!r}")
    return [Unit(*pair) for pair in zip(characters, readings, strict=True)]


def _word_unit(word: str) -> Unit:
    written, mark, spoken = word.partition("~")
    if not mark:
        return Unit(" " + word, word)
    stops = re.search(r"[,.?!]*$", spoken)
    return Unit(" " + written + (stops[0] if stops else ""), spoken.replace("_", " "))
