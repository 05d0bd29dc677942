"""Whether the model fits, in the status: before a load, while it lasts, after it, and after one that failed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_loader import loader
from model_loader.device import describe_device
from model_loader.pool import EnginePool
from transcription import pipeline
from transcription.interface import Status
from transcription.pipeline import LocalTranscriber

RED = "fp32 of demo needs 295 MiB for 4 windows at a time, but only 10 MiB are free."


@pytest.fixture
def demo() -> Iterator[LocalTranscriber]:
    transcriber = make("demo")
    yield transcriber
    transcriber.close()


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loader, pipeline):
        monkeypatch.setattr(module, "free_bytes", lambda device: 10 * 2**20)


def make(model: str, **options: Any) -> LocalTranscriber:
    pool = EnginePool(device="cpu", offline=True, warm_up=False)
    return LocalTranscriber(pool, model=model, precision="fp32", device=describe_device("cpu"), **options)


def colour(status: Status) -> str:
    return next(row.fit for row in status.precisions if row.name == "fp32")


def test_of_a_checkpoint_on_disk_the_table_is_there_before_a_load(demo: LocalTranscriber) -> None:
    status = demo.status()
    assert len(status.fits) == len(status.precisions) and colour(status) == "green" and status.loaded == ()
    assert status.message == "The model has not been loaded yet."


def test_of_a_known_name_too_and_of_a_wrong_or_an_unknown_one_nothing() -> None:
    assert make("large-v3").status().fits[0].prediction is not None
    assert make("no/such-whisper").status().fits == () == make("./nowhere").status().fits


@pytest.mark.usefixtures("little_room")
def test_a_red_verdict_stands_in_the_message_before_during_and_after_the_load(
    demo: LocalTranscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Status] = []
    load = loader._load
    monkeypatch.setattr(loader, "_load", lambda *words: (seen.append(demo.status()), load(*words))[1])
    before = demo.status()
    assert colour(before) == "red" and RED in before.message and before.phase == "starting"
    demo.prepare(warm_up=False)
    (during,), after = seen, demo.status()
    assert during.phase == "loading" and during.message.startswith(f"Loading demo at fp32. {RED} It is tried")
    assert (after.phase, after.message) == ("ready", f"Before the load: {RED}")
    assert after.loaded[-1].verdict is not None and after.loaded[-1].verdict.colour == "red"


@pytest.mark.usefixtures("little_room")
def test_after_a_load_that_ran_out_of_memory_table_and_verdict_are_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*words: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(loader, "_load", full)
    told: list[str] = []
    demo = make("demo", on_fit=lambda seen: told.append(seen.verdict.colour))
    demo.prepare(warm_up=False)
    status = demo.status()
    assert status.phase == "failed" and colour(status) == "red" and len(status.fits) == len(status.precisions)
    assert "does not fit into the memory" in status.message and status.message.endswith(f"Before the load: {RED}")
    assert told == ["red"]


def test_a_model_that_fits_is_ready_without_a_word(demo: LocalTranscriber) -> None:
    demo.prepare(warm_up=False)
    assert (demo.status().phase, demo.status().message) == ("ready", "")


def test_a_damaged_checkpoint_has_no_table_and_the_load_says_why(demo_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_folder, tmp_path / "damaged"))
    (folder / "config.json").write_text("[]", encoding="utf-8")
    transcriber = make(str(folder))
    assert transcriber.status().fits == ()
    transcriber.prepare(warm_up=False)
    assert transcriber.status().phase == "failed" and "config.json cannot be read" in transcriber.status().message
