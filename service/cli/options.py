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
DTYPES = ("float32", "bfloat16", "float16")


def _known(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    return dtype


DtypeOption = Annotated[
    str | None,
    typer.Option(
        envvar="MEND_DTYPE",
        help="float32, bfloat16 or float16; float32 on a CPU, bfloat16 on a GPU.",
        callback=_known,
    ),
]
DEFAULT_BASE_MODEL = DEFAULT_MODEL
__all__ = ["DEFAULT_BASE_MODEL", "DEFAULT_EDITOR", "BaseModelOption", "DeviceOption", "DtypeOption"]
