"""Units -> int16 speech at 16 kHz with the time of every unit, through eSpeak NG and Flite.

In: units (units.py), a voice, rate, pitch. Out: an Utterance: samples and where each unit starts and ends.

Both programs come from Debian's packages (`apt-get install espeak-ng flite`) and are called in this process through
ctypes: a call costs a few milliseconds where a child process would cost fifty, and word times come with the sound
(eSpeak NG's word events, `speak_lib.h`; the ends of Flite's tokens). Both libraries keep global state, so they are
loaded once per process and parallel work uses processes. A time between two known ones is interpolated over characters.

The same voice sounds like several people: resampling by a factor from FORMANT_RATIOS moves pitch and formants together.
Not done here: noise, rooms and levels (augment.py), choosing sentences (text.py).
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from audio.constants import SAMPLE_RATE
from errors import MachineError
from training.units import Unit, parse_units

Pcm = npt.NDArray[np.int16]

BASE_VOICES: dict[str, tuple[str, ...]] = {
    "en": ("en-us",) * 6 + ("en",) * 2 + ("en-gb-x-rp", "en-gb-scotland", "en-029"),
    "es": ("es", "es", "es-419"),
    "fr": ("fr", "fr", "fr-be", "fr-ch"),
    "de": ("de",),
    "ru": ("ru",),
    "zh": ("cmn-latn-pinyin",),
}
"""eSpeak NG's voices by language; repeated ones are drawn more often."""

_NUMBERED = tuple(f"m{i}" for i in range(1, 9)) + tuple(f"f{i}" for i in range(1, 6))
_NAMED = (
    "klatt klatt2 klatt3 klatt4 Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco"
    " Mario Michael Mike Nguyen adam anika antonio aunty belinda benjamin boris caleb croak david ed edward edward2"
    " grandma grandpa gustave iven iven2 john linda marcelo max michel miguel norbert pablo paul pedro quincy rob"
    " robert sandro shelby steph steph2 travis victor whisper whisperf zac"
)
VARIANTS = ("",) * 6 + _NUMBERED * 2 + tuple(_NAMED.split())
"""eSpeak NG's speaker variants, which go with any of its voices; repeated ones are drawn more often."""

FLITE_VOICES = ("awb", "rms", "slt", "kal16", "kal")
_SHIFTS = tuple(Fraction(*pair) for pair in ((8, 9), (9, 10), (10, 11), (11, 10), (10, 9), (9, 8), (7, 8), (8, 7)))
FORMANT_RATIOS = (Fraction(1),) * 4 + _SHIFTS

_MEAN_RATE_WPM, _RATE_SPREAD_WPM = 165, 26
_CHINESE_RATE = 0.85
"""Syllables are spelt as words there, so the same words per minute would be too fast."""
_TARGET_RMS = 2600.0
_PEAK = 32000.0


@dataclass(frozen=True, slots=True)
class Utterance:
    """One spoken line. samples: int16 [n_samples], 16 kHz mono; starts and ends: sample offsets per unit."""

    samples: Pcm
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Delivery:
    """Who speaks and how. voice: 'en-us+f3' (eSpeak NG) or 'flite:slt'."""

    voice: str
    rate_wpm: float = 165.0
    pitch: int = 50
    pitch_range: int = 50
    formant_ratio: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class RawSpeech:
    """What a program returned: samples at its own rate, and known starts: unit index -> sample."""

    samples: Pcm
    sample_rate: int
    unit_starts: dict[int, int]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class _FliteWave(ctypes.Structure):
    """cst_wave of cst_wave.h."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _FliteVoice(ctypes.Structure):
    """The head of cst_voice."""

    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


_EspeakCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _load_library(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # global: Flite's voices look up symbols in its main library
    except OSError as error:
        raise MachineError(
            f"The speech synthesiser's library {name} is not installed ({error}). "
            f"Install it with: apt-get install {package}"
        ) from error


class Espeak:
    """eSpeak NG, all six languages."""

    _SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
    _RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
    _WORD_EVENT = 1

    def __init__(self) -> None:
        self._library = _load_library("libespeak-ng.so.1", "espeak-ng")
        self.sample_rate: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 4000, None, self._DO_NOT_EXIT)
        if self.sample_rate <= 0:
            raise MachineError("eSpeak NG found no voice data. Install it with: apt-get install espeak-ng-data")
        self._pieces: list[Pcm] = []
        self._events: list[tuple[int, int]] = []
        self._callback = _EspeakCallback(self._receive)  # kept: the library holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._voice = ""

    def _receive(self, wave: Any, n_samples: int, events: Any) -> int:
        if wave and n_samples > 0:
            self._pieces.append(np.ctypeslib.as_array(wave, (n_samples,)).copy())
        index = 0
        while events[index].type != 0:
            if events[index].type == self._WORD_EVENT:
                self._events.append((events[index].text_position - 1, events[index].audio_position))
            index += 1
        return 0

    def speak(self, spoken: Sequence[str], delivery: Delivery) -> RawSpeech:
        """Raises ValueError for a voice that eSpeak NG does not have."""
        if delivery.voice != self._voice:
            if self._library.espeak_SetVoiceByName(delivery.voice.encode()) != 0:
                raise ValueError(f"eSpeak NG has no voice {delivery.voice!r}; `espeak-ng --voices` lists them.")
            self._voice = delivery.voice
        settings = (
            (self._RATE, delivery.rate_wpm),
            (self._PITCH, delivery.pitch),
            (self._RANGE, delivery.pitch_range),
            (self._VOLUME, 90),
        )
        for parameter, value in settings:
            self._library.espeak_SetParameter(parameter, int(value), 0)
        self._pieces, self._events = [], []
        data = " ".join(spoken).encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, self._UTF8, None, None)
        samples = np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)
        return RawSpeech(samples, self.sample_rate, self._unit_starts(spoken))

    def _unit_starts(self, spoken: Sequence[str]) -> dict[int, int]:
        """Word events name a character; several may fall into one unit (a number), some units get none."""
        first_character = character_starts(spoken)
        known: dict[int, int] = {}
        latest_unit, latest_sample = -1, 0
        for character, audio_ms in self._events:
            unit = bisect.bisect_right(first_character, character) - 1
            sample = int(audio_ms * self.sample_rate / 1000)
            if character >= 0 and unit > latest_unit and sample >= latest_sample:
                known[unit] = sample
                latest_unit, latest_sample = unit, sample
        return {0: 0, **known}


class Flite:
    """Flite, English only: voices made from recordings of people, which eSpeak NG's are not."""

    _LAST_SEGMENT_END = b"daughtern.R:SylStructure.daughtern.daughtern.R:Segment.end"

    def __init__(self) -> None:
        self._library = _load_library("libflite.so.1", "flite")
        _load_library("libflite_usenglish.so.1", "flite")
        _load_library("libflite_cmulex.so.1", "flite")
        self._library.flite_init()
        self._declare_functions()
        self._voices = {name: self._register(name) for name in FLITE_VOICES}

    def _register(self, name: str) -> Any:
        register = getattr(_load_library(f"libflite_cmu_us_{name}.so.1", "flite"), f"register_cmu_us_{name}")
        register.restype, register.argtypes = ctypes.POINTER(_FliteVoice), [ctypes.c_char_p]
        return register(None)

    def _declare_functions(self) -> None:
        pointer, text, library = ctypes.c_void_p, ctypes.c_char_p, self._library
        library.flite_synth_text.restype = pointer
        library.flite_synth_text.argtypes = [text, ctypes.POINTER(_FliteVoice)]
        library.utt_wave.restype, library.utt_wave.argtypes = ctypes.POINTER(_FliteWave), [pointer]
        library.feat_set_float.argtypes = [pointer, text, ctypes.c_float]
        library.delete_utterance.argtypes = [pointer]
        library.utt_relation.restype, library.utt_relation.argtypes = pointer, [pointer, text]
        library.relation_head.restype, library.relation_head.argtypes = pointer, [pointer]
        library.item_next.restype, library.item_next.argtypes = pointer, [pointer]
        library.flite_ffeature_float.restype = ctypes.c_float
        library.flite_ffeature_float.argtypes = [pointer, text]

    def speak(self, spoken: Sequence[str], delivery: Delivery) -> RawSpeech:
        """Pitch and range are the voice's own; the rate becomes a stretch of its durations."""
        voice = self._voices[delivery.voice.removeprefix("flite:")]
        stretch = _MEAN_RATE_WPM / delivery.rate_wpm
        self._library.feat_set_float(voice.contents.features, b"duration_stretch", stretch)
        text = " ".join(spoken).encode("ascii", "ignore")
        utterance = self._library.flite_synth_text(text, voice)
        wave = self._library.utt_wave(utterance).contents
        sample_rate = int(wave.sample_rate)  # read before the utterance is freed
        samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
        token_ends = self._token_ends(utterance, sample_rate)
        self._library.delete_utterance(utterance)
        return RawSpeech(samples, sample_rate, self._unit_starts(spoken, token_ends))

    def _token_ends(self, utterance: int, sample_rate: int) -> list[int]:
        ends: list[int] = []
        token = self._library.relation_head(self._library.utt_relation(utterance, b"Token"))
        while token:
            end_s = self._library.flite_ffeature_float(token, self._LAST_SEGMENT_END)
            ends.append(int(end_s * sample_rate))
            token = self._library.item_next(token)
        return ends

    @staticmethod
    def _unit_starts(spoken: Sequence[str], token_ends: list[int]) -> dict[int, int]:
        """A unit starts where the one before it ends; unknown if Flite split the text into other tokens than we did."""
        tokens_so_far = np.cumsum([len(text.split()) for text in spoken])
        if len(token_ends) != tokens_so_far[-1]:
            return {0: 0}
        return {0: 0} | {i + 1: token_ends[n - 1] for i, n in enumerate(tokens_so_far[:-1])}


def character_starts(spoken: Sequence[str]) -> list[int]:
    """Offset of each unit's first character in the blank-separated text."""
    lengths = [len(text) + 1 for text in spoken]
    return [0, *np.cumsum(lengths)[:-1].tolist()]


@functools.cache
def _espeak() -> Espeak:
    """The one instance: the library keeps voice and callback in global variables."""
    return Espeak()


@functools.cache
def _flite() -> Flite:
    """The one instance, loaded when its first voice speaks."""
    return Flite()


class Synthesizer:
    """Both programs behind one call."""

    def __init__(self) -> None:
        """Raises MachineError if eSpeak NG is not installed; Flite's absence shows when it should speak."""
        _espeak()

    def pick(self, language: str, rng: random.Random, *, moderate: bool = False) -> Delivery:
        """A random speaker. `moderate` leaves out very fast, slow, high and shifted ones (held-out recordings)."""
        voice = self._pick_voice(language, rng)
        spread, low, high = (20, 125, 215) if moderate else (_RATE_SPREAD_WPM, 110, 240)
        if voice.startswith("flite:"):
            low, high = max(low, 125), min(high, 220)
        rate = min(high, max(low, rng.gauss(_MEAN_RATE_WPM, spread))) * (_CHINESE_RATE if language == "zh" else 1.0)
        pitch = rng.randint(20, 80) if moderate else rng.randint(15, 85)
        ratio = Fraction(1) if moderate else rng.choice(FORMANT_RATIOS)
        return Delivery(voice, rate, pitch, rng.randint(30, 80), ratio)

    @staticmethod
    def _pick_voice(language: str, rng: random.Random) -> str:
        draw = rng.random() if language == "en" else 1.0
        if draw < 0.16:
            return "flite:" + rng.choice(FLITE_VOICES[:3])
        if draw < 0.28:
            return "flite:kal16" if rng.random() < 0.8 else "flite:kal"
        variant = rng.choice(VARIANTS)
        return rng.choice(BASE_VOICES[language]) + (f"+{variant}" if variant else "")

    def speak(self, units: Sequence[Unit], delivery: Delivery) -> Utterance | None:
        """Say the units; None if the program produced (nearly) silence, which happens for odd text.

        Raises ValueError for an unknown voice.
        """
        spoken = [unit.spoken for unit in units]
        raw = self._program(delivery.voice).speak(spoken, delivery)
        edges = _speech_edges(raw)
        if edges is None:
            return None
        low, high = edges
        starts = _interpolate_starts(spoken, raw.unit_starts, high) - low
        starts = np.maximum.accumulate(np.clip(starts, 0, high - low))
        samples = resample(raw.samples[low:high], Fraction(SAMPLE_RATE, raw.sample_rate) * delivery.formant_ratio)
        samples *= _TARGET_RMS / (float(np.sqrt(np.mean(np.square(samples)))) + 1e-6)
        scaled = (starts * (len(samples) / (high - low))).astype(int).tolist()
        pcm = np.clip(samples, -_PEAK, _PEAK).astype(np.int16)
        return Utterance(pcm, tuple(scaled), (*scaled[1:], len(pcm)))

    @staticmethod
    def _program(voice: str) -> Espeak | Flite:
        return _flite() if voice.startswith("flite:") else _espeak()


def _speech_edges(raw: RawSpeech) -> tuple[int, int] | None:
    """First and last audible sample with a little room around; None if there is under 0.2 s or nothing audible."""
    if len(raw.samples) < raw.sample_rate // 5:
        return None
    level = np.abs(raw.samples.astype(np.int32))
    loud = np.flatnonzero(level > max(60, int(level.max() * 0.012)))
    if len(loud) == 0:
        return None
    return max(0, int(loud[0]) - raw.sample_rate // 100), min(len(level), int(loud[-1]) + raw.sample_rate // 50)


def _interpolate_starts(spoken: Sequence[str], known: dict[int, int], end: int) -> npt.NDArray[np.float64]:
    """Start of every unit in samples: known ones as they are, the rest in proportion to characters."""
    first_character = character_starts(spoken)
    indices = sorted(known)
    at_character = [first_character[i] for i in indices] + [len(" ".join(spoken))]
    at_sample = [known[i] for i in indices] + [end]
    return np.interp(first_character, at_character, at_sample)


@functools.lru_cache(maxsize=256)
def _low_pass(n_bins: int) -> npt.NDArray[np.float32]:
    """1 up to 94 % of the band, then a raised cosine to 0, so that resampling does not ring."""
    edge = int(n_bins * 0.94)
    taper = 0.5 + 0.5 * np.cos(np.linspace(0, np.pi, n_bins - edge))
    return np.concatenate([np.ones(edge), taper]).astype(np.float32)


def resample(samples: npt.NDArray[Any], ratio: Fraction) -> npt.NDArray[np.float32]:
    """[n_samples] -> [about n_samples * ratio] float32, through the spectrum.

    The input is padded to a multiple of the denominator, whose factors are small, so the transforms stay fast.
    """
    waveform = samples.astype(np.float32)
    if ratio == 1:
        return waveform
    block = ratio.denominator * 64
    padded = np.pad(waveform, (0, -len(waveform) % block))
    n_out = len(padded) * ratio.numerator // ratio.denominator
    n_bins = min(len(padded), n_out) // 2 + 1
    spectrum = np.fft.rfft(padded)[:n_bins] * _low_pass(n_bins)
    resampled = np.fft.irfft(spectrum, n=n_out) * (n_out / len(padded))
    return resampled[: round(len(waveform) * ratio)].astype(np.float32)


def main() -> int:
    """Say a word in every language with both programs, to find out before a long run what is not installed."""
    try:
        synthesizer = Synthesizer()
        voices = {language: BASE_VOICES[language][0] for language in BASE_VOICES} | {"en": "flite:slt"}
        for language, voice in voices.items():
            word = "你好。" if language == "zh" else "Radio."
            synthesizer.speak(parse_units(word, language), Delivery(voice))
    except (MachineError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
