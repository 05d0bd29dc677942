"""Words that are seen while their window is still being decoded, on the fast engine with the demo checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_loader.device import describe_device
from model_loader.pool import EnginePool
from transcription.interface import TranscriptionRun
from transcription.options import TranscribeOptions
from transcription.pipeline import LocalTranscriber


@pytest.fixture(scope="module")
def demo() -> Iterator[LocalTranscriber]:
    device = describe_device("cpu")
    transcriber = LocalTranscriber(
        EnginePool(device="cpu", offline=True, warm_up=False), model="demo", precision="fp32", device=device
    )
    yield transcriber
    transcriber.close()


def drafts_of(run: TranscriptionRun) -> list[str]:
    """Every draft seen until the run ended, each once."""
    seen: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(list, run)
        while not ended.done():
            draft = run.draft
            if draft and draft not in seen[-1:]:
                seen.append(draft)
            time.sleep(0.002)
        ended.result()
    return seen


def test_a_draft_grows_into_the_text_and_goes(demo: LocalTranscriber, greeting: Path) -> None:
    run = demo.transcribe(greeting, TranscribeOptions(language="en", engine="fast"))
    drafts = drafts_of(run)
    transcript = run.transcript
    assert len(drafts) > 2 and len(drafts[0]) < len(transcript.text)
    assert all(transcript.text.startswith(draft) for draft in drafts)
    assert run.draft == ""
    assert transcript.first_text_s is not None and transcript.first_text_s < transcript.elapsed_s


def test_a_draft_never_ends_in_half_a_character(demo: LocalTranscriber, root: Path) -> None:
    """Most Chinese characters are two or three tokens."""
    run = demo.transcribe(root / "examples" / "chinese.flac", TranscribeOptions(language="zh", engine="fast"))
    drafts = drafts_of(run)
    assert drafts and not any("\N{REPLACEMENT CHARACTER}" in draft for draft in drafts)


def test_the_reference_engine_has_no_drafts(demo: LocalTranscriber, greeting: Path) -> None:
    run = demo.transcribe(greeting, TranscribeOptions(language="en", engine="reference"))
    assert drafts_of(run) == [] and run.transcript.text
