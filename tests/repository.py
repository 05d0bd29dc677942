"""What the project consists of, for tests that read it as a whole."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def project_files() -> tuple[Path, ...]:
    """All files of the project, relative to its folder; new ones that are not committed yet included."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        return tuple(sorted(Path(name) for name in names if name and (ROOT / name).is_file()))
    found = []  # an unpacked archive
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names]
    return tuple(sorted(found))
