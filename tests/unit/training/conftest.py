"""The speech synthesisers, or a loud skip."""

from __future__ import annotations

import os

import pytest

from errors import MachineError
from training.synthesis import Delivery, Synthesizer
from training.units import parse_units


@pytest.fixture(scope="session")
def synthesizer() -> Synthesizer:
    """eSpeak NG and Flite. Where they are not installed the tests that need them skip, but never in CI."""
    try:
        programs = Synthesizer()
        programs.speak(parse_units("Hello there.", "en"), Delivery("flite:slt"))
    except MachineError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"SPEECH SYNTHESIS IS NOT TESTED: {error}")
    return programs
