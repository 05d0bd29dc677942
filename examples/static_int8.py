"""Static INT8 from end to end: calibrate, save, reload, and compare with fp32 and dynamic INT8, per language.

    python examples/static_int8.py
    python examples/static_int8.py --calibrate-on en            what happens to languages that were not heard
    python examples/static_int8.py --model openai/whisper-large-v3 --audio FOLDER --out DIR

Calibration measures how large the inputs of every linear layer become, so that each layer has one fixed scale.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from examples.workbench import MIB, Outcome, device_of, examples_in, parser, path, percent, run, run_script, table
from model_loader.device import DeviceInfo
from model_loader.engine import ReferenceEngine
from model_loader.loader import load_engine
from transcription.calibrate import Calibration, calibrate, recordings_in
from transcription.calibrated import check_target

ROWS = ("fp32", "int8-static", "int8-dynamic")


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    heard = options.add_mutually_exclusive_group()
    heard.add_argument("--audio", type=path, help="folder of recordings to calibrate on (default: the examples)")
    heard.add_argument("--calibrate-on", default="", help="languages of the examples, with commas (default: all)")
    options.add_argument("--out", type=path, help="keep the calibrated folder here (default: a temporary one)")
    options.add_argument("--languages", default="", help="of the examples compared, with commas (default: all)")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    chosen = [] if arguments.audio else examples_in(arguments.calibrate_on)
    files = [found.path for found in chosen] or recordings_in(arguments.audio)
    recordings = examples_in(arguments.languages)
    if arguments.out:
        check_target(arguments.out)
    with TemporaryDirectory(prefix="sotto-") as scratch:
        made = _calibrate(arguments.model, files, arguments.out or Path(scratch) / "calibrated", device)
        size = sum(file.stat().st_size for file in made.folder.iterdir()) / MIB
        print(f"Calibrated on {', '.join(f'{code} {s:.0f} s' for code, s in made.report.languages.items())}.")
        print(f"Saved {size:.0f} MiB; reloading needs neither the recordings nor the 32-bit weights.")
        for layer in made.report.ranked[:3]:
            print(f"  {100 * layer.output_error:.2f} % output error  {layer.name}")
        outcomes = [
            run(
                str(made.folder) if x == "int8-static" else arguments.model, x, recordings, device=device, engine="auto"
            )
            for x in ROWS
        ]
    languages = [recording.language for recording in recordings]
    head = ["precision", "engine", "load s", "warm s", "weights MiB", "peak MiB", *(f"WER {x}" for x in languages)]
    print(table(head, [_row(outcome, languages) for outcome in outcomes]))
    for outcome in outcomes:
        if outcome.reason:
            print(f"{outcome.precision} was not run: {outcome.reason}")
    print("\n".join(_verdicts(outcomes, set(made.report.languages))))
    return 1 if any(outcome.reason for outcome in outcomes) else 0


def _calibrate(model: str, files: Sequence[Path], out: Path, device: DeviceInfo) -> Calibration:
    precision = "fp16" if device.kind == "cuda" else "fp32"
    engine = load_engine(model, precision, device=str(device.torch_device), warm_up=False)
    assert isinstance(engine, ReferenceEngine)
    try:
        return calibrate(engine, files, out)
    finally:
        engine.close()


def _row(outcome: Outcome, languages: Sequence[str]) -> list[object]:
    errors = [percent(outcome.errors.get(language)) for language in languages]
    engine = outcome.report.engine if outcome.report else None
    return [outcome.precision, engine, outcome.load_s, outcome.warm_s, outcome.weights_mib, outcome.peak_mib, *errors]


def _verdicts(outcomes: Sequence[Outcome], heard: set[str]) -> list[str]:
    base = outcomes[0]
    lines = []
    for outcome in outcomes[1:]:
        if not (base.weights_mib and outcome.weights_mib and base.warm_s and outcome.warm_s):
            continue
        worse = [code for code, rate in outcome.errors.items() if rate > base.errors[code]]
        lines.append(
            f"{outcome.precision}: {100 * (outcome.weights_mib / base.weights_mib - 1):+.0f} % weights, "
            f"{outcome.time_beside(base)}, "
            f"more word errors in {', '.join(worse) or 'no language'}."
        )
    unheard = [code for code in base.errors if code not in heard]
    if unheard:
        lines.append(
            f"Not calibrated on {', '.join(unheard)}: layers were measured on other languages' sounds and words."
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(run_script(main))
