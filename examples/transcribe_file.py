"""Transcribe a recording with a few lines of Python: `python examples/transcribe_file.py [RECORDING] [--model MODEL]`.

Without arguments it transcribes examples/town-walk.flac. Prints each piece of text with its time as soon as its window
is finished. The same two classes carry the page and the command line.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what is said in a recording.")
    parser.add_argument("recording", type=Path, nargs="?", default=ROOT / "examples" / "town-walk.flac")
    parser.add_argument("--model", default="auto", help="demo, a folder or a Hub name (default: auto)")
    parser.add_argument("--precision", default="auto", help="see python app.py precisions (default: auto)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # so that the packages are found from any folder
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from errors import SottoError

    try:
        transcribe(arguments.recording, arguments.model, arguments.precision)
    except SottoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def transcribe(recording: Path, model: str, precision: str) -> None:
    from model_loader.device import describe_device
    from model_loader.pool import EnginePool
    from transcription.options import TranscribeOptions
    from transcription.pipeline import LocalTranscriber

    pool = EnginePool(warm_up=False)
    transcriber = LocalTranscriber(pool, model=model, precision=precision, device=describe_device("auto"))
    try:
        run = transcriber.transcribe(recording, TranscribeOptions())
        for segment in run:
            sys.stdout.write(f"{segment.start_s:7.2f} {segment.end_s:7.2f}  {segment.text.strip()}\n")
            sys.stdout.flush()
        for warning in run.warnings:
            sys.stderr.write(f"{warning}\n")
    finally:
        transcriber.close()


if __name__ == "__main__":
    raise SystemExit(main())
