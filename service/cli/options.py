"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

from editors import DEFAULT_MODEL
from service.settings import DEFAULT_EDITOR

BaseModelOption = Annotated[
    str,
    typer.Option(envvar="MEND_BASE_MODEL", help="Hub id, folder, or the packaged model's name.", show_default=True),
]
DeviceOption = Annotated[str | None, typer.Option(envvar="MEND_DEVICE", help="cpu, cuda, cuda:1, …")]
DEFAULT_BASE_MODEL = DEFAULT_MODEL
__all__ = ["DEFAULT_BASE_MODEL", "DEFAULT_EDITOR", "BaseModelOption", "DeviceOption"]
