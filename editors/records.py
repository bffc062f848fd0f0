"""Records of a JSON array or of JSON Lines, whose errors name the line and the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from editors.errors import DataFileError

_SPACE = re.compile(r"[ \t\r\n]*")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_records(raw: bytes, path: Path) -> Iterator[tuple[int, object]]:
    """Every record with the line on which it begins. Raises DataFileError."""
    suspect = _SURROGATE.search(raw) is not None
    line = 1
    try:
        for line, record in _records(raw, path):
            if suspect:
                json.dumps(record, ensure_ascii=False).encode()
            yield line, record
    except RecursionError as error:
        raise DataFileError(f"{path}, after line {line}: nested too deeply", line=line) from error
    except UnicodeEncodeError as error:
        raise DataFileError(
            f"{path}, line {line}: half of a surrogate pair ({error.object[error.start]!a}) is no text", line=line
        ) from error


def _records(raw: bytes, path: Path) -> Iterator[tuple[int, object]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not UTF-8 at byte {error.start}", file=str(path)) from error
    try:
        if text.lstrip().startswith("["):
            yield from _array(text)
            return
    except json.JSONDecodeError as error:
        raise DataFileError(f"{path}, line {error.lineno}: {error.msg}", line=error.lineno) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataFileError(f"{path}, line {number}: {error.msg}", line=number) from error


def _array(text: str) -> Iterator[tuple[int, object]]:
    """The items of a JSON array one by one, since only so is it known where each stands."""
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        item, position = decoder.raw_decode(text, position)
        yield line, item
        position = _skip(text, position)
        more = text.startswith(",", position)
        position = _skip(text, position + 1) if more else position
    if not text.startswith("]", position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, position + 1)


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


class Record:
    """One record, with errors that say where it stands."""

    def __init__(self, fields: object, path: Path, line: int, inside: str = "") -> None:
        self.path, self.line = path, line
        self.where = f"{path}, line {line}{inside}"
        if not isinstance(fields, Mapping):
            raise DataFileError(f"{self.where}: expected an object, found {type(fields).__name__}", line=line)
        self.fields = fields
        self._inside = inside

    def text(self, name: str, *, optional: bool = False) -> str | None:
        value = self.fields.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "is missing" if value is None else f"must be text, found {type(value).__name__}")
        return value

    def texts(self, name: str, *, optional: bool = True) -> tuple[str, ...]:
        value = self.fields.get(name, [] if optional else None)
        if value is None:
            raise self.wrong(name, "is missing")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "must be a list of texts")
        return tuple(value)

    def answer(self, name: str) -> str | None:
        """A known answer: a text, or the first of a list of equally right ones. None where it is empty or absent."""
        return self.at(name, self.fields.get(name))

    def at(self, name: str, value: object) -> str | None:
        """The same, of a value that stands in the field."""
        while isinstance(value, list):
            value = value[0] if value else None
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, f"must be text or a list of texts, found {type(value).__name__}")
        return value if value and value.strip() else None

    def inner(self, name: str) -> Record:
        return self._inner(name, self.fields.get(name), f", in {name!r}")

    def inners(self, name: str) -> list[Record]:
        """The objects of a list, of which there may be none."""
        value = self.fields.get(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, "must be a list of objects")
        return [self._inner(name, item, f", in {name!r}[{index}]") for index, item in enumerate(value)]

    def _inner(self, name: str, value: object, place: str) -> Record:
        if not isinstance(value, Mapping):
            raise self.wrong(name, "must be an object" if place.endswith("'") else "must be a list of objects")
        return Record(value, self.path, self.line, self._inside + place)

    def wrong(self, name: str, problem: str) -> DataFileError:
        return DataFileError(f"{self.where}: field {name!r} {problem}", line=self.line, field=name)
