"""One ffmpeg process: which program, which arguments, what it says. decode.py gives it files and gets bytes.

Why a child process, how it may read its standard input, and what it may not open: decode.py's header.
Not done here: opening files, judging what went wrong, samples.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import IO, Final

from audio.constants import SAMPLE_RATE
from errors import MachineError

_LINE_BYTES: Final = 2048  # longer lines are read in pieces
_KEPT_HEADER_LINES: Final = 500
_KEPT_ERRORS: Final = 20
_PATIENCE_S: Final = 30.0  # for last words after the end; only a stopped machine takes longer

# "[mov,mp4 @ 0x55aa] [error] moov atom not found": contexts, level, text.
_LOG_LINE = re.compile(r"^(?:\[[^\]]*@ 0x[0-9a-f]+\] )*\[(\w+)\] (.*)$")
_INPUT = re.compile(r"^Input #0, ([^ ]+), from ")
# Two blanks exactly: a tag that calls itself "Duration" is printed with four.
_DURATION = re.compile(r"^  Duration: (\d+):(\d\d):(\d\d(?:\.\d+)?)")
_STREAM = re.compile(r"^ {2,4}Stream #0:\d+(?:\[\w+\])?(?:\(\w+\))?: (Audio|Video): (.*)$")
_AUDIO = re.compile(r"^(\w+).*?, (\d+) Hz, ([^,]+)")
_UNKNOWN_LAYOUT = re.compile(r"Rematrix is needed between (\d+) channels")
_CUT_PACKET = "corrupt input packet"
_NO_LENGTH = "Ignoring maximum wav data size"  # a WAV written to a pipe: its last packet always counts as cut
# ffmpeg's cache says this at every seek, although nothing is wrong (libavformat/cache.c).
_HARMLESS = "Inner protocol failed to seekback end"


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file's header says of itself; it may be wrong."""

    size_bytes: int
    container: str = ""
    """ffmpeg's name, for example wav or mov,mp4,m4a,3gp,3g2,mj2; empty when it recognised nothing."""
    duration_s: float | None = None
    """None when the header does not say (live recordings, some streams)."""
    is_estimate: bool = False
    """The duration was computed from the bit rate."""
    codec: str = ""
    sample_rate: int = 0
    channels: str = ""
    """ffmpeg's words: mono, stereo, 5.1, 9 channels."""
    n_audio_tracks: int = 0
    has_video: bool = False
    """A moving picture; the cover of an album does not count."""


def find_ffmpeg() -> str:
    """Path of an ffmpeg program. Raises MachineError if there is none.

    The system's if it can seek in its standard input (version 6 and newer), else the one in the imageio-ffmpeg wheel,
    else an older one of the system's, which needs a temporary file as large as the recording.
    """
    system = shutil.which("ffmpeg")
    if system and can_seek(system):
        return system
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        if system:
            return system
        raise MachineError(
            "No ffmpeg was found, and recordings cannot be read without it. "
            "Install the system package 'ffmpeg', or the Python package 'imageio-ffmpeg'."
        ) from error


def probe_arguments(program: str) -> list[str]:
    """Arguments that make ffmpeg describe its standard input and end."""
    import ffmpeg

    return [program, *_QUIET, *ffmpeg.get_args(_input(program)["a:0"].output("-", format="null", t=0))]


def decode_arguments(program: str, *, n_unknown_channels: int = 0) -> list[str]:
    """Arguments that turn standard input into float32 mono 16 kHz on standard output.

    n_unknown_channels: for a layout that ffmpeg has no mixing matrix for (9 channels), how many to average; else 0.
    """
    import ffmpeg

    # async, first_pts: gaps in the time stamps, and a track that starts late, become silence.
    mix = f"aresample={SAMPLE_RATE}:async=1:first_pts=0:rematrix_maxval=1"
    if n_unknown_channels:
        mix = f"pan=mono|c0={'+'.join(f'{1 / n_unknown_channels:.6f}*c{i}' for i in range(n_unknown_channels))},{mix}"
    output = _input(program)["a:0"].output(
        "pipe:1", format="f32le", acodec="pcm_f32le", ac=1, ar=SAMPLE_RATE, af=mix, threads=1
    )
    return [program, *_QUIET, *ffmpeg.get_args(output)]


# level: every line says how serious it is. info: the header is printed.
_QUIET: Final = ("-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info")


def _input(program: str):  # type: ignore[no-untyped-def]  # ffmpeg-python has no types
    import ffmpeg

    # vn, sn, dn: pictures and subtitles are skipped instead of read. One thread is quick enough and keeps memory small.
    return ffmpeg.input(**input_options(program), vn=None, sn=None, dn=None, threads=1)


def input_options(program: str) -> dict[str, str | int]:
    """How this ffmpeg reads its standard input; see decode.py's header."""
    if can_seek(program):
        return {"filename": "fd:", "protocol_whitelist": "fd"}
    # read_ahead_limit: look for an index however far away it is.
    return {"filename": "cache:pipe:0", "protocol_whitelist": "cache,pipe", "read_ahead_limit": -1}


@functools.lru_cache(maxsize=8)
def can_seek(program: str) -> bool:
    """Whether this ffmpeg has the protocol fd:, which seeks in a file given as standard input."""
    try:
        done = subprocess.run(
            [program, "-hide_banner", "-protocols"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _does_not_start(program, error) from error
    return b"fd" in done.stdout.split()


def _does_not_start(program: str, error: Exception) -> MachineError:
    return MachineError(f"ffmpeg at {program} does not start ({error}). Install ffmpeg again.")


class Child:
    """ffmpeg at work: sound on standard output, words on standard error, drained by a thread so that neither blocks.

    stdin: an open file, positioned at its start; ffmpeg inherits it. Raises MachineError if the program does not start.
    Dropping the object, or the end of our process, ends ffmpeg too.
    """

    def __init__(self, arguments: list[str], stdin: IO[bytes]) -> None:
        try:
            self._process = subprocess.Popen(
                arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise _does_not_start(arguments[0], error) from error
        assert self._process.stdout is not None and self._process.stderr is not None
        self._sound = self._process.stdout
        self._reading = threading.Lock()
        self.words = Words()
        # The thread must not hold self, or a dropped reader would never be collected.
        self._thread = threading.Thread(
            target=self.words.listen, args=(self._process.stderr,), name="ffmpeg-words", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._process)

    def read(self, n_bytes: int) -> bytes:
        """n_bytes of sound; fewer at the end or after stop()."""
        parts: list[bytes] = []
        with self._reading:
            while n_bytes and not self._sound.closed:
                part = self._sound.read(n_bytes)
                if not part:
                    break
                parts.append(part)
                n_bytes -= len(part)
        return b"".join(parts)

    def wait(self) -> int:
        """Exit code of an ffmpeg that has said and given everything."""
        exit_code = self._process.wait()
        self._thread.join(timeout=_PATIENCE_S)
        return exit_code

    def stop(self) -> None:
        """End ffmpeg, reap it, close the pipes; safe to call twice and while another thread reads."""
        self._end()
        self._thread.join(timeout=_PATIENCE_S)
        with self._reading:  # a reader in another thread has met the end of the pipe by now
            self._sound.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class Words:
    """What ffmpeg said: a bounded number of lines, however many a damaged file provokes."""

    def __init__(self) -> None:
        self.n_errors = 0
        self.last_errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self.n_unknown_channels = 0
        self._has_length = True
        self._header: list[str] = []
        self._header_is_over = threading.Event()

    def listen(self, stream: IO[bytes]) -> None:
        """Read to the end; runs in the thread."""
        with stream:
            for raw in iter(lambda: stream.readline(_LINE_BYTES), b""):
                self._take(raw.decode(errors="replace").rstrip("\r\n"))
        self._header_is_over.set()

    def info(self, size_bytes: int) -> MediaInfo:
        """The header in order. Waits until ffmpeg has told all of it; the first sound comes after."""
        self._header_is_over.wait(timeout=_PATIENCE_S)
        return parse_header(self._header, size_bytes)

    def _take(self, line: str) -> None:
        match = _LOG_LINE.match(line)
        if match is None:
            return
        level, text = match.groups()
        if text.startswith("Output #0"):
            self._header_is_over.set()
        if not self._header_is_over.is_set() and len(self._header) < _KEPT_HEADER_LINES:
            self._header.append(text)
        if _NO_LENGTH in text:
            self._has_length = False
        is_error = level in ("error", "fatal", "panic") and _HARMLESS not in text
        if is_error or (_CUT_PACKET in text and self._has_length):
            self.n_errors += 1
            self.last_errors.append(text.strip())
            if unknown := _UNKNOWN_LAYOUT.search(text):
                self.n_unknown_channels = int(unknown[1])


def parse_header(lines: list[str], size_bytes: int) -> MediaInfo:
    """ffmpeg's description of input 0, as the lines after their level, to values. Unknown lines are skipped."""
    container, duration_s = "", None
    sounds: list[str] = []
    has_video = is_estimate = False
    for line in lines:
        if line.startswith("Stream mapping"):
            break
        is_estimate |= line.startswith("Estimating duration from bitrate")
        if match := _INPUT.match(line):
            container = match[1]
        elif match := _DURATION.match(line):
            duration_s = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
        elif match := _STREAM.match(line):
            if match[1] == "Audio":
                sounds.append(match[2])
            else:
                has_video |= "(attached pic)" not in match[2]
    details = _AUDIO.match(sounds[0]) if sounds else None
    return MediaInfo(
        size_bytes=size_bytes,
        container=container,
        duration_s=duration_s,
        is_estimate=is_estimate,
        codec=details[1] if details else "",
        sample_rate=int(details[2]) if details else 0,
        channels=details[3].strip() if details else "",
        n_audio_tracks=len(sounds),
        has_video=has_video,
    )
