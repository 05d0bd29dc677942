"""How the page looks, where a test of what it does notices nothing: endless names on a phone, the keyboard's ring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.browser.steps import open_card, open_tab
from tests.measured import measured_row
from transcription.run_card import RunCard, to_json
from transcription.transcript import Segment

UNBROKEN = Segment(0.0, 1.0, "Q" * 300, "en", 0, 0.0, -0.1, 1.0, 0.0)
BEYOND_JS = """
Array.from(document.querySelectorAll('#tab-compare *')).filter((one) =>
  !one.closest('.scroll') && !one.closest('svg') && one.getBoundingClientRect().right > innerWidth + 1).length
"""


def test_a_card_with_endless_names_fits_a_phone_and_shows_two_precisions_at_a_time(page: Any, tmp_path: Path) -> None:
    rows = [measured_row(name, [UNBROKEN], reference="R" * 300) for name in ("fp32", "bf16", "int8")]
    long = tuple(replace(row, proof="P" * 300, warnings=("W" * 300,)) for row in rows)
    card = tmp_path / "card.json"
    card.write_text(to_json(RunCard("2026-11-20", long, "recording_" * 40 + ".wav")), encoding="utf-8")
    page.set_viewport_size({"width": 390, "height": 844})
    open_tab(page, "compare")
    open_card(page, card)
    page.locator("#compare-verdicts", has_text="recording_").wait_for()
    assert page.evaluate(BEYOND_JS) == 0
    second = page.locator("#compare-figures .compared thead th").nth(2).bounding_box()
    assert second["x"] + second["width"] <= 390
    page.click("#compare-close")
    page.locator("#compare-figures .compared").wait_for(state="detached")


def test_the_field_that_has_the_keyboard_has_a_ring(page: Any) -> None:
    open_tab(page, "compare")
    kinds = ("input[type=checkbox]", "textarea", "input[type=range]", "input[type=radio]", "#compare-language input")
    for kind in kinds:
        field = page.locator(f"#tab-compare {kind}").first
        field.focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        style = page.evaluate("(() => { const one = getComputedStyle(document.activeElement); "
                              "return [one.outlineStyle, one.outlineWidth]; })()")  # fmt: skip
        assert style == ["solid", "2px"], kind
    page.keyboard.press("Escape")
