"""Ways to make edits, under one interface, so that all are measured alike: MEND; the baselines are in `finetune`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from editors.base_model import BaseModel
from editors.capture import capture
from editors.checkpoint import Editor
from editors.data import Example
from editors.errors import StateOverflow
from editors.factors import Factors
from editors.margins import smallest_margins
from editors.scale import SCALES, ScaleSearch, search_edit, stronger, token_margins
from editors.state import Rows
from editors.targets import Target
from editors.text import Tokens
from editors.views import UpperBlocks, view

MAX_ATTEMPTS = 5
"""Scales that the service tries for one edit, at most."""
TOGETHER = 24
"""Edits that are worked out in one batch."""
STRONGER = 6
"""How often edits are made stronger that do not take beside many others."""

Weights = Mapping[str, Tensor]
"""An edit that is no sum of factors: the edited weights themselves, by name, in the parameters' own layout."""


@dataclass(frozen=True)
class Made:
    """An edit, with what is worth reporting of how it was made. edit: None where the model already says the correction,
    or never would."""

    edit: Factors | Weights | None
    facts: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """targets: the weights that it edits. factored: whether its edits are `Factors`."""

    name: str
    targets: tuple[Target, ...]
    factored: bool

    def edits(self, examples: Sequence[Example]) -> Iterable[Made]:
        """One edit for each example, made at the base, as if there were no other."""

    def write(self, edit: Factors | Weights, live: nn.Module) -> None:
        """Set the edited weights of `live` to those under one edit, rounded to the model's own precision."""

    def rows(self, edit: Factors) -> Rows:
        """What a factored edit does alone, as rows whose product is ΔW."""

    def write_together(self, examples: Sequence[Example], live: nn.Module) -> None:
        """Set the edited weights of `live`, a view, to those under all edits made at the base in one change."""

    def write_in_turn(self, examples: Sequence[Example], live: nn.Module) -> Iterator[Made]:
        """Change the edited weights of `live`, a view that is as the base, by one edit after another."""


class Mend:
    """A trained editor's edits as the service makes them: scale searched, factors quantised.

    margin: of the search, in nats. The service's guard is no part of this: what it would refuse is measured too.
    """

    factored = True

    def __init__(self, base: BaseModel, editor: Editor, margin: float, name: str = "mend") -> None:
        self.base, self.editor, self.margin, self.name = base, editor, margin, name
        self.targets = editor.targets
        self._upper = UpperBlocks(base.model, editor.captured)
        self._alone = _Candidate(base, editor, margin)
        # Small changes vanish when weights are rounded, so there a scale has to be tried on rounded weights.
        self._rounds = torch.finfo(base.dtype).eps > torch.finfo(torch.float32).eps

    def edits(self, examples: Sequence[Example]) -> Iterator[Made]:
        """At the searched scale; where an edit does not take, at the one that comes nearest."""
        alone = self._alone
        for sequence, hidden, rows in self._proposed(examples):
            rows, search = alone.search(hidden, sequence, rows)
            order = search.order(self.margin)[:MAX_ATTEMPTS] or [search.strongest]
            chosen = order[0]
            if self._rounds:
                holding = (i for i in order if alone.holds(alone.quantise(rows, SCALES[i]), sequence, hidden))
                chosen = next(holding, chosen)
            yield Made(alone.quantise(rows, SCALES[chosen]), _facts(search, chosen))

    def write(self, edit: Factors, live: nn.Module) -> None:
        self._alone.write([edit], live)

    def rows(self, edit: Factors) -> Rows:
        return self.editor.joined([edit])

    def write_together(self, examples: Sequence[Example], live: nn.Module) -> None:
        """Edits that add up, each at its own searched scale. Edits that know of each other at the first scale; those
        that do not take as they would alone, and then stronger a few times, as long as no fewer take than before."""
        if self.editor.aggregate == "sum":
            self._alone.write([made.edit for made in self.edits(examples)], live)
            return
        tokens, states, forms = map(list, zip(*self._proposed(examples), strict=True))
        hidden = [state[0] for state in states]
        scales, searched = [self.editor.first_scale] * len(forms), set()
        candidate = _Candidate(self.base, self.editor, self.margin, live)
        best: tuple[int, list[Factors]] = (-1, [])
        for _ in range(STRONGER + 1):
            edits = [candidate.quantise(rows, scale) for rows, scale in zip(forms, scales, strict=True)]
            candidate.write(edits, live)
            said = [margin > 0 for margin in smallest_margins(candidate.upper, tokens, hidden)]
            if sum(said) < best[0]:
                candidate.write(best[1], live)
                return
            if all(said):
                return
            best = sum(said), edits
            for index in (index for index, holds in enumerate(said) if not holds):
                scales[index] = stronger(scales[index])
                if index not in searched:
                    searched.add(index)
                    forms[index], search = self._alone.search(states[index], tokens[index], forms[index])
                    scales[index] = max([scales[index], *(SCALES[place] for place in search.order(self.margin)[:1])])

    def write_in_turn(self, examples: Sequence[Example], live: nn.Module) -> Iterator[Made]:
        """The scale is searched on top of what is live. What no scale can teach is refused, as by the service."""
        candidate = _Candidate(self.base, self.editor, self.margin, live)
        for example in examples:
            ((tokens, hidden, rows),) = self._proposed([example])
            if candidate.says(tokens, hidden):
                yield Made(None, {"scale": None, "already": True})
                continue
            rows, search = candidate.search(hidden, tokens, rows)
            for index in search.order(self.margin)[:MAX_ATTEMPTS]:
                factors = candidate.quantise(rows, SCALES[index])
                if candidate.holds(factors, tokens, hidden, keep=True):
                    yield Made(factors, _facts(search, index))
                    break
            else:
                yield Made(None, {"scale": None, "refused": True})

    def _proposed(self, examples: Sequence[Example]) -> Iterator[tuple[Tokens, Tensor, Rows]]:
        """Each example's tokens, its hidden states under the edited blocks (1, tokens, width), and its edit."""
        for start in range(0, len(examples), TOGETHER):
            tokens = [self._encode(example) for example in examples[start : start + TOGETHER]]
            hidden = self._upper.below([sequence.inputs for sequence in tokens])
            with torch.no_grad():
                proposal = self.editor(capture(self._upper, hidden, tokens))
            for index, sequence in enumerate(tokens):
                yield sequence, hidden[index : index + 1, : len(sequence.inputs)], proposal.rows_of(self.targets, index)

    def _encode(self, example: Example) -> Tokens:
        return self.base.encode(example.prompt, example.correction, example.named_subject)


class _Candidate:
    """Weights on which edits are tried, on top of those that were kept. live: a view of the base, to be written."""

    def __init__(self, base: BaseModel, editor: Editor, margin: float, live: nn.Module | None = None) -> None:
        self._base, self._editor, self._margin = base, editor, margin
        self._live = live or view(base.model, [target.name for target in editor.targets])
        self._state = editor.new_state(base.device)
        self.quantise = self._state.quantise
        self.upper = UpperBlocks(self._live, editor.targets)

    @torch.no_grad()
    def says(self, tokens: Tokens, hidden: Tensor) -> bool:
        """Whether each token of the target is the most likely now."""
        logits = self.upper.logits(hidden, [tokens])
        return bool((token_margins(logits, torch.tensor(tokens.target, device=logits.device)) > 0).all())

    def search(self, hidden: Tensor, tokens: Tokens, rows: Rows) -> tuple[Rows, ScaleSearch]:
        """In which form, and at which scales, one more edit would take."""
        return search_edit(self._editor, self._state, self.upper, hidden, tokens, rows, self._margin)

    def write(self, edits: Sequence[Factors], live: nn.Module) -> None:
        """Set the weights of `live` to those under these edits, and under those that were kept."""
        self._state.add(*edits)
        try:
            self._state.write(self._base.model, live)
        finally:
            self._state.remove(*edits)

    def holds(self, factors: Factors, tokens: Tokens, hidden: Tensor, *, keep: bool = False) -> bool:
        """Whether the edit takes on the weights as they are served. keep: leave it in if so."""
        try:
            self._state.add(factors)
        except StateOverflow:
            return False
        self._state.write(self._base.model, self._live)
        took = self.says(tokens, hidden)
        if not (took and keep):
            self._state.remove(factors)
            self._state.write(self._base.model, self._live)
        return took


def _facts(search: ScaleSearch, index: int) -> dict[str, Any]:
    return {"scale": SCALES[index], "margins": search.margins}
