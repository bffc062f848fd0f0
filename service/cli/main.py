"""The `mend` command's entry point."""

from __future__ import annotations

import sys

import typer

from editors.errors import EditorsError
from service.cli.apply import apply
from service.cli.bench import bench
from service.cli.checkpoint import checkpoint
from service.cli.client_command import EXIT_STATUSES, ClientCommand
from service.cli.commands import audit, edit, edits, generate
from service.cli.compare import compare
from service.cli.evaluate import evaluate
from service.cli.export import export
from service.cli.keys import keys
from service.cli.ledger import ledger
from service.cli.migrate import migrate
from service.cli.plan import plan
from service.cli.rollback import kill_switch, rollback, tag, tags
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
ledger.command()(migrate)
app.add_typer(ledger, name="ledger")
app.add_typer(keys, name="keys")
app.command()(plan)
for command in (edit, edits, rollback, tag, tags, kill_switch, generate, audit, apply):
    app.command(cls=ClientCommand, epilog=EXIT_STATUSES)(command)


@app.callback()
def _root() -> None:
    """Correct facts in a serving language model."""


def main() -> None:
    """Run the command line. Expected errors end it with one clear line and exit status 1."""
    try:
        app()
    except Exception as error:
        # Not imported before there is an error: with the engine's comes torch, for which no quick command should wait.
        from service.engine.errors import EngineError
        from service.ledger.errors import LedgerError

        if isinstance(error, EditorsError | EngineError | LedgerError):
            sys.exit(f"mend: {error}")
        raise
