"""Options that several subcommands share, and the settings as options."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from editors import DEFAULT_MODEL
from service.settings import DEFAULT_EDITOR, Settings

BaseModelOption = Annotated[
    str,
    typer.Option(envvar="MEND_BASE_MODEL", help="Hub id, folder, or the packaged model's name.", show_default=True),
]
DeviceOption = Annotated[str | None, typer.Option(envvar="MEND_DEVICE", help="cpu, cuda, cuda:1, …")]

EditorOption = Annotated[
    str | None,
    typer.Option(envvar="MEND_EDITOR", help="Folder of the checkpoint, or training-free; as for mend serve without."),
]


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


DEFAULT_BASE_MODEL = DEFAULT_MODEL
__all__ = [
    "DEFAULT_BASE_MODEL",
    "DEFAULT_EDITOR",
    "BaseModelOption",
    "DeviceOption",
    "Dtype",
    "EditorOption",
    "command_line",
    "read_settings",
    "with_settings",
]

Command = TypeVar("Command", bound=Callable[..., None])


def with_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command an option for each of these settings; it gets them as `**flags`, for `read_settings`.

    They are unset by default, so that the environment and the defaults stay in one place.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        named = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*named, *map(_option, names)])  # type: ignore[attr-defined]
        return command

    return decorate


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from the environment and from the flags that were given. Ends the command when one makes no sense."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        sys.exit(f"mend: MEND_{name.upper()} is {first['input']!r}: {first['msg']}")


def command_line() -> str:
    """The command as it was given, with files by their names alone: where they lie is nobody else's business."""

    def named(argument: str) -> str:
        try:
            return Path(argument).name if Path(argument).exists() else argument
        except (OSError, ValueError):  # what is longer than a name may be is none
            return argument

    return shlex.join(["mend", *map(named, sys.argv[1:])])


def _option(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    default = field.get_default()
    note = "" if default in (None, ()) else f"  [default: {default}]"
    metavar = {int: "INTEGER", float: "NUMBER", bool: "true|false"}.get(field.annotation, "TEXT")
    help_ = f"MEND_{name.upper()}. {field.description}{note}"
    # Text all of them: a flag is checked where its variable is, with the same words.
    option = typer.Option(help=help_, show_default=False, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
