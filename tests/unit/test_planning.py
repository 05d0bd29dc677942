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
    assert "up to the 32 windows that the fast engine decodes at once, or 256 on the reference engine" in out
    assert "from its published sizes" in out and "--precision auto, for its batches of " in out


def test_plan_says_why_a_row_cannot_run_here_and_lists_every_row_for_every_card_and_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, out, _ = run(capsys, "plan", "--model", "tiny", work=tmp_path)
    assert "  fp16 needs a GPU: a CPU computes in 16 bits with bf16" in out.split("largest batch:")[0]
    table = out.split("every precision, and its largest batch")[1].splitlines()[1:]
    head, *lines = [line.split("  ") for line in table]
    assert [word.strip() for word in head if word.strip()] == ["GPU", "model", *PRECISIONS]
    cells = [[word.strip() for word in line if word.strip()] for line in lines[: len(GPUS) * len(KNOWN)]]
    found = {(gpu, model): dict(zip(PRECISIONS, batches, strict=True)) for gpu, model, *batches in cells}
    assert len(found) == len(GPUS) * len(KNOWN)
    row = found["RTX 4060 (8 GB)", "large-v3"]
    assert row["fp32"] == "-" and int(row["bnb-int8"]) > 0 and found["T4 (16 GB)", "large-v3"]["bf16"] == "no"


def test_plan_for_one_precision_shows_that_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "plan", "--model", "tiny", "--precision", "8bit", work=tmp_path)
    assert code == 0 and "bnb-int8" in out and "fp32" not in out and "--precision auto" not in out
    _, out, _ = run(capsys, "plan", "--model", "tiny", "--precision", "8bit", "--json", work=tmp_path)
    plan = json.loads(out)
    assert [row["precision"] for row in plan["precisions"]] == ["bnb-int8"]
    assert {cell["precision"] for cell in plan["matrix"]} == {"bnb-int8"}


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


def test_plan_says_what_the_program_itself_would_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which does not depend on the batches that are listed."""
    monkeypatch.setattr("model_loader.memory.free_bytes", lambda device: 20 * 2**30)  # it changes from call to call
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
        ("--precision nope", "There is no precision 'nope'; choose one of fp32"),
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_may_not_fit_is_said_before_the_text_and_done_all_the_same(
    precision: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, greeting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_loader.loader.free_bytes", lambda device: 2**20)
    model = make_saying("Good morning.", tmp_path / "model", shape="least")
    words = ("detect", str(greeting), "--model", str(model), "--precision", precision)
    code, out, err = run(capsys, *words, work=tmp_path)
    assert code == 0 and out.startswith("en")
    assert err.count("but only 1 MiB are free. It is tried all the same") == 1
    assert f"{precision} of model needs " in err
