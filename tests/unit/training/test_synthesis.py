"""eSpeak NG and Flite through ctypes."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from training.recordings import Line, record
from training.synthesis import Delivery, Synthesizer, resample
from training.units import LANGUAGES, parse_units

LINES = {
    "en": "The library is open today.",
    "es": "La biblioteca está abierta hoy.",
    "fr": "La bibliothèque est ouverte aujourd'hui.",
    "de": "Die Bibliothek ist heute geöffnet.",
    "ru": "Библиотека сегодня открыта.",
    "zh": "图书馆今天开门。",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_spoken_with_a_time_for_each_unit(synthesizer: Synthesizer, language: str) -> None:
    units = parse_units(LINES[language], language)
    utterance = synthesizer.speak(units, synthesizer.pick(language, random.Random(1)))
    assert utterance is not None
    assert 0.8 < utterance.duration_s < 6.0
    assert len(utterance.starts) == len(utterance.ends) == len(units)
    assert utterance.starts[0] == 0 and utterance.ends[-1] == len(utterance.samples)
    assert list(utterance.starts) == sorted(set(utterance.starts))


@pytest.mark.parametrize("voice", ["en-us+f3", "flite:slt", "flite:kal"])
def test_a_word_is_where_the_sound_says_it_is(synthesizer: Synthesizer, voice: str) -> None:
    """The long pause that a full stop makes lies before the word that the times put behind it."""
    units = parse_units("Hello there. Goodbye.", "en")
    utterance = synthesizer.speak(units, Delivery(voice))
    assert utterance is not None
    level = np.abs(utterance.samples.astype(np.int32))
    quiet = np.convolve(level, np.ones(800) / 800, mode="valid")
    middle = slice(len(quiet) // 4, -len(quiet) // 4)
    pause = int(np.argmin(quiet[middle])) + middle.start + 400
    assert abs(utterance.starts[2] - pause) < 0.35 * 16_000


def test_a_formant_ratio_makes_the_same_words_longer_and_lower(synthesizer: Synthesizer) -> None:
    units = parse_units("Seven green boats.", "en")
    plain = synthesizer.speak(units, Delivery("en-us"))
    lower = synthesizer.speak(units, Delivery("en-us", formant_ratio=Fraction(9, 8)))
    assert plain is not None and lower is not None
    assert lower.duration_s / plain.duration_s == pytest.approx(9 / 8, rel=0.02)


def test_an_unknown_voice_is_named(synthesizer: Synthesizer) -> None:
    with pytest.raises(ValueError, match="no voice 'xx-nobody'"):
        synthesizer.speak(parse_units("Hello.", "en"), Delivery("xx-nobody"))


def test_resampling_keeps_a_tone_and_its_level() -> None:
    time = np.arange(22_050) / 22_050
    tone = 1000 * np.sin(2 * np.pi * 440 * time)
    resampled = resample(tone, Fraction(16_000, 22_050))
    assert len(resampled) == 16_000
    spectrum = np.abs(np.fft.rfft(resampled))
    assert int(np.argmax(spectrum)) == 440
    assert np.sqrt(np.mean(resampled[1000:-1000] ** 2)) == pytest.approx(1000 / np.sqrt(2), rel=0.01)


def test_a_recording_holds_its_sentences_where_it_says(synthesizer: Synthesizer) -> None:
    lines = [
        Line("Good morning.", "en", Delivery("flite:slt"), pause_s=1.5),
        Line("It is 9:30~nine_thirty.", "en", Delivery("en-us+m3"), pause_s=0.5),
    ]
    recording = record(lines, synthesizer, lead_s=0.25)
    first, second = recording.sentences
    assert recording.text == "Good morning. It is 9:30."
    assert first.start_s == 0.25
    assert second.start_s - first.end_s == pytest.approx(1.5, abs=0.001)
    assert recording.duration_s - second.end_s == pytest.approx(0.5, abs=0.001)
    pause = recording.samples[round(first.end_s * 16_000) : round(second.start_s * 16_000)]
    assert not pause[16:-16].any()  # the times are rounded to milliseconds
    assert [word.text for word in second.words] == ["It", "is", "9:30."]
    assert second.words[0].start_s == second.start_s
