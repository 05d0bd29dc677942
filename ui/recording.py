"""The recording that the tabs work on: a file, the microphone or an example. Chosen once, used by every tab.

The file goes from the browser's upload straight into the player (a copy in the page, no Python in between): Gradio
would otherwise run ffmpeg on an untrusted file by its path to convert it for the browser, and a playlist file could
then make it read others. Only our own decoder, which gets bytes through a pipe, opens what a user sends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ui import render
from ui.texts import label, page_locale, say


@dataclass(frozen=True, slots=True)
class Example:
    """One example recording of examples/manifest.json."""

    path: Path
    label: str
    language: str
    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The recording that a page has chosen."""

    path: Path
    name: str
    """As the user knows it; downloads are named after it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The components that other parts of the page read or change."""

    card: Any
    chosen: Any
    """gr.State of Chosen | None."""
    current: Any
    """The line that names it."""
    player: Any


def load_examples(folder: Path) -> tuple[Example, ...]:
    """Read folder/manifest.json; entries whose file is missing are left out, no manifest gives no examples."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return ()
    content = json.loads(manifest.read_text(encoding="utf-8"))
    entries = content["recordings"] if isinstance(content, dict) else content
    examples = (
        Example(folder / e["file"], e.get("label") or e["file"], e["language"], e["text"], float(e["seconds"]))
        for e in entries
    )
    return tuple(example for example in examples if example.path.is_file())


def build(examples: Sequence[Example]) -> Recording:
    """The card above the tabs: file, microphone and player, examples. The first example is ready at the start."""
    first = _choose_example(examples[0]) if examples else None
    with gr.Column(elem_id="recording") as card:
        chosen = gr.State(first)
        with gr.Row(equal_height=True, elem_classes="recording-row"):
            file = gr.File(
                label=label("recording_file"),
                file_types=None,  # names say little: our decoder judges by content, and in a sentence
                type="filepath",
                height=150,
                min_width=240,
                scale=2,
                elem_id="recording-file",
            )
            player = gr.Audio(
                value=str(first.path) if first else None,
                label=label("recording_player"),
                sources=["microphone"],
                type="filepath",
                editable=False,
                buttons=[],
                min_width=280,
                scale=3,
                elem_id="player",
            )
        with gr.Row(elem_classes="examples"):
            record = gr.Button(label("recording_record"), size="sm", min_width=90, elem_id="record")
            buttons = [gr.Button(_example_label(example), size="sm", min_width=90) for example in examples]
        current = gr.HTML(shown(first), elem_id="recording-current")
        gr.HTML(render.hint("insecure-origin", label("microphone_insecure")))
        gr.HTML(render.hint("unplayable", label("player_unplayable")))

    # The browser hands the upload to the player itself (see the head of this file).
    file.upload(None, file, player, js="(file) => file", api_visibility="private")
    player.change(None, js="() => sotto.assumePlayable()", api_visibility="private")
    for event, is_playing in ((player.play, "true"), (player.pause, "false"), (player.stop, "false")):
        event(None, js=f"() => {{ sotto.playing = {is_playing}; }}", api_visibility="private")
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    file.upload(_from_file, file, [chosen, current], **quiet)
    file.clear(_nothing, None, [chosen, current, player], **quiet)
    player.clear(_nothing, None, [chosen, current, file], **quiet)
    record.click(lambda: (*_nothing(), None), None, [chosen, current, player, file], **quiet).then(
        None, js="() => sotto.record()", api_visibility="private"
    )
    player.stop_recording(_from_microphone, player, [chosen, current, file], **quiet)
    for button, example in zip(buttons, examples, strict=True):
        button.click(_take(example), None, [chosen, current, player, file], **quiet)
    return Recording(card=card, chosen=chosen, current=current, player=player)


def _example_label(example: Example) -> str:
    """'English: at the library' -> 'English · 0:12'; the whole label would take a row of its own on a phone."""
    short = re.split("[:：]", example.label)[0].strip()
    return f"{short} · {render.clock(example.seconds)}"


def _choose_example(example: Example) -> Chosen:
    return Chosen(example.path, example.path.name)


def shown(chosen: Chosen | None) -> str:
    """The line under the player: which recording the tabs will use."""
    return render.chosen(chosen.name) if chosen else ""


def _from_file(path: str | None) -> tuple[Chosen | None, str]:
    chosen = Chosen(Path(path), Path(path).name) if path else None
    return chosen, shown(chosen)


def _from_microphone(path: str | None, request: gr.Request) -> tuple[Chosen | None, str, None]:
    chosen = Chosen(Path(path), say("microphone_name", page_locale(request))) if path else None
    return chosen, shown(chosen), None


def _take(example: Example) -> Callable[[], tuple[Chosen, str, str, None]]:
    """The handler of one example's button."""
    chosen = _choose_example(example)
    return lambda: (chosen, shown(chosen), str(example.path), None)


def _nothing() -> tuple[None, str, None]:
    return None, "", None
