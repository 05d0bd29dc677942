"""fp32, fp16 autocast (mixed precision), fp16 and bf16 on the same recordings: memory, time, accuracy.

    python examples/mixed_precision.py
    python examples/mixed_precision.py --model openai/whisper-large-v3

Accuracy is measured against what is really said in the bundled examples. Rows that this device cannot run are shown
with their reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from examples.workbench import Outcome, device_of, examples_in, parser, percent, run, run_script, table

ROWS = ("fp32", "fp16-autocast", "fp16", "bf16")


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--languages", default="en,fr", help="of the examples, with commas (default: en,fr)")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    recordings = examples_in(arguments.languages)
    outcomes = [run(arguments.model, name, recordings, device=device) for name in ROWS]
    languages = [recording.language for recording in recordings]
    head = ["precision", "load s", "warm s", "x real time", "weights MiB", "peak MiB", *(f"WER {x}" for x in languages)]
    seconds = sum(recording.seconds for recording in recordings)
    print(table(head, [_row(outcome, seconds, languages) for outcome in outcomes]))
    if device.kind == "cpu":
        print("peak: torch keeps no account of a CPU's memory, so none is given.")
    for outcome in outcomes:
        if outcome.reason:
            print(f"{outcome.precision} was not run: {outcome.reason}")
    print("\n".join(_verdicts(outcomes)))
    return 0 if any(not outcome.reason for outcome in outcomes) else 1


def _row(outcome: Outcome, seconds: float, languages: Sequence[str]) -> list[object]:
    speed = None if outcome.warm_s is None else seconds / outcome.warm_s
    errors = [percent(outcome.errors.get(language)) for language in languages]
    return [outcome.precision, outcome.load_s, outcome.warm_s, speed, outcome.weights_mib, outcome.peak_mib, *errors]


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """Each row against fp32, from this run's figures alone."""
    base = outcomes[0]
    lines = []
    for outcome in outcomes[1:]:
        if outcome.reason or not (base.weights_mib and outcome.weights_mib and base.warm_s and outcome.warm_s):
            continue
        same = sum(outcome.texts[file] == text for file, text in base.texts.items())
        lines.append(
            f"{outcome.precision}: {100 * outcome.weights_mib / base.weights_mib:.0f} % of fp32's weights, "
            f"{outcome.time_beside(base)}, {same} of {len(base.texts)} texts equal to fp32's."
        )
        if outcome.precision == "fp16-autocast":
            lines.append(
                "  autocast keeps the weights in 32 bits and casts them to compute: it saves no weight memory."
            )
    return lines


if __name__ == "__main__":
    raise SystemExit(run_script(main))
