"""Measure a method of editing: single edits, edits added in one change, and edits made one after another.

Every prompt is marked before and after (`marks`). Edits that are sums of factors, of a base in float32, run as rows of
one batch; everything else is written into weights, rounded as those that are served, one edit at a time: what vanishes
in rounding must be missed in the figures too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.data import Example
from editors.errors import DataFileError
from editors.evaluation.cases import draw_unrelated, encoded
from editors.evaluation.exam import Exam
from editors.evaluation.methods import Made, Method
from editors.evaluation.reader import Reader
from editors.evaluation.report import Report
from editors.evaluation.texts import TextLoss
from editors.text import Tokens
from editors.views import view

BATCH = 24
"""Examples whose cases are read together."""
TEXT_EDITS = 16
"""Single edits, or batches of edits, under which running text is read."""


@dataclass
class Bench:
    """What measurements on one base model share.

    texts: running texts of one length. others: examples that are not edited, from which unrelated prompts are drawn
    where several edits are active and the data brings none.
    """

    base: BaseModel
    seed: int = 0
    texts: Sequence[Tokens] = ()
    others: Sequence[Example] = ()

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """Those that have tokens."""
        return [example for example in examples if encoded(self.base, example.prompt, example.correction)]

    def single(self, method: Method, examples: Sequence[Example]) -> Report:
        """One edit active at a time."""
        report, examples = Report(method.name, "single", self.seed), self.usable(examples)
        pristine, live = self._pristine(method), None
        texts = TextLoss(pristine, self.texts)
        asked = list(zip(examples, draw_unrelated(examples, self.seed), strict=True))
        by_row = method.factored and self.base.dtype in (torch.float32, torch.float64)
        for batch in self._batches(asked, report):
            exam = Exam(pristine, [example for example, _ in batch], [prompts for _, prompts in batch])
            made = _timed(method.edits([example for example, _ in batch]), report)
            report.before += exam.before
            if by_row:
                edits = [method.rows(one.edit) for one in made]
                report.after += exam.mark(pristine, edits)
                for edit in edits[: TEXT_EDITS - texts.measured]:
                    texts.measure(pristine, edit)
                continue
            live = live or self._live(method)
            for owner, one in enumerate(made):
                method.write(one.edit, live.whole)
                report.after.append(exam.mark(live, only=owner)[owner])
                if texts.measured < TEXT_EDITS:
                    texts.measure(live)
        return _finished(report, examples, texts)

    def batched(self, method: Method, examples: Sequence[Example], size: int, measured: int | None = None) -> Report:
        """Groups of `size` edits, each made at the base and added in one change; what is left over is not measured.

        measured: so many of a larger group, evenly spread; all of them without it.
        """
        examples = self._enough(examples, size)
        every = max(1, size // (measured or size))
        report = Report(method.name, f"batched {size}", self.seed)
        pristine, live = self._pristine(method), self._live(method)
        texts, asked = TextLoss(pristine, self.texts), []
        examples = examples[: len(examples) // size * size]
        for start in range(0, len(examples), size):
            group = examples[start : start + size]
            began = time.perf_counter()
            method.write_together(group, live.whole)
            report.seconds += [(time.perf_counter() - began) / size] * size
            part = group[::every][:measured]
            self._mark_all(report, pristine, live, group, part)
            asked += part
            if texts.measured < TEXT_EDITS:
                texts.measure(live)
        report.records = [{} for _ in asked]
        return _finished(report, asked, texts)

    def accumulated(self, method: Method, examples: Sequence[Example], count: int) -> Report:
        """The first `count` edits, one made after another on top of those before, all measured at the end."""
        examples = self._enough(examples, count)[:count]
        report = Report(method.name, f"accumulated {count}", self.seed)
        pristine, live = self._pristine(method), self._live(method)
        texts = TextLoss(pristine, self.texts)
        made = _timed(method.write_in_turn(examples, live.whole), report)
        for _ in tqdm(made, total=count, desc=f"{method.name}, one after another", unit="edit", disable=None):
            pass
        self._mark_all(report, pristine, live, examples, examples)
        texts.measure(live)
        return _finished(report, examples, texts)

    def _mark_all(
        self, report: Report, pristine: Reader, live: Reader, edited: Sequence[Example], examples: Sequence[Example]
    ) -> None:
        """Mark some of the examples whose edits the weights hold."""
        held = {id(example) for example in edited}
        others = [other for other in self.others if id(other) not in held]
        asked = list(zip(examples, draw_unrelated(examples, self.seed, others), strict=True))
        for batch in self._batches(asked, report):
            exam = Exam(pristine, [example for example, _ in batch], [prompts for _, prompts in batch])
            report.before += exam.before
            report.after += exam.mark(live)

    def _enough(self, examples: Sequence[Example], wanted: int) -> list[Example]:
        usable = self.usable(examples)
        if not 0 < wanted <= len(usable):
            raise DataFileError(f"{wanted} edits at once cannot be measured on {len(usable)} examples; give a number "
                                "from 1 to that, or more examples", wanted=wanted, examples=len(usable))  # fmt: skip
        return usable

    def _batches(self, asked: Sequence, report: Report) -> Iterator[Sequence]:
        with tqdm(total=len(asked), desc=f"{report.method}, {report.setting}", unit="edit", disable=None) as bar:
            for start in range(0, len(asked), BATCH):
                yield asked[start : start + BATCH]
                bar.update(len(asked[start : start + BATCH]))

    def _pristine(self, method: Method) -> Reader:
        return Reader(self.base, view(self.base.model), method.targets)

    def _live(self, method: Method) -> Reader:
        own = [target.name for target in method.targets]
        return Reader(self.base, view(self.base.model, own), method.targets)


def _timed(made: Iterable[Made], report: Report) -> Iterator[Made]:
    """Note how each edit was made, and how long it took."""
    edits = iter(made)
    while True:
        began = time.perf_counter()
        one = next(edits, None)
        if one is None:
            return
        report.seconds.append(time.perf_counter() - began)
        report.records.append(dict(one.facts))
        yield one


def _finished(report: Report, examples: Sequence[Example], texts: TextLoss) -> Report:
    report.records = [
        {"prompt": example.prompt, **record} for example, record in zip(examples, report.records, strict=True)
    ]
    report.losses_before, report.losses_after, report.texts_digest = texts.before, texts.after, texts.digest
    return report
