"""Word by word: what differs, in parts that give both texts back; and how words are split and joined."""

from __future__ import annotations

import random

import pytest

from tests.fakes import demo_tokens, segment
from transcription.transcript import join_words, split_words
from transcription.worddiff import KINDS, word_diff


@pytest.mark.parametrize(
    ("language", "before", "after", "kinds"),
    [
        ("en", "The colour of the sea.", "the color of the sea", ["equal"]),
        ("en", "I have ten cats", "I have two cats", ["equal", "changed", "equal"]),
        ("en", "we can see the river", "we see the big river", ["equal", "missing", "equal", "added", "equal"]),
        ("zh", "今天天气很好。", "今天天汽很好", ["equal", "changed", "equal"]),
        ("fr", "", "bonjour", ["added"]),
        ("fr", "bonjour", "", ["missing"]),
        ("fr", "", "", []),
        ("en", "— well, um — yes", "well yes —", None),
        ("en", "I do not know", "I don't know", ["equal"]),
        ("en", "do not go", "don't come", ["equal", "changed"]),
        ("en", "we have twenty one cats", "we have 21 cats", ["equal"]),
        ("en", "it costs one hundred and five dollars today", "it costs $105 today", ["equal"]),
        ("en", "it was $5 million then", "it was five million dollars then", ["equal"]),
        ("en", "he has been here", "he's been here", ["equal"]),
        ("en", "a well-known man left", "a well known man stayed", ["equal", "changed"]),
        ("de", "die U-Bahn kommt", "die U Bahn kommt", ["equal"]),
        ("fr", "— bien, 21", "bien 21 chats", None),
        ("zh", "hello this text is English", "今天天气很好", ["changed"]),
        ("zh", "我用iPhone 15 Pro打电话", "我用iPhone 16 Pro打电话", ["equal", "changed", "equal"]),
    ],
)
def test_a_diff_gives_both_texts_back(language: str, before: str, after: str, kinds: list[str] | None) -> None:
    half = len(after) // 2
    spoken = [segment(0.0, 3.0, after)] if " " not in after[half:] else [
        segment(0.0, 3.0, after[: after.index(" ", half)]), segment(3.0, 6.0, after[after.index(" ", half) :])
    ]  # fmt: skip
    parts = word_diff(before, spoken, language, demo_tokens().normalise)
    assert join_words((p.was for p in parts), language) == join_words(split_words(before, language), language)
    assert join_words((p.text for p in parts), language) == join_words(split_words(after, language), language)
    assert all(p.kind in KINDS for p in parts)
    times = [p.start_s for p in parts if p.start_s is not None]
    assert times == sorted(times) and all(0.0 <= time <= 6.0 for time in times)
    assert kinds is None or [p.kind for p in parts] == kinds
    assert (parts == () or after == "") or len(times) == len(parts)


def test_a_diff_shows_no_difference_where_no_word_error_is_counted() -> None:
    """The whole text is normalised where errors are counted, the diff word by word: they must not contradict."""
    pairs = [("do not", "don't"), ("twenty one", "21"), ("five dollars", "$5"), ("well-known", "well known"),
             ("the colour", "the color"), ("he is", "he's"), ("three hundred and four", "304")]  # fmt: skip
    normalise, chance = demo_tokens().normalise, random.Random(1)
    for _ in range(60):
        chosen = [chance.choice(pairs) for _ in range(chance.randint(1, 6))]
        fillers = chance.sample(("river", "stone", "we see", "house", "market", "by then"), len(chosen))
        before, after = (
            " ".join(f"{chance.choice(pair)} {filler}" for pair, filler in zip(chosen, fillers, strict=True))
            for _ in range(2)
        )
        assert normalise(before, "en") == normalise(after, "en")
        assert [part.kind for part in word_diff(before, [segment(0.0, 3.0, after)], "en", normalise)] == ["equal"]
        parts = word_diff(f"{before} yes", [segment(0.0, 3.0, f"{after} no")], "en", normalise)
        assert [(part.kind, part.was) for part in parts][1:] == [("changed", "yes")]


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
@pytest.mark.parametrize(
    "text",
    ["hello this text", "今天天气很好。", "我用iPhone 15 Pro打电话", "это другой", "it's 3.5, no?", "안녕 세상", ""],
)
def test_splitting_and_joining_undo_each_other(language: str, text: str) -> None:
    words = split_words(text, language)
    joined = join_words(words, language)
    assert split_words(joined, language) == words and joined.replace(" ", "") == text.replace(" ", "")
    for at in range(len(words) + 1):
        halves = join_words(words[:at], language), join_words(words[at:], language)
        assert join_words(halves, language) == joined, "in whatever parts"


def test_foreign_words_keep_their_space_in_a_language_without_spaces() -> None:
    assert join_words(["hello", "this", "是", "text", "", "2"], "zh") == "hello this是text 2"
    assert join_words(["hello", "<00:00:01.000>this", "<00:00:02.000>是"], "zh") == (
        "hello <00:00:01.000>this<00:00:02.000>是"
    )
    assert split_words("今天 hello 2024年", "zh") == ["今", "天", "hello", "2024", "年"]
