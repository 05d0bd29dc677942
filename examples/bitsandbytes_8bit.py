"""Load Whisper in 8 bit with bitsandbytes, time one recording, and count why it is slower.

    python examples/bitsandbytes_8bit.py
    python examples/bitsandbytes_8bit.py talk.mp3 --model openai/whisper-large-v3

Compared with 16 bits on a GPU and with 32 bits on a CPU. The reasons are counted by torch's profiler and read from
NVML while the recording is transcribed; what this machine cannot count is "not available".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from examples.workbench import Outcome, device_of, examples, parser, path, read_recording, run, run_script, table

EIGHT_BIT = "bnb-int8"


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("recording", type=path, nargs="?", help="default: the English example")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    recordings = [read_recording(arguments.recording)] if arguments.recording else examples("en")
    base = "fp16" if device.kind == "cuda" else "fp32"
    outcomes = [run(arguments.model, name, recordings, device=device, counts=True) for name in (base, EIGHT_BIT)]
    rows = [_row(outcome) for outcome in outcomes]
    print(table(["precision", "load s", "first s", "warm s", "weights MiB", "peak MiB", "GPU busy %"], rows))
    refused = [outcome for outcome in outcomes if outcome.reason]
    for outcome in refused:
        print(f"{outcome.precision} was not run: {outcome.reason}")
    if refused:
        return 1
    for outcome in outcomes:
        assert outcome.report is not None
        print(f"{outcome.precision}: {outcome.report.census.summary}")
        print(f"  {' '.join(outcome.texts.values())}")
    print("\n".join(explain(*outcomes)))
    return 0


def explain(base: Outcome, eight: Outcome) -> list[str]:
    """Sentences built from what was measured here."""
    assert base.warm_s and eight.warm_s and base.weights_mib and eight.weights_mib
    lines = [
        f"{EIGHT_BIT} holds {100 * eight.weights_mib / base.weights_mib:.0f} % of {base.precision}'s weights; "
        f"{eight.time_beside(base)} on this recording."
    ]
    if not eight.is_apart_from(base):
        return lines
    if eight.warm_s < base.warm_s:
        return [*lines, "It is not slower here."]
    if base.activity is None or eight.activity is None:
        return lines
    lines.append("Why it is slower, counted for one token:")
    counted = (
        ("torch operators called by the host", base.activity.n_operators, eight.activity.n_operators),
        ("kernels launched on the GPU", base.activity.n_kernels, eight.activity.n_kernels),
        ("waits of the host for the GPU", base.activity.n_waits, eight.activity.n_waits),
        ("GPU busy, percent of the time (NVML)", base.utilisation_percent, eight.utilisation_percent),
    )
    for what, before, after in counted:
        values = "not available" if before is None or after is None else f"{before:.0f} -> {after:.0f}"
        lines.append(f"  {what}: {values}")
    lines.append(
        "LLM.int8() rounds the input of every linear layer anew, looks for outlying columns (over 6.0), multiplies "
        f"those in 16 bits and adds the two products up; {base.precision} does one product."
    )
    return lines


def _row(outcome: Outcome) -> list[object]:
    return [
        outcome.precision, outcome.load_s, outcome.first_s, outcome.warm_s,
        outcome.weights_mib, outcome.peak_mib, outcome.utilisation_percent,
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_script(main))
