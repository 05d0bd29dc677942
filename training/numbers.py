"""Numbers, times and dates for the grammars: how they are written and, where a synthesiser would guess, how said.

In: a random generator. Out: text in units.py's notation ('9:30~nine_thirty'). English spells everything out, because
its two synthesisers read digits differently; eSpeak NG reads the digits of the other languages well.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
    " fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
_HANZI = "零一二三四五六七八九"

ones, tens, ordinals = _ONES.split(), _TENS.split(), _ORDINALS.split()

SlotMaker = Callable[[random.Random], str]


def english_below_hundred(number: int) -> str:
    if number < 20:
        return ones[number]
    return tens[number // 10] + (f"-{ones[number % 10]}" if number % 10 else "")


def english_number(number: int) -> str:
    """0 to 999,999 in American words: 'one thousand two hundred five'."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{english_number(number // size)} {name}" + (f" {english_number(rest)}" if rest else "")
    return english_below_hundred(number)


def english_year(year: int, rng: random.Random) -> str:
    """'nineteen oh five', 'two thousand three', 'twenty nineteen'."""
    century, rest = divmod(year, 100)
    if year >= 2000:
        in_full = year < 2010 or rng.random() < 0.3
        return english_number(year) if in_full else f"twenty {english_below_hundred(rest)}"
    if rest == 0:
        return f"{english_below_hundred(century)} hundred"
    return f"{english_below_hundred(century)} " + (f"oh {ones[rest]}" if rest < 10 else english_below_hundred(rest))


def english_ordinal(number: int) -> str:
    """1 to 39: 'twenty-first'."""
    if number <= 20:
        return ordinals[number]
    return "thirtieth" if number == 30 else f"{tens[number // 10]}-{ordinals[number % 10]}"


def chinese_number(number: int) -> str:
    """0 to 9,999 in characters: 一百零五."""
    if number < 10:
        return _HANZI[number]
    if number < 20:
        return "十" + (_HANZI[number % 10] if number % 10 else "")
    for size, character in ((1000, "千"), (100, "百"), (10, "十")):
        if number >= size:
            head, rest = _HANZI[number // size] + character, number % size
            if rest == 0:
                return head
            zero = "零" if rest < size // 10 else ""
            one = "一" if size > 10 and 10 <= rest < 20 else ""
            return head + zero + one + chinese_number(rest)
    raise AssertionError(number)


def _noted(written: str, spoken: str) -> str:
    return f"{written}~{spoken.replace(' ', '_')}"


def _number_slot(rng: random.Random) -> str:
    number = rng.choice([rng.randint(10, 99), rng.randint(10, 99), rng.randint(100, 999), rng.randint(1000, 9999)])
    return _noted(str(number), english_number(number))


def _tens_slot(rng: random.Random) -> str:
    number = rng.randint(10, 59)
    return _noted(str(number), english_number(number))


def _year_slot(rng: random.Random) -> str:
    year = rng.choice([rng.randint(1700, 1999), rng.randint(1950, 1999), rng.randint(2000, 2029)])
    return _noted(str(year), english_year(year, rng))


def _time_slot(rng: random.Random) -> str:
    hour, minute = rng.randint(1, 12), rng.choice([0, 0, 15, 30, 45, rng.randint(1, 59)])
    if minute == 0:
        return f"{ones[hour]} o'clock" if hour < 10 else f"{_noted(str(hour), ones[hour])} o'clock"
    spoken = f"oh {ones[minute]}" if minute < 10 else english_below_hundred(minute)
    return _noted(f"{hour}:{minute:02d}", f"{ones[hour]} {spoken}")


def _ordinal_slot(rng: random.Random) -> str:
    number = rng.randint(1, 31)
    ending = "th" if 10 < number < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return _noted(f"{number}{ending}", english_ordinal(number))


def _digits_slot(rng: random.Random) -> str:
    """A telephone number in two groups."""
    digits = [rng.randint(0, 9) for _ in range(rng.choice([3, 4, 6, 7]))]
    half = len(digits) // 2
    groups = [digits] if half < 2 else [digits[:half], digits[half:]]
    return " ".join(_noted("".join(map(str, group)), " ".join(ones[d] for d in group)) for group in groups)


def _hour_slot(rng: random.Random) -> str:
    return str(rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 18, 19, 20]))


def _spanish_hour_slot(rng: random.Random) -> str:
    return str(rng.randint(2, 12))


def _day_slot(rng: random.Random) -> str:
    """A day of the month; not 1 and 21, whose reading depends on gender and language."""
    return str(rng.choice([day for day in range(2, 31) if day not in (1, 21)]))


def _plain_year_slot(rng: random.Random) -> str:
    return str(rng.choice([rng.randint(1800, 1999), rng.randint(1950, 1999), rng.randint(2002, 2029)]))


def _chinese_count_slot(rng: random.Random) -> str:
    number = rng.choice([rng.randint(2, 10), rng.randint(11, 99), rng.randint(100, 999)])
    return "两" if number == 2 else chinese_number(number)


def _chinese_time_slot(rng: random.Random) -> str:
    part = rng.choice(["早上", "上午", "下午", "晚上", ""])
    return part + chinese_number(rng.randint(1, 12)) + "点" + rng.choice(["", "半", "十分", "二十分", "一刻"])


def _chinese_year_slot(rng: random.Random) -> str:
    return "".join(_HANZI[int(digit)] for digit in str(rng.randint(1950, 2029)))


_EUROPEAN: dict[str, SlotMaker] = {"h": _hour_slot, "d": _day_slot, "year": _plain_year_slot}

SLOT_MAKERS: dict[str, dict[str, SlotMaker]] = {
    "en": {
        "num": _number_slot,
        "tens": _tens_slot,
        "year": _year_slot,
        "time": _time_slot,
        "ord": _ordinal_slot,
        "digits": _digits_slot,
    },
    "es": _EUROPEAN | {"h": _spanish_hour_slot},
    "fr": _EUROPEAN,
    "de": _EUROPEAN,
    "ru": _EUROPEAN,
    "zh": {
        "n": _chinese_count_slot,
        "t": _chinese_time_slot,
        "mo": lambda rng: chinese_number(rng.randint(1, 12)),
        "dd": lambda rng: chinese_number(rng.randint(1, 30)),
        "y": _chinese_year_slot,
    },
}
"""Slots that are computed instead of drawn from a list, by language and slot name."""
