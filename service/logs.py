"""How the process logs: one line per event on stderr, as text for people or as JSON for machines.

Flow: every logger of the standard library, ours and those of libraries -> context of the request, fields given as
`extra`, time in UTC -> a line. What is not logged by a logger (warnings, what ends a thread) is made to be.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Literal, TextIO

from opentelemetry import trace
from structlog.contextvars import merge_contextvars
from structlog.dev import ConsoleRenderer
from structlog.processors import ExceptionRenderer, JSONRenderer, StackInfoRenderer, TimeStamper
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from service.confidential import told

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

logger = logging.getLogger("mend")
FIRST = ("timestamp", "level", "logger", "event", "request_id")
NOISE = ("color_message",)
"""What uvicorn gives beside the same message without colours."""


def configure(format: Format, level: Level) -> None:
    """Log like this from now on. level: of what is ours; of libraries nothing below info is ever told."""
    wanted = getattr(logging, level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(format, colours=sys.stderr.isatty()))
    logging.basicConfig(handlers=[handler], level=max(wanted, logging.INFO), force=True)
    logger.setLevel(wanted)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda end: _uncaught(end.exc_type, end.exc_value, end.exc_traceback)


def adopt() -> None:
    """Take their own handlers from libraries that came with some, so that they log like everybody."""
    for each in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(each, logging.Logger) and each.handlers:
            each.handlers.clear()
            each.propagate = True


def formatter(format: Format, *, colours: bool = False) -> logging.Formatter:
    """What makes a line of a record."""
    context: list[Processor] = [merge_contextvars, ExtraAdder(), add_logger_name, add_log_level]
    context += [TimeStamper(fmt="iso", utc=True), _add_trace, StackInfoRenderer()]
    rendering: list[Processor] = (
        [ExceptionRenderer(_error), _in_order, JSONRenderer()]
        if format == "json"
        else [_printable, ConsoleRenderer(colors=colours, exception_formatter=_write_error, sort_keys=False)]
    )
    return ProcessorFormatter(
        foreign_pre_chain=context, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
    )


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Where the request is traced: by which id it is found."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    first = {name: event[name] for name in FIRST if name in event}
    return first | {name: value for name, value in event.items() if name not in first and name not in NOISE}


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Whatever is in a text, it makes neither another line nor another colour."""
    return {name: _escaped(value) if isinstance(value, str) else value for name, value in event.items()}


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    escaped = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in text.rstrip("\n"))
    return "".join(escaped)


def _error(error: ExcInfo) -> str:
    return told(error[1])


def _write_error(out: TextIO, error: ExcInfo) -> None:
    out.write("\n" + told(error[1]))


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), traceback)
        return
    logger.critical("an error on our side that nobody caught", exc_info=(kind, error, traceback))
