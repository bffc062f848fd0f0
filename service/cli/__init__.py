"""The `mend` command. Each module here holds one group of subcommands and imports what it needs when it runs."""

from service.cli.main import main

__all__ = ["main"]
