"""Every word in both languages, and no word that nobody says."""

from __future__ import annotations

import re
from string import Formatter
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from ui.texts import LOCALES, TEXTS, label, page_locale, say, translations

SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "ui").rglob("*.py")) if path.name != "texts.py"
)
SAID = set(re.findall(r"\b(?:say|label|title)\(\s*[\"']([a-z0-9_]+)[\"']", SOURCES))
COMPOSED = tuple(re.findall(r"f\"([a-z_]+_)\{", SOURCES))


def request(languages: str | None) -> Any:
    return SimpleNamespace(headers={} if languages is None else {"accept-language": languages})


@pytest.mark.parametrize("key", TEXTS)
def test_each_text_has_both_languages_and_the_same_values(key: str) -> None:
    english, chinese = TEXTS[key]
    assert english.strip()
    assert chinese.strip()
    assert chinese != english
    fields = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in (english, chinese)]
    assert fields[0] == fields[1]


def test_each_text_that_is_said_exists() -> None:
    assert len(SAID) > 50, "the pattern above no longer finds the calls"
    assert set(TEXTS) >= SAID


@pytest.mark.parametrize("key", TEXTS)
def test_each_text_is_said_somewhere(key: str) -> None:
    assert key in SAID or f'"{key}"' in SOURCES or key.startswith(COMPOSED)


def test_a_label_without_text_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        label("nonsense")


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-TW", "zh"),
        ("de-DE,de;q=0.9", "en"),
        ("en-GB,zh;q=0.5", "en"),
        (None, "en"),
    ],
)
def test_the_browser_chooses_the_language(accepted: str | None, expected: str) -> None:
    assert page_locale(request(accepted)) == expected


def test_values_are_filled_in() -> None:
    assert say("transcribe_progress", "en", done="0:10", total="1:00") == "0:10 of 1:00"


def test_the_table_reaches_every_chinese_locale() -> None:
    table = translations().translations_dict
    assert set(table) == {*LOCALES, "zh-CN", "zh-TW"}
    assert table["zh-CN"]["transcribe_go"] == TEXTS["transcribe_go"][1]
