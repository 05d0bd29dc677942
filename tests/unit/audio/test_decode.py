"""Bytes to waveform: containers, levels, damage, limits, hostile files, and the child process."""

from __future__ import annotations

import gc
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import audio.child
import audio.decode
from audio.child import MediaInfo, parse_header
from audio.constants import SAMPLE_RATE
from audio.decode import decode_all, decode_blocks, find_ffmpeg, probe
from errors import (
    AudioError,
    AudioTooLargeError,
    DiskFullError,
    EmptyAudioError,
    MachineError,
    NoAudioTrackError,
    NotAudioError,
)

from .conftest import PROGRAMS, by_turns, tone


def level(samples: np.ndarray) -> float:
    return float(np.abs(samples).max())


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_16_khz_mono_wav_keeps_every_sample(ffmpeg: str, write_wav: Callable[..., Path]) -> None:
    steps = np.random.default_rng(0).integers(-32768, 32767, 3 * SAMPLE_RATE + 7).astype(np.int16)
    decoded = decode_all(write_wav(steps), ffmpeg=ffmpeg)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, steps.astype(np.float32) / 32768)


@pytest.mark.parametrize("block_s", [0.01, 0.37, 1.0, 100.0])
def test_block_size_does_not_change_the_waveform(write_wav: Callable[..., Path], block_s: float) -> None:
    path = write_wav(tone(2.5))
    blocks = list(decode_blocks(path, block_s=block_s))
    assert all(block.size == round(block_s * SAMPLE_RATE) for block in blocks[:-1])
    assert np.array_equal(np.concatenate(blocks), decode_all(path))


def test_bytes_and_path_decode_alike(ffmpeg: str, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tone(1.0))
    assert np.array_equal(decode_all(path.read_bytes(), ffmpeg=ffmpeg), decode_all(path, ffmpeg=ffmpeg))


@pytest.mark.parametrize(
    ("ffmpeg", "n_channels", "subtype"),
    by_turns([(2, "PCM_16"), (1, "FLOAT"), (6, "FLOAT"), (8, "PCM_16"), (9, "FLOAT"), (17, "PCM_16")]),
    indirect=["ffmpeg"],
)
def test_equal_channels_keep_their_level(
    ffmpeg: str, write_wav: Callable[..., Path], n_channels: int, subtype: str
) -> None:
    path = write_wav(np.stack([tone(1.0)] * n_channels, axis=1), subtype=subtype)
    assert level(decode_all(path, ffmpeg=ffmpeg)) == pytest.approx(0.5, abs=0.002)


def test_sound_in_one_channel_of_two_is_heard(ffmpeg: str, write_wav: Callable[..., Path]) -> None:
    path = write_wav(np.stack([tone(1.0), np.zeros(SAMPLE_RATE, np.float32)], axis=1))
    assert level(decode_all(path, ffmpeg=ffmpeg)) == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize(("ffmpeg", "rate"), by_turns([8_000, 22_050, 44_100, 96_000]), indirect=["ffmpeg"])
def test_resampling_keeps_length_and_pitch(ffmpeg: str, write_wav: Callable[..., Path], rate: int) -> None:
    decoded = decode_all(write_wav(tone(2.0, rate=rate), rate=rate), ffmpeg=ffmpeg)
    assert decoded.size == pytest.approx(2 * SAMPLE_RATE, abs=20)
    spectrum = np.abs(np.fft.rfft(decoded[:SAMPLE_RATE]))
    assert int(spectrum.argmax()) == 440


def test_what_is_not_a_number_becomes_silence_with_a_warning(ffmpeg: str, write_wav: Callable[..., Path]) -> None:
    samples = tone(1.0)
    samples[[100, 200]] = np.nan, np.inf
    samples[300] = 1e30
    with decode_blocks(write_wav(samples, subtype="FLOAT"), ffmpeg=ffmpeg) as reader:
        decoded = np.concatenate(list(reader))
    assert decoded[100] == decoded[200] == 0.0
    assert level(decoded) == 1.0
    assert len(reader.warnings) == 1
    assert "2 samples that are not numbers" in reader.warnings[0]


def test_a_gap_in_the_time_stamps_becomes_silence(ffmpeg: str, make_media: Callable[..., Path]) -> None:
    jump = "asetpts=PTS+2/TB*gte(T\\,1)"
    path = make_media("-f", "lavfi", "-i", "sine=d=2:r=16000", "-af", jump, "-c:a", "pcm_s16le", "gap.mkv")
    decoded = decode_all(path, ffmpeg=ffmpeg)
    assert decoded.size == pytest.approx(4 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
    assert level(decoded[int(1.2 * SAMPLE_RATE) : int(2.8 * SAMPLE_RATE)]) == 0.0
    assert level(decoded[int(3.2 * SAMPLE_RATE) : int(3.8 * SAMPLE_RATE)]) > 0.1


# ---- containers -----------------------------------------------------------------------------------------------------

SINE = ("-f", "lavfi", "-i", "sine=d=12:r=44100")
PICTURE = ("-f", "lavfi", "-i", "color=c=black:s=32x32:d=12:r=5")
CONTAINERS = {
    "index-last.m4a": (*SINE, "-c:a", "aac", "-b:a", "96k"),
    "index-first.m4a": (*SINE, "-c:a", "aac", "-b:a", "96k", "-movflags", "+faststart"),
    "fragmented.mp4": (*SINE, "-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"),
    "video-index-last.mp4": (*PICTURE, *SINE, "-c:v", "mpeg4", "-c:a", "aac"),
    "video.mkv": (*PICTURE, *SINE, "-c:v", "mpeg4", "-c:a", "ac3"),
    "video.avi": (*PICTURE, *SINE, "-c:v", "mpeg4", "-c:a", "mp2"),
    "stream.ts": (*SINE, "-c:a", "aac"),
    "pcm.caf": (*SINE, "-c:a", "pcm_s16be"),
    "sound.wma": (*SINE, "-c:a", "wmav2"),
}


@pytest.mark.parametrize(("ffmpeg", "name"), by_turns(CONTAINERS), indirect=["ffmpeg"])
def test_container_made_here_decodes_whole(ffmpeg: str, make_media_once: Callable[..., Path], name: str) -> None:
    path = make_media_once(*CONTAINERS[name], name)
    if "index-last" in name:
        data = path.read_bytes()
        assert data.index(b"mdat") < data.index(b"moov")
    with decode_blocks(path, ffmpeg=ffmpeg) as reader:
        decoded = np.concatenate(list(reader))
    assert decoded.size / SAMPLE_RATE == pytest.approx(12.0, abs=0.15)
    assert reader.duration_s == pytest.approx(12.0, abs=0.2)
    assert reader.warnings == []
    assert reader.info.has_video == name.startswith("video")


def test_second_audio_track_is_named_in_a_warning(make_media: Callable[..., Path]) -> None:
    path = make_media(
        "-f", "lavfi", "-i", "sine=d=1", "-f", "lavfi", "-i", "anoisesrc=d=1", "-map", "0", "-map", "1", "two.mkv"
    )
    with decode_blocks(path) as reader:
        assert sum(block.size for block in reader) == pytest.approx(SAMPLE_RATE, abs=200)
    assert reader.warnings == ["two.mkv has 2 audio tracks; the first one was used."]


def test_probe_says_what_the_header_says(ffmpeg: str, make_media_once: Callable[..., Path]) -> None:
    path = make_media_once(*CONTAINERS["video-index-last.mp4"], "video-index-last.mp4")
    info = probe(path, ffmpeg=ffmpeg)
    assert (info.codec, info.sample_rate, info.channels) == ("aac", 44_100, "mono")
    assert info.duration_s == pytest.approx(12.0, abs=0.1)
    assert info.n_audio_tracks == 1
    assert info.has_video
    assert info.size_bytes == path.stat().st_size


def test_tags_cannot_pose_as_the_header() -> None:
    lines = [
        "Input #0, wav, from 'fd:':",
        "  Metadata:",
        "    title           : x",
        "                    :   Duration: 99:00:00.00, start: 0",
        "    Duration        : 98:00:00.00",
        "  Duration: 00:01:02.50, start: 0.000000, bitrate: 256 kb/s",
        "  Stream #0:0[0x1](und): Audio: aac (LC) (mp4a / 0x6134706D), 44100 Hz, 5.1(side), fltp, 95 kb/s (default)",
        "  Stream #0:1: Video: mjpeg, yuvj420p, 300x300 (attached pic)",
        "Stream mapping:",
        "  Stream #0:7: Audio: pcm_f32le, 16000 Hz, mono",
    ]
    assert parse_header(lines, 9) == MediaInfo(9, "wav", 62.5, False, "aac", 44_100, "5.1(side)", 1, False)


# ---- recordings from the shared folder -----------------------------------------------------------------------------


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("part", [".", "formats"])
def test_every_recording_decodes_to_its_length(shared_audio: Path, ffmpeg: str, part: str) -> None:
    """Of the formats each by every ffmpeg; of the rest, which are long, each by one, every fifth by the system's."""
    wrong = []
    system = PROGRAMS["system"]
    for index, row in enumerate(rows(shared_audio / part)):
        if part != "formats" and system is not None and (index % 5 == 0) != (ffmpeg == system):
            continue
        with decode_blocks(shared_audio / part / row["file"], ffmpeg=ffmpeg) as reader:
            decoded_s = sum(block.size for block in reader) / SAMPLE_RATE
        if abs(decoded_s - row["seconds"]) > 0.15 or reader.warnings:
            wrong.append((row["file"], row["seconds"], decoded_s, reader.warnings))
    assert wrong == []


BROKEN: dict[str, type[Exception] | tuple[float, bool]] = {  # an error, or seconds and whether a warning is due
    "empty.wav": EmptyAudioError,
    "grabación número 1 – 録音 запись.wav": (8.66, False),
    "header-only.wav": EmptyAudioError,
    "pocketsphinx-awful.wav": EmptyAudioError,
    "pocketsphinx-bad.wav": NotAudioError,
    "pocketsphinx-evil.wav": NotAudioError,
    "silence-5s.wav": (5.0, False),
    "speech-0.05s.wav": (0.05, False),
    "streamed-size-unknown.wav": (4.28, False),
    "text-renamed.wav": NotAudioError,
    "truncated-no-index.m4a": NotAudioError,
    "truncated.flac": (2.38, True),
    "truncated.mp3": (4.96, True),
    "video-without-audio.mp4": NoAudioTrackError,
}


def test_every_broken_file_has_an_expectation(shared_audio: Path) -> None:
    assert {row["file"] for row in rows(shared_audio / "broken")} == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_gives_a_sentence_or_what_decodes(shared_audio: Path, ffmpeg: str, name: str) -> None:
    path, expected = shared_audio / "broken" / name, BROKEN[name]
    if isinstance(expected, tuple):
        with decode_blocks(path, ffmpeg=ffmpeg) as reader:
            assert sum(block.size for block in reader) / SAMPLE_RATE == pytest.approx(expected[0], abs=0.02)
        assert bool(reader.warnings) == expected[1]
        return
    with pytest.raises(expected) as caught:
        decode_blocks(path, ffmpeg=ffmpeg)
    assert type(caught.value) is expected
    assert_helpful(str(caught.value), name)
    assert caught.value.exit_code == 2


def assert_helpful(message: str, name: str) -> None:
    """Two sentences for a user: what is wrong with which file, and what to do. No path, no ffmpeg jargon."""
    assert message.startswith(name)
    assert re.search(r"\. [A-Z].*\.$", message), message
    assert "/" not in message and "0x" not in message and "Error" not in message


# ---- damage made here ----------------------------------------------------------------------------------------------


def test_cut_wav_yields_its_beginning_and_warns(ffmpeg: str, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tone(4.0))
    path.write_bytes(path.read_bytes()[: 2 * 2 * SAMPLE_RATE + 44])
    with decode_blocks(path, ffmpeg=ffmpeg) as reader:
        assert sum(block.size for block in reader) == pytest.approx(2 * SAMPLE_RATE, abs=2)
    assert "damaged" in reader.warnings[0]


def test_many_complaints_neither_block_nor_pile_up(ffmpeg: str, make_media_once: Callable[..., Path]) -> None:
    path = make_media_once("-f", "lavfi", "-i", "anoisesrc=d=40:r=44100", "-b:a", "64k", "noisy.mp3")
    data = bytearray(path.read_bytes())
    places = np.random.default_rng(0).integers(4096, len(data), len(data) // 40)
    for place in places:
        data[place] ^= 0xFF
    with decode_blocks(bytes(data), ffmpeg=ffmpeg) as reader:
        decoded_s = sum(block.size for block in reader) / SAMPLE_RATE
        words = reader._child.words
    assert decoded_s > 15
    assert words.n_errors > 100
    assert len(words.last_errors) <= 20
    assert reader.warnings


ZEROS, HEADS = (b"\0", b"\0" * 100_000), (b"RIFF", b"ID3\x04\0\0\0\0\0\0", b"%PDF-1.7 " * 500)
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
NO_SOUND = [(b"", EmptyAudioError), *((data, NotAudioError) for data in (*ZEROS, *HEADS))]


@pytest.mark.parametrize(
    ("ffmpeg", "data", "error"), by_turns([*NO_SOUND, (PNG, (NotAudioError, NoAudioTrackError))]), indirect=["ffmpeg"]
)
def test_bytes_without_sound_are_refused(ffmpeg: str, data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        decode_blocks(data, ffmpeg=ffmpeg)
    assert_helpful(str(caught.value), "The recording")
    with pytest.raises(AudioError):
        probe(data, ffmpeg=ffmpeg)


def test_missing_file_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nothing.wav", tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("nul\0byte.wav")):
        with pytest.raises(AudioError):
            decode_blocks(path)


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_too_long_by_the_header_is_refused_at_once(write_wav: Callable[..., Path]) -> None:
    with pytest.raises(AudioTooLargeError, match=r"made.wav lasts 0:00:20 or more; the limit is 0:00:15\."):
        decode_blocks(write_wav(tone(20.0)), max_duration_s=15.0)


def test_too_long_without_a_header_stops_at_the_limit(make_media: Callable[..., Path]) -> None:
    path = make_media("-f", "lavfi", "-i", "sine=d=20", "-c:a", "libopus", "-f", "webm", "-live", "1", "live.webm")
    reader = decode_blocks(path, block_s=1.0, max_duration_s=5.0)
    assert reader.duration_s is None
    with pytest.raises(AudioTooLargeError):
        list(reader)
    assert list(reader) == []


def test_a_header_that_claims_hours_of_a_small_file_is_not_believed(write_wav: Callable[..., Path]) -> None:
    path = write_wav(tone(4.0))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    with decode_blocks(bytes(data), max_duration_s=60.0) as reader:
        assert sum(block.size for block in reader) == 4 * SAMPLE_RATE
    assert reader.warnings == []


def test_too_many_bytes_are_refused(write_wav: Callable[..., Path]) -> None:
    with pytest.raises(AudioTooLargeError, match=r"made.wav has 0\.1 MB; the limit is 0\.0 MB"):
        decode_blocks(write_wav(tone(2.0)), max_bytes=10_000)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audio.decode.tempfile, "TemporaryFile", fail)
    with pytest.raises(DiskFullError, match="No space left on device"):
        decode_blocks(b"x")


# ---- files that point elsewhere -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A local web server; its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    thread.join()
    web.server_close()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "hls-live": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{target}\n"
    "m=audio 5004 RTP/AVP 0\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT10S"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("is_recognised", [True, False], ids=["recognised", "whitelist-alone"])
def test_playlist_opens_nothing(
    ffmpeg: str,
    write_wav: Callable[..., Path],
    server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    is_recognised: bool,
) -> None:
    address, asked = server
    if not is_recognised:
        monkeypatch.setattr(audio.decode, "_is_playlist", lambda head: False)
    for target in (f"{address}/x.wav", str(write_wav(tone(1.0))), "pipe:0"):
        with pytest.raises(NotAudioError if is_recognised else AudioError) as caught:
            decode_blocks(PLAYLISTS[kind].format(target=target).encode(), ffmpeg=ffmpeg)
        assert ("playlist" in str(caught.value)) == is_recognised
    assert asked == []


@pytest.mark.parametrize(("kind", "extension"), [("hls", "m3u8"), ("concat", "ffconcat")])
def test_the_same_playlist_without_protection_reaches_the_server(
    server: tuple[str, list[str]], ffmpeg: str, tmp_path: Path, kind: str, extension: str
) -> None:
    """Or the test above could not fail."""
    address, asked = server
    path = tmp_path / f"list.{extension}"
    path.write_text(PLAYLISTS[kind].format(target=f"{address}/x.ts"))
    open_doors = ["-protocol_whitelist", "file,http,tcp", *(["-safe", "0"] if kind == "concat" else [])]
    subprocess.run([ffmpeg, "-v", "quiet", "-nostdin", *open_doors, "-i", path, "-f", "null", "-"], timeout=60)
    assert "/x.ts" in asked


# ---- the child process ----------------------------------------------------------------------------------------------


def children() -> list[psutil.Process]:
    return psutil.Process().children()


def test_close_after_one_block_ends_and_reaps_ffmpeg(ffmpeg: str, long_wav: Path) -> None:
    before = children()
    reader = decode_blocks(long_wav, block_s=1.0, ffmpeg=ffmpeg)
    next(reader)
    assert len(children()) == len(before) + 1
    reader.close()
    reader.close()
    assert children() == before
    assert list(reader) == []
    assert reader.warnings == []


def test_a_dropped_reader_takes_ffmpeg_along(long_wav: Path) -> None:
    before = children()
    reader = decode_blocks(long_wav, block_s=1.0)
    next(reader)
    with pytest.warns(ResourceWarning):
        del reader
        gc.collect()
    assert children() == before


def test_close_from_another_thread_ends_the_iteration(long_wav: Path) -> None:
    reader = decode_blocks(long_wav, block_s=0.001)
    problems: list[BaseException] = []
    seen = threading.Event()

    def consume() -> None:
        try:
            for _ in reader:
                seen.set()
        except BaseException as error:  # reported below
            problems.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    assert seen.wait(10)
    reader.close()
    thread.join(10)
    assert not thread.is_alive()
    assert problems == []


def test_a_killed_ffmpeg_leaves_what_was_decoded_and_says_so(long_wav: Path) -> None:
    before = children()
    reader = decode_blocks(long_wav, block_s=1.0)
    next(reader)
    (child,) = (process for process in children() if process not in before)
    child.kill()
    n_blocks = 1 + sum(1 for _ in reader)
    assert 1 <= n_blocks < 300
    assert "ended by signal 9" in reader.warnings[0]


def test_threads_end_with_the_reader(long_wav: Path) -> None:
    n_threads = threading.active_count()
    for _ in range(3):
        with decode_blocks(long_wav) as reader:
            next(reader)
    deadline = time.monotonic() + 5
    while threading.active_count() > n_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == n_threads


def test_no_ffmpeg_anywhere_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio.child.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MachineError, match="Install the system package 'ffmpeg'"):
        find_ffmpeg()


def test_an_ffmpeg_that_can_seek_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    monkeypatch.setattr(audio.child.shutil, "which", lambda name: "/bin/other")
    monkeypatch.setattr(audio.child, "can_seek", lambda program: True)
    assert find_ffmpeg() == "/bin/other"
    monkeypatch.setattr(audio.child, "can_seek", lambda program: False)
    assert find_ffmpeg() == imageio_ffmpeg.get_ffmpeg_exe()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert find_ffmpeg() == "/bin/other"


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/ffmpeg"])
def test_a_program_that_does_not_start_is_named(write_wav: Callable[..., Path], program: str) -> None:
    with pytest.raises(MachineError, match=program):
        decode_blocks(write_wav(tone(0.1)), ffmpeg=program)
