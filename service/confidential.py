"""What people write stays out of the log, unless it is asked for.

Prompts, corrections and answers are logged by the logger `mend.prompts` alone. The messages of unexpected errors may
quote them, so of such errors the log has the types and the lines of code (see `service.logs`).
"""

from __future__ import annotations

import logging
import traceback

logger = logging.getLogger("mend.prompts")
logger.setLevel(logging.INFO)
LEFT_OUT = "(MEND_LOG_PROMPTS=true logs what it says)"
_wanted = False  # not a state of the logger, which whoever configures logging may reset


def log_prompts(wanted: bool) -> None:
    """Whether they are to be logged from now on, in this process."""
    global _wanted
    _wanted = wanted


def note_texts(what: str, **texts: object) -> None:
    """Log what somebody wrote or was answered, if that is asked for."""
    if _wanted:
        logger.info(what, extra=texts)


def told(error: BaseException) -> str:
    """An unexpected error for the log: with its message if texts may be logged, without it if not."""
    if _wanted:
        return "".join(traceback.format_exception(error)).rstrip()
    parts: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_name(type(cause))}: {LEFT_OUT}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n\nafter\n\n".join(parts)


def _name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
