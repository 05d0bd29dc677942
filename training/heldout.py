"""The recordings that ship: `python -m training.heldout examples` and `python -m training.heldout evaluation`.

In: examples/scripts.toml. Out: examples/*.flac with manifest.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.recordings import Line, Recording, record, write_flac
from training.synthesis import Delivery, Synthesizer

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "CC0-1.0"
"""Texts written for this project, spoken by programs."""


def make_examples(folder: Path, synthesizer: Synthesizer) -> list[dict[str, Any]]:
    """Say every script of folder/scripts.toml, write the recordings and manifest.json; returns the manifest."""
    scripts = tomllib.loads((folder / "scripts.toml").read_text(encoding="utf8"))["recording"]
    manifest = []
    for script in scripts:
        recording = say_script(script, synthesizer)
        write_flac(folder / script["file"], recording.samples)
        voices = list(dict.fromkeys(sentence.voice for sentence in recording.sentences))
        head = {"file": script["file"], "label": script["label"]}
        tail = {"voice": ", ".join(voices), "licence": LICENCE}
        manifest.append(head | recording.truth(with_words=False) | tail)
        logger.info("recording=%s seconds=%.1f", script["file"], recording.duration_s)
    _write_json(folder / "manifest.json", manifest)
    return manifest


def say_script(script: dict[str, Any], synthesizer: Synthesizer) -> Recording:
    """One [[recording]] of scripts.toml; a line is a text, or a voice, the pause after it in seconds, and a text."""
    lines = []
    for entry in script["lines"]:
        voice, pause_s, text = entry if isinstance(entry, list) else (script["voice"], 0.4, entry)
        lines.append(Line(text, script["language"], Delivery(voice, script["rate_wpm"]), pause_s))
    return record(lines, synthesizer)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("examples", "evaluation"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.what == "examples":
        make_examples(ROOT / "examples", Synthesizer())


if __name__ == "__main__":
    main()
