"""The door every handler goes through: an exception becomes a sentence on the page, and the page goes on.

A SottoError carries its own sentence. Anything else is a bug of ours: its traceback is logged under an id and the user
gets a sentence with that id, never the traceback.
"""

from __future__ import annotations

import logging
import secrets

from errors import SottoError
from ui import chinese
from ui.texts import say

logger = logging.getLogger(__name__)


def explain(error: Exception, locale: str) -> str:
    """One sentence for the user. An unexpected error is logged with its traceback under the id in the sentence."""
    if isinstance(error, SottoError):
        logger.info("event=refused error=%s", type(error).__name__)
        return in_words(type(error), str(error), locale)
    report_id = secrets.token_hex(4)
    logger.error("event=unexpected_error id=%s", report_id, exc_info=error)
    return say("error_unexpected", locale, id=report_id)


def in_words(kind: type[SottoError], sentence: str, locale: str) -> str:
    """An error's sentence for the page: as it is, or after its kind in Chinese."""
    if locale != "zh":
        return sentence
    known = next(one.__name__ for one in kind.__mro__ if one.__name__ in chinese.ERRORS)
    return f"{chinese.ERRORS[known]}（{sentence}）"
