"""The experiment scripts in examples/ end to end on the CPU: without arguments on the demo model, with options on a
small checkpoint that says one sentence, and with bad input; and what calibration's languages do to the demo model.

In this process, which saves ten seconds of imports each: as people start them, by their file from elsewhere, or through
their main().
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch

from errors import ModelUnavailableError
from examples.workbench import EXAMPLES, LONGEST_EXAMPLE_S, Outcome, Recording, available, examples, percent, table
from model_loader.calibration import CalibrationReport
from model_loader.causal import find_gpt2
from model_loader.device import describe_device
from model_loader.engine import Engine
from model_loader.loader import load_engine, quiet_libraries
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


def start(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *arguments: str
) -> tuple[int, str, str]:
    """(exit code, output, errors) of a script as people start it, by its file and from another folder."""
    file = Path(importlib.import_module(f"examples.{script}").__file__ or "")
    elsewhere = [place for place in sys.path if place not in ("", str(file.parent.parent))]
    patch.setattr(sys, "path", [str(file.parent), *elsewhere])
    patch.setattr(sys, "argv", [str(file), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, printed.out, printed.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_imports_without_doing_anything(script: str, root: Path) -> None:
    assert len((root / "examples" / f"{script}.py").read_text(encoding="utf-8").splitlines()) < 120
    assert callable(importlib.import_module(f"examples.{script}").main)


def test_unmeasured_cells_are_a_dash_and_columns_line_up() -> None:
    lines = table(["a", "seconds"], [["x", 1.234], ["longer", None], ["y", 1234.5]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[1:]] == ["1.23", "-", "1234"]
    assert (percent(0.125), percent(None)) == ("12.5 %", None)


def test_times_are_told_apart_as_the_page_tells_them_apart() -> None:
    base = Outcome("fp32", warm_runs_s=(1.0, 1.2, 1.1))
    slow, same = Outcome("bf16", warm_runs_s=(2.3, 2.0, 2.2)), Outcome("int8", warm_runs_s=(1.3, 1.15, 1.4))
    assert slow.time_beside(base) == "takes 2.00 times the time of fp32" and base.is_apart_from(slow)
    assert same.time_beside(base) == "its time cannot be told from that of fp32 in 3 warm runs"
    assert Outcome("fp16", reason="No.").warm_s is None
    for runs in ((1.25, 1.3, 1.28), (2.0, 2.1)):  # apart by less than the runs of fp32 are, and too few
        told = Outcome("int8", warm_runs_s=runs)
        assert not told.is_apart_from(base) and "cannot be told" in told.time_beside(base)
    near, steady = Outcome("bf16", warm_runs_s=(1.01, 1.011, 1.012)), Outcome("fp32", warm_runs_s=(1.0, 1.001, 1.002))
    assert not near.is_apart_from(steady)
    assert near.time_beside(steady) == "takes as long as fp32: the difference is under 2 %"


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


@pytest.fixture(scope="module")
def gpt2(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of one narrow layer and random weights, with a tokenizer: the demo model's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=64, vocab_size=6004, **ids)
    with quiet_libraries():
        GPT2LMHeadModel(config).save_pretrained(folder)
    shutil.copy(demo_folder / "tokenizer.json", folder)
    return folder


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


@pytest.fixture
def one_warm_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough where no times are told apart."""
    monkeypatch.setattr("examples.workbench.WARM_RUNS", 1)


@pytest.fixture
def small_demo(short_demo: Path, one_warm_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model of short windows in its place, no GPU, and one warm run: a script's own choices, in seconds."""
    for module in ("names", "weights", "header"):
        monkeypatch.setattr(f"model_loader.{module}.DEMO_FOLDER", short_demo)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("bitsandbytes_8bit", {"fp32": "", "bnb-int8": ""}),
        ("static_int8", {"fp32": "0.0 %", "int8-static": "0.0 %", "int8-dynamic": "0.0 %"}),
    ],
)
def test_a_script_without_arguments_hears_what_the_examples_say(
    script: str,
    rows: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """On the demo model, which hears this sentence in every precision. The other scripts: below."""
    first_sentences(tmp_path, "en")
    monkeypatch.setattr("examples.workbench.EXAMPLES", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, output, errors = start(monkeypatch, capsys, script)
    assert (code, errors) == (0, "")
    found = rows_of(output)
    assert {name: cells[-1] if rows[name] else "" for name, cells in found.items()} == rows
    assert output.count("  Good morning, and welcome to the library.\n") == (2 if script == "bitsandbytes_8bit" else 0)
    assert ("Calibrated on en 3 s." in output) == (script == "static_int8")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("bitsandbytes_8bit", "silence.wav", "No speech was found in silence.wav; give a recording of somebody"),
        ("bitsandbytes_8bit", "nowhere.wav", "There is no file 'nowhere.wav'"),
        ("bitsandbytes_8bit", "english.flac --model no-model", "no-model is not a Whisper checkpoint"),
        ("mixed_precision", "--languages xx", "There is no bundled example in 'xx'; choose from en"),
        ("mixed_precision", "--languages ,", "There is no bundled example in ''; choose from en"),
        ("mixed_precision", "--languages en --model no-model", "no-model is not a Whisper checkpoint"),
        ("dynamic_and_int4", "--languages en,xx", "There is no bundled example in 'xx'; choose from en"),
        ("dynamic_and_int4", "--device cuda:99", "cuda:99"),
        ("static_int8", "--calibrate-on xx", "There is no bundled example in 'xx'; choose from en"),
        ("static_int8", "--languages xx", "There is no bundled example in 'xx'; choose from en"),
        ("static_int8", "--audio=", "argument --audio: the path is empty"),
        ("static_int8", "--audio . --calibrate-on en", "--calibrate-on: not allowed with argument --audio"),
        ("static_int8", "--out silence.wav", "silence.wav cannot be a folder, because silence.wav is a file"),
        ("gpt2_precision", "--tokens 0", "argument --tokens: '0' is not a whole number from 1"),
        ("gpt2_precision", "--tokens=-3", "argument --tokens: '-3' is not a whole number from 1"),
        ("gpt2_precision", "--layers 0", "argument --layers: '0' is not a whole number from 1"),
        ("gpt2_precision", "--out silence.wav", "silence.wav cannot be written (File exists); choose another --out."),
        ("gpt2_precision", "--model no-model", "no-model holds no language model: it has no config.json"),
        ("gpt2_precision", "--model silence.wav", "There is no language model 'silence.wav'"),
        ("gpt2_precision", "--model /nowhere", "There is no language model '/nowhere'"),
        ("gpt2_precision", "--model a..b", "knows no model 'a..b'"),
        ("gpt2_precision", "--model {demo}", "is a whisper model, not a language model"),
        ("gpt2_precision", "--model {gpt2} --tokens 62", "64 positions, and the prompt takes 8: 62 tokens do not fit"),
        ("gpt2_precision", "--model broken --tokens 2", "broken/config.json cannot be read"),
        ("gpt2_precision", "--model cut --tokens 2", "cut holds no language model that can be read"),
        ("gpt2_precision", "--model other --tokens 2", "lacks 1 of its weights (transformer.wte.weight, ...) or they"),
    ],
)
def test_a_script_says_in_a_sentence_what_is_wrong(
    script: str, arguments: str, message: str, demo_folder: Path, gpt2: Path, short_examples: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """Before anything is measured."""
    soundfile.write(tmp_path / "silence.wav", torch.zeros(16_000).numpy(), 16_000)
    for name in ("no-model", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("[]")
    for name in ("cut", "other"):
        shutil.copytree(gpt2, tmp_path / name)
    weights = (gpt2 / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((gpt2 / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    shutil.copy(short_examples / "english.flac", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, output, errors = start(monkeypatch, capsys, script, *arguments.format(demo=demo_folder, gpt2=gpt2).split())
    assert code == 2 and message in errors
    assert "precision  " not in output, "no table"


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
@pytest.mark.usefixtures("small_demo")
def test_mixed_precision_shows_every_row_or_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without arguments, on the demo model; in the French recording two words fewer are said than in its text."""
    first_sentences(tmp_path, "en", "fr")
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    added = [row | {"text": row["text"] + (" Deux mots." if row["language"] == "fr" else "")} for row in manifest]
    (tmp_path / "manifest.json").write_text(json.dumps(added))
    monkeypatch.setattr("examples.workbench.EXAMPLES", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, output, errors = start(monkeypatch, capsys, "mixed_precision")
    assert (code, errors) == (0, "")
    rows = rows_of(output)
    assert float(rows["bf16"][3]) == pytest.approx(float(rows["fp32"][3]) / 2, rel=0.02)
    for name in ("fp16", "fp16-autocast"):
        assert set(rows[name]) == {"-"} and f"{name} was not run: {name} needs a GPU" in output
    assert rows["fp32"][-2:] == rows["bf16"][-2:]
    assert sorted(rows["fp32"][-2:]) == ["0.0 %", percent(2 / 12)], "of twelve words it misses two"
    assert "2 of 2 texts equal to fp32's" in output


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo", "short_examples")
def test_4_bit_rows_are_proven_and_the_packed_ones_run_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without arguments, on the demo model."""
    monkeypatch.chdir(tmp_path)
    code, output, errors = start(monkeypatch, capsys, "dynamic_and_int4")
    assert (code, errors) == (0, "")
    rows = rows_of(output)
    expected = available(["fp32", "int8-dynamic", "bnb-nf4", "bnb-fp4", "int8", "int4"], describe_device("cpu"))
    assert list(rows) == expected
    assert {row[0] for row in rows.values()} == {"fast"}
    weights = {name: float(row[3]) / float(rows["fp32"][3]) for name, row in rows.items()}
    assert weights["bnb-nf4"] == weights["bnb-fp4"] < 0.4
    assert weights["int8-dynamic"] < 0.5, "on a CPU embeddings stay in 32 bits"
    assert weights["int4"] < weights["int8"] < 0.8, "on a CPU the encoder of the packed rows stays in 32 bits"
    n_encoder, n_decoder = 6, 4
    assert f"{6 * n_encoder + 10 * n_decoder} Linear4bit nf4" in output
    assert f"{4 * n_encoder + 6 * n_decoder + 1} Int8Linear int8" in output, "those of one input are joined"
    assert {row[-1] for row in rows.values()} == {"0.0 %"}, "it hears the example in every row"


@pytest.mark.slow
@pytest.mark.usefixtures("one_warm_run")
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
    monkeypatch.setattr("examples.workbench.WARM_RUNS", 2)  # as few as have a spread
    asked: list[str] = []
    monkeypatch.setattr("model_loader.causal.is_reachable", lambda name, mirror: bool(asked.append(name)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    options = ("--device", "cpu", "--tokens", "4", "--layers", "1")
    code, output, _ = start(monkeypatch, capsys, "gpt2_precision", *options)
    assert code == 0
    assert asked == ["openai-community/gpt2"] and "not on this disk and the Hub does not answer" in output
    rows = rows_of(output)
    weights_mib = [round(float(row[1])) for row in rows.values()]
    # Of twelve layers, one. At 4 bits on a CPU the embeddings, 75 MiB at 16 bits, are kept at 32.
    assert weights_mib == pytest.approx([475 - 11 * 27, 157 - 11 * 6.8, 117 + 75 - 11 * 3.4], abs=2)
    assert list(rows) == ["fp32", "bnb-int8", "bnb-nf4"] and all(float(row[-1]) > 0 for row in rows.values())
    assert "Random weights in GPT-2-small's shape" in output and "Linear8bitLt int8" in output
    for name in ("memory.png", "time.png"):
        width, height = png_size((tmp_path / "gpt2-charts" / name).read_bytes())
        assert width > 600 and height > 300


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("is_named", [False, True], ids=["without arguments", "--model"])
def test_gpt2_is_taken_from_this_disk_or_from_a_folder_and_its_words_are_shown(
    is_named: bool, gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """50 tokens without arguments; of a folder as many as are asked for."""
    asked: list[str] = []
    cached = None if is_named else gpt2
    monkeypatch.setattr("model_loader.causal.find_cached", lambda name, *_: bool(asked.append(name)) or cached)
    monkeypatch.chdir(tmp_path)
    options = ("--model", str(gpt2), "--tokens", "5", "--out", "drawn") if is_named else ()
    code, output, errors = start(monkeypatch, capsys, "gpt2_precision", *options)
    assert (code, errors) == (0, "") and set(asked) == ({"openai-community/gpt2"} if not is_named else set())
    rows = rows_of(output)
    assert list(rows) == ["fp32", "bnb-int8", "bnb-nf4"] and all(float(row[-2]) > 0 for row in rows.values())
    file_mib = (gpt2 / "model.safetensors").stat().st_size / 2**20
    assert float(rows["fp32"][1]) == pytest.approx(file_mib, rel=0.02)
    assert "4 Linear4bit nf4" in output and "Random weights" not in output
    said = re.findall(r"^  Precision is(.+)$", output, re.M)
    assert len(said) == 3
    charts = tmp_path / ("drawn" if is_named else "gpt2-charts")
    assert sorted(file.name for file in charts.iterdir()) == ["memory.png", "time.png"]


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
