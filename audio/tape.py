"""The part of a stream that is still needed, addressed by position in the recording.

In: blocks [n_samples] in order. Out: copies of stretches. What is forgotten is freed, so memory follows what is kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]  # a waveform or a piece of one: [n_samples], 16 kHz mono


class Tape:
    """append at the end, read anywhere after what was forgotten."""

    def __init__(self) -> None:
        self._blocks: list[Samples] = []
        self._start_sample = 0  # of the first block kept
        self.end_sample = 0
        """Samples appended so far."""

    def append(self, block: Samples) -> None:
        """block: float32 [n_samples]; empty ones are allowed."""
        if block.ndim != 1:
            raise ValueError(f"a waveform is [n_samples], not {block.shape}")
        if block.size:
            self._blocks.append(block.astype(np.float32, copy=False))
            self.end_sample += block.size

    def read(self, start_sample: int, end_sample: int) -> Samples:
        """A copy of [start_sample, end_sample). Raises ValueError outside what is kept."""
        if not self._start_sample <= start_sample <= end_sample <= self.end_sample:
            raise ValueError(
                f"samples {start_sample} to {end_sample} are not kept; {self._start_sample} to {self.end_sample} are"
            )
        stretch = np.empty(end_sample - start_sample, dtype=np.float32)
        at = self._start_sample
        for block in self._blocks:
            first, last = max(start_sample, at), min(end_sample, at + block.size)
            if first < last:
                stretch[first - start_sample : last - start_sample] = block[first - at : last - at]
            at += block.size
        return stretch

    def forget(self, before_sample: int) -> None:
        """Free the blocks that end at or before before_sample."""
        while self._blocks and self._start_sample + self._blocks[0].size <= before_sample:
            self._start_sample += self._blocks.pop(0).size
