"""A finished comparison -> what is printed, downloaded and written: table, JSON, run card, CSV, Markdown.

In: its run card, and an older one to show beside. Out: text by kind, and the files that were asked for, checked before
any work. The rows of the older card carry its time, model, recording and device wherever they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from errors import OptionError
from transcription.comparison import (
    held_to,
    measured_on,
    row_names,
    second_table,
    terminal_table,
    to_csv,
    to_markdown,
    warned,
)
from transcription.interface import CompareRow
from transcription.run_card import RunCard, row_dict, to_json

ENDINGS = {"json": (".json",), "card": (".json",), "csv": (".csv",), "markdown": (".md", ".markdown")}
OTHER_RECORDING = "The earlier run card measured another recording: its times and words cannot be compared with these."
OTHER_TEXT = "The earlier run card was held to another text: its word errors cannot be compared with these."
ONE_TEXT = (
    "Of these measurements and the earlier run card only one was held to a given text: its word errors are errors "
    "against that text, those of the other are agreement with the text of a precision. They cannot be compared."
)


@dataclass(frozen=True, slots=True)
class Result:
    """A comparison, and an older one beside it."""

    card: RunCard | None
    old: RunCard | None = None

    @property
    def rows(self) -> tuple[CompareRow, ...]:
        """The new ones first."""
        return (*(self.card.rows if self.card else ()), *(self.old.rows if self.old else ()))

    @property
    def is_of_two_recordings(self) -> bool:
        """The older card measured another recording: its times and words say nothing about this one."""
        hashes = {card.recording_sha256 for card in (self.card, self.old) if card and card.recording_sha256}
        return len(hashes) > 1

    @property
    def is_of_two_texts(self) -> bool:
        """Both were held to a pasted text, and not to the same one: the errors of one say nothing about the other's."""
        texts = {" ".join(card.reference_text.split()) for card in (self.card, self.old) if card}
        return len(texts - {""}) > 1

    @property
    def is_of_text_and_agreement(self) -> bool:
        """One was held to a pasted text and the other to a precision's: both have errors, of different kinds."""
        cards = [card for card in (self.card, self.old) if card and any(row.wer is not None for row in card.rows)]
        return len({bool(card.reference_text.strip()) for card in cards}) > 1

    @property
    def warnings(self) -> list[str]:
        """What forbids comparing the two; another recording has another text, which need not be said as well."""
        if self.is_of_two_recordings:
            return [OTHER_RECORDING]
        mixed = [ONE_TEXT] if self.is_of_text_and_agreement else []
        return [OTHER_TEXT] if self.is_of_two_texts else mixed

    @property
    def names(self) -> list[str]:
        """What each row is called: its precision, and where an older one comes from."""
        old = self.old
        return [
            *(row_names(self.card.rows) if self.card else ()),
            *(row_names(old.rows, lambda row: old.mark) if old else ()),
        ]

    def render(self, kind: str) -> str:
        """kind: table, or a key of ENDINGS. JSON and run card hold the new rows alone."""
        if kind == "csv":
            return to_csv(self.rows, self.names)
        if kind == "markdown":
            return "\n".join([to_markdown(self.rows, self.names), *(f"{sentence}\n" for sentence in self.warnings)])
        if kind == "table":
            return self._on_terminal()
        assert self.card is not None  # there is something new to write
        if kind == "card":
            return to_json(self.card)
        return json.dumps([row_dict(row) for row in self.card.rows], ensure_ascii=False, indent=2) + "\n"

    def _on_terminal(self) -> str:
        """Model and device, two tables, a sentence a row, what rows warn of, and what the words were held to."""
        rows, names = self.rows, self.names
        verdicts = [f"{name}: {row.verdict}" for name, row in zip(names, rows, strict=True) if row.verdict]
        tables = [part for part in (measured_on(rows), terminal_table(rows, names)) if part]
        second = second_table(rows, names)
        said = [*verdicts, *warned(rows, names), *held_to(rows, names), *self.warnings]
        return "\n".join([*tables, *(["", second, ""] if second else []), *said])


def plan_outputs(given: Mapping[str, str], recording: Path) -> dict[str, Path]:
    """Kind -> file, of options that name one ('' and '-' do not).

    Raises OptionError: what cannot be delivered is refused before any work, and `compare --json talk.mp3` must not
    write over a recording.
    """
    files = {kind: Path(path) for kind, path in given.items() if path not in ("", "-")}
    for kind, path in files.items():
        if path.suffix.lower() not in ENDINGS[kind]:
            raise OptionError(f"--{kind} writes a file that ends with {ENDINGS[kind][0]}, and {path} does not.")
        if not path.absolute().parent.is_dir():
            raise OptionError(f"--{kind} {path}: the folder {path.parent} does not exist; make it first.")
    places = [recording.resolve(), *(path.resolve() for path in files.values())]
    twice = [path for path in files.values() if places.count(path.resolve()) > 1]
    if twice:
        raise OptionError(f"{twice[0]} would be written over; give each output a file of its own.")
    return files
