"""What a load and a window take of a processor's memory, against what was foretold: in a process of its own, as the
heap of this one holds what other tests left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import make_checkpoint
from tests.conftest import ROOT

MEASURE = """
import json, sys, threading, time
from pathlib import Path
from model_loader import loader
from model_loader.device import describe_device
from model_loader.fit import predict
from model_loader.header import read_folder
from model_loader.precision import PRECISIONS

def held():  # anonymous pages: a checkpoint's mapped file is not this program's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not is_over:
        peaks.append(held())
        time.sleep(0.001)

demo, folder, row = sys.argv[1:]
engine = loader.load_engine(demo, row, engine="fast", device="cpu")  # imports, threads, libraries' own buffers
engine.close()
del engine
before, peaks, is_over = held(), [], False
watcher = threading.Thread(target=watch)
watcher.start()
made = loader.load_engine(folder, row, engine="fast", device="cpu", warm_up=False)
loaded, count = max(peaks), len(peaks)
loader._warm_up(made)
is_over = True
watcher.join()
foretold = predict(read_folder(Path(folder)), PRECISIONS[row], 1, device=describe_device("cpu"), engine="fast")
print(json.dumps([loaded - before, foretold.load_peak_bytes, max(peaks[count:]) - before, foretold.peak_bytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_processor_holds_about_what_was_foretold(tmp_path: Path) -> None:
    """int8-dynamic reads all weights at 32 bits, converts them one by one and takes them apart once more."""
    tiny = make_checkpoint("tiny", tmp_path / "tiny")  # large enough to be told from the libraries' own buffers
    command = [sys.executable, "-c", MEASURE, "demo", str(tiny), "int8-dynamic"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    load, foretold_load, work, foretold_work = json.loads(found.stdout.splitlines()[-1])
    assert load < foretold_load + 24 * 2**20, "what was taken apart went back at once"
    assert 0.6 * foretold_work < work < 1.25 * foretold_work
