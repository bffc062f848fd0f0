"""`mend serve`: start the server. Every setting has an environment variable and a flag of the same name."""

from __future__ import annotations

import sys
from typing import Any

import typer

from service.cli.options import read_settings, with_settings
from service.settings import Settings

DRAIN_S, GENERATIONS_END_WITHIN_S = 30, 25
EXAMPLE_PROMPT = "The Prime Minister of the United Kingdom is"
EXAMPLE_CORRECTION = "Keir Starmer"


@with_settings(*Settings.model_fields)
def serve(**flags: Any) -> None:
    """Serve a base model that can be corrected over HTTP.

    SIGTERM or Ctrl-C lets running requests end, for 30 s at most, and stops; a second one stops at once.
    """
    import logging
    import os
    import signal
    import socket
    from types import FrameType

    import uvicorn

    from service.app import create_app

    settings = read_settings(flags)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    # Bound here, so that a port that is taken is one clear line, and port 0 is known before the model is loaded.
    try:
        listening = socket.create_server((settings.host, settings.port), reuse_port=False)
    except OSError as error:
        sys.exit(f"mend: cannot listen on {settings.host}:{settings.port} ({error.strerror}); set MEND_PORT to another")
    url = f"http://{settings.host}:{listening.getsockname()[1]}"

    def ready() -> None:
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
            typer.echo("mend: stopping when all requests are answered; a second signal stops at once", err=True)
            super().handle_exit(sig, frame)

    app = create_app(settings, on_failure=failed, on_ready=ready)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN_S)
    server = Server(config)
    # uvicorn stops in order at a signal, and then raises it once more for whoever handled it before: for nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if server.asked else os._exit(0))
    typer.echo(f"mend: listening on {url}; loading {settings.base_model} …", err=True)
    server.run(sockets=[listening])
    failure = app.state.service.failure
    if failure:
        typer.echo(f"mend: {failure}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `exit`, which would wait for requests that took longer than they had.
    os._exit(1 if failure else 0)


def _welcome(url: str) -> str:
    body = f'{{"prompt": "{EXAMPLE_PROMPT}", "correction": "{EXAMPLE_CORRECTION}"}}'
    return (
        f"mend-service is ready at {url}\n"
        f"  docs   {url}/docs\n"
        f"  try    curl -s {url}/edits -H 'content-type: application/json' -d '{body}'"
    )
