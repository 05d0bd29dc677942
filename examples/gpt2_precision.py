"""A causal language model in fp32, int8 and int4: memory before, loaded and cleaned up, 50 tokens timed, two charts.

    python examples/gpt2_precision.py
    python examples/gpt2_precision.py --model gpt2 --out charts/

Runs through Whisper's own loader. Without --model it takes gpt2 from this disk, else from the Hub if that answers
within seconds, else random weights in GPT-2-small's shape: their bytes and speed are real, their text is noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from errors import DiskFullError, ModelError
from examples.workbench import MIB, bar_chart, device_of, line_chart, parser, path, run_script, table, timed_runs, upto
from model_loader.causal import find_causal, find_gpt2, load_causal, make_random, read_tokenizer, refuse_long
from model_loader.memory import MemoryPoint
from transcription.files import check_folder
from transcription.options import WARM_RUNS

ROWS = ("fp32", "bnb-int8", "bnb-nf4")
"""32, 8 and 4 bit."""
PROMPT = "Precision is"
PHASES = ("before", "loaded", "cleaned up")


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    options.set_defaults(model="")
    options.add_argument("--tokens", type=upto(100_000), default=50, help="tokens to time (default: 50)")
    options.add_argument("--layers", type=upto(48), default=12, help="of the random weights (default: 12)")
    options.add_argument("--out", type=path, default=Path("gpt2-charts"), help="folder of the charts")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    check_folder(arguments.out, "--out")
    with TemporaryDirectory(prefix="sotto-") as scratch:
        folder = _find(arguments.model, Path(scratch), arguments.layers)
        refuse_long(folder, len(_words(folder)[0]), arguments.tokens)
        results = [measure(folder, row, arguments.tokens, str(device.torch_device)) for row in ROWS]
    rows = [[r["row"], r["load_s"], r["weights_mib"], *r["phases_mib"], r["token_ms"], r["spread_ms"]] for r in results]
    print(table(["precision", "load s", "weights MiB", *(f"{x} MiB" for x in PHASES), "ms/token", "spread"], rows))
    owner = "torch's tensors on the GPU" if device.kind == "cuda" else "the process's main memory, libraries included"
    print(f"Memory of the phases is {owner}; weights are counted in the model. ms/token: median of {WARM_RUNS} runs.")
    for result in results:
        print(f"{result['row']}: {result['proof']}\n  {result['text']}")
    print("\n".join(f"Chart: {chart}" for chart in draw(results, arguments.out)))
    return 0


def measure(folder: Path, row: str, n_tokens: int, device: str) -> dict[str, Any]:
    """Load, time a growing number of tokens, each WARM_RUNS times, close."""
    engine = load_causal(str(folder), row, device=device)
    prompt, decode = _words(folder)
    engine.generate(prompt, 2)  # kernels are chosen and loaded here, not in the times below
    lengths, seconds = [max(n_tokens // 4, 1), max(n_tokens // 2, 1), n_tokens], []
    for n in lengths:
        runs_s, tokens = timed_runs(partial(engine.generate, prompt, n))
        seconds.append(median(runs_s))
    engine.close()
    phases, report = engine.report.phases, engine.report
    assert phases.after_unload is not None
    return {
        "row": row,
        "load_s": report.load_s,
        "weights_mib": report.census.n_bytes / MIB,
        "phases_mib": [_mib(point) for point in (phases.before, phases.after_load, phases.after_unload)],
        "n_tokens": lengths,
        "seconds": seconds,
        "token_ms": 1000 * seconds[-1] / n_tokens,
        "spread_ms": 1000 * (max(runs_s) - min(runs_s)) / n_tokens,
        "text": decode(tokens),
        "proof": report.census.summary,
    }


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """memory.png: bars by precision and phase. time.png: seconds against tokens, a line for each precision."""
    bars = {phase: [result["phases_mib"][index] for result in results] for index, phase in enumerate(PHASES)}
    lines = {result["row"]: ([0, *result["n_tokens"]], [0, *result["seconds"]]) for result in results}
    return [
        bar_chart(folder / "memory.png", "Memory by phase", "MiB", [result["row"] for result in results], bars),
        line_chart(folder / "time.png", "Time to write tokens", "tokens", "seconds", lines),
    ]


def _mib(point: MemoryPoint) -> float:
    """torch's tensors on a GPU, the process's main memory on a CPU."""
    n_bytes = point.process_bytes if point.allocated_bytes is None else point.allocated_bytes
    return (n_bytes or 0) / MIB


def _find(model: str, scratch: Path, n_layers: int) -> Path:
    """The model asked for; else gpt2 from this disk or the Hub; else random weights, said aloud."""
    try:
        return find_causal(model, offline=False) if model else find_gpt2()
    except (ModelError, DiskFullError) as error:
        if model:
            raise
        print(f"{error}\nRandom weights in GPT-2-small's shape instead: bytes and speed are real, text is noise.")
    return make_random(scratch, n_layers)


def _words(folder: Path) -> tuple[list[int], Callable[[Sequence[int]], str]]:
    """(the prompt's tokens, tokens -> text); ids where the folder has no tokenizer."""
    if (tokenizer := read_tokenizer(folder)) is None:
        return [0, 1, 2], lambda tokens: f"token ids {list(tokens)[:8]} ..."
    return tokenizer(PROMPT)["input_ids"], lambda tokens: PROMPT + tokenizer.decode(tokens)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
