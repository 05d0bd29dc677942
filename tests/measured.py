"""A row of a comparison with scripted figures. Loads no large library: the browser's tests take it too."""

from __future__ import annotations

from collections.abc import Sequence

from model_loader.precision import PRECISIONS
from transcription.interface import CompareRow, MemoryPhase
from transcription.transcript import Segment


def measured_row(name: str, segments: Sequence[Segment] = (), reference: str = "", repeats: int = 1) -> CompareRow:
    """Scripted figures of one precision; what a CPU does not measure is None."""
    return CompareRow(
        precision=name, label=PRECISIONS[name].label, effective=name, text=" ".join(s.text for s in segments),
        segments=tuple(segments), language="en", audio_s=12.2, load_s=0.1, warm_up_s=0.1, first_run_s=1.0,
        warm_runs_s=(1.0,) * repeats, warm_s=1.0, first_text_s=0.5, real_time_factor=12.2, tokens_per_s=30.0,
        weights_bytes=45_000_000, peak_bytes=400_000_000, wer=0.0, cer=0.0, n_word_errors=0, n_reference_words=20,
        reference=reference, device="CPU, 2 cores", model="demo", batch_size=4, predicted_weights_bytes=45_000_000,
        predicted_peak_bytes=70_000_000, phases=(MemoryPhase("before", 200_000_000), MemoryPhase("peak", 400_000_000)),
    )  # fmt: skip
