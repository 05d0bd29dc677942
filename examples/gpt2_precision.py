"""A causal language model in fp32, int8 and int4: memory before, loaded and cleaned up, 50 tokens timed, two charts.

    python examples/gpt2_precision.py
    python examples/gpt2_precision.py --model gpt2 --out charts/

Runs through Whisper's own loader. Without --model it takes gpt2 where that is on the disk, else random weights in
GPT-2-small's shape: their bytes and speed are real, their text is noise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the packages are found from any folder

from errors import ModelUnavailableError
from examples.workbench import MIB, device_of, parser, run_script, table
from model_loader.causal import RANDOM, find_causal, load_causal
from model_loader.memory import MemoryPoint

ROWS = {"fp32": "fp32", "int8": "bnb-int8", "int4": "bnb-nf4"}
PROMPT = "Precision is"
PHASES = ("before", "loaded", "cleaned up")


def main(argv: Sequence[str]) -> int:
    options = parser(__doc__)
    options.set_defaults(model="")
    options.add_argument("--tokens", type=int, default=50, help="tokens to time (default: 50)")
    options.add_argument("--out", type=Path, default=Path("gpt2-charts"), help="folder of the charts")
    arguments = options.parse_args(argv)
    device = device_of(arguments.device)
    model = arguments.model or _default_model()
    if model == RANDOM:
        print(
            "gpt2 is not on this disk: random weights in GPT-2-small's shape. Bytes and speed are real, text is noise."
        )
    results = [measure(model, row, arguments.tokens, str(device.torch_device)) for row in ROWS.values()]
    head = ["precision", "load s", "weights MiB", *(f"{phase} MiB" for phase in PHASES), "ms/token"]
    rows = [
        [r["row"], r["load_s"], r["weights_mib"], *r["phases_mib"], 1000 * r["token_s"][-1] / arguments.tokens]
        for r in results
    ]
    print(table(head, rows))
    owner = "the GPU's, of torch's tensors" if device.kind == "cuda" else "the process's resident main memory"
    print(f"Memory of the phases is {owner}; weights are counted in the model.")
    for result in results:
        print(f"{result['row']}: {result['proof']}")
        print(f"  {PROMPT}{result['text']}" if result["text"] else f"  token ids {result['tokens'][:8]} ...")
    for chart in draw(results, arguments.out):
        print(f"Chart: {chart}")
    return 0


def measure(model: str, row: str, n_tokens: int, device: str) -> dict[str, Any]:
    """Load, time a growing number of tokens, close."""
    engine = load_causal(model, row, device=device)
    tokenizer = None if model == RANDOM else _tokenizer(find_causal(model, offline=True))
    prompt = tokenizer(PROMPT)["input_ids"] if tokenizer else [464, 3280, 318]
    engine.generate(prompt, 2)  # kernels are chosen and loaded here, not in the time below
    times = [0.0]
    for n in (n_tokens // 4, n_tokens // 2, n_tokens):
        started_s = time.perf_counter()
        tokens = engine.generate(prompt, max(n, 1))
        times.append(time.perf_counter() - started_s)
    engine.close()
    phases, report = engine.report.phases, engine.report
    assert phases.after_unload is not None
    return {
        "row": row,
        "load_s": report.load_s,
        "weights_mib": report.census.n_bytes / MIB,
        "phases_mib": [_mib(point) for point in (phases.before, phases.after_load, phases.after_unload)],
        "n_tokens": [0, max(n_tokens // 4, 1), max(n_tokens // 2, 1), n_tokens],
        "token_s": times,
        "tokens": tokens,
        "text": tokenizer.decode(tokens) if tokenizer else "",
        "proof": report.census.summary,
    }


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """memory.png: bars by precision and phase. time.png: seconds against tokens, a line for each precision."""
    from matplotlib.figure import Figure  # its own canvas: no display is needed

    folder.mkdir(parents=True, exist_ok=True)
    memory = Figure(figsize=(7, 4), layout="constrained")
    axes = memory.add_subplot(xlabel="precision", ylabel="MiB", title="Memory by phase")
    for index, phase in enumerate(PHASES):
        places = [place + 0.27 * (index - 1) for place in range(len(results))]
        axes.bar(places, [result["phases_mib"][index] for result in results], width=0.25, label=phase)
    axes.set_xticks(range(len(results)), [result["row"] for result in results])
    axes.legend()
    seconds = Figure(figsize=(7, 4), layout="constrained")
    axes = seconds.add_subplot(xlabel="tokens", ylabel="seconds", title="Time to write tokens")
    for result in results:
        axes.plot(result["n_tokens"], result["token_s"], marker="o", label=result["row"])
    axes.legend()
    paths = [folder / "memory.png", folder / "time.png"]
    for figure, path in zip((memory, seconds), paths, strict=True):
        figure.savefig(path, dpi=120)
    return paths


def _mib(point: MemoryPoint) -> float:
    """torch's tensors on a GPU, the process's main memory on a CPU."""
    n_bytes = point.process_bytes if point.allocated_bytes is None else point.allocated_bytes
    return (n_bytes or 0) / MIB


def _default_model() -> str:
    try:
        find_causal("gpt2", offline=True)
    except ModelUnavailableError:
        return RANDOM
    return "gpt2"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
