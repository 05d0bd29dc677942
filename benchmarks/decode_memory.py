"""Does a ten-hour recording need more memory than a one-minute one? python -m benchmarks.decode_memory

Makes its own recordings (a tone under noise, encoded once and repeated), decodes them as the product does, and samples
the resident memory of this process and of its ffmpeg every 20 ms. "index last" is M4A with its index behind the sound,
as phones write it: ffmpeg keeps that index in memory, about 3 MiB per hour. --windows also finds speech and cuts
windows, which takes three minutes more. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from audio.child import find_ffmpeg
from audio.decode import decode_blocks
from audio.windows import cut_windows

PIECE_S = 60  # encoded once
LENGTHS_S = {"1 min": 60, "1 h": 3600, "10 h": 36_000}
SAMPLE_EVERY_S = 0.02
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One recording decoded once. Memory is the peak while decoding."""

    kind: str
    length: str
    file_mib: float
    decoded_s: float
    own_growth_mib: float
    """Of this process, above what it held before."""
    ffmpeg_mib: float
    wall_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ffmpeg", default=None, help="the program to measure (default: the one the product would use)"
    )
    parser.add_argument("--windows", action="store_true", help="also find speech and cut windows")
    options = parser.parse_args()
    program = options.ffmpeg or find_ffmpeg()
    with tempfile.TemporaryDirectory(prefix="sotto-decode-") as folder:
        makers: dict[str, Callable[[int], Path]] = {
            "MP3": lambda seconds: make_mp3(program, Path(folder), seconds),
            "M4A, index last": lambda seconds: make_m4a(program, Path(folder), seconds),
        }
        measure(makers["MP3"](PIECE_S), "warm-up", "", program, windows=options.windows)
        rows = []
        for kind, make in makers.items():
            for length, seconds in LENGTHS_S.items():
                path = make(seconds)
                rows.append(measure(path, kind, length, program, windows=options.windows))
                path.unlink()
    report(rows, program, windows=options.windows)


def make_mp3(program: str, folder: Path, seconds: int) -> Path:
    """MP3 frames stand alone, so a repeated file is a longer recording."""
    return repeat(encode(program, folder / "piece.mp3", "libmp3lame"), folder / "long.mp3", seconds)


def make_m4a(program: str, folder: Path, seconds: int) -> Path:
    """AAC frames stand alone too; copied into M4A, the index is written last."""
    stream = repeat(encode(program, folder / "piece.aac", "aac"), folder / "long.aac", seconds)
    path = folder / "long.m4a"
    run(program, "-i", str(stream), "-c", "copy", str(path))
    stream.unlink()
    return path


def encode(program: str, path: Path, codec: str) -> Path:
    sound = f"aevalsrc=0.3*sin(880*t)+0.05*random(0):s=16000:d={PIECE_S}"
    if not path.exists():
        run(program, "-f", "lavfi", "-i", sound, "-c:a", codec, "-b:a", "32k", "-write_xing", "0", str(path))
    return path


def repeat(piece: Path, path: Path, seconds: int) -> Path:
    data = piece.read_bytes()
    with path.open("wb") as file:
        for _ in range(seconds // PIECE_S):
            file.write(data)
    return path


def run(program: str, *words: str) -> None:
    subprocess.run([program, "-v", "error", "-nostdin", "-y", *words], check=True)


def measure(path: Path, kind: str, length: str, program: str, *, windows: bool) -> Row:
    """Decode path once, as the product does."""
    watcher = MemoryWatcher()
    started = time.perf_counter()
    with watcher, decode_blocks(path, ffmpeg=program) as reader:
        for _ in cut_windows(reader) if windows else reader:
            pass
    return Row(
        kind=kind,
        length=length,
        file_mib=path.stat().st_size / MIB,
        decoded_s=reader.decoded_s,
        own_growth_mib=(watcher.own_peak - watcher.own_start) / MIB,
        ffmpeg_mib=watcher.child_peak / MIB,
        wall_s=time.perf_counter() - started,
    )


class MemoryWatcher:
    """Peaks of resident memory, in bytes, of this process and of its children together."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.own_start = self.own_peak = int(self._process.memory_info().rss)
        self.child_peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_EVERY_S):
            self.own_peak = max(self.own_peak, int(self._process.memory_info().rss))
            self.child_peak = max(self.child_peak, sum(map(resident_bytes, self._process.children())))


def resident_bytes(process: psutil.Process) -> int:
    """0 for a process that has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def report(rows: list[Row], program: str, *, windows: bool) -> None:
    print(f"ffmpeg: {program}    path: decode{' and windows' if windows else ''}")
    print(f"{'recording':<16} {'length':>6} {'file MiB':>9} {'own growth MiB':>15} {'ffmpeg MiB':>11} {'seconds':>8}")
    for row in rows:
        print(
            f"{row.kind:<16} {row.length:>6} {row.file_mib:>9.1f} {row.own_growth_mib:>15.1f} "
            f"{row.ffmpeg_mib:>11.1f} {row.wall_s:>8.1f}"
        )
    summary = {
        "benchmark": "decode_memory",
        "ffmpeg": program,
        "windows": windows,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
