"""The page. Whatever is imported of it loads Gradio first, and here.

Whenever Gradio is imported it writes a file of type hints beside each of its components, for which it parses its own
source: half of the time that its import takes. It leaves alone a component whose source cannot be found.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _without_type_hints() -> Iterator[None]:
    find = inspect.getfile

    def find_others(thing: Any) -> str:
        if inspect.isclass(thing) and thing.__module__.startswith("gradio."):
            raise OSError("Its type hints are not wanted.")
        return find(thing)

    inspect.getfile = find_others  # type: ignore[assignment]  # its list of what has a file is long
    try:
        yield
    finally:
        inspect.getfile = find


with _without_type_hints():
    import gradio as gradio
