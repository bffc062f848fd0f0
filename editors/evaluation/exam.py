"""A batch of examples as an exam: what the base answers is kept, and edited models are marked beside it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from editors.data import Example
from editors.evaluation.cases import Case, make_cases
from editors.evaluation.marks import Values, mark_base, mark_locality, mark_target
from editors.evaluation.reader import Reader, Reading
from editors.state import Rows

END_TOKENS = 2
"""Decoded beyond the answer's own, for a tokenisation that is longer than the data's."""


class Exam:
    """The cases of some examples.

    pristine: reads the base. unrelated: prompts for each example. decode: also mark what greedy decoding says.
    """

    def __init__(
        self, pristine: Reader, examples: Sequence[Example], unrelated: Sequence[Sequence[str]], *, decode: bool = True
    ) -> None:
        self.count, self.decode = len(examples), decode
        self.cases = make_cases(pristine, examples, unrelated)
        sequences = [sequence for case in self.cases for sequence in case.sequences.values()]
        states = iter(pristine.below(sequences))
        self._states: list[list[Tensor]] = [[next(states) for _ in case.sequences] for case in self.cases]
        everything = range(len(self.cases))
        found = self._read(pristine, everything, None)
        self._base = {index: found[index] for index in everything if self.cases[index].wanted is None}
        self.before = self._mark(pristine, everything, found, None, edited=False)

    def mark(self, reader: Reader, edits: Sequence[Rows] | None = None, only: int | None = None) -> list[Values]:
        """Values of each example under the reader's model.

        edits: one for each example, to be read under it. only: leave out the cases of all other examples.
        """
        chosen = [index for index, case in enumerate(self.cases) if only is None or case.owner == only]
        return self._mark(reader, chosen, self._read(reader, chosen, edits), edits, edited=True)

    def _read(
        self, reader: Reader, chosen: Sequence[int], edits: Sequence[Rows] | None
    ) -> dict[int, dict[str, Reading]]:
        places = [(index, name) for index in chosen for name in self.cases[index].sequences]
        readings = reader.read(
            [self.cases[index].sequences[name] for index, name in places],
            [state for index in chosen for state in self._states[index]],
            [edits[self.cases[index].owner] for index, _ in places] if edits else None,
        )
        found: dict[int, dict[str, Reading]] = {index: {} for index in chosen}
        for (index, name), reading in zip(places, readings, strict=True):
            found[index][name] = reading
        return found

    def _mark(
        self,
        reader: Reader,
        chosen: Sequence[int],
        found: dict[int, dict[str, Reading]],
        edits: Sequence[Rows] | None,
        *,
        edited: bool,
    ) -> list[Values]:
        said = self._say(reader, chosen, edits)
        values: list[Values] = [{} for _ in range(self.count)]
        for index in chosen:
            case = self.cases[index]
            if case.wanted is not None:
                marks = mark_target(case, found[index], said.get(index))
            else:
                marks = mark_locality(case, self._base[index], found[index]) if edited else mark_base(found[index])
            for name, value in marks.items():
                values[case.owner].setdefault(name, []).append(value)
        return values

    def _say(self, reader: Reader, chosen: Sequence[int], edits: Sequence[Rows] | None) -> dict[int, bool]:
        asked = [index for index in chosen if self.cases[index].wanted is not None] if self.decode else []
        if not asked:
            return {}
        cases: list[Case] = [self.cases[index] for index in asked]
        length = max(len(case.sequences["new"].target) for case in cases) + END_TOKENS
        owners = [edits[case.owner] for case in cases] if edits else None
        said = reader.say([case.prompt for case in cases], length, owners)
        return {
            index: reader.base.says(text, case.wanted) for index, case, text in zip(asked, cases, said, strict=True)
        }
