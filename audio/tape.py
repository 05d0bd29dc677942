"""The part of a stream that is still needed, addressed by position in the recording.

In: blocks [n_samples] in order. Out: copies of stretches. What is forgotten is freed, so memory follows what is kept.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]  # a waveform or a piece of one: [n_samples], 16 kHz mono


class Tape:
    """append at the end, read anywhere after what was forgotten."""

    def __init__(self) -> None:
        self._blocks: list[Samples] = []
        self._starts: list[int] = []  # of each block
        self.end_sample = 0
        """Samples appended so far."""

    def append(self, block: Samples) -> None:
        """block: float32 [n_samples]; empty ones are allowed."""
        if block.ndim != 1:
            raise ValueError(f"a waveform is [n_samples], not {block.shape}")
        if block.size:
            self._blocks.append(block.astype(np.float32, copy=False))
            self._starts.append(self.end_sample)
            self.end_sample += block.size

    def read(self, start_sample: int, end_sample: int) -> Samples:
        """A copy of [start_sample, end_sample). Raises ValueError outside what is kept."""
        kept_from = self._starts[0] if self._starts else self.end_sample
        if not kept_from <= start_sample <= end_sample <= self.end_sample:
            raise ValueError(
                f"samples {start_sample} to {end_sample} are not kept; {kept_from} to {self.end_sample} are"
            )
        stretch = np.empty(end_sample - start_sample, dtype=np.float32)
        index = max(0, bisect_right(self._starts, start_sample) - 1)
        while index < len(self._blocks) and self._starts[index] < end_sample:
            at, block = self._starts[index], self._blocks[index]
            first, last = max(start_sample, at), min(end_sample, at + block.size)
            stretch[first - start_sample : last - start_sample] = block[first - at : last - at]
            index += 1
        return stretch

    def forget(self, before_sample: int) -> None:
        """Free the blocks that end at or before before_sample."""
        count = 0
        while count < len(self._blocks) and self._starts[count] + self._blocks[count].size <= before_sample:
            count += 1
        del self._blocks[:count], self._starts[:count]
