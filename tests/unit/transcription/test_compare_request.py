"""What a comparison is asked for: a text from whatever file holds it, and an exit code that says whose fault it was."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from errors import OptionError
from tests.measured import measured_row
from transcription.compare_request import exit_code, reference_text
from transcription.interface import CompareRow

SAID = "Schönen guten Morgen."


@pytest.mark.parametrize(
    "content",
    [
        SAID.encode(),
        codecs.BOM_UTF8 + SAID.encode(),
        codecs.BOM_UTF16_LE + SAID.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + SAID.encode("utf-16-be"),
    ],
)
def test_a_text_file_is_read_as_windows_and_others_save_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "said.txt").write_bytes(content)
    assert reference_text(str(tmp_path / "said.txt")) == SAID


@pytest.mark.parametrize(
    "content",
    [SAID.encode("latin-1"), b"\x89PNG\r\n\x1a\n", SAID.encode("utf-16-le"), b"a\0b", codecs.BOM_UTF16_LE + b"a"],
)
def test_a_file_that_is_no_text_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "said").write_bytes(content)
    with pytest.raises(OptionError, match="is not UTF-8 text"):
        reference_text(str(tmp_path / "said"))


@pytest.mark.parametrize("given", ["/nowhere", "./said", "../said", "~/nowhere/said", "said.txt", "SAID.TXT", "a b.md"])
def test_a_path_of_nothing_is_not_taken_for_the_words(given: str) -> None:
    with pytest.raises(OptionError, match=r"There is no file .* Give --text"):
        reference_text(given)


def test_a_folder_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a folder"):
        reference_text(str(tmp_path))


@pytest.mark.parametrize("given", ["", SAID, "and/or", "Open notes.txt\nand read.", "long " * 2000])
def test_words_are_the_text(given: str) -> None:
    assert reference_text(given) == given


def test_the_exit_code_is_a_mistakes_only_where_each_was_refused_for_one() -> None:
    def failed(kind: str) -> CompareRow:
        return CompareRow("bf16", "", error="no", error_kind=kind)

    mistake, other = failed("OptionError"), failed("OutOfMemoryError")
    assert exit_code([mistake, failed("CalibrationMissingError")]) == 2
    assert exit_code([mistake, other]) == exit_code([other]) == exit_code([failed("")]) == exit_code([]) == 1
    assert exit_code([mistake, measured_row("fp32")]) == 0
