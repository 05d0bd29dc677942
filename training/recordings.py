"""Lines with their speakers -> one recording with the time of every sentence and word; FLAC and Opus files.

In: what is said, by whom, with which pauses. Out: waveform float32 [n_samples] 16 kHz and the truth about it.
Used for everything that is listened to later: the examples and the held-out evaluation set (heldout.py).
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audio.constants import SAMPLE_RATE
from audio.decode import find_ffmpeg
from errors import MachineError
from training.synthesis import Delivery, Synthesizer
from training.units import parse_units, written_text

logger = logging.getLogger(__name__)

Waveform = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Line:
    """One sentence to say, in units.py's notation, and the silence after it."""

    text: str
    language: str
    delivery: Delivery
    pause_s: float = 0.4


@dataclass(frozen=True, slots=True)
class SpokenWord:
    """A word, or a Chinese character, and where it is heard."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class SpokenSentence:
    text: str
    voice: str
    start_s: float
    end_s: float
    words: tuple[SpokenWord, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """samples: float32 [n_samples], 16 kHz mono, between -1 and 1."""

    samples: Waveform
    language: str
    sentences: tuple[SpokenSentence, ...]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def text(self) -> str:
        return ("" if self.language == "zh" else " ").join(sentence.text for sentence in self.sentences)

    def truth(self, *, with_words: bool) -> dict[str, Any]:
        """The part of a manifest row that describes what is heard."""
        sentences = [asdict(sentence) for sentence in self.sentences]
        for sentence in sentences:
            words = sentence.pop("words")
            if with_words:
                sentence["words"] = [[word["text"], word["start_s"], word["end_s"]] for word in words]
        return {
            "language": self.language,
            "text": self.text,
            "seconds": round(self.duration_s, 2),
            "sentences": sentences,
        }


def record(lines: Sequence[Line], synthesizer: Synthesizer, *, lead_s: float = 0.3, gain: float = 1.0) -> Recording:
    """Say the lines one after another. Raises ValueError for a line that cannot be said by its voice."""
    pieces: list[Waveform] = [_silence(lead_s)]
    n_samples = len(pieces[0])
    sentences: list[SpokenSentence] = []
    for line in lines:
        units = parse_units(line.text, line.language)
        utterance = synthesizer.speak(units, line.delivery)
        if utterance is None:
            raise ValueError(f"The voice {line.delivery.voice} says nothing audible for {line.text!r}.")
        words = tuple(
            SpokenWord(unit.written.strip(), _seconds(n_samples + start), _seconds(n_samples + end))
            for unit, start, end in zip(units, utterance.starts, utterance.ends, strict=True)
        )
        text = written_text(line.text, line.language)
        end_s = _seconds(n_samples + len(utterance.samples))
        sentences.append(SpokenSentence(text, line.delivery.voice, _seconds(n_samples), end_s, words))
        pieces += [utterance.samples.astype(np.float32) * (gain / 32768.0), _silence(line.pause_s)]
        n_samples += len(pieces[-2]) + len(pieces[-1])
    samples = np.clip(np.concatenate(pieces), -1.0, 1.0).astype(np.float32)
    return Recording(samples, lines[0].language, tuple(sentences))


def write_flac(path: Path, samples: Waveform) -> None:
    """16-bit mono at 16 kHz, lossless."""
    import soundfile

    soundfile.write(path, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def write_opus(path: Path, samples: Waveform, *, bitrate_kbps: int) -> None:
    """Ogg Opus through ffmpeg. Raises MachineError if this ffmpeg was built without libopus."""
    encoding = ["-c:a", "libopus", "-b:a", f"{bitrate_kbps}k", "-application", "voip", "-frame_duration", "60"]
    reproducible = ["-fflags", "+bitexact", "-flags:a", "+bitexact", "-map_metadata", "-1"]
    command = [find_ffmpeg(), "-loglevel", "error", "-y", "-f", "f32le", "-ar", str(SAMPLE_RATE), "-ac", "1", "-i", "-"]
    command += [*encoding, *reproducible, str(path)]
    finished = subprocess.run(command, input=samples.astype("<f4").tobytes(), capture_output=True, check=False)
    if finished.returncode != 0:
        message = finished.stderr.decode(errors="replace").strip()
        raise MachineError(f"ffmpeg could not write Opus to {path}: {message}. Install an ffmpeg with libopus.")
    logger.info("wrote file=%s bytes=%d", path.name, path.stat().st_size)


def _silence(duration_s: float) -> Waveform:
    return np.zeros(round(duration_s * SAMPLE_RATE), np.float32)


def _seconds(n_samples: int) -> float:
    return round(n_samples / SAMPLE_RATE, 3)
