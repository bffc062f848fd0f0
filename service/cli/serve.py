"""`mend serve`: start the server. Every setting has an environment variable and a flag of the same name.

Where the log is JSON, so is every word of this command.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from service import heap
from service.api.hosts import is_loopback
from service.api.keys import KeysUnusable, read_keys, read_secret
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
    heap.settle()  # while there is one thread
    # First of all, so that what cannot be right is one clear line at once, before torch is imported.
    try:
        if settings.api_keys is not None:
            read_keys(settings.api_keys)
        if settings.session_secret is not None:
            read_secret(settings.session_secret)
    except KeysUnusable as error:
        sys.exit(f"mend: {error}")
    listening = _listen(settings)
    address, port, *_ = listening.getsockname()
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    import signal
    from types import FrameType

    from service import logs, tracing

    logs.configure(settings.log_format, settings.log_level)  # before anything is imported that logs
    try:
        tracing.wanted(settings.otlp_endpoint)  # if they cannot be sent, before all that takes long
    except tracing.TracingUnavailable as error:
        sys.exit(f"mend: {error}")

    import uvicorn

    from service.app import create_app
    from service.cli.connections import protocol

    as_json = settings.log_format == "json"

    def say(message: str, level: int = logging.INFO, **facts: str) -> None:
        if as_json:
            logger.log(level, "%s", message, extra=facts)
        else:
            typer.echo(f"mend: {message}", err=True)

    def ready() -> None:
        if as_json:
            say(f"mend-service is ready at {url}", url=url)
        else:
            typer.echo(_welcome(url, with_key=settings.api_keys is not None))

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

    # With the address itself, since a name would have to be asked again what it means.
    app = create_app(settings.model_copy(update={"host": address}), on_failure=failed, on_ready=ready)
    logs.adopt()
    config = uvicorn.Config(
        app,
        http=protocol(settings.request_timeout_s, settings.max_connections),
        log_config=None,
        log_level="error" if settings.log_level == "error" else "warning",
        access_log=False,  # it would hold the prompts of GET /generate
        proxy_headers=False,  # whoever asks could choose the address that he is known by
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
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


def _listen(settings: Settings) -> socket.socket:
    """The socket. Ends the command when it cannot be bound, or would let in everybody without that being meant."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        if settings.api_keys is None and not settings.open_to_all and not is_loopback(address[0]):
            sys.exit(
                f"mend: {where} can be reached from elsewhere, and there are no API keys: whoever reaches it could "
                "change the model. Make keys (mend keys create) and name their file in MEND_API_KEYS, listen on "
                "127.0.0.1, or, if it is meant to be so, say it once more with MEND_OPEN_TO_ALL=true"
            )
        return socket.create_server(address, family=family, reuse_port=False)
    except OSError as error:
        sys.exit(f"mend: cannot listen on {where} ({error.strerror}); set MEND_HOST or MEND_PORT to another")


def _welcome(url: str, *, with_key: bool) -> str:
    key = " -H 'authorization: Bearer mend_…'" if with_key else ""
    body = f'{{"prompt": "{EXAMPLE_PROMPT}", "correction": "{EXAMPLE_CORRECTION}"}}'
    return (
        f"mend-service is ready at {url}\n"
        f"  docs   {url}/docs\n"
        f"  try    curl -s {url}/edits{key} -H 'content-type: application/json' -d '{body}'"
    )
