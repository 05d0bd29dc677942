"""The experiment scripts in examples/ end to end on the CPU, with a small checkpoint that says one sentence, and what
calibration's languages do to the demo model.

In this process, which saves ten seconds of imports each: gpt2_precision as people start it, by its file from elsewhere,
the others through their main().
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch

from benchmarks.shapes import SHAPES
from errors import ModelUnavailableError
from examples.workbench import EXAMPLES, LONGEST_EXAMPLE_S, Outcome, Recording, available, examples, percent, table
from model_loader.calibration import CalibrationReport
from model_loader.causal import find_gpt2
from model_loader.device import describe_device
from model_loader.engine import Engine
from model_loader.loader import load_engine
from tests.saying import make_saying
from tests.short import make_short
from transcription.calibrate import calibrate
from transcription.compare import error_rates
from transcription.decode import Decoder, encode
from transcription.options import TranscribeOptions
from transcription.tokenizer import WhisperTokens

pytestmark = pytest.mark.usefixtures("short_windows")

SAID = "Good morning."
SCRIPTS = ("bitsandbytes_8bit", "mixed_precision", "static_int8", "dynamic_and_int4", "gpt2_precision")


def run(capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> str:
    """What a script prints, from its main()."""
    module = importlib.import_module(f"examples.{script}")
    assert module.main(["--device", "cpu", *arguments]) == 0
    return capsys.readouterr().out


def rows_of(output: str) -> dict[str, list[str]]:
    """The table's cells by the precision in front."""
    known = ("fp32", "fp16", "fp16-autocast", "bf16", "bnb-int8", "bnb-nf4", "bnb-fp4", "int8", "int4", "int8-static")
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if "  " in line and ":" not in line]
    return {cells[0]: cells[1:] for cells in lines if cells[0] in (*known, "int8-dynamic")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_imports_without_doing_anything(script: str, root: Path) -> None:
    assert len((root / "examples" / f"{script}.py").read_text(encoding="utf-8").splitlines()) < 120
    assert callable(importlib.import_module(f"examples.{script}").main)


def test_unmeasured_cells_are_a_dash_and_columns_line_up() -> None:
    lines = table(["a", "seconds"], [["x", 1.234], ["longer", None], ["y", 1234.5]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[1:]] == ["1.23", "-", "1234"]
    assert (percent(0.125), percent(None)) == ("12.5 %", None)


def test_times_are_told_apart_only_where_no_warm_run_of_one_is_as_long_as_one_of_the_other() -> None:
    base = Outcome("fp32", warm_runs_s=(1.0, 1.2, 1.1))
    slow, same = Outcome("bf16", warm_runs_s=(2.3, 2.0, 2.2)), Outcome("int8", warm_runs_s=(1.3, 1.15, 1.4))
    assert slow.time_beside(base) == "takes 2.00 times the time of fp32" and base.is_apart_from(slow)
    assert same.time_beside(base) == "its time cannot be told from that of fp32 in 3 warm runs"
    assert Outcome("fp16", reason="No.").warm_s is None


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few weights that says SAID whatever it hears, for short windows."""
    folder = tmp_path_factory.mktemp("saying")
    return make_short(make_saying(SAID, folder / "whole"), folder / "short")


@pytest.fixture(scope="module")
def short_examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The examples' first sentences, English and Mandarin, instead of the examples."""
    folder = tmp_path_factory.mktemp("examples")
    first_sentences(folder, "en", "zh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.workbench.EXAMPLES", folder)
        yield folder


@pytest.fixture
def six_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of every language."""
    first_sentences(tmp_path, "en", "es", "fr", "de", "ru", "zh")
    monkeypatch.setattr("examples.workbench.EXAMPLES", tmp_path)


def first_sentences(folder: Path, *languages: str) -> None:
    """Write the short examples of these languages, cut, and their manifest."""
    manifest = json.loads((EXAMPLES / "manifest.json").read_text(encoding="utf-8"))
    rows = [row for row in manifest if row["language"] in languages and row["seconds"] < LONGEST_EXAMPLE_S]
    for row in rows:
        first = row["sentences"][0]
        samples, rate = soundfile.read(EXAMPLES / row["file"], dtype="float32")
        soundfile.write(folder / row["file"], samples[: round((first["end_s"] + 0.3) * rate)], rate)
        row |= {"text": first["text"], "seconds": first["end_s"] + 0.3}
    (folder / "manifest.json").write_text(json.dumps(rows))


@pytest.mark.slow
def test_8_bit_is_timed_beside_32_and_its_slowness_counted(
    saying: Path, short_examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(capsys, "bitsandbytes_8bit", str(short_examples / "english.flac"), "--model", str(saying))
    rows = rows_of(output)
    assert float(rows["bnb-int8"][3]) < 0.4 * float(rows["fp32"][3])
    assert all(float(cell) > 0 for row in rows.values() for cell in row[:4])
    assert all(row[4:] == ["-", "-"] for row in rows.values()), "a CPU has no GPU figures"
    assert output.count(f"  {SAID}\n") == 2
    if "Why it is slower" in output:
        counted = re.search(r"torch operators called by the host: (\d+) -> (\d+)", output)
        assert counted is not None and int(counted[2]) > 2 * int(counted[1]) > 0
        assert output.count("not available") == 3
    else:
        assert "It is not slower here." in output or "cannot be told" in output


@pytest.mark.slow
def test_mixed_precision_shows_every_row_or_its_reason(
    saying: Path, short_examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(capsys, "mixed_precision", "--languages", "en", "--model", str(saying))
    rows = rows_of(output)
    assert float(rows["bf16"][3]) == pytest.approx(float(rows["fp32"][3]) / 2, rel=0.02)
    for name in ("fp16", "fp16-autocast"):
        assert set(rows[name]) == {"-"} and f"{name} was not run: {name} needs a GPU" in output
    assert rows["fp32"][-1] == rows["bf16"][-1] == "71.4 %", "of seven words it says two"
    assert "1 of 1 texts equal to fp32's" in output


@pytest.mark.slow
def test_4_bit_rows_are_proven_and_the_packed_ones_run_fast(
    saying: Path, short_examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(capsys, "dynamic_and_int4", "--model", str(saying))
    rows = rows_of(output)
    expected = available(["fp32", "int8-dynamic", "bnb-nf4", "bnb-fp4", "int8", "int4"], describe_device("cpu"))
    assert list(rows) == expected
    assert {row[0] for row in rows.values()} == {"fast"}
    weights = {name: float(row[3]) / float(rows["fp32"][3]) for name, row in rows.items()}
    assert weights["bnb-nf4"] == weights["bnb-fp4"] < 0.4
    assert weights["int8-dynamic"] < 0.6, "on a CPU embeddings, half of this checkpoint, stay in 32 bits"
    assert weights["int4"] < weights["int8"] < 0.95, "on a CPU the encoder of the packed rows stays in 32 bits"
    n_encoder, n_decoder = SHAPES["deep"].encoder_layers, SHAPES["deep"].decoder_layers
    assert f"{6 * n_encoder + 10 * n_decoder} Linear4bit nf4" in output
    assert f"{4 * n_encoder + 6 * n_decoder + 1} Int8Linear int8" in output, "those of one input are joined"
    assert {row[-1] for row in rows.values()} == {"71.4 %"}


@pytest.mark.slow
def test_static_int8_is_saved_reloaded_and_names_what_it_was_not_calibrated_on(
    saying: Path, short_examples: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--calibrate-on", "en", "--languages", "en,zh", "--out", str(tmp_path / "english")]
    output = run(capsys, "static_int8", "--model", str(saying), *options)
    assert re.search(r"^Calibrated on en \d+ s\.$", output, re.M)
    assert "Not calibrated on zh" in output
    rows = rows_of(output)
    assert list(rows) == ["fp32", "int8-static", "int8-dynamic"]
    assert float(rows["int8-static"][3]) < 0.6 * float(rows["fp32"][3]), "embeddings stay in 32 bits on a CPU"
    assert all(row[-2] == "71.4 %" and row[-1].endswith("%") for row in rows.values())
    assert (tmp_path / "english" / "report.html").exists()


@pytest.mark.slow
def test_gpt2_runs_in_three_precisions_and_draws_its_charts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))  # gpt2 is not on this disk
    asked: list[str] = []
    monkeypatch.setattr("model_loader.causal.is_reachable", lambda name, mirror: bool(asked.append(name)))
    script = EXAMPLES / "gpt2_precision.py"
    monkeypatch.chdir(tmp_path)
    elsewhere = [place for place in sys.path if place not in ("", str(EXAMPLES.parent))]
    monkeypatch.setattr(sys, "path", [str(script.parent), *elsewhere])
    monkeypatch.setattr(sys, "argv", [str(script), "--device", "cpu", "--tokens", "4", "--layers", "1"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert asked == ["openai-community/gpt2"] and "not on this disk and the Hub does not answer" in output
    rows = rows_of(output)
    weights_mib = [round(float(row[1])) for row in rows.values()]
    assert weights_mib == pytest.approx([475 - 11 * 27, 157 - 11 * 6.8, 117 - 11 * 3.4], abs=2), "of twelve layers, one"
    assert list(rows) == ["fp32", "bnb-int8", "bnb-nf4"] and all(float(row[-1]) > 0 for row in rows.values())
    assert "Random weights in GPT-2-small's shape" in output and "Linear8bitLt int8" in output
    for name in ("memory.png", "time.png"):
        width, height = png_size((tmp_path / "gpt2-charts" / name).read_bytes())
        assert width > 600 and height > 300


@pytest.mark.parametrize(("offline", "answers"), [(False, True), (False, False), (True, True)])
def test_gpt2_is_fetched_from_a_hub_that_answers(
    offline: bool, answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("model_loader.causal.is_reachable", lambda name, mirror: answers)
    monkeypatch.setattr("model_loader.causal.download", lambda name, *args, **kwargs: tmp_path / name)
    if answers and not offline:
        assert find_gpt2() == tmp_path / "openai-community/gpt2"
    else:
        why = "the network may not be used" if offline else "the Hub does not answer"
        with pytest.raises(ModelUnavailableError, match=f"gpt2 is not on this disk and {why}"):
            find_gpt2()


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height, every chunk's checksum verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, names = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        names.append(data[at + 4 : at + 8])
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            data[at + 4 : at + 8 + length]
        )
        at += 12 + length
    assert names[0] == b"IHDR" and b"IDAT" in names and names[-1] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.slow
@pytest.mark.usefixtures("six_examples")
def test_languages_that_were_not_calibrated_on_are_further_from_fp32(short_demo: Path, tmp_path: Path) -> None:
    """English alone, then all six languages, and what either does to each: distance from fp32, and word errors.

    A short sentence each: word errors of whole recordings, on more of them, are in LOG.md.
    """
    recordings = examples()
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    drift: dict[str, dict[str, float]] = {}
    wrong: dict[str, dict[str, float]] = {}
    for name, heard in (("english", {"en"}), ("all", {r.language for r in recordings})):
        engine = load_engine(str(short_demo), "fp32", device="cpu", warm_up=False)
        texts = texts or {recording.language: fp32_text(engine, recording) for recording in recordings}
        wrong["fp32"] = wrong.get("fp32") or {r.language: word_error_rate(engine, r) for r in recordings}
        folder = tmp_path / name
        calibrate(engine, [r.path for r in recordings if r.language in heard], folder)  # type: ignore[arg-type]
        engine.close()
        assert set(CalibrationReport.load(folder).languages) == heard
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert ("zh " in page.split("Languages heard:")[1].split("</b>")[0]) == ("zh" in heard)
        engine = load_engine(str(folder), "int8-static", device="cpu", warm_up=False)
        drift[name] = {r.language: distance(engine, r, *texts[r.language]) for r in recordings}
        wrong[name] = {r.language: word_error_rate(engine, r) for r in recordings}
        engine.close()
    print(drift, wrong)
    unheard = set(drift["all"]) - {"en"}
    assert len(unheard) == 5
    assert drift["english"]["en"] < 1.25 * drift["all"]["en"], drift
    assert all(drift["english"][language] > 1.25 * drift["all"][language] for language in unheard), drift
    assert wrong["all"] == wrong["fp32"], wrong
    assert sum(wrong["english"].values()) >= sum(wrong["all"].values()), wrong


def fp32_text(engine: Engine, recording: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt and tokens [1, n], log-probabilities along them [1, n, n_vocab])."""
    tokens = WhisperTokens.from_folder(engine.report.folder)
    decoder = Decoder(tokens, TranscribeOptions(temperatures=(0.0,)))
    found = decoder.decode(engine, recording.windows[:1], recording.language)[0].tokens
    row = torch.tensor([tokens.prompt(recording.language, "transcribe") + list(found)])
    return row, logprobs(engine, recording, row)


def word_error_rate(engine: Engine, recording: Recording) -> float:
    tokens = WhisperTokens.from_folder(engine.report.folder)
    decoder = Decoder(tokens, TranscribeOptions(temperatures=(0.0,)))
    heard = " ".join(tokens.decode(r.tokens) for r in decoder.decode(engine, recording.windows, recording.language))
    said, found = (tokens.normalise(text, recording.language) for text in (recording.text, heard))
    rate = error_rates(said, found)[0]
    assert rate is not None
    return rate


def logprobs(engine: Engine, recording: Recording, row: torch.Tensor) -> torch.Tensor:
    hidden = encode(engine, recording.windows[:1]).hidden
    with torch.no_grad():
        return engine._logits(row, hidden).float().log_softmax(-1)  # type: ignore[attr-defined]


def distance(engine: Engine, recording: Recording, row: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logprobs(engine, recording, row) - expected).abs().mean())
