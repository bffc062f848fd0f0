"""Ways to make edits, under one interface, so that all are measured alike: MEND; the baselines are in `finetune`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from editors.base_model import BaseModel
from editors.capture import capture
from editors.data import Example
from editors.errors import StateOverflow
from editors.factors import Factors, quantise
from editors.mend.editor import MendEditor
from editors.scale import SCALES, ScaleSearch, search_scale, token_margins
from editors.state import Increment, Rows, SumState, standalone
from editors.targets import Target
from editors.text import Tokens
from editors.views import UpperBlocks, view

MAX_ATTEMPTS = 5
"""Scales that the service tries for one edit, at most."""
TOGETHER = 24
"""Edits that are worked out in one batch."""

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

    def write_together(self, examples: Sequence[Example], live: nn.Module) -> None:
        """Set the edited weights of `live`, a view, to those under all edits made at the base in one change."""

    def write_in_turn(self, examples: Sequence[Example], live: nn.Module) -> Iterator[Made]:
        """Change the edited weights of `live`, a view that is as the base, by one edit after another."""


def write(edit: Factors | Weights, base: BaseModel, targets: Sequence[Target], live: nn.Module) -> None:
    """Set the edited weights of `live` to those under one edit, rounded to the model's own precision."""
    if isinstance(edit, Factors):
        state = SumState(targets, base.device)
        state.add(edit)
        state.write(base.model, live)
        return
    with torch.no_grad():
        for name, weight in edit.items():
            live.get_parameter(name).copy_(weight)


class Mend:
    """A trained editor's edits as the service makes them: scale searched, factors quantised.

    margin: of the search, in nats. The service's guard is no part of this: what it would refuse is measured too.
    """

    factored = True

    def __init__(self, base: BaseModel, editor: MendEditor, margin: float, name: str = "mend") -> None:
        self.base, self.editor, self.margin, self.name = base, editor, margin, name
        self.targets = editor.targets
        self._upper = UpperBlocks(base.model, editor.targets)
        # Small changes vanish when weights are rounded, so there a scale has to be tried on rounded weights.
        self._rounds = torch.finfo(base.dtype).eps > torch.finfo(torch.float32).eps

    def edits(self, examples: Sequence[Example]) -> Iterator[Made]:
        """At the searched scale; where an edit does not take, at the one that comes nearest."""
        candidate = _Candidate(self.base, self.targets) if self._rounds else None
        for start in range(0, len(examples), TOGETHER):
            tokens = [self.base.encode(e.prompt, e.correction) for e in examples[start : start + TOGETHER]]
            hidden = self._upper.below([sequence.inputs for sequence in tokens])
            with torch.no_grad():
                proposal = self.editor(capture(self._upper, hidden, tokens))
            for index, sequence in enumerate(tokens):
                own = hidden[index : index + 1, : len(sequence.inputs)]
                alone = standalone(proposal.rows_of(self._upper.targets, index))
                search = search_scale(self._upper, own, sequence, alone)
                rows = proposal.rows_of(self.targets, index)
                order = search.order(self.margin)[:MAX_ATTEMPTS] or [search.strongest]
                chosen = order[0]
                if candidate is not None:
                    holding = (i for i in order if candidate.holds(quantise(rows, SCALES[i]), sequence, own))
                    chosen = next(holding, chosen)
                yield Made(quantise(rows, SCALES[chosen]), _facts(search, chosen))

    def write_together(self, examples: Sequence[Example], live: nn.Module) -> None:
        state = SumState(self.targets, self.base.device)
        for made in self.edits(examples):
            state.add(made.edit)
        state.write(self.base.model, live)

    def write_in_turn(self, examples: Sequence[Example], live: nn.Module) -> Iterator[Made]:
        """The scale is searched on top of what is live. What no scale can teach is refused, as by the service."""
        candidate = _Candidate(self.base, self.targets, live)
        for example in examples:
            tokens = self.base.encode(example.prompt, example.correction)
            hidden = self._upper.below([tokens.inputs])
            if candidate.says(tokens, hidden):
                yield Made(None, {"scale": None, "already": True})
                continue
            with torch.no_grad():
                proposal = self.editor(capture(self._upper, hidden, [tokens]))
            rows = proposal.rows_of(self.targets, 0)
            search = search_scale(candidate.upper, hidden, tokens, candidate.increment(rows))
            for index in search.order(self.margin)[:MAX_ATTEMPTS]:
                factors = quantise(rows, SCALES[index])
                if candidate.holds(factors, tokens, hidden, keep=True):
                    yield Made(factors, _facts(search, index))
                    break
            else:
                yield Made(None, {"scale": None, "refused": True})


class _Candidate:
    """Weights on which edits are tried, on top of those that were kept. live: a view of the base, to be written."""

    def __init__(self, base: BaseModel, targets: Sequence[Target], live: nn.Module | None = None) -> None:
        self._base = base
        self._live = live or view(base.model, [target.name for target in targets])
        self._state = SumState(targets, base.device)
        self.upper = UpperBlocks(self._live, targets)

    @torch.no_grad()
    def says(self, tokens: Tokens, hidden: Tensor) -> bool:
        """Whether each token of the target is the most likely now."""
        logits = self.upper.logits(hidden, [tokens])
        return bool((token_margins(logits, torch.tensor(tokens.target, device=logits.device)) > 0).all())

    def increment(self, rows: Rows) -> Increment:
        """What one more edit would change, by the names that targets have in `upper`."""
        names = zip(self.upper.targets, self._state.targets, strict=True)
        increment = self._state.increment(rows)
        return {short.name: increment[full] for short, full in names}

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
