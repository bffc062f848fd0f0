"""`mend serve`: start the server. Every setting has an environment variable and a flag of the same name.

Where the log is JSON, so is every word of this command.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from service.cli.options import read_settings, with_settings
from service.settings import Settings

logger = logging.getLogger("mend")

DRAIN_S, GENERATIONS_END_WITHIN_S = 30, 25
EXAMPLE_PROMPT = "The Prime Minister of the United Kingdom is"
EXAMPLE_CORRECTION = "Keir Starmer"


@with_settings(*Settings.model_fields)
def serve(**flags: Any) -> None:
    """Serve a base model that can be corrected over HTTP.

    SIGTERM or Ctrl-C lets running requests end, for 30 s at most, and stops; a second one stops at once.
    """
    with _refusing(flags):
        _serve(read_settings(flags))


def _serve(settings: Settings) -> None:
    import signal
    import socket
    from types import FrameType

    from service import logs, tracing

    logs.configure(settings.log_format, settings.log_level)  # before anything is imported that logs
    try:
        tracing.wanted(settings.otlp_endpoint)  # if they cannot be sent, before all that takes long
    except tracing.TracingUnavailable as error:
        sys.exit(f"mend: {error}")

    import uvicorn

    from service.app import create_app

    as_json = settings.log_format == "json"

    def say(message: str, level: int = logging.INFO, **facts: str) -> None:
        if as_json:
            logger.log(level, "%s", message, extra=facts)
        else:
            typer.echo(f"mend: {message}", err=True)

    # Bound here, so that a port that is taken is one clear line, and port 0 is known before the model is loaded.
    try:
        listening = socket.create_server((settings.host, settings.port), reuse_port=False)
    except OSError as error:
        sys.exit(f"mend: cannot listen on {settings.host}:{settings.port} ({error.strerror}); set MEND_PORT to another")
    url = f"http://{settings.host}:{listening.getsockname()[1]}"

    def ready() -> None:
        if as_json:
            say(f"mend-service is ready at {url}", url=url)
        else:
            typer.echo(_welcome(url))

    def failed() -> None:
        server.should_exit = True

    class Server(uvicorn.Server):
        asked = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.asked:
                # Whatever an edit was doing: it is in the ledger or it is not. Our Redis ends when we are gone.
                os._exit(128 + sig)
            self.asked = True
            app.state.service.drain(GENERATIONS_END_WITHIN_S)
            say("stopping when all requests are answered; a second signal stops at once")
            super().handle_exit(sig, frame)

    app = create_app(settings, on_failure=failed, on_ready=ready)
    logs.adopt()
    quiet = "error" if settings.log_level == "error" else "warning"
    config = uvicorn.Config(
        app, log_config=None, log_level=quiet, access_log=False, timeout_graceful_shutdown=DRAIN_S
    )  # fmt: skip
    server = Server(config)
    # uvicorn stops in order at a signal, and then raises it once more for whoever handled it before: for nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if server.asked else os._exit(0))
    say(f"listening on {url}; loading {settings.base_model} …", url=url)
    server.run(sockets=[listening])
    failure = app.state.service.failure
    if failure:
        say(failure, logging.CRITICAL)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `exit`, which would wait for requests that took longer than they had.
    os._exit(1 if failure else 0)


@contextmanager
def _refusing(flags: Mapping[str, Any]) -> Iterator[None]:
    """Why it does not start is logged where the log is JSON; the settings may be what is wrong, so flags are asked."""
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, str) or (flags["log_format"] or os.environ.get("MEND_LOG_FORMAT")) != "json":
            raise
        from service import logs

        logs.configure("json", "info")
        logger.critical("%s", end.code.removeprefix("mend: "))
        sys.exit(1)


def _welcome(url: str) -> str:
    body = f'{{"prompt": "{EXAMPLE_PROMPT}", "correction": "{EXAMPLE_CORRECTION}"}}'
    return (
        f"mend-service is ready at {url}\n"
        f"  docs   {url}/docs\n"
        f"  try    curl -s {url}/edits -H 'content-type: application/json' -d '{body}'"
    )
