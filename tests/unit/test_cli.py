"""The command line, in this process: every bad input is one sentence and exit code 2, and the next command works.

Real audio; the real demo checkpoint where its hearing matters, else one that says SAID whatever it hears. `run` is
app.py's own call without the interpreter around it.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import app
import cli
from errors import SottoError
from model_loader.precision import PRECISIONS
from model_loader.weights import DownloadProgress
from settings import Settings, setting_docs
from terminal import Download
from tests.fakes import FakeRun, FakeTranscriber
from tests.saying import make_saying
from transcription import pipeline
from transcription.formats import FORMATS
from transcription.pipeline import LocalTranscriber
from transcription.transcript import Segment


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]

SAID = "Good morning, and welcome to the library."


@pytest.fixture(scope="module")
def transcribers() -> Iterator[dict[Settings, LocalTranscriber]]:
    """Kept between commands, so that each test does not load the model anew."""
    kept: dict[Settings, LocalTranscriber] = {}
    yield kept
    for transcriber in kept.values():
        transcriber.close()


@pytest.fixture
def quick_run(
    run: Run, transcribers: dict[Settings, LocalTranscriber], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Like run, with an engine that may be in memory already: as the second request to a server."""
    build = cli.build_transcriber

    @contextmanager
    def keep(settings: Settings, *, warm_up: bool = False) -> Iterator[LocalTranscriber]:
        key = replace(settings, work_dir=Path(), warm_up=False)
        yield transcribers.setdefault(key, build(key))

    monkeypatch.setattr(cli, "_transcriber", keep)
    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> Run:
    def call(*argv: object, examples: Path | None = None, serve: Any = app.serve) -> Outcome:
        words = [str(word) for word in argv]
        if words and words[0] in ("transcribe", "detect", "compare"):
            words += [*([] if "--model" in words else ["--model", "demo"]), "--offline", "--device", "cpu"]
        code = cli.main(
            [*words, "--work-dir", str(tmp_path / "work")], serve=serve, examples=examples or root / "examples"
        )
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def english(root: Path) -> Path:
    return root / "examples" / "english.flac"


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_saying(SAID, tmp_path_factory.mktemp("saying") / "model", shape="least")


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured here, of copies as a new process would get and give them; starting each costs the most."""

    def measured(work: Any, argument: Any, *, name: str, on_step: Any, stop: Any) -> Any:
        work, argument = pickle.loads(pickle.dumps((work, argument)))
        return pickle.loads(pickle.dumps(work(argument, on_step)))

    monkeypatch.setattr(pipeline, "run_in_worker", measured)


def is_one_sentence(text: str) -> bool:
    line = text.strip()
    return bool(line) and "\n" not in line and "Traceback" not in line and line.endswith((".", "?", ")"))


# --- what works -------------------------------------------------------------------------------------------------------


def test_transcribe_without_a_file_transcribes_the_example(quick_run: Run, greeting: Path, tmp_path: Path) -> None:
    """With the first recording's first sentence as the only example."""
    shutil.copy(greeting, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps([{"file": greeting.name}, {"file": "nowhere.flac"}]))
    done = quick_run("transcribe", examples=tmp_path)
    assert (done.code, done.out) == (0, f"{SAID}\n")
    assert "demo model" in done.err and "--model openai/whisper-large-v3" in done.err


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_goes_to_standard_output(quick_run: Run, saying: Path, greeting: Path, name: str) -> None:
    done = quick_run("transcribe", greeting, "--model", saying, "--format", name, "--language", "English")
    assert done.code == 0 and "library" in done.out
    marks = {"txt": "Good", "srt": "1\n00:00:00", "vtt": "WEBVTT\n\n00:00:00.", "tsv": "start\tend", "json": "{\n"}
    assert done.out.startswith(marks[name])
    if name == "json":
        assert json.loads(done.out)["language"] == "en"


def test_several_files_and_formats_go_to_a_folder(quick_run: Run, saying: Path, root: Path, tmp_path: Path) -> None:
    named = tmp_path / "größe 录音 запись.flac"
    shutil.copy(root / "examples" / "german.flac", named)
    out = tmp_path / "out"
    files = [named, root / "examples" / "french.flac"]
    done = quick_run("transcribe", *files, "--model", saying, "--format", "txt,srt", "--output", out)
    assert done.code == 0 and done.out == ""
    stems = ("größe 录音 запись", "french")
    assert {p.name for p in out.iterdir()} == {f"{stem}.{end}" for stem in stems for end in ("txt", "srt")}
    assert all(SAID in path.read_text(encoding="utf-8") for path in out.iterdir())
    assert str(out / "french.srt") in done.err


def test_several_files_as_json_are_one_line_each(quick_run: Run, saying: Path, root: Path, greeting: Path) -> None:
    german = root / "examples/german.flac"
    done = quick_run("transcribe", german, greeting, "--model", saying, "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in lines] == ["german.flac", "greeting.wav"]
    assert [line["duration_s"] for line in lines] == pytest.approx([soundfile.info(german).duration, 3.2], abs=0.01)
    assert all(line["language"] == "en" and SAID in line["text"] for line in lines)


def test_a_failing_file_leaves_the_others(quick_run: Run, saying: Path, greeting: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_text("not a recording")
    done = quick_run("transcribe", bad, greeting, "--model", saying)
    assert done.code == 2 and "library" in done.out and "bad.wav" in done.err


def test_detect(quick_run: Run, saying: Path, root: Path) -> None:
    done = quick_run("detect", root / "examples/chinese.flac")
    assert done.code == 0 and done.out.split()[:2] == ["zh", "Chinese"]
    report = json.loads(quick_run("detect", root / "examples/chinese.flac", "--model", saying, "--json").out)
    assert report["guesses"][0]["code"] == "en" and report["windows"][0]["guesses"]


def test_precisions_lists_every_row_with_its_reason(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("precisions", "--json", "--device", "cpu").out)}
    assert list(rows) == list(PRECISIONS)
    assert rows["fp32"]["available"] and rows["fp32"]["reason"] is None
    assert not rows["fp16"]["available"] and "GPU" in rows["fp16"]["reason"]
    assert [rows[name]["engine"] for name in ("fp32", "bnb-int8", "fp16")] == ["fast", "reference", None]
    for engine in ("fast", "reference"):
        lines = run("precisions", "--device", "cpu", "--engine", engine).out.splitlines()
        assert len(lines) == len(PRECISIONS) and lines[0].endswith(f"available, {engine} engine")
        assert ("engine: bitsandbytes looks for outliers at every call" in "\n".join(lines)) == (engine == "fast")


@pytest.mark.slow
def test_compare_measures_every_precision_and_writes_what_was_asked_for(
    run: Run, no_workers: None, saying: Path, greeting: Path, tmp_path: Path
) -> None:
    said = tmp_path / "said.txt"
    said.write_text(SAID, encoding="utf-8")
    names = ["fp32", "bf16", "int8-dynamic"]
    outputs = [word for kind, ending in (("json", "json"), ("card", "card.json"), ("csv", "csv"), ("markdown", "md"))
               for word in (f"--{kind}", tmp_path / f"out.{ending}")]  # fmt: skip
    done = run("compare", greeting, "--precisions", f"{','.join(names)},fp16", "--order", "shuffled", "--text", said,
               "--repeats", 1, "--model", saying, *outputs)  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["precision"]: row for row in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))}
    assert list(rows) == [*names, "fp16"], "the table keeps its order"
    assert "GPU" in rows["fp16"]["error"] and rows["fp16"]["warm_s"] is None
    for name in names:
        row = rows[name]
        assert row["error"] is None and row["effective"] == name and row["wer"] == 0 and row["reference"] == "your text"
        assert row["energy_j"] is None and row["utilisation_percent"] is None, "a CPU has neither"
        assert min(row[key] for key in ("load_s", "warm_up_s", "first_run_s", "warm_s", "first_text_s")) > 0
        assert row["weights_bytes"] < row["peak_bytes"] and row["text"].startswith("Good morning")
    assert rows["bf16"]["weights_bytes"] < 0.6 * rows["fp32"]["weights_bytes"]
    assert "50 % less memory" in rows["bf16"]["verdict"]
    assert done.out.splitlines()[0] == f"{saying.name} on {rows['fp32']['device']}"
    assert done.out.splitlines()[1].startswith("precision") and "accuracy" in done.out.splitlines()[-1]
    card = json.loads((tmp_path / "out.card.json").read_text(encoding="utf-8"))
    assert card["order"] == "shuffled" and card["recording"] == greeting.name and len(card["rows"]) == 4
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5
    assert (tmp_path / "out.md").read_text().splitlines()[2].startswith("| precision | effective | engine | language |")


def test_compare_prints_a_table_with_an_older_card_beside(
    run: Run, english: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "build_transcriber", lambda settings: scripted)
    scripted = FakeTranscriber(reference="fp32")
    done = run("compare", english, "--card", tmp_path / "old.json")
    rows = done.out.splitlines()
    available = [row.name for row in scripted.status().precisions if row.unavailable is None]
    assert done.code == 0 and [row.split()[0] for row in rows[2 : len(available) + 2]] == available
    assert " 43 " in rows[2] and " 12.2 " in rows[2] and " 0.0 " in rows[2]
    assert "agreement with fp32, not accuracy" in rows[-1]
    both = run("compare", english, "--precisions", "fp32", "--with-card", tmp_path / "old.json", "--json")
    assert [row["precision"] for row in json.loads(both.out)] == ["fp32"], "JSON holds the new rows alone"
    both = run("compare", english, "--precisions", "fp32", "--with-card", tmp_path / "old.json")
    assert "CPU, 2 cores)" in both.out.splitlines()[3]


def test_compare_does_not_write_over_a_recording(run: Run, english: Path) -> None:
    before = english.read_bytes()
    done = run("compare", "--json", english)
    assert done.code == 2 and ".json" in done.err and english.read_bytes() == before


def test_interrupting_keeps_the_text_so_far(
    run: Run, english: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupted(FakeRun):
        def _work(self) -> Iterator[Segment]:
            yield next(super()._work())
            raise KeyboardInterrupt

    scripted = FakeTranscriber(run=Interrupted)
    monkeypatch.setattr(cli, "build_transcriber", lambda settings: scripted)
    done = run("transcribe", english, "--output", tmp_path / "x.srt")
    assert done.code == 1 and "Stopped." in done.err
    text = (tmp_path / "x.srt").read_text(encoding="utf-8")
    assert text.startswith("1\n00:00:00,300") and "Good morning" in text, "the ending chooses the format"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_drawn_on_terminals_only(
    run: Run, english: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(cli, "build_transcriber", lambda settings: FakeTranscriber(pause_s=0.15))
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run("transcribe", english).code == 0
    assert ("/12 s" in stderr.getvalue()) is is_terminal


def test_a_download_shows_its_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show = Download()
    for done in range(0, 3_000_000_001, 30_000_000):
        show(DownloadProgress("openai/whisper-large-v3", done, 3_000_000_000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "Downloading openai/whisper-large-v3: 3,000 of 3,000 MB (100%)"


def test_quiet_files_say_no_speech_and_succeed(quick_run: Run, shared_audio: Path, tmp_path: Path) -> None:
    done = quick_run("transcribe", shared_audio / "broken" / "silence-5s.wav")
    assert (done.code, done.out) == (0, "") and "No speech was found" in done.err
    file = tmp_path / "silence.vtt"
    assert quick_run("transcribe", shared_audio / "broken" / "silence-5s.wav", "--output", file).code == 0
    assert file.read_text() == "WEBVTT\n"


# --- bad input --------------------------------------------------------------------------------------------------------


def broken(name: str) -> Callable[[Path, Path], Path]:
    return lambda shared, tmp: shared / "broken" / name


def made(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def make(shared: Path, tmp: Path) -> Path:
        (tmp / name).write_bytes(content)
        return tmp / name

    return make


BAD_FILES = {
    "empty": (broken("empty.wav"), "is empty"),
    "header only": (broken("header-only.wav"), ""),
    "text": (broken("text-renamed.wav"), ""),
    "truncated index": (broken("truncated-no-index.m4a"), ""),
    "video without sound": (broken("video-without-audio.mp4"), ""),
    "missing": (lambda shared, tmp: tmp / "nowhere.wav", "nowhere.wav"),
    "an address": (lambda shared, tmp: Path("https://example.com/a.mp3"), "Addresses are not followed"),
    "a folder": (lambda shared, tmp: tmp, "not a file"),
    "a playlist": (made("x.m3u8", b"#EXTM3U\nfile:///etc/passwd\n"), "playlist"),
    "a concat script": (made("x.wav", b"ffconcat version 1.0\nfile /etc/passwd\n"), "playlist"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("command", ["transcribe", "detect"])
def test_a_bad_recording_is_one_sentence(
    quick_run: Run, shared_audio: Path, tmp_path: Path, name: str, command: str
) -> None:
    make, part = BAD_FILES[name]
    done = quick_run(command, make(shared_audio, tmp_path))
    assert done.code == 2 and done.out == ""
    assert part in done.err
    assert is_one_sentence(done.err)


GOOD_FILES = ("grabación número 1 – 録音 запись.wav", "speech-0.05s.wav", "streamed-size-unknown.wav", "truncated.mp3")


@pytest.mark.parametrize("name", GOOD_FILES)
def test_an_odd_recording_works(quick_run: Run, saying: Path, shared_audio: Path, name: str) -> None:
    done = quick_run("transcribe", shared_audio / "broken" / name, "--model", saying)
    assert done.code == 0 and "Traceback" not in done.err and (SAID in done.out or "No speech was found" in done.err)


def test_samples_that_are_not_numbers_are_said(quick_run: Run, saying: Path, tmp_path: Path, greeting: Path) -> None:
    samples, rate = soundfile.read(greeting, dtype="float32")
    samples[1000:1100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, rate, subtype="FLOAT")
    done = quick_run("transcribe", tmp_path / "nan.wav", "--model", saying)
    assert done.err.count("nan.wav") == 1, "its name once"
    assert done.code == 0 and "library" in done.out and "not numbers" in done.err


BAD_OPTIONS = {
    "--language klingon": "does not know the language 'klingon'",
    "--language ja": "does not know the language 'ja'",
    "--task sing": "transcribe, translate",
    "--task translate": "not trained to translate",
    "--windows round": "vad, fixed",
    "--beam-size 0": "from 1 to 10",
    "--beam-size x": "invalid int value",
    "--format docx": "txt, srt, vtt, tsv, json",
    "--format txt,srt": "give --output FOLDER",
    "--precision fp17": "fp32",
    "--precision fp16": "GPU",
    "--model openai/no-such-model": "no-such-model",
    "--model ./nowhere": "nowhere",
    "--device tpu": "auto, cpu, cuda",
    "--max-duration-h 0.001": "limit",
    "--batch-size -3": "--batch-size",
    "--no-such-option": "--no-such-option",
    "--mod demo": "--mod",
}


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_a_wrong_option_is_one_sentence(quick_run: Run, english: Path, words: str, capsys: Any, tmp_path: Path) -> None:
    argv = ["transcribe", str(english), "--model", "demo", "--offline", "--device", "cpu", *words.split()]
    code = cli.main([*argv, "--work-dir", str(tmp_path)], serve=app.serve, examples=english.parent)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert BAD_OPTIONS[words] in captured.err
    assert is_one_sentence(captured.err)


def test_a_checkpoint_of_another_kind_is_refused(run: Run, tmp_path: Path, english: Path, capsys: Any) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    argv = ["transcribe", str(english), "--model", str(tmp_path / "gpt"), "--work-dir", str(tmp_path)]
    assert cli.main(argv, serve=app.serve, examples=english.parent) == 2
    assert is_one_sentence(capsys.readouterr().err)


def test_a_file_over_the_size_limit_is_refused(run: Run, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "big.wav", np.zeros(16_000 * 40), 16_000)
    done = run("transcribe", tmp_path / "big.wav", "--max-upload-mb", 1)
    assert done.code == 2 and "limit is 1" in done.err


def test_an_output_that_cannot_be_written_is_refused_before_any_work(run: Run, english: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = run("transcribe", english, "--output", tmp_path / "file" / "x.txt")
    assert done.code == 2 and "cannot be written" in done.err and "library" not in done.out


def test_the_recording_is_never_overwritten(run: Run, english: Path, tmp_path: Path) -> None:
    recording = tmp_path / "talk.txt"
    shutil.copy(english, recording)
    done = run("transcribe", recording, "--output", recording)
    assert done.code == 2 and "would overwrite" in done.err
    assert recording.read_bytes() == english.read_bytes()


def test_a_taken_port_is_named_with_another_one(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words in (["--server_port", port], ["serve", "--server-port", port]):
            done = run(*words)
            assert done.code == 2 and f"Port {port}" in done.err and "--server-port" in done.err
            assert is_one_sentence(done.err)


def test_an_address_of_another_machine_is_refused(run: Run) -> None:
    done = run("serve", "--server-name", "203.0.113.7", "--server-port", 0)
    assert done.code == 2 and is_one_sentence(done.err)


def test_without_a_command_the_page_is_served_with_the_settings_given(run: Run) -> None:
    seen: list[Settings] = []
    assert run("--server_port", 7861, "--precision", "bf16", serve=lambda s: seen.append(s) or 0).code == 0
    assert run("serve", "--server_port=7861", serve=lambda s: seen.append(s) or 0).code == 0
    assert [s.server_port for s in seen] == [7861, 7861] and seen[0].precision == "bf16"


def test_something_unexpected_is_a_sentence_with_the_log_file(run: Run, tmp_path: Path) -> None:
    def fail(settings: Settings) -> int:
        raise ZeroDivisionError("a bug")

    done = run(serve=fail)
    assert done.code == 1 and is_one_sentence(done.err) and "Traceback" not in done.err
    log = (tmp_path / "work" / "sotto.log").read_text(encoding="utf-8")
    report_id = done.err.split("(id ")[1].split(")")[0]
    assert report_id in log and "ZeroDivisionError: a bug" in log


def test_compare_of_what_this_device_cannot_run_is_one_sentence_and_nothing_else(run: Run, root: Path) -> None:
    done = run("compare", root / "examples/english.flac", "--device", "cpu", "--precisions", "fp16, float8")
    assert done.code == 2 and done.out == "" and is_one_sentence(done.err)
    assert done.err.startswith("fp16 needs a GPU")


@pytest.mark.parametrize(("error", "code"), [(SottoError("It is so."), 1), (KeyboardInterrupt(), 1)])
def test_exit_codes(run: Run, error: BaseException, code: int) -> None:
    def fail(settings: Settings) -> int:
        raise error

    assert run(serve=fail).code == code


def test_missing_examples_are_a_sentence(run: Run, tmp_path: Path) -> None:
    done = run("transcribe", examples=tmp_path)
    assert done.code == 2 and is_one_sentence(done.err)


# --- the program ------------------------------------------------------------------------------------------------------


def test_help_is_complete_and_fast(root: Path) -> None:
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, root / "app.py", "--help"], capture_output=True, text=True, timeout=60)
    elapsed_s = time.monotonic() - started_s
    assert done.returncode == 0 and done.stderr == ""
    for name in setting_docs():
        assert f"--{name.replace('_', '-')}" in done.stdout or f"--no-{name.replace('_', '-')}" in done.stdout
    for command in ("transcribe", "detect", "precisions", "plan", "compare", "calibrate", "serve"):
        assert command in done.stdout
    assert elapsed_s < 5, "0.2 s on an idle machine: nothing heavy is imported for it"


@pytest.mark.parametrize("command", ["transcribe", "detect", "precisions", "plan", "compare", "calibrate", "serve"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"], serve=app.serve, examples=Path())
    assert stopped.value.code == 0
    assert "--model" in capsys.readouterr().out
