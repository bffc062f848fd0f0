"""Editing data: what an edit is judged on, read from the files in which people hold it.

Recognised by their fields, as a JSON array or as JSON Lines:
- CounterFact, flat:   prompt, target_new, rephrase_prompt, locality_prompt, subject
- CounterFact, ROME's: requested_rewrite, paraphrase_prompts, neighborhood_prompts
- zsRE, MEND's:        src, alt, rephrase, loc, subject
- the project's own:   prompt, correction, and optionally subject, paraphrases, keep, unrelated
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from editors.errors import DataFileError


@dataclass(frozen=True)
class Example:
    """One correction and the prompts that tell whether it was made well.

    neighbours: prompts that resemble it and must keep their answers. unrelated: prompts about something else.
    """

    prompt: str
    correction: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """The examples of one file. digest: SHA-256 of the file's bytes. layout: which kind of file it was."""

    name: str
    layout: str
    digest: str
    examples: tuple[Example, ...]
    skipped: int
    """Records with an empty correction, which some published files contain."""

    def split(self, held_out: int) -> tuple[DataSet, DataSet]:
        """All but the last `held_out` examples, and those."""
        edge = max(0, len(self.examples) - held_out)
        return replace(self, examples=self.examples[:edge]), replace(self, examples=self.examples[edge:])


def read_data(path: str | Path) -> DataSet:
    """Read a data file. Raises DataFileError naming the record and the field that is wrong."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"cannot read the data file {path}: {error.strerror}", file=str(path)) from error
    records = _records(raw, path)
    if not records:
        raise DataFileError(f"{path} holds no records", file=str(path))
    layout = _recognise(records[0][1], path)
    examples = [_READERS[layout](_Record(record, path, line)) for line, record in records]
    kept = tuple(example for example in examples if example.correction.strip())
    return DataSet(path.name, layout, hashlib.sha256(raw).hexdigest(), kept, len(examples) - len(kept))


class _Record:
    """One record, with errors that say where it stands."""

    def __init__(self, fields: object, path: Path, line: int) -> None:
        self.where = f"{path}, record {line}"
        if not isinstance(fields, Mapping):
            raise DataFileError(f"{self.where}: expected an object, found {type(fields).__name__}", record=line)
        self.fields = fields

    def text(self, name: str, *, optional: bool = False) -> str | None:
        value = self.fields.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"must be text, found {type(value).__name__}"
            raise DataFileError(f"{self.where}: field {name!r} {problem}", field=name)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DataFileError(f"{self.where}: field {name!r} must be a list of texts", field=name)
        return tuple(value)

    def inner(self, name: str) -> _Record:
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise DataFileError(f"{self.where}: field {name!r} must be an object", field=name)
        inner = object.__new__(_Record)
        inner.where, inner.fields = f"{self.where}, in {name!r}", value
        return inner


def _records(raw: bytes, path: Path) -> list[tuple[int, object]]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not UTF-8 at byte {error.start}", file=str(path)) from error
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise DataFileError(f"{path}, line {error.lineno}: {error.msg}", line=error.lineno) from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataFileError(f"{path}, line {number}: {error.msg}", line=number) from error
    return records


def _recognise(record: object, path: Path) -> str:
    fields = set(record) if isinstance(record, Mapping) else set()
    for layout, wanted in _MARKS.items():
        if wanted <= fields:
            return layout
    known = "; ".join(f"{layout}: {', '.join(sorted(wanted))}" for layout, wanted in _MARKS.items())
    raise DataFileError(
        f"{path}: the first record has the fields {', '.join(sorted(fields)) or 'none'}, "
        f"which is no known layout ({known})",
        file=str(path),
    )


def _flat_counterfact(record: _Record) -> Example:
    return Example(
        prompt=record.text("prompt"),
        correction=record.text("target_new"),
        subject=record.text("subject", optional=True),
        paraphrases=(record.text("rephrase_prompt"),),
        neighbours=(record.text("locality_prompt"),),
    )


def _rome_counterfact(record: _Record) -> Example:
    rewrite = record.inner("requested_rewrite")
    subject = rewrite.text("subject")
    return Example(
        prompt=rewrite.text("prompt").replace("{}", subject),
        correction=rewrite.inner("target_new").text("str"),
        subject=subject,
        paraphrases=record.texts("paraphrase_prompts"),
        neighbours=record.texts("neighborhood_prompts"),
    )


def _zsre(record: _Record) -> Example:
    return Example(
        prompt=record.text("src"),
        correction=record.text("alt"),
        subject=record.text("subject", optional=True),
        paraphrases=(record.text("rephrase"),),
        unrelated=(record.text("loc"),),
    )


def _own(record: _Record) -> Example:
    return Example(
        prompt=record.text("prompt"),
        correction=record.text("correction"),
        subject=record.text("subject", optional=True),
        paraphrases=record.texts("paraphrases"),
        neighbours=record.texts("keep"),
        unrelated=record.texts("unrelated"),
    )


_MARKS = {
    "counterfact-rome": {"requested_rewrite"},
    "counterfact": {"prompt", "target_new"},
    "zsre": {"src", "alt"},
    "mend": {"prompt", "correction"},
}
_READERS = {"counterfact-rome": _rome_counterfact, "counterfact": _flat_counterfact, "zsre": _zsre, "mend": _own}
