"""Units, numbers, grammars and the screening of manuals."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from training.numbers import chinese_number, english_number, english_ordinal, english_year
from training.text import Grammar, build_lines, held_out_keys, is_plain, package_sentences, sentence_key, split
from training.units import LANGUAGES, Unit, parse_units, to_pinyin, written_text


def test_a_spoken_form_replaces_what_is_said_and_not_what_is_written() -> None:
    assert parse_units("It is 9:30~nine_thirty.", "en") == [
        Unit(" It", "It"),
        Unit(" is", "is"),
        Unit(" 9:30.", "nine thirty."),
    ]
    assert written_text("It is 9:30~nine_thirty.", "en") == "It is 9:30."


def test_mandarin_units_are_characters_with_their_readings() -> None:
    assert parse_units("你好，再见。", "zh") == [
        Unit("你", "ni3"),
        Unit("好，", "hao3,"),
        Unit("再", "zai4"),
        Unit("见。", "jian4."),
    ]
    assert to_pinyin("银行") == "yin2 hang2"


def test_readings_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="2 characters but 1 syllables"):
        parse_units("你好。\tni3", "zh")


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (42, "forty-two"), (105, "one hundred five"), (9999, None), (3000, "three thousand")],
)
def test_english_numbers(number: int, words: str | None) -> None:
    expected = words or "nine thousand nine hundred ninety-nine"
    assert english_number(number) == expected


@pytest.mark.parametrize(
    ("number", "characters"),
    [
        (2, "二"),
        (10, "十"),
        (15, "十五"),
        (20, "二十"),
        (105, "一百零五"),
        (110, "一百一十"),
        (1010, "一千零一十"),
        (2003, "二千零三"),
    ],
)
def test_chinese_numbers(number: int, characters: str) -> None:
    assert chinese_number(number) == characters


def test_english_years_and_ordinals() -> None:
    rng = random.Random(1)
    assert english_year(1905, rng) == "nineteen oh five"
    assert english_year(1700, rng) == "seventeen hundred"
    assert [english_ordinal(n) for n in (1, 12, 20, 21, 30, 31)] == [
        "first",
        "twelfth",
        "twentieth",
        "twenty-first",
        "thirtieth",
        "thirty-first",
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_can_be_filled_and_parsed(language: str) -> None:
    grammar = Grammar.load(language)
    for template in grammar.templates:
        single = Grammar(language, (template,), grammar.slots)
        for seed in range(5):
            line = single.sentence(random.Random(seed))
            assert "{" not in line and "#" not in line
            assert parse_units(line, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_text_holds_no_held_out_sentence(language: str) -> None:
    held_out = held_out_keys(language)
    lines = build_lines(language, n_grammar=3000)
    assert len(held_out) == 64
    assert len(lines) > 1000
    assert not held_out & {sentence_key(line) for line in lines}


def test_the_same_seed_gives_the_same_text() -> None:
    assert build_lines("de", n_grammar=50, seed=3) == build_lines("de", n_grammar=50, seed=3)
    assert build_lines("de", n_grammar=50, seed=3) != build_lines("de", n_grammar=50, seed=4)


def test_a_sentence_key_ignores_case_stops_and_pronunciation() -> None:
    assert sentence_key("See you at 9:30~nine_thirty, Anna!") == sentence_key("see you at 9:30 anna")


@pytest.mark.parametrize(
    ("sentence", "language", "plain"),
    [
        ("The window shows the files in the folder.", "en", True),
        ("Run apt-get update && apt-get upgrade.", "en", False),
        ("the window shows the files in the folder.", "en", False),
        ("See e.g. the manual of the program.", "en", False),
        ("Short one.", "en", False),
        ("Das Fenster zeigt die Dateien im Ordner.", "de", True),
        ("The window shows the files in your folder.", "de", False),
        ("点击按钮打开文件。", "zh", True),
        ("点击OK按钮。", "zh", False),
    ],
)
def test_only_plain_sentences_of_the_right_language_are_kept(sentence: str, language: str, plain: bool) -> None:
    assert is_plain(sentence, language) is plain


def test_markup_and_brackets_leave_whole_sentences() -> None:
    text = "Open the “menu” (see above) ; then choose a file. Save it…  Done!"
    assert split(text, "en") == ["Open the menu, then choose a file.", "Save it.", "Done!"]


def test_wordnet_examples_need_words_that_the_manuals_know(tmp_path: Path) -> None:
    help_folder = tmp_path / "usr" / "share" / "help" / "C" / "files"
    help_folder.mkdir(parents=True)
    (help_folder / "open.page").write_text("<p>The folder on the left holds all of your <em>music</em> files.</p>")
    wordnet = tmp_path / "usr" / "share" / "wordnet"
    wordnet.mkdir()
    (wordnet / "data.noun").write_text(
        '1 03 n 01 x 0 000 | a gloss; "your music files are on the left"; "the gruesome files are on the left"\n'
        '2 03 n 01 y 0 000 | a gloss; "the music of death is on the left"\n'
    )
    found = package_sentences("en", tmp_path, ["Are we late? The music is loud of death."])
    assert found == ["The folder on the left holds all of your music files.", "Your music files are on the left."]
