"""Windows through an engine that many share: order, fallback, bounds, cancelling; at the end several files at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio.decode import decode_all
from audio.windows import Window
from errors import CancelledError, DeviceError, OutOfMemoryError
from model_loader.device import describe_device
from model_loader.engine import GenerateRequest, TokenSequence
from model_loader.pool import EnginePool
from tests.fakes import FakeEngine, FakePool, FakeSharedEngine, always, demo_tokens, hypothesis
from tests.saying import make_saying
from transcription.decode import Decoder
from transcription.flow import Batches, Flow, Stream, make_flow
from transcription.options import TranscribeOptions
from transcription.pipeline import Limits, LocalTranscriber

GOOD = (0.0, "the cat sat on the mat", 2.0)
LOOP = (0.0, "again " * 60, 2.0)
ENGLISH = TranscribeOptions(language="en")


def numbered(row: int, request: GenerateRequest) -> TokenSequence:
    return hypothesis((0.5, f"window {row % 100}", 1.0))


def windows(count: int, length_s: float = 4.0) -> list[Window]:
    samples = np.zeros(round(length_s * 16_000), dtype=np.float32)
    return [Window(i, 5.0 * i, samples, 3.0) for i in range(count)]


def stream(engine: FakeSharedEngine, decoder: Decoder | None = None, **arguments: Any) -> tuple[Stream, FakePool]:
    pool = FakePool(engine)
    decoder = decoder or Decoder(demo_tokens(), TranscribeOptions())
    return Stream(lambda: pool.borrow("demo", "fp32"), decoder, 4, **arguments), pool  # type: ignore[arg-type]


def texts(flow: Flow) -> list[str]:
    """Of everything that is left, window by window."""
    found = []
    while taken := flow.take():
        found += ["|".join(demo_tokens().decode(r.tokens).strip() for r in results) for _, results in taken]
    return found


def test_results_come_in_time_order_whatever_finishes_first() -> None:
    engine = FakeSharedEngine(numbered, held=[])
    flow, pool = stream(engine)
    for window in windows(3):
        flow.add(window, "en")
    assert engine.held is not None and pool.n_users == 3
    for answer in reversed(engine.held):
        answer()
    assert pool.n_users == 0, "an engine is held until its work is done, not until somebody reads"
    assert texts(flow) == ["window 0", "window 1", "window 2"]


def test_one_window_first_and_never_more_than_the_limit() -> None:
    flow, _ = stream(FakeSharedEngine(numbered))
    assert flow.room == 1
    flow.add(windows(1)[0], "en")
    flow.take()
    assert flow.room == 4
    for window in windows(4):
        flow.add(window, "en")
    assert flow.room == 0


def test_only_the_failing_window_is_decoded_again_from_its_encoder_output() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return hypothesis(LOOP if row == 1 and request.temperature < 0.4 else GOOD)

    engine = FakeSharedEngine(script)
    flow, _ = stream(engine)
    for window in windows(3):
        flow.add(window, "en")
    assert texts(flow) == ["the cat sat on the mat"] * 3
    assert [(row, order.temperature) for row, order, _ in engine.orders] == [(0, 0), (1, 0), (2, 0), (1, 0.2), (1, 0.4)]
    assert engine.n_encoded == 3, "nothing is encoded twice"
    assert [order.needs_first_logits for _, order, _ in engine.orders] == [True, True, True, False, False]


def test_when_every_temperature_fails_the_best_attempt_is_kept_and_said() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return hypothesis(GOOD, avg_logprob=-1.2) if request.temperature == 0.6 else hypothesis(LOOP)

    decoder = Decoder(demo_tokens(), TranscribeOptions())
    flow, _ = stream(FakeSharedEngine(script), decoder)
    flow.add(windows(1)[0], "en")
    ((_, (result,)),) = flow.take()
    assert result.temperature == 0.6
    assert len(decoder.warnings) == 1 and "0:00 to 0:04" in decoder.warnings[0]


@pytest.mark.parametrize(("avg_logprob", "is_empty"), [(-0.5, False), (-1.5, True)])
def test_silence_is_emptied_and_not_decoded_again(avg_logprob: float, is_empty: bool) -> None:
    engine = FakeSharedEngine(always(GOOD, avg_logprob=avg_logprob), no_speech=0.9)
    flow, _ = stream(engine)
    flow.add(windows(1)[0], "en")
    ((_, (result,)),) = flow.take()
    assert (result.tokens == ()) is is_empty and len(engine.orders) == 1
    assert result.no_speech_prob == pytest.approx(0.9, abs=1e-4)


def test_numbers_that_are_not_finite_are_said() -> None:
    decoder = Decoder(demo_tokens(), TranscribeOptions())
    engine = FakeSharedEngine(always(GOOD, avg_logprob=float("nan")), not_finite=True)
    flow, _ = stream(engine, decoder)
    flow.add(windows(1)[0], "en")
    assert texts(flow) == [""] and len(engine.orders) == 1
    assert len(decoder.warnings) == 1 and "not finite at precision fp32" in decoder.warnings[0]


def test_text_that_ran_out_of_tokens_is_continued_in_its_place() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        if row == 0:
            return hypothesis((0.0, "the first half", 1.5), (1.5, "cut in the mid", None), finished=False)
        return hypothesis((0.0, "the second half" if row == 2 else "the next window", 2.0))

    flow, _ = stream(FakeSharedEngine(script))
    for window in windows(2):
        flow.add(window, "en")
    assert texts(flow) == ["the first half|the second half", "the next window"]


def test_what_was_looked_at_is_not_encoded_again() -> None:
    engine = FakeSharedEngine(numbered, language="de")
    flow, _ = stream(engine)
    batch = windows(2)
    logits = flow.look(batch)
    assert logits.shape == (2, 6004) and int(logits[0].argmax()) == demo_tokens().languages["de"]
    for window in batch:
        flow.add(window, "de")
    assert texts(flow) == ["window 0", "window 1"] and engine.n_encoded == 2
    assert [len(order.prompt) for _, order, _ in engine.orders] == [0, 0, 3, 3]


def test_closing_stops_what_is_under_way() -> None:
    engine = FakeSharedEngine(numbered, held=[])
    flow, pool = stream(engine)
    flow.add(windows(1)[0], "en")
    assert engine.held is not None and engine.orders[0][1].should_stop is not None
    assert not engine.orders[0][1].should_stop()
    flow.close()
    assert engine.orders[0][1].should_stop()
    engine.held.pop()()
    assert pool.n_users == 0
    with pytest.raises(CancelledError):
        flow.take()


def test_a_failure_reaches_its_own_job() -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        if row == 0:
            raise DeviceError("The device failed.")
        return hypothesis(GOOD)

    engine = FakeSharedEngine(script)
    one, _ = stream(engine)
    other, _ = stream(engine)
    one.add(windows(1)[0], "en")
    other.add(windows(1)[0], "en")
    with pytest.raises(DeviceError):
        one.take()
    assert texts(other) == ["the cat sat on the mat"]


def test_beam_search_goes_in_batches() -> None:
    engine: Any = FakeSharedEngine(numbered)
    pool: Any = FakePool(engine)
    for beams, kind in ((1, Stream), (3, Batches)):
        decoder = Decoder(demo_tokens(), TranscribeOptions(beam_size=beams))
        assert isinstance(make_flow(lambda: pool.borrow("demo", "fp32"), decoder, engine, 4), kind)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError("No room.")])
@pytest.mark.parametrize("is_shared", [True, False])
def test_text_stays_where_memory_does_not_suffice_for_the_times_of_its_words(
    error: Exception, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def attend(encoded: Any, tokens: Sequence[int], n_frames: int) -> Any:
        asked.append(n_frames)
        raise error

    decoder = Decoder(demo_tokens(), TranscribeOptions(words=True))
    engine: Any = FakeSharedEngine(numbered) if is_shared else FakeEngine(numbered)
    monkeypatch.setattr(engine, "attend", attend)
    pool: Any = FakePool(engine)
    flow = make_flow(lambda: pool.borrow("demo", "fp32"), decoder, engine, 4)
    for window in windows(3):
        flow.add(window, "en")
    assert texts(flow) == ["window 0", "window 1", "window 2"]
    assert len(asked) == 1, "one failure is enough"
    (warning,) = decoder.warnings
    assert "times of words" in warning and "the text itself is complete" in warning


@pytest.mark.parametrize(("asked", "room"), [(0, 64), (3, 6)])
def test_every_row_has_a_window_behind_it_where_nobody_asks_for_less(asked: int, room: int) -> None:
    engine: Any = FakeSharedEngine(numbered, max_rows=32)
    pool: Any = FakePool(engine)
    decoder = Decoder(demo_tokens(), TranscribeOptions())
    flow = make_flow(lambda: pool.borrow("demo", "fp32"), decoder, engine, asked)
    flow.add(windows(1)[0], "en")
    flow.take()
    assert flow.room == room


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_reads_ahead_by_a_bounded_number_of_windows(root: Path) -> None:
    engine = FakeSharedEngine(numbered)
    pool: Any = FakePool(engine)
    transcriber = LocalTranscriber(pool, device=describe_device("cpu"), limits=Limits(batch_size=1))
    run = transcriber.transcribe(root / "examples" / "town-walk.flac", ENGLISH)
    counts = [(engine.n_encoded, run.progress.windows_done) for _ in run]
    assert counts[0] == (1, 1), "the first window has the engine for itself"
    assert all(encoded - done <= 1 for encoded, done in counts)  # two at once: one is being counted
    assert run.transcript.text.split()[-1] == str(len(counts) - 1)


def test_a_live_window_is_urgent(root: Path) -> None:
    engine = FakeSharedEngine(always((0.0, "good morning", 1.0)))
    pool: Any = FakePool(engine)
    transcriber = LocalTranscriber(pool, device=describe_device("cpu"))
    samples = decode_all(root / "examples" / "english.flac")[: 5 * 16_000]
    *_, last = transcriber.live(iter([samples]), TranscribeOptions())
    assert last.settled == "good morning" and not pool.is_lent
    assert engine.orders and all(urgent for _, _, urgent in engine.orders)


SAID = "Good morning, and welcome to the library."


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTranscriber]:
    """Of a checkpoint that says SAID in every window; its fast engine has two rows."""
    folder = make_saying(SAID, tmp_path_factory.mktemp("saying"), shape="least")
    pool = EnginePool(device="cpu", offline=True, warm_up=False, batch=2)
    transcriber = LocalTranscriber(pool, model=str(folder), precision="fp32", device=describe_device("cpu"))
    yield transcriber
    transcriber.close()


@pytest.fixture(scope="module")
def spoken(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A recording of so many sentences, with pauses so long that each is a window of its own."""
    folder = tmp_path_factory.mktemp("spoken")
    samples, rate = soundfile.read(root / "examples" / "english.flac", dtype="float32")
    borders_s = [(0.0, 3.06), (3.06, 7.2), (7.2, 12.0)]
    parts = [samples[round(start_s * rate) : round(end_s * rate)] for start_s, end_s in borders_s]
    pause = np.zeros(4 * rate, dtype=np.float32)

    def write(count: int) -> Path:
        path = folder / f"{count}.wav"
        sentences = [parts[index % len(parts)] for index in range(count)]
        soundfile.write(path, np.concatenate([part for each in sentences for part in (each, pause)]), rate)
        return path

    return write


def test_a_clip_behind_a_long_recording_has_its_text_first(
    saying: LocalTranscriber, spoken: Callable[[int], Path]
) -> None:
    """The long one fills every row, and would for ten times as long as the clip takes."""
    long = saying.transcribe(spoken(12), ENGLISH)
    is_reading, ended = threading.Event(), list[str]()

    def read_all() -> None:
        for _ in long:
            is_reading.set()
        ended.append("long")

    thread = threading.Thread(target=read_all)
    thread.start()
    assert is_reading.wait(120)
    short = saying.transcribe(spoken(1), ENGLISH)
    assert [s.text for s in short] == [SAID]
    ended.append("clip")
    thread.join()
    assert ended == ["clip", "long"] and [s.text for s in long.transcript.segments] == [SAID] * 12
    assert (short.transcript.engine, long.transcript.engine) == ("fast", "fast")
    status = saying.status()
    assert status.engine == "fast" and not status.is_busy


def test_cancelling_one_of_two_runs_leaves_the_other(saying: LocalTranscriber, spoken: Callable[[int], Path]) -> None:
    one, two = saying.transcribe(spoken(4), ENGLISH), saying.transcribe(spoken(3), ENGLISH)
    first, second = iter(one), iter(two)
    next(first), next(second)
    one.cancel()
    started_s = time.monotonic()
    assert len(list(first)) < 3 and one.is_cancelled
    assert time.monotonic() - started_s < 60
    assert len(list(second)) == 2 and not two.is_cancelled


def test_cancel_stops_within_a_window(saying: LocalTranscriber, spoken: Callable[[int], Path]) -> None:
    run = saying.transcribe(spoken(4), TranscribeOptions(language="en", batch_size=1))
    stream = iter(run)
    next(stream)
    run.cancel()
    assert all(s.window_index == 0 for s in stream)
    assert run.transcript.transcribed_s < 7 and run.transcript.text == SAID


def test_a_reader_that_stops_blocks_nobody(saying: LocalTranscriber, spoken: Callable[[int], Path]) -> None:
    """Another engine is loaded while it pauses; it goes on with its own afterwards. Both say which they were."""
    run = saying.transcribe(spoken(3), ENGLISH)
    stopped = iter(run)
    list(islice(stopped, 1))
    other = saying.transcribe(spoken(1), TranscribeOptions(language="en", engine="reference"))
    assert list(other) and other.transcript.engine == "reference"
    assert len(list(stopped)) == 2 and run.transcript.engine == "fast"
    beams = saying.transcribe(spoken(1), TranscribeOptions(language="en", beam_size=2))
    assert list(beams) and beams.transcript.engine == "reference"
