"""Values in, page text out: pure functions from the program's dataclasses to HTML and widget values. No Gradio here.

Everything that came from a recording, a file name or an error is escaped. Class names belong to style.css.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from transcription.interface import LanguageName, PrecisionStatus, Status
from transcription.transcript import LanguageGuess, LanguageReport, Progress, Segment, Transcript, join_words
from ui import chinese
from ui.texts import say

KIB = 2**10
MIB = 2**20
GIB = 2**30
UNSURE_BELOW = 0.6
"""A best language below this share is shown as unsure."""


# Numbers in words


def clock(seconds: float) -> str:
    """7 -> '0:07', 3723 -> '1:02:03'. Whole seconds, rounded down as players do."""
    whole = max(0, int(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value: float | None) -> str:
    """A measured time: '0.42 s', '12.3 s', '2:05 min'; a dash where it was not measured."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 100 else f"{clock(value)} min"


def size(n_bytes: int | None) -> str:
    """Bytes in binary units, as nvidia-smi counts: '512 MiB', '3.2 GiB'; a dash where there is no reading."""
    if n_bytes is None:
        return "–"
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.1f} GiB"
    return f"{n_bytes / MIB:.0f} MiB" if n_bytes >= MIB or n_bytes == 0 else f"{n_bytes / KIB:.0f} KiB"


def percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


# Building blocks


def notice(sentence: str, kind: str = "note") -> str:
    """One sentence in a box. kind: note, calm or error; an error is announced to screen readers at once."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(sentence)}</div>'


def banner(status: Status, locale: str) -> str:
    """What a user must know about the model before trusting its text; empty for a real checkpoint."""
    if status.banner is None:
        return ""
    sentence = say("banner_demo", locale) if status.is_demo and locale != "en" else status.banner
    marked = re.sub(r"--[a-z-]+", r"<code>\g<0></code>", escape(sentence))  # an option is not broken at its hyphens
    return f'<div class="notice demo" role="note">{marked}</div>'


def hint(name: str, sentence: object) -> str:
    """A static sentence that stays hidden until page.js finds that it applies (class of the same name on the page)."""
    return f'<div class="notice note hint-{name}">{sentence}</div>'


def empty(sentence: object) -> str:
    """A quiet sentence where results will be. A static label keeps its marker for the browser to translate."""
    return f'<p class="empty">{sentence}</p>'


def line(sentence: str) -> str:
    return f'<p class="line">{escape(sentence)}</p>'


def chosen(name: str) -> str:
    return f'<p class="chosen">{escape(name)}</p>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: frozenset[int] = frozenset()) -> str:
    """A table of text cells; numeric columns align right."""

    def cells(values: Sequence[str]) -> str:
        return "".join(
            f"<td{' class=num' if i in numeric else ''}>{escape(value)}</td>" for i, value in enumerate(values)
        )

    return frame(headers, "".join(f"<tr>{cells(row)}</tr>" for row in rows), numeric=numeric)


def frame(headers: Sequence[str], body: str, *, numeric: frozenset[int] = frozenset()) -> str:
    """A table around finished rows; on a narrow page it scrolls inside its own box (reachable by keyboard)."""
    heads = "".join(f"<th{' class=num' if i in numeric else ''}>{escape(text)}</th>" for i, text in enumerate(headers))
    return (
        '<div class="scroll" tabindex="0" role="group"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# A transcript


def segment(item: Segment, locale: str) -> str:
    """One timed row; its time is a button that plays the recording from there (wired in tabs/transcribe.py)."""
    time = clock(item.start_s)
    hear = escape(say("transcribe_hear", locale, time=time))
    return (
        f'<div class="segment"><button type="button" class="hear" data-start="{item.start_s:.2f}" title="{hear}" '
        f'aria-label="{hear}">{time}</button><p lang="{escape(item.language)}" dir="auto">{_words(item)}'
        "</p></div>"
    )


def _words(item: Segment) -> str:
    """The segment's text; each word of it can be clicked where its time is known."""
    texts = [
        f'<span class="word" data-start="{word.start_s:.2f}" title="{clock(word.start_s)}">{escape(word.text)}</span>'
        for word in item.words
    ]
    return join_words(texts, item.language) if texts else escape(item.text.strip())


def segments(items: Iterable[Segment], locale: str) -> str:
    return "".join(segment(item, locale) for item in items)


def draft(text: str) -> str:
    """The words of the window that is being decoded: paler, for they may still change."""
    return f'<p class="draft" dir="auto">{escape(text)}</p>' if text else ""


def progress(state: Progress, locale: str) -> str:
    """A bar with its percentage and the time left; without a known length, the seconds done."""
    if not state.total_s:
        line = say("transcribe_progress_open", locale, done=clock(state.done_s))
        return f'<div class="progress open" role="progressbar"><i></i></div><p class="line">{escape(line)}</p>'
    share = min(1.0, state.done_s / state.total_s)
    parts = [
        percent(share),
        say("transcribe_progress", locale, done=clock(state.done_s), total=clock(state.total_s)),
    ]
    if state.eta_s is not None:
        parts.append(say("transcribe_eta", locale, eta=seconds(state.eta_s)))
    return (
        f'<div class="progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="line">{escape(" · ".join(parts))}</p>'
    )


def waiting(sentence: str) -> str:
    """A bar of unknown length with a sentence, before the first window is finished."""
    return f'<div class="progress open" role="progressbar"><i></i></div><p class="line">{escape(sentence)}</p>'


def summary(transcript: Transcript, names: dict[str, str], locale: str) -> str:
    """What the finished transcription cost and covered."""
    head = say("transcribe_done", locale, elapsed=seconds(transcript.elapsed_s))
    return f'<div class="summary"><b>{escape(head)}</b>{_facts(transcript, names, locale)}</div>' + notes(
        transcript.warnings, locale
    )


def kept(transcript: Transcript, names: dict[str, str], sentence: str, kind: str, locale: str) -> str:
    """A transcription that ended early: why, and what there is of it."""
    facts = f'<div class="summary">{_facts(transcript, names, locale)}</div>' if transcript.segments else ""
    return notice(sentence, kind) + facts + notes(transcript.warnings, locale)


def _facts(transcript: Transcript, names: dict[str, str], locale: str) -> str:
    spoken = names.get(transcript.language, transcript.language)
    if transcript.language_probability is not None:
        spoken = f"{spoken} ({percent(transcript.language_probability)})"
    facts = [
        say("transcribe_factor", locale, factor=f"{transcript.real_time_factor:.1f}"),
        say(
            "transcribe_coverage",
            locale,
            transcribed=seconds(transcript.transcribed_s),
            speech=seconds(transcript.speech_s),
            duration=seconds(transcript.duration_s),
        ),
    ]
    if transcript.language:
        facts.append(say("transcribe_language", locale, language=spoken))
    ran = {"precision": transcript.precision, "model": transcript.model, "engine": transcript.engine}
    facts.append(say("transcribe_ran", locale, **ran))
    return "".join(f"<span>{escape(fact)}</span>" for fact in facts)


def notes(warnings: Sequence[str], locale: str) -> str:
    """What the user should know about the result; nothing where there is nothing to say."""
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    head = escape(say("transcribe_warnings", locale))
    return f'<div class="notice note" role="status"><b>{head}</b><ul>{items}</ul></div>'


def subtitles(items: Iterable[Segment]) -> list[dict[str, Any]]:
    """Cues for gr.Audio's player."""
    return [{"text": item.text.strip(), "timestamp": [item.start_s, item.end_s]} for item in items if item.text.strip()]


# Languages


def language_names(languages: Iterable[LanguageName], locale: str) -> dict[str, str]:
    """Code -> name in the page's language."""
    names = chinese.LANGUAGES if locale == "zh" else {}
    return {row.code: names.get(row.code, row.name) for row in languages}


def confidences(guesses: Iterable[LanguageGuess], names: dict[str, str]) -> dict[str, float]:
    """For gr.Label: name -> probability."""
    return {names.get(guess.code, guess.code): guess.probability for guess in guesses}


def language_summary(report: LanguageReport, names: dict[str, str], locale: str) -> str:
    """The winner in one sentence, and a calm warning where the windows do not support it."""
    if not report.guesses:
        return notice(say("language_none", locale), "calm")
    best = report.best
    key = "language_summary" if len(report.windows) > 1 else "language_summary_one"
    sentence = say(
        key, locale, name=names.get(best.code, best.code), percent=percent(best.probability), n=len(report.windows)
    )
    agree = all(window.guesses and window.guesses[0].code == best.code for window in report.windows)
    unsure = "" if agree and best.probability >= UNSURE_BELOW else notice(say("language_unsure", locale), "note")
    return f'<div class="summary"><b>{escape(sentence)}</b></div>{unsure}'


def language_windows(report: LanguageReport, names: dict[str, str], locale: str) -> str:
    """One row per window: its time, its best languages, and a bar of the best one's probability."""
    rows = []
    for window in report.windows:
        time = f"{clock(window.start_s)}–{clock(window.end_s)}"
        best, *others = window.guesses
        other = ", ".join(
            f"<span>{escape(names.get(g.code, g.code))} {percent(g.probability)}</span>" for g in others[:2]
        )
        rows.append(
            f"<tr><td class=time>{time}</td><td><b>{escape(names.get(best.code, best.code))}</b></td>"
            f'<td class="share"><span class="bar"><i style="width:{100 * best.probability:.1f}%"></i></span>'
            f"{percent(best.probability)}</td><td class=dim>{other}</td></tr>"
        )
    if not rows:
        return ""
    headers = (say("language_window", locale), say("language_best", locale), "", say("language_second", locale))
    return frame(headers, "".join(rows))


# Menus: (shown, value) pairs, in the page's language


def precision_choices(rows: Iterable[PrecisionStatus], default: str, locale: str) -> list[tuple[str, str]]:
    """The table's rows after the default; those this machine cannot run say so."""
    choices = [(say("choice_default_precision", locale, name=default), "")]
    for row in rows:
        text = row.label if row.unavailable is None else say("choice_unavailable", locale, label=row.label)
        choices.append((text, row.name))
    return choices


def language_choices(rows: Iterable[LanguageName], locale: str) -> list[tuple[str, str]]:
    names = language_names(rows, locale)
    named = sorted(((name, code) for code, name in names.items()), key=lambda pair: pair[0].lower())
    return [(say("choice_auto_language", locale), ""), *named]


def task_choices(can_translate: bool, locale: str) -> list[tuple[str, str]]:
    tasks = ("transcribe", "translate") if can_translate else ("transcribe",)
    return [(say(f"choice_{task}", locale), task) for task in tasks]


def engine_choices(locale: str) -> list[tuple[str, str]]:
    return [(say("choice_default", locale), ""), *((name, name) for name in ("auto", "fast", "reference"))]


def window_choices(locale: str) -> list[tuple[str, str]]:
    return [(say(f"choice_{mode}", locale), mode) for mode in ("vad", "fixed")]
