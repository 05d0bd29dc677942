"""Where results go: never over a recording, never half a file, refused before any work."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest

from errors import DiskFullError, OptionError
from transcription.files import format_of, plan_files, write_file
from transcription.formats import FORMATS

TXT, SRT = FORMATS["txt"], FORMATS["srt"]


def names(plan: dict, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in plan.values()]


def test_one_recording_in_one_format_names_its_file(tmp_path: Path) -> None:
    assert names(plan_files([Path("talk.mp3")], [TXT], str(tmp_path / "a" / "out.text")), tmp_path) == ["a/out.text"]


@pytest.mark.parametrize("output", ["", "new/"])
def test_several_results_go_to_a_folder(tmp_path: Path, output: str) -> None:
    plan = plan_files([Path("one.mp3"), Path("two.wav")], [TXT, SRT], f"{tmp_path}/{output}")
    assert names(plan, tmp_path) == [f"{output}{n}" for n in ("one.txt", "one.srt", "two.txt", "two.srt")]


def test_recordings_of_one_name_get_results_of_two(tmp_path: Path) -> None:
    plan = plan_files([Path("x/talk.mp3"), Path("y/talk.wav")], [TXT], str(tmp_path))
    assert names(plan, tmp_path) == ["talk.txt", "talk.wav.txt"]


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    recording = tmp_path / "renamed.txt"
    recording.write_bytes(b"RIFF")
    assert names(plan_files([recording], [TXT], f"{tmp_path}/"), tmp_path) == ["renamed.txt.txt"]
    with pytest.raises(OptionError, match="would overwrite"):
        plan_files([recording], [TXT], str(recording))


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match=r"cannot be written.*--output"):
        plan_files([Path("talk.mp3")], [TXT], str(tmp_path / "file" / "out.txt"))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ü 录音.txt"
    write_file(path, "schön\n")
    assert path.read_text(encoding="utf-8") == "schön\n"
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\udcff")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text(encoding="utf-8") == "schön\n"
    assert path.stat().st_mode & 0o044 == 0o044 or path.stat().st_mode & 0o400


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.txt", tmp_path / "link.txt", tmp_path / "pipe"
    real.touch()
    link.symlink_to(real)
    os.mkfifo(pipe)
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.append(pipe.read_text(encoding="utf-8")), daemon=True)
    listener.start()
    for path in (link, pipe):
        (planned,) = plan_files([Path("talk.mp3")], [TXT], str(path)).values()
        assert planned == path
        write_file(planned, "schön\n")
    listener.join(10)
    assert heard == ["schön\n"] and pipe.is_fifo()
    assert link.is_symlink() and real.read_text(encoding="utf-8") == "schön\n"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a folder among the devices")
def test_a_file_in_a_folder_among_the_devices_is_a_file() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (planned,) = plan_files([Path("talk.mp3")], [TXT], f"{folder}/new/out.txt").values()
        write_file(planned, "text")
        assert planned.read_text(encoding="utf-8") == "text" and [*planned.parent.iterdir()] == [planned]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_device_is_written_into_and_stays_one() -> None:
    (planned,) = plan_files([Path("talk.mp3")], [TXT], "/dev/full").values()
    with pytest.raises(DiskFullError, match="no room left"):
        write_file(planned, "text")
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("output", "name"), [("a.SRT", "srt"), ("a.json", "json"), ("a", None), ("srt", None), ("", None)]
)
def test_the_ending_asks_for_a_format(output: str, name: str | None) -> None:
    row = format_of(output)
    assert (row.name if row else None) == name
