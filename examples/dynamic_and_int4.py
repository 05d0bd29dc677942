"""What needs no calibration: dynamic INT8, bitsandbytes' two 4-bit formats, and our own int8 and int4.

    python examples/dynamic_and_int4.py
    python examples/dynamic_and_int4.py --model openai/whisper-large-v3

All run on the engine that the app takes: the fast one where it can. What bitsandbytes costs on transformers is shown by
bitsandbytes_8bit.py, and for every row by `python app.py compare FILE --engine reference`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from examples.workbench import Outcome, device_of, examples_in, parser, percent, run, run_script, table
from model_loader.precision import PRECISIONS

ROWS = ("int8-dynamic", "bnb-nf4", "bnb-fp4", "int8", "int4")


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--languages", default="en", help="of the examples, with commas (default: en)")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    recordings = examples_in(arguments.languages)
    base = "fp16" if device.kind == "cuda" else "fp32"
    outcomes = []
    for name in (base, *(name for name in ROWS if name in PRECISIONS)):
        outcomes.append(run(arguments.model, name, recordings, device=device, engine="auto"))
    languages = [recording.language for recording in recordings]
    head = ["precision", "engine", "load s", "warm s", "weights MiB", "peak MiB", *(f"WER {x}" for x in languages)]
    print(table(head, [_row(outcome, languages) for outcome in outcomes]))
    for outcome in outcomes:
        if outcome.reason:
            print(f"{outcome.precision} was not run: {outcome.reason}")
        elif outcome.report is not None:
            print(f"{outcome.precision}: {outcome.report.census.summary}")
    print("\n".join(_verdicts(outcomes)))
    return 0 if any(not outcome.reason for outcome in outcomes) else 1


def _row(outcome: Outcome, languages: Sequence[str]) -> list[object]:
    engine = outcome.report.engine if outcome.report else None
    errors = [percent(outcome.errors.get(language)) for language in languages]
    return [outcome.precision, engine, outcome.load_s, outcome.warm_s, outcome.weights_mib, outcome.peak_mib, *errors]


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """Each row against the first, from this run's figures alone."""
    base = outcomes[0]
    return [
        f"{outcome.precision}: {100 * outcome.weights_mib / base.weights_mib:.0f} % of {base.precision}'s weights, "
        f"{outcome.time_beside(base)}."
        for outcome in outcomes[1:]
        if base.weights_mib and outcome.weights_mib and base.warm_s and outcome.warm_s
    ]


if __name__ == "__main__":
    raise SystemExit(run_script(main))
