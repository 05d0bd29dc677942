"""The door every handler goes through: an exception becomes a sentence on the page, and the page goes on.

A SottoError carries its own sentence. Anything else is a bug of ours: its traceback is logged under an id and the user
gets a sentence with that id, never the traceback.
"""

from __future__ import annotations

import logging
import secrets

from errors import SottoError
from ui.texts import say

logger = logging.getLogger(__name__)


def explain(error: Exception, locale: str) -> str:
    """One sentence for the user. An unexpected error is logged with its traceback under the id in the sentence."""
    if isinstance(error, SottoError):
        logger.info("event=refused error=%s", type(error).__name__)
        return str(error)
    report_id = secrets.token_hex(4)
    logger.error("event=unexpected_error id=%s", report_id, exc_info=error)
    return say("error_unexpected", locale, id=report_id)
