"""`app.py plan`, and what `--precision auto` says on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import app
import cli
from model_loader.header import KNOWN
from model_loader.plan import GPUS
from model_loader.precision import PRECISIONS
from tests.saying import make_saying


def run(capsys: pytest.CaptureFixture[str], *words: str, work: Path) -> tuple[int, str, str]:
    code = cli.main([*words, "--device", "cpu", "--offline", "--work-dir", str(work)], serve=app.serve, examples=work)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_plan_lists_precisions_by_batch_and_cards_by_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "plan", "--model", "large-v3", "--batch", "1,4", work=tmp_path)
    assert (code, err) == (0, "")
    assert all(name in out for name in (*PRECISIONS, *KNOWN, "batch 1", "batch 4", "T4 (16 GB)", "H200 (141 GB)"))
    assert "bf16 needs a GPU of compute capability 8.0 or newer; T4 has 7.5. Choose fp16." in out
    assert "up to the 32 windows that the fast engine decodes at once" in out
    assert "from its published sizes" in out and "--precision auto, for its batches of " in out


def test_plan_for_the_reference_engine_is_that_engines_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An H200 has room for 256 windows of tiny there; the fast engine decodes 32."""
    found = {
        engine: json.loads(run(capsys, "plan", "--model", "tiny", "--engine", engine, "--json", work=tmp_path)[1])
        for engine in ("auto", "reference")
    }
    largest = {engine: plan["gpus"][-1]["fitting"]["fp16"] for engine, plan in found.items()}
    assert largest == {"auto": 32, "reference": 256}
    _, out, _ = run(capsys, "plan", "--model", "tiny", "--engine", "reference", work=tmp_path)
    assert "fast engine" not in out and out.count("256 windows on the reference engine") == 2


def test_plan_says_what_the_program_itself_would_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Which does not depend on the batches that are listed."""
    taken = {
        batch: json.loads(run(capsys, "plan", "--model", "large-v3", "--batch", batch, "--json", work=tmp_path)[1])[
            "auto"
        ]
        for batch in ("1", "32,4")
    }
    assert taken["1"] == taken["32,4"] and taken["1"]["precision"] in PRECISIONS
    _, out, _ = run(capsys, "plan", "--model", "large-v3", "--batch-size", "7", work=tmp_path)
    assert "--precision auto, for its batches of 7: " in out


def test_plan_as_json_has_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "plan", "--model", "demo", "--json", work=tmp_path)
    found = json.loads(out)
    assert code == 0 and found["source"] == "file" and found["n_weights"] == 11_244_032
    rows = {row["precision"]: row for row in found["precisions"]}
    assert list(rows) == list(PRECISIONS)
    assert [entry["batch"] for entry in rows["fp32"]["batches"]] == [1, 8, 32]
    assert rows["fp32"]["batches"][0]["weights_bytes"] == 4 * found["n_weights"]
    assert rows["fp16"]["unavailable"] and not rows["fp16"]["batches"]
    assert len(found["gpus"]) == len(GPUS) and len(found["matrix"]) == len(GPUS) * len(KNOWN)


def test_plan_without_a_model_takes_what_auto_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "plan", "--cache-dir", str(tmp_path / "hub"), work=tmp_path)
    assert code == 0 and out.startswith(("openai/whisper-base on CPU", "openai/whisper-small on CPU"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--batch 0", "--batch is '0'"),
        ("--model ./nowhere", "There is no model"),
        ("--model some/thing", "--offline"),
        ("--device tpu", "auto, cpu, cuda"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["plan", "--offline", "--device", "cpu", "--work-dir", str(tmp_path), *words.split()]
    assert cli.main(argv, serve=app.serve, examples=tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and part in printed.err and "\n" not in printed.err.strip()


def test_plan_reads_no_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    """A checkpoint whose tensors are cut off can still be planned."""
    for path in (root / "models" / "demo").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in (root / "models" / "demo").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:60_000])
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), work=tmp_path)
    assert code == 0 and "predicted from its header" in out


def test_auto_says_why_on_standard_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, greeting: Path) -> None:
    model = make_saying("Good morning.", tmp_path / "model", shape="least")
    words = ("detect", str(greeting), "--model", str(model), "--precision", "auto")
    code, out, err = run(capsys, *words, work=tmp_path)
    assert code == 0 and out.startswith("en") and "so auto takes this most accurate row." in err
