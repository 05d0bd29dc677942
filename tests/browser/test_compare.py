"""Compare in a browser: two precisions measured on the example, their words, verdict, files, a card opened again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.test_page import open_tab
from tests.fakes import measured_row
from transcription.run_card import RunCard, load_card, to_json


def names_of(page: Any) -> list[str]:
    heads = page.locator("#compare-figures thead th")
    return [heads.nth(i).inner_text() for i in range(1, heads.count())]


def test_two_precisions_are_measured_told_apart_and_kept(page: Any, tmp_path: Path) -> None:
    page.set_default_timeout(200_000)  # two processes that load torch, on two slow cores
    open_tab(page, "compare")
    page.click("#compare-go")
    page.locator("#compare-status .notice", has_text="two precisions").wait_for()
    for name in ("fp32", "bnb-nf4"):
        page.locator("#compare-precisions label", has_text=name).first.click()
    page.click("#compare-go")
    page.locator("#compare-status", has_text="fp32: ").wait_for()
    page.locator("#compare-figures thead th", has_text="fp32").wait_for()
    page.locator("#compare-status", has_text="bnb-nf4: ").wait_for()
    assert names_of(page) == ["fp32"], "the first row is there before the second is measured"
    page.locator("#compare-status", has_text="Measured on this machine").wait_for()

    assert names_of(page) == ["fp32", "bnb-nf4"]
    assert "agreement with fp32, not accuracy" in page.inner_text("#compare-figures")
    assert "less memory than those of fp32" in page.inner_text("#compare-verdicts")
    assert page.locator("#compare-charts svg, #compare-charts canvas").count() == 2
    words = page.locator("#compare-words-bnb-nf4 .highlighted")
    assert words.count() >= 1, "the 4-bit text differs from fp32's"
    assert "rgba(0, 0, 0, 0)" not in words.first.evaluate("one => getComputedStyle(one).backgroundColor")
    words.first.click()
    page.wait_for_function("document.querySelector('#player #time').innerText !== '0:00'")

    with page.expect_download() as download:
        page.click("#compare-card")
    card = tmp_path / "card.json"
    download.value.save_as(card)
    assert [row.precision for row in load_card(card).rows] == ["fp32", "bnb-nf4"]
    assert json.loads(card.read_text())["rows"][1]["verdict"]
    with page.expect_download() as download:
        page.click("#compare-csv")
    assert len(list(csv.reader(Path(download.value.path()).read_text().splitlines()))) == 3

    with page.expect_file_chooser() as chooser:
        page.click("#compare-open")
    chooser.value.set_files(card)
    page.locator("#compare-status", has_text="2 rows of").wait_for()
    assert len(names_of(page)) == 4 and "CPU" in names_of(page)[2]


@pytest.mark.timeout(1200)
def test_calibrating_with_the_button_makes_int8_static_run(page: Any, tmp_path: Path) -> None:
    page.set_default_timeout(600_000)  # every example is decoded twice, on two slow cores
    open_tab(page, "compare")
    page.click("#calibrate button")  # the accordion's head
    page.click("#calibrate-go")
    page.locator("#calibrate-status", has_text="Listening to ").wait_for()
    page.locator("#calibrate-status", has_text="Calibrated on ").wait_for()
    for language in ("en", "es", "fr", "de", "ru", "zh"):
        assert f" {language}" in page.inner_text("#calibrate-status")
    with page.expect_download() as download:
        page.click("#calibrate-report")
    report = tmp_path / "report.html"
    download.value.save_as(report)
    for name in ("int8-static", "int8-dynamic"):
        page.locator("#compare-precisions label", has_text=name).first.click()
    page.click("#compare-go")
    page.locator("#compare-figures thead th", has_text="int8-static").wait_for()
    page.locator("#compare-status", has_text="Measured on this machine").wait_for()
    assert page.locator("#compare-figures .failure").count() == 0
    assert "76 Int8Linear int8" in page.inner_text("#compare-figures")

    opened = page.context.new_page()
    opened.goto(report.as_uri())
    assert "Languages heard: " in opened.inner_text("body")
    bars = opened.locator("tr td div")
    assert bars.count() == 76, "a bar for each linear layer"
    widths = [bars.nth(i).bounding_box()["width"] for i in range(76)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 3 * widths[-1] > 0
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_card_opened_in_a_new_page_is_shown_with_its_charts(page: Any, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text(to_json(RunCard("2026-11-20", (measured_row("fp32"), measured_row("bf16")))), encoding="utf-8")
    open_tab(page, "compare")
    with page.expect_file_chooser() as chooser:
        page.click("#compare-open")
    chooser.value.set_files(card)
    page.locator("#compare-figures thead th", has_text="bf16 (2026-11-20").wait_for()
    page.locator("#compare-charts svg, #compare-charts canvas").nth(1).wait_for()


def test_a_file_that_is_no_run_card_is_refused_in_a_sentence(page: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    open_tab(page, "compare")
    with page.expect_file_chooser() as chooser:
        page.click("#compare-open")
    chooser.value.set_files(other)
    page.locator("#compare-status .notice.error", has_text="not a run card").wait_for()
