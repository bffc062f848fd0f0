"""Editing data: what an edit is judged on, read from the files in which people hold it.

Recognised by their fields, as a JSON array or as JSON Lines:
- CounterFact, flat:   prompt, target_new, rephrase_prompt, locality_prompt, subject, and with their answers
                       ground_truth, locality_ground_truth, portability (EasyEdit's fields)
- CounterFact, ROME's: requested_rewrite, paraphrase_prompts, neighborhood_prompts
- zsRE, MEND's:        src, alt, rephrase, loc, subject, answers, loc_ans
- FEVER, MEND's:       input, alternatives, filtered_rephrases, output
- the project's own:   prompt, correction, and optionally subject, paraphrases, keep, unrelated, answer
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from editors.errors import DataFileError
from editors.records import Record, read_records


@dataclass(frozen=True)
class Probe:
    """A prompt that an edit is judged on, with its right answer where that is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Example:
    """One correction and the prompts that tell whether it was made well.

    neighbours: prompts that resemble it and must keep their answers. unrelated: prompts about something else.
    answer: what was right before the correction. neighbour_answers, unrelated_answers: the right answers of those
    prompts, one for each, or none at all. portability: what follows from the correction.
    """

    prompt: str
    correction: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    answer: str | None = None
    neighbour_answers: tuple[str | None, ...] = ()
    unrelated_answers: tuple[str | None, ...] = ()
    portability: tuple[Probe, ...] = ()

    @property
    def named_subject(self) -> str | None:
        """The subject, without spaces around it, where the prompt names it."""
        subject = (self.subject or "").strip()
        return subject if subject and subject in self.prompt else None


@dataclass(frozen=True)
class DataSet:
    """The examples of one file. digest: SHA-256 of the file's bytes. layout: which kind of file it was."""

    name: str
    layout: str
    digest: str
    examples: tuple[Example, ...]
    skipped: int
    """Records that are no example: an empty prompt or correction, which some published files contain, or, in FEVER,
    no alternative or no rephrase."""
    dropped: int = 0
    """Prompts of the examples that were empty."""

    def split(self, held_out: int) -> tuple[DataSet, DataSet]:
        """All but the last `held_out` examples, and those."""
        edge = max(0, len(self.examples) - held_out)
        return replace(self, examples=self.examples[:edge]), replace(self, examples=self.examples[edge:])


def read_data(path: str | Path) -> DataSet:
    """Read a data file. Raises DataFileError naming the line (a record's first) and the field that is wrong."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"cannot read the data file {path}: {error.strerror}", file=str(path)) from error
    records = list(read_records(raw, path))
    if not records:
        raise DataFileError(f"{path} holds no records", file=str(path))
    layout = _recognise(records[0][1], path)
    read = [_READERS[layout](Record(record, path, line)) for line, record in records]
    whole = [example for example in read if example and example.prompt.strip() and example.correction.strip()]
    examples = tuple(map(_without_empty_prompts, whole))
    dropped = sum(map(_prompts, whole)) - sum(map(_prompts, examples))
    return DataSet(path.name, layout, hashlib.sha256(raw).hexdigest(), examples, len(read) - len(whole), dropped)


def _without_empty_prompts(example: Example) -> Example:
    def kept(prompts: tuple[str, ...], values: tuple) -> tuple:
        return tuple(value for prompt, value in zip(prompts, values, strict=False) if prompt.strip())

    return replace(
        example,
        paraphrases=kept(example.paraphrases, example.paraphrases),
        neighbours=kept(example.neighbours, example.neighbours),
        neighbour_answers=kept(example.neighbours, example.neighbour_answers),
        unrelated=kept(example.unrelated, example.unrelated),
        unrelated_answers=kept(example.unrelated, example.unrelated_answers),
        portability=tuple(probe for probe in example.portability if probe.prompt.strip()),
    )


def _prompts(example: Example) -> int:
    return len(example.paraphrases) + len(example.neighbours) + len(example.unrelated) + len(example.portability)


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


def _flat_counterfact(record: Record) -> Example:
    return Example(
        prompt=record.text("prompt"),
        correction=record.text("target_new"),
        subject=record.text("subject", optional=True),
        paraphrases=(record.text("rephrase_prompt"),),
        neighbours=(record.text("locality_prompt"),),
        answer=record.answer("ground_truth"),
        neighbour_answers=(record.answer("locality_ground_truth"),),
        portability=_portability(record),
    )


def _portability(record: Record) -> tuple[Probe, ...]:
    """EasyEdit's: one prompt beside the others, or groups by name of prompts, each group listed or in columns."""
    single = record.text("portability_prompt", optional=True)
    probes = [] if single is None else [Probe(single, record.answer("portability_ground_truth"))]
    if record.fields.get("portability") is None:
        return tuple(probes)
    groups = record.inner("portability")
    for name, group in groups.fields.items():
        if isinstance(group, Mapping):
            probes += _columns(groups.inner(name))
        else:
            probes += [Probe(item.text("prompt"), item.answer("ground_truth")) for item in groups.inners(name)]
    return tuple(probes)


def _columns(group: Record) -> list[Probe]:
    if isinstance(group.fields.get("prompt"), str):
        return [Probe(group.text("prompt"), group.answer("ground_truth"))]
    prompts, answers = group.texts("prompt", optional=False), group.fields.get("ground_truth")
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise group.wrong("ground_truth", f"must be a list with an answer for each of the {len(prompts)} prompts")
    rows = [group.at("ground_truth", answer) for answer in answers]
    return [Probe(prompt, answer) for prompt, answer in zip(prompts, rows, strict=True)]


def _rome_counterfact(record: Record) -> Example:
    rewrite = record.inner("requested_rewrite")
    subject = rewrite.text("subject")
    neighbours = record.texts("neighborhood_prompts")
    # Its neighbours share the relation and the true answer.
    answer = rewrite.inner("target_true").answer("str") if rewrite.fields.get("target_true") is not None else None
    return Example(
        prompt=rewrite.text("prompt").replace("{}", subject),
        correction=rewrite.inner("target_new").text("str"),
        subject=subject,
        paraphrases=record.texts("paraphrase_prompts"),
        neighbours=neighbours,
        answer=answer,
        neighbour_answers=(answer,) * len(neighbours),
    )


def _zsre(record: Record) -> Example:
    return Example(
        prompt=record.text("src"),
        correction=record.text("alt"),
        subject=record.text("subject", optional=True),
        paraphrases=(record.text("rephrase"),),
        unrelated=(record.text("loc"),),
        answer=record.answer("answers"),
        unrelated_answers=(record.answer("loc_ans"),),
    )


def _fever(record: Record) -> Example | None:
    """A claim and the label that it should get. The claim itself stands among its rephrases in places."""
    claim, outputs = record.text("input"), record.inners("output")
    labels = record.texts("alternatives", optional=False)
    rephrases = tuple(text for text in record.texts("filtered_rephrases", optional=False) if text != claim)
    if not (labels and rephrases):
        return None
    answer = outputs[0].answer("answer") if outputs else None
    return Example(claim, labels[0], paraphrases=rephrases, answer=answer)


def _own(record: Record) -> Example:
    return Example(
        prompt=record.text("prompt"),
        correction=record.text("correction"),
        subject=record.text("subject", optional=True),
        paraphrases=record.texts("paraphrases"),
        neighbours=record.texts("keep"),
        unrelated=record.texts("unrelated"),
        answer=record.answer("answer"),
    )


_MARKS = {
    "counterfact-rome": {"requested_rewrite"},
    "counterfact": {"prompt", "target_new"},
    "zsre": {"src", "alt"},
    "fever": {"input", "alternatives"},
    "mend": {"prompt", "correction"},
}
_READERS = {
    "counterfact-rome": _rome_counterfact,
    "counterfact": _flat_counterfact,
    "zsre": _zsre,
    "fever": _fever,
    "mend": _own,
}
