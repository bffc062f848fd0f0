"""What commands that talk to a running service have in common: their options, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

REFUSED, DRIFT, LOST, UNREACHABLE = 1, 2, 3, 4
EXIT_STATUSES = (
    "Exit status: 0 done; 1 refused by the service, or wrong input; 2 there is drift (apply --check); "
    "3 some edit no longer holds (audit); 4 the service cannot be reached or is not ready."
)
USAGE = 2
"""Exit status of a command line that is not understood, if nobody changes it."""

ServiceOption = Annotated[str, typer.Option(envvar="MEND_SERVICE", help="URL of the running service.")]
DEFAULT_SERVICE = "http://127.0.0.1:8000"
WaitOption = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="Ask again for so long while the service does not answer.")
]
DEFAULT_WAIT_S = 30.0
KEY = "MEND_API_KEY"
"""Variable with the key. There is no flag for it: whoever lists the processes of a machine would read it."""
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--api-key-file", envvar="MEND_API_KEY_FILE", metavar="FILE", help=f"Holds the API key, not {KEY}."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the service's own answer.")]
ActorOption = Annotated[str | None, typer.Option(envvar="MEND_ACTOR", help="Who asks; kept in the ledger.")]
ReasonOption = Annotated[str | None, typer.Option(help="Why; kept in the ledger.")]
IfMatchOption = Annotated[
    int | None, typer.Option(metavar="REVISION", help="Only if this is still the service's revision.")
]


class ClientCommand(TyperCommand):
    """A command that ends with the statuses above, also when its command line is not understood."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of click, or of typer's own copy of it
            if getattr(error, "exit_code", None) == USAGE:
                error.exit_code = REFUSED  # type: ignore[attr-defined]
            raise


def stop(why: str, status: int = REFUSED) -> NoReturn:
    """End the command with one line."""
    typer.echo(f"mend: {why}", err=True)
    raise typer.Exit(status)
