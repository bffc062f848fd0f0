"""The `mend` command's entry point."""

from __future__ import annotations

import sys

import typer

from editors.errors import EditorsError
from service.cli.bench import bench
from service.cli.checkpoint import checkpoint
from service.cli.compare import compare
from service.cli.evaluate import evaluate
from service.cli.export import export
from service.cli.plan import plan
from service.cli.serve import serve
from service.cli.train import train

app = typer.Typer(name="mend", no_args_is_help=True, add_completion=False, help="Correct facts in a serving model.")
app.command()(serve)
app.command()(train)
app.command()(evaluate)
app.command()(compare)
app.command()(bench)
app.command()(export)
app.add_typer(checkpoint, name="checkpoint")
app.command()(plan)


@app.callback()
def _root() -> None:
    """Correct facts in a serving language model."""


def main() -> None:
    """Run the command line. Expected errors end it with one clear line and exit status 1."""
    from service.engine.errors import EngineError
    from service.ledger.errors import EmbeddedRedisError, LedgerError

    try:
        app()
    except (EditorsError, EngineError, LedgerError, EmbeddedRedisError) as error:
        sys.exit(f"mend: {error}")
