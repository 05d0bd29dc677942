"""Python's garbage collector, told what a program of large libraries needs. Importing this tells the first part.

Python looks for garbage after every 700 new objects; PyTorch, transformers and Gradio bring a million that stay.
Looking seldom takes a fourth off a start (12.4 to 9.3 s of a processor). What must be found at once, a closed engine's
memory, is collected explicitly (model_loader/engine.py, release); that search takes half a second unless it is told
what stays.
"""

from __future__ import annotations

import gc

gc.set_threshold(200_000, 20, 100)


def keep_libraries() -> None:
    """What is in memory now stays there: searches leave it out. For after the large imports, before any engine."""
    gc.freeze()
