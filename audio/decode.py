"""Any media file in, float32 mono 16 kHz waveform out, block by block, at flat memory.

In: a path or the bytes of a file. Out: blocks [n_samples] between -1 and 1, warnings, and what the header says.

Why this way. ffmpeg reads every container and resamples; it runs as a child process, so a hostile file can end only
that process. It never sees a path or an address of the user's: we open the file and hand it over as standard input, and
`-protocol_whitelist` holds nothing but that input. So a playlist (m3u8, ffconcat, SDP, MPD) that names other files or
hosts opens nothing, and scripts that ffmpeg knows by extension (avs, vpy) do not run.

How ffmpeg may read its standard input, because MP4 and M4A often keep their index at the end and must be seekable:
`fd:` (ffmpeg 6 and newer) seeks in the file itself; an older one (Debian 12 has 5.1) gets `cache:pipe:0`, which makes a
pipe seekable through an unlinked temporary file as long as what has been read. Tried and dropped: plain `pipe:0` for
formats that need no seeking; ffmpeg then misses durations and believes wrong ones.

Levels: channels are mixed with ffmpeg's matrix, normalised so that the mix cannot exceed its loudest channel; by
default ffmpeg normalises integer sources and not float ones, so a stereo MP3 would come out 3 dB louder than the same
WAV. Gaps in a recording's time stamps become silence, so positions in the waveform are positions in the recording.
Memory: with 10 hours instead of one minute our process grows by under 3 MiB and ffmpeg stays at 33 MiB (MP3), or 61 MiB
for M4A, whose index it keeps (python -m benchmarks.decode_memory, ffmpeg 9.0).
Not done here: finding speech (vad.py), choosing among several audio tracks (the first is taken, with a warning).
"""

from __future__ import annotations

import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import numpy as np

from audio.child import Child, MediaInfo, decode_arguments, find_ffmpeg, probe_arguments
from audio.constants import SAMPLE_RATE
from audio.tape import Samples
from errors import (
    AudioError,
    AudioTooLargeError,
    DiskFullError,
    EmptyAudioError,
    MachineError,
    NoAudioTrackError,
    NotAudioError,
    SottoError,
)

__all__ = ["AudioReader", "MediaInfo", "Samples", "Source", "decode_all", "decode_blocks", "find_ffmpeg", "probe"]

logger = logging.getLogger(__name__)

Source = Path | bytes

BLOCK_S: Final = 10.0
SAMPLE_BYTES: Final = 4  # float32

# No speech codec goes below about 700 bit/s (Codec 2); a header that claims more seconds than the file can hold is
# wrong (a WAV written to a pipe claims 37 hours) and does not count against the length limit.
MIN_BYTES_PER_S: Final = 80
# A header may round, and encoders pad; only a larger lack of sound is worth a warning.
MISSING_S: Final = 1.0
MISSING_SHARE: Final = 0.02

_HEAD_BYTES: Final = 4096
_PLAYLIST_STARTS: Final = (
    b"#extm3u",
    b"ffconcat",
    b"[playlist]",
    b"[reference]",
    b"v=0\n",
    b"v=0\r",
    b"<smil",
    b"<asx",
)


def decode_blocks(
    source: Source,
    *,
    block_s: float = BLOCK_S,
    max_duration_s: float | None = None,
    max_bytes: int | None = None,
    ffmpeg: str | None = None,
) -> AudioReader:
    """Open a recording and iterate over its waveform.

    Yields float32 [n_samples] blocks of block_s seconds (the last is shorter), 16 kHz mono, all values in -1..1.
    The first block is decoded before this returns, so a file without sound raises here:
    EmptyAudioError, NotAudioError, NoAudioTrackError, AudioTooLargeError (by its header or its bytes), AudioError (no
    such file), MachineError, DiskFullError. AudioTooLargeError may also come later, once max_duration_s is passed.
    A file that breaks off yields what decodes and leaves a sentence in `warnings`.
    ffmpeg: path of the program; None finds one.
    """
    return AudioReader(source, block_s=block_s, max_duration_s=max_duration_s, max_bytes=max_bytes, ffmpeg=ffmpeg)


def decode_all(source: Source, *, max_duration_s: float | None = None, ffmpeg: str | None = None) -> Samples:
    """The whole waveform, float32 [n_samples]; for short recordings. Raises as decode_blocks does."""
    with decode_blocks(source, max_duration_s=max_duration_s, ffmpeg=ffmpeg) as reader:
        return np.concatenate(list(reader))


def probe(source: Source, *, ffmpeg: str | None = None) -> MediaInfo:
    """What the header says, without decoding. Raises as decode_blocks does; damage past the header goes unseen."""
    program = ffmpeg or find_ffmpeg()
    with _open_source(source) as opened:
        child = Child(probe_arguments(program), opened.file)
        try:
            exit_code = child.wait()
        finally:
            child.stop()
        info = child.words.info(opened.size_bytes)
        if not info.n_audio_tracks:
            raise _why_no_sound(opened.name, child, exit_code, info)
        return info


class AudioReader(Iterator[Samples]):
    """One pass over a recording's waveform; see decode_blocks. Close it, or use `with`, to stop early."""

    info: MediaInfo
    warnings: list[str]
    """Sentences about damage; complete once the iteration has ended."""

    def __init__(
        self,
        source: Source,
        *,
        block_s: float = BLOCK_S,
        max_duration_s: float | None = None,
        max_bytes: int | None = None,
        ffmpeg: str | None = None,
    ) -> None:
        self.warnings = []
        self._block_bytes = max(1, round(block_s * SAMPLE_RATE)) * SAMPLE_BYTES
        self._max_duration_s = max_duration_s
        self._n_samples = 0
        self._n_not_numbers = 0
        self._is_closed = False
        with _open_source(source, max_bytes=max_bytes) as opened:
            self._name = opened.name
            self._child, self._first = _start(ffmpeg or find_ffmpeg(), opened, self._block_bytes)
            self.info = self._child.words.info(opened.size_bytes)
        try:
            self._check_start()
        except SottoError:
            self.close()
            raise

    @property
    def duration_s(self) -> float | None:
        """Length by the header; None when unknown. `decoded_s` is the truth once the iteration has ended."""
        return self.info.duration_s

    @property
    def decoded_s(self) -> float:
        """Seconds yielded so far."""
        return self._n_samples / SAMPLE_RATE

    def __iter__(self) -> AudioReader:
        return self

    def __next__(self) -> Samples:
        if self._is_closed:
            raise StopIteration
        raw, self._first = self._first or self._child.read(self._block_bytes), b""
        n_samples = len(raw) // SAMPLE_BYTES
        if n_samples == 0:
            if not self._is_closed:  # closed by another thread while we read: not the file's fault
                self._finish()
            raise StopIteration
        self._n_samples += n_samples
        if self._max_duration_s is not None and self.decoded_s > self._max_duration_s:
            self.close()
            raise _too_long(self._name, self.decoded_s, self._max_duration_s)
        return self._clean(raw, n_samples)

    def close(self) -> None:
        """End ffmpeg and reap it; safe to call twice and from another thread."""
        self._is_closed = True
        self._child.stop()

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_start(self) -> None:
        if not self._first:
            raise _why_no_sound(self._name, self._child, self._child.wait(), self.info)
        said_s, limit_s = self.info.duration_s, self._max_duration_s
        if said_s is None or limit_s is None or said_s <= limit_s:
            return
        if self.info.size_bytes >= said_s * MIN_BYTES_PER_S:
            raise _too_long(self._name, said_s, limit_s)

    def _clean(self, raw: bytes, n_samples: int) -> Samples:
        """Bytes of float32 to samples in -1..1; what is not a number becomes 0 and is counted.

        Clipping is what every 16-bit reader does too (openai/whisper asks ffmpeg for s16le).
        """
        samples = np.frombuffer(raw, dtype="<f4", count=n_samples).astype(np.float32)
        is_number = np.isfinite(samples)
        if not is_number.all():
            self._n_not_numbers += int(n_samples - np.count_nonzero(is_number))
            samples[~is_number] = 0.0
        return np.clip(samples, -1.0, 1.0, out=samples)

    def _finish(self) -> None:
        """The sound has ended: reap ffmpeg and put what went wrong into words."""
        exit_code = self._child.wait()
        self.close()
        if damage := _describe_damage(self._name, self._child, exit_code, self.info, self.decoded_s):
            self.warnings.append(damage)
        if self._n_not_numbers:
            self.warnings.append(
                f"{self._name} held {self._n_not_numbers} samples that are not numbers (NaN or infinite); "
                "they were replaced by silence."
            )
        if self.info.n_audio_tracks > 1:
            self.warnings.append(f"{self._name} has {self.info.n_audio_tracks} audio tracks; the first one was used.")
        logger.info("decode decoded_s=%.2f n_warnings=%d", self.decoded_s, len(self.warnings))


@dataclass(slots=True)
class _Opened:
    """A file that ffmpeg may inherit as its standard input."""

    file: IO[bytes]
    name: str
    size_bytes: int
    head: bytes

    def __enter__(self) -> _Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _open_source(source: Source, *, max_bytes: int | None = None) -> _Opened:
    """Open, measure, look at the first bytes. Bytes go through an unlinked temporary file, so that ffmpeg can seek."""
    if isinstance(source, bytes):
        name, size_bytes = "The recording", len(source)
    else:
        name, size_bytes = source.name, _file_bytes(source)
    if size_bytes == 0:
        raise EmptyAudioError(f"{name} is empty (0 bytes). Choose a file that holds a recording.")
    if max_bytes is not None and size_bytes > max_bytes:
        raise AudioTooLargeError(
            f"{name} has {size_bytes / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB. "
            "Use a compressed format, split it, or raise the limit."
        )
    file = _temporary_file(source) if isinstance(source, bytes) else _open_path(source)
    head = os.pread(file.fileno(), _HEAD_BYTES, 0)
    if _is_playlist(head):
        file.close()
        raise NotAudioError(
            f"{name} is a playlist: it only points at other files, and those are not followed. "
            "Choose the recording itself."
        )
    return _Opened(file, name, size_bytes, head)


def _file_bytes(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        if re.match(r"[a-z]{2,}:/", str(path)):  # Path has made one slash of two
            raise AudioError("Addresses are not followed. Download the recording, and give its file.") from error
        raise AudioError(f"There is no file '{path}' to be read. Check its name and folder.") from error
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"'{path}' is not a file. Give the path of one recording.")
    return status.st_size


def _open_path(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise AudioError(f"'{path}' cannot be opened ({error.strerror}). Check its permissions.") from error


def _temporary_file(data: bytes) -> IO[bytes]:
    try:
        file = tempfile.TemporaryFile(prefix="sotto-")  # noqa: SIM115  (_Opened closes it)
        file.write(data)
        file.seek(0)  # flushes too
    except OSError as error:
        raise DiskFullError(
            f"A temporary file of {len(data) / 1e6:.1f} MB could not be written ({error.strerror}). "
            "Free some space in the temporary folder."
        ) from error
    return file


def _is_playlist(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith(_PLAYLIST_STARTS) or (start.startswith(b"<") and b"<mpd" in start)


def _start(program: str, opened: _Opened, n_bytes: int) -> tuple[Child, bytes]:
    """Run ffmpeg and read the first block; once more with a plain mean if it has no matrix for the channel layout."""
    child = Child(decode_arguments(program), opened.file)
    first = child.read(n_bytes)
    if first:
        return child, first
    child.wait()
    if n_channels := child.words.n_unknown_channels:
        child.stop()
        opened.file.seek(0)
        child = Child(decode_arguments(program, n_unknown_channels=n_channels), opened.file)
        first = child.read(n_bytes)
    return child, first


def _why_no_sound(name: str, child: Child, exit_code: int, info: MediaInfo) -> SottoError:
    """The error for an ffmpeg that ended without a sample."""
    said = " ".join(child.words.last_errors)
    if "No space left on device" in said:
        return DiskFullError(f"There is no space left to read {name}. Free some space in the temporary folder.")
    if exit_code < 0:
        return MachineError(f"ffmpeg was ended by signal {-exit_code} while it read {name}. Try again.")
    if info.n_audio_tracks and child.words.n_errors == 0:
        return EmptyAudioError(f"{name} has a header but no sound in it. Choose a file that holds a recording.")
    if info.n_audio_tracks:
        return NotAudioError(
            f"The sound in {name} ({info.codec or 'unknown codec'}) cannot be decoded. "
            "The file is damaged or protected; convert it to WAV, FLAC or MP3 with another program."
        )
    if info.has_video or info.container:
        return NoAudioTrackError(f"{name} has no audio track. Choose a recording or a video with sound.")
    if "moov atom not found" in said:
        return NotAudioError(
            f"{name} has lost its index: the recording or its download broke off before the end. "
            "Fetch the file again, or repair it with the program that made it."
        )
    return NotAudioError(
        f"{name} is not a recording that can be read. Choose an audio or video file, such as WAV, MP3, M4A or MP4."
    )


def _describe_damage(name: str, child: Child, exit_code: int, info: MediaInfo, decoded_s: float) -> str | None:
    """One sentence when less came out than the header promised, or when ffmpeg complained; else None."""
    if exit_code < 0:
        return f"ffmpeg was ended by signal {-exit_code} after {decoded_s:.1f} s of {name}; the rest is missing."
    is_short = (
        info.duration_s is not None
        and not info.is_estimate
        and not info.has_video  # a picture may go on after the sound
        and info.duration_s - decoded_s > max(MISSING_S, MISSING_SHARE * info.duration_s)
    )
    if is_short:
        return (
            f"{name} should last {info.duration_s:.1f} s, but only {decoded_s:.1f} s could be decoded; "
            "it is damaged or broke off."
        )
    if exit_code != 0 or child.words.n_errors:
        return f"{name} is damaged in places; {decoded_s:.1f} s could be decoded, and some sound may be missing."
    return None


def _too_long(name: str, duration_s: float, limit_s: float) -> AudioTooLargeError:
    return AudioTooLargeError(
        f"{name} lasts {_clock(duration_s)} or more; the limit is {_clock(limit_s)}. Split it, or raise the limit."
    )


def _clock(duration_s: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(duration_s)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
