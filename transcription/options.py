"""What a user may ask of one transcription, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass

from errors import OptionError

WINDOW_MODES = ("vad", "fixed")
TASKS = ("transcribe", "translate")
ENGINES = ("auto", "fast", "reference")
WARM_RUNS = 3
"""Of each precision in a comparison, unless said otherwise: fewer have no spread, and without one nothing is called
faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscribeOptions:
    """Options of one recording. Raises OptionError for a value outside its range.

    The language is checked against the checkpoint when the engine is known.
    """

    language: str | None = None
    """Two- or three-letter code, or None to detect it."""
    task: str = "transcribe"
    windows: str = "vad"
    """vad: cut in silence; fixed: 30 s with overlap, merged on timestamps."""
    prompt: str = ""
    """Words and names the recording holds; given to the model as previous text of every window."""
    words: bool = False
    """Times of single words too, in a second pass over each window."""
    beam_size: int = 1
    batch_size: int = 0
    """Windows decoded together; 0 lets the engine choose."""
    engine: str = ""
    """fast: the captured step; reference: transformers' generate; auto: fast where precision and checkpoint allow it.
    Empty: as the program was started. Beam search always runs on reference."""
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried in order for windows that fail the thresholds below (source: openai/whisper, transcribe.py)."""
    compression_ratio_limit: float = 2.4
    logprob_limit: float = -1.0
    no_speech_limit: float = 0.6
    max_new_tokens: int = 224
    seed: int = 0
    """Of the sampling at temperatures above 0."""

    def __post_init__(self) -> None:
        _one_of("windows", self.windows, WINDOW_MODES)
        _one_of("task", self.task, TASKS)
        if self.engine:
            _one_of("engine", self.engine, ENGINES)
        _in_range("beam size", self.beam_size, 1, 10)
        _in_range("batch size", self.batch_size, 0, 256)
        _in_range("max_new_tokens", self.max_new_tokens, 1, 440)
        if not self.temperatures or any(not 0.0 <= t <= 2.0 for t in self.temperatures):
            raise OptionError(
                f"Temperatures {list(self.temperatures)} are not usable; give one or more numbers from 0 to 2."
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is '{value}'; choose one of {', '.join(allowed)}.")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise OptionError(f"{name} is {value}; choose a whole number from {low} to {high}.")
