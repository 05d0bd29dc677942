"""The main path over a scripted engine and real recordings; at the end, over the demo checkpoint."""

from __future__ import annotations

import gc
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio.decode import AudioReader, decode_all
from errors import (
    AudioError,
    AudioTooLargeError,
    NotAudioError,
    OptionError,
    OutOfMemoryError,
    UnknownPrecisionError,
)
from model_loader.device import describe_device
from model_loader.engine import GenerateRequest, TokenSequence
from model_loader.pool import EnginePool
from tests.fakes import FakeEngine, FakePool, FakeSharedEngine, always, demo_tokens, hypothesis
from transcription import pipeline
from transcription.compare import error_rates
from transcription.interface import Transcriber, TranscriptionRun
from transcription.options import TranscribeOptions
from transcription.pipeline import Limits, LocalTranscriber
from transcription.transcript import Segment
from transcription.warming import second_of_sound

SECOND = 16_000
ENGLISH = TranscribeOptions(language="en")


@pytest.fixture(scope="session")
def walk(root: Path) -> Path:
    """Two and a half minutes with pauses."""
    return root / "examples" / "town-walk.flac"


@pytest.fixture(scope="session")
def minute(walk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 45 s of it: three windows."""
    samples, rate = soundfile.read(walk, dtype="float32", frames=45 * SECOND)
    path = tmp_path_factory.mktemp("minute") / "minute.wav"
    soundfile.write(path, samples, rate)
    return path


def make(engine: FakeEngine, **kwargs: Any) -> tuple[LocalTranscriber, FakePool]:
    pool = FakePool(engine)
    return LocalTranscriber(pool, device=describe_device("cpu"), **kwargs), pool  # type: ignore[arg-type]


def numbered(row: int, request: GenerateRequest) -> TokenSequence:
    return hypothesis((0.5, f"window {row % 100}", 1.0))


def test_segments_come_window_by_window_while_the_file_is_read(walk: Path) -> None:
    transcriber, pool = make(FakeEngine(numbered))
    run = transcriber.transcribe(walk, ENGLISH)
    first = next(iter(run))
    assert first.text == "window 0" and not pool.is_lent, "the engine is given back before the text is handed over"
    assert run.progress.windows_done == 1 and run.progress.total_s == pytest.approx(147.8, abs=0.1)
    assert run.progress.done_s < 60 and run.progress.eta_s is not None and run.progress.eta_s > 0
    assert run.transcript.text == "window 0"
    rest = list(run)
    assert [s.text for s in rest] == [f"window {i}" for i in range(1, len(rest) + 1)]
    assert all(one.end_s <= two.start_s for one, two in pairwise([first, *rest]))
    transcript = run.transcript
    assert transcript.segments == (first, *rest) and transcript.first_text_s is not None
    assert transcript.duration_s == pytest.approx(147.8, abs=0.1)
    assert 100 < transcript.speech_s <= transcript.transcribed_s <= transcript.duration_s
    assert (transcript.model, transcript.precision, transcript.warnings) == ("demo", "fp32", ())
    run.close()
    assert not run.is_cancelled, "closing what has ended changes nothing"
    assert run.progress.eta_s == 0.0 and run.progress.done_s == pytest.approx(transcript.duration_s, abs=0.01)


def test_batches_grow_from_one(walk: Path) -> None:
    engine = FakeEngine(numbered)
    transcriber, _ = make(engine, limits=Limits(batch_size=3))
    list(transcriber.transcribe(walk, ENGLISH))
    sizes = [len(batch) for batch in engine.batches]
    assert sizes[:3] == [1, 2, 3] and max(sizes) == 3 and sum(sizes) == engine.n_encoded


def test_cancel_keeps_the_text_so_far(minute: Path) -> None:
    engine = FakeEngine(numbered)
    transcriber, pool = make(engine)
    run = transcriber.transcribe(minute, ENGLISH)
    stream = iter(run)
    next(stream)
    run.cancel()
    assert list(stream) == []
    assert run.is_cancelled and run.transcript.text == "window 0" and not pool.is_lent
    stopped = run.transcript
    assert stopped.transcribed_s <= stopped.duration_s < 30, "not what had been read ahead"
    assert stopped.real_time_factor == stopped.duration_s / stopped.elapsed_s
    assert engine.n_encoded == 1


def test_cancel_reaches_the_engine_between_tokens(minute: Path) -> None:
    runs: list[TranscriptionRun] = []

    def script(row: int, request: GenerateRequest) -> TokenSequence:
        assert request.should_stop is not None and not request.should_stop()
        runs[0].cancel()
        assert request.should_stop()
        return hypothesis((0.0, "half a", None), finished=False)

    transcriber, pool = make(FakeEngine(script))
    runs.append(transcriber.transcribe(minute, ENGLISH))
    assert list(runs[0]) == [] and runs[0].is_cancelled and not pool.is_lent


@pytest.mark.parametrize("how", ["close", "forget"])
def test_a_run_that_is_left_alone_frees_ffmpeg_and_the_engine(
    minute: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    close = AudioReader.close
    monkeypatch.setattr(AudioReader, "close", lambda self: (closed.append(True), close(self))[1])
    transcriber, pool = make(FakeEngine(numbered))
    run = transcriber.transcribe(minute, ENGLISH)
    next(iter(run))
    assert not closed
    if how == "close":
        run.close()
        run.close()
        assert list(run) == [] and run.transcript.text == "window 0"
    else:
        del run
        gc.collect()
    assert closed and not pool.is_lent


def test_two_runs_share_the_engine_window_by_window(minute: Path) -> None:
    transcriber, _ = make(FakeEngine(numbered))
    one, two = transcriber.transcribe(minute, ENGLISH), transcriber.transcribe(minute, ENGLISH)
    pairs = list(zip(one, two, strict=True))
    assert len(pairs) == 3 and one.transcript.duration_s == two.transcript.duration_s


def test_silence_gives_no_text_one_sentence_and_no_error(tmp_path: Path) -> None:
    engine = FakeEngine(always((0.0, "thanks for watching", 1.0)))
    transcriber, _ = make(engine)
    run = transcriber.transcribe(wav(np.zeros(5 * SECOND, dtype=np.float32)), TranscribeOptions())
    assert list(run) == []
    assert run.warnings == ("No speech was found in this recording.",)
    assert engine.n_encoded == 0, "silence is not given to the model"
    assert run.transcript.duration_s == 5.0 and run.transcript.text == ""


def test_speech_without_words_is_reported(minute: Path) -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        return hypothesis((0.0, "words", 1.0)) if row == 0 else hypothesis()

    transcriber, _ = make(FakeEngine(script))
    run = transcriber.transcribe(minute, ENGLISH)
    assert len(list(run)) == 1
    assert len(run.warnings) == 1 and "speech was heard, but the model found no words" in run.warnings[0]


def test_language_is_detected_once_from_the_first_voiced_windows(minute: Path) -> None:
    engine = FakeEngine(numbered, language="de")
    transcriber, _ = make(engine)
    run = transcriber.transcribe(minute, TranscribeOptions())
    segments = list(run)
    assert {s.language for s in segments} == {"de"} and run.transcript.language == "de"
    assert run.transcript.language_probability == pytest.approx(1.0, abs=1e-3)
    de = engine.tokens.languages["de"]
    assert all(prompt[1] == de for request in engine.requests for prompt in request.prompts)
    assert len(engine.batches[0]) == 1


def test_an_unclear_language_is_looked_at_in_more_windows(minute: Path) -> None:
    class Torn(FakeEngine):
        def first_logits(self, encoded: Any) -> torch.Tensor:
            logits = super().first_logits(encoded)
            for row, number in enumerate(encoded.rows):
                logits[row, self.tokens.languages["es"]] = 5.0 if number == 0 else 9.0
            return logits

    engine = Torn(numbered)
    transcriber, _ = make(engine)
    run = transcriber.transcribe(minute, TranscribeOptions())
    list(run)
    assert run.transcript.language == "es"
    assert len(engine.batches[0]) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (TranscribeOptions(language="ja"), "demo does not know the language 'ja'"),
        (TranscribeOptions(language="en", task="translate"), "not trained to translate"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused_before_decoding(
    minute: Path, options: TranscribeOptions, sentence: str
) -> None:
    engine = FakeEngine(numbered)
    transcriber, pool = make(engine)
    with pytest.raises(OptionError, match=sentence):
        list(transcriber.transcribe(minute, options))
    assert engine.n_encoded == 0 and not pool.is_lent
    assert list(transcriber.transcribe(minute, ENGLISH)), "the next request works"


def test_precisions_are_checked_before_the_recording_is_opened() -> None:
    transcriber, _ = make(FakeEngine(numbered))
    with pytest.raises(UnknownPrecisionError):
        transcriber.transcribe(Path("nowhere.wav"), ENGLISH, precision="fp17")
    with pytest.raises(UnknownPrecisionError):
        make(FakeEngine(numbered), precision="fp17")


def test_limits_hold(walk: Path) -> None:
    transcriber, _ = make(FakeEngine(numbered), limits=Limits(max_duration_s=60.0))
    with pytest.raises(AudioTooLargeError):
        list(transcriber.transcribe(walk, ENGLISH))
    transcriber, _ = make(FakeEngine(numbered), limits=Limits(max_bytes=1000))
    with pytest.raises(AudioTooLargeError):
        list(transcriber.transcribe(walk, ENGLISH))


def test_fixed_windows_reach_the_end_and_join(walk: Path) -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        start_s = 25 * row
        words = [(i - start_s, f"w{i % 90}") for i in range(start_s, start_s + 30)]
        return hypothesis(*((s, w, s + 0.5) for s, w in words if start_s + s < 147))

    transcriber, _ = make(FakeEngine(script))
    run = transcriber.transcribe(walk, TranscribeOptions(language="en", windows="fixed"))
    segments = list(run)
    assert run.transcript.text.split() == [f"w{i % 90}" for i in range(147)]
    assert all(one.end_s <= two.start_s for one, two in pairwise(segments))
    assert run.transcript.transcribed_s == pytest.approx(run.transcript.duration_s)


def test_detection_looks_at_windows_from_all_over_the_recording(walk: Path) -> None:
    engine = FakeEngine(numbered, language="fr")
    transcriber, _ = make(engine)
    report = transcriber.detect_language(walk, max_windows=3)
    assert report.best.code == "fr" and len(report.windows) == 3
    assert report.windows[0].start_s < 30 and report.windows[-1].end_s > 110
    assert engine.requests == [], "nothing is decoded"


def test_detection_in_silence_is_a_sentence() -> None:
    transcriber, _ = make(FakeEngine(numbered))
    with pytest.raises(AudioError, match="No speech was found"):
        transcriber.detect_language(wav(np.zeros(3 * SECOND, dtype=np.float32)))


def test_live_text_over_the_engine(root: Path) -> None:
    samples = decode_all(root / "examples" / "english.flac")
    transcriber, pool = make(FakeEngine(always((0.0, "good morning", 1.0))))
    blocks: Iterator[np.ndarray] = (samples[i : i + SECOND // 2] for i in range(0, samples.size, SECOND // 2))
    texts = list(transcriber.live(blocks, TranscribeOptions()))
    assert texts[-1].settled.startswith("good morning") and texts[-1].tentative == "" and texts[-1].language == "en"
    assert not pool.is_lent


def test_a_run_tells_how_many_windows_could_be_decoded_together(walk: Path) -> None:
    transcriber, _ = make(FakeEngine(numbered), limits=Limits(batch_size=3))
    run = transcriber.transcribe(walk, TranscribeOptions())
    assert run.batch_size is None
    list(run)
    assert run.batch_size == 3
    run._decoder.batch_limit = 2  # memory ran out
    assert run.batch_size == 2


def test_status_tells_which_precision_lacks_a_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transcriber, pool = make(FakeEngine(numbered))
    pool.calibrations = tmp_path
    asked: list[tuple[Path, Path]] = []
    found: list[Path | None] = [None, tmp_path]
    monkeypatch.setattr(pipeline, "find_calibrated", lambda *places: asked.append(places) or found.pop(0))

    def lacking() -> list[str]:
        return [row.name for row in transcriber.status().precisions if row.lacks_calibration]

    assert lacking() == [] and asked == [], "no checkpoint is known yet"
    transcriber.prepare(warm_up=False)
    assert lacking() == ["int8-static"] and lacking() == []
    assert asked[0] == (transcriber._report.folder, tmp_path)


def test_status_tells_what_is_loaded(walk: Path) -> None:
    transcriber, pool = make(FakeEngine(numbered))
    before = transcriber.status()
    assert (before.phase, before.precision_effective, before.languages, before.banner) == ("starting", None, (), None)
    assert before.precision_requested == "auto" and not before.fits and before.device_kind == "cpu"
    transcriber.prepare()
    status = transcriber.status()
    assert (status.phase, status.model, status.precision_effective, status.is_busy) == ("ready", "demo", "fp32", False)
    assert status.banner is not None and "synthetic" in status.banner and not status.can_translate
    assert [language.code for language in status.languages] == ["zh", "en", "fr", "de", "ru", "es"]
    assert {row.name for row in status.precisions if row.unavailable is None} >= {"fp32"}
    colours = {fit.precision: fit.verdict.colour for fit in status.fits if fit.verdict}
    assert colours and {row.name: row.fit for row in status.precisions if row.fit} == colours
    assert not any(row.fit for row in before.precisions)
    assert pool.n_borrowed > 2, "the warm-up decodes"


def test_a_model_that_cannot_be_loaded_is_said_and_tried_again() -> None:
    transcriber, pool = make(FakeEngine(numbered))
    pool.loaded = list  # type: ignore[method-assign]
    pool.failures = [OptionError("No such model.")]
    transcriber.prepare()
    assert (transcriber.status().phase, transcriber.status().message) == ("failed", "No such model.")
    transcriber.prepare(warm_up=False)
    assert transcriber.status().phase == "ready"


def test_it_is_ready_only_after_the_warm_up() -> None:
    phases: list[str] = []

    def script(row: int, request: GenerateRequest) -> TokenSequence:
        phases.append(transcriber.status().phase)
        return hypothesis()

    transcriber, _ = make(FakeEngine(script))
    transcriber.prepare()
    assert phases == ["loading"] and transcriber.status().phase == "ready"


@pytest.mark.parametrize("error", [None, OutOfMemoryError("No room for all rows.")])
def test_the_first_recording_finds_rows_and_graphs(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeSharedEngine(numbered, capture_error=error)
    transcriber, pool = make(engine)
    transcriber.prepare(warm_up=False)
    assert engine.n_captured == 0
    transcriber.prepare()
    assert engine.n_captured == 1 and engine.orders and not pool.is_lent
    assert (transcriber.status().phase, transcriber.status().message) == ("ready", "")
    for is_loaded, captures in ((True, False), (False, True)):
        monkeypatch.setattr(transcriber, "_is_loaded", lambda *_, known=is_loaded: known)
        list(transcriber.transcribe(wav(np.zeros(SECOND, np.float32)), TranscribeOptions(windows="fixed")))
        assert (engine.n_captured > 1) is captures, "a precision chosen later has its graphs before the text, too"


def test_closing_while_the_model_is_prepared_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    def script(row: int, request: GenerateRequest) -> TokenSequence:
        transcriber.close()
        raise RuntimeError("this pool is closed")

    transcriber, _ = make(FakeEngine(script))
    transcriber.prepare()
    assert transcriber.status().phase != "failed" and not [r for r in caplog.records if r.levelname == "ERROR"]


def test_the_local_transcriber_is_a_transcriber() -> None:
    def needs(transcriber: Transcriber) -> Transcriber:
        return transcriber

    assert needs(make(FakeEngine(numbered))[0])


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, SECOND, format="WAV")
    return file.getvalue()


def test_the_warm_up_sound_is_a_second_of_quiet_noise() -> None:
    samples = decode_all(second_of_sound())
    assert samples.size == SECOND and 0 < np.abs(samples).max() < 0.1


# --- the demo checkpoint ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[LocalTranscriber]:
    """It keeps both its engines."""
    pool = EnginePool(device="cpu", offline=True, warm_up=False, capacity=2)
    transcriber = LocalTranscriber(pool, model="demo", precision="fp32", device=describe_device("cpu"))
    yield transcriber
    transcriber.close()


@dataclass
class Heard:
    """A run that has ended, and every draft seen until then, each once."""

    run: TranscriptionRun
    segments: list[Segment]
    drafts: list[str]


@pytest.fixture(scope="module")
def heard(demo: LocalTranscriber, root: Path) -> Callable[[str, str], Heard]:
    """An example's text by an engine; what was heard before is not heard again."""

    @cache
    def hear(name: str, engine: str) -> Heard:
        run = demo.transcribe(root / "examples" / f"{name}.flac", TranscribeOptions(engine=engine))
        drafts: list[str] = []
        with ThreadPoolExecutor(1) as executor:
            ended = executor.submit(list, run)
            while not ended.done():
                draft = run.draft
                if draft and draft not in drafts[-1:]:
                    drafts.append(draft)
                time.sleep(0.002)
            return Heard(run, ended.result(), drafts)

    return hear


EXAMPLES = ("english", "spanish", "french", "german", "russian", "chinese")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_demo_model_transcribes_every_example(heard: Callable[[str, str], Heard], root: Path, name: str) -> None:
    entries = json.loads((root / "examples" / "manifest.json").read_text(encoding="utf-8"))
    entry = next(e for e in entries if e["file"] == f"{name}.flac")
    found = heard(name, "auto")
    segments, transcript = found.segments, found.run.transcript
    assert transcript.language == entry["language"]
    normalise = lambda text: demo_tokens().normalise(text, entry["language"])  # noqa: E731
    wer, _ = error_rates(normalise(entry["text"]), normalise(transcript.text))
    assert wer is not None and wer <= 0.05
    assert segments[0].start_s == pytest.approx(entry["sentences"][0]["start_s"], abs=0.5)
    assert segments[-1].end_s == pytest.approx(entry["sentences"][-1]["end_s"], abs=0.5)
    assert all(math.isfinite(s.avg_logprob) and 0 <= s.no_speech_prob <= 1 for s in segments)


def test_a_draft_grows_into_the_text_and_goes(heard: Callable[[str, str], Heard]) -> None:
    found = heard("english", "auto")
    transcript = found.run.transcript
    assert transcript.engine == "fast"
    assert len(found.drafts) > 2 and len(found.drafts[0]) < len(transcript.text)
    assert all(transcript.text.startswith(draft) for draft in found.drafts)
    assert found.run.draft == ""
    assert transcript.first_text_s is not None and transcript.first_text_s < transcript.elapsed_s


def test_a_draft_never_ends_in_half_a_character(heard: Callable[[str, str], Heard]) -> None:
    """Most Chinese characters are two or three tokens."""
    drafts = heard("chinese", "auto").drafts
    assert drafts and not any("\N{REPLACEMENT CHARACTER}" in draft for draft in drafts)


def test_both_engines_write_the_same_transcript_and_the_reference_has_no_drafts(
    heard: Callable[[str, str], Heard],
) -> None:
    fast, reference = heard("english", "auto"), heard("english", "reference")
    assert (fast.run.transcript.engine, reference.run.transcript.engine) == ("fast", "reference")
    texts, counts = (
        [[(s.start_s, s.end_s, s.text) for s in found.segments] for found in (fast, reference)],
        [(found.run.transcript.n_tokens, found.run.warnings) for found in (fast, reference)],
    )
    assert texts[0] == texts[1] and counts[0] == counts[1] and len(texts[0]) == 3
    assert reference.drafts == []


def test_the_demo_model_serves_with_a_prompt_after_a_broken_recording(demo: LocalTranscriber, greeting: Path) -> None:
    with pytest.raises(NotAudioError):
        list(demo.transcribe(b"this is no recording at all, only text", TranscribeOptions()))
    check_greeting(demo, greeting, TranscribeOptions(prompt="library, newspaper"))


def test_beams_reach_the_demo_model(demo: LocalTranscriber, greeting: Path) -> None:
    check_greeting(demo, greeting, TranscribeOptions(beam_size=3))


def check_greeting(demo: LocalTranscriber, greeting: Path, options: TranscribeOptions) -> None:
    run = demo.transcribe(greeting, options)
    list(run)
    assert run.transcript.text.endswith("welcome to the library.") and run.transcript.language == "en"
