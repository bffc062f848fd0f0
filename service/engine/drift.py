"""Which guard prompts the live model has moved on, and what it says to them now.

Flow: live weights -> a copy of them, as for an audit -> the guard -> the moved prompts decoded -> kept.
Neither generation nor editing waits for it. What was found is kept until the state is another one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from editors.base_model import BaseModel
from editors.decoding import continue_greedily
from editors.wording import Wording
from service.engine.guard import REFERENCE_TOKENS, Guard
from service.engine.requests import Published
from service.engine.turns import MAX_READING, Places
from service.engine.weights import View, Weights


@dataclass(frozen=True)
class GuardPrompt:
    """tokens: what the base says, greedily. moved: how many of them the live model, reading them, no longer prefers.

    base, live: what each says, greedily; the same where nothing moved.
    """

    prompt: str
    tokens: int
    moved: int
    base: str
    live: str


@dataclass(frozen=True)
class Drift:
    """What the edits of one state do to the guard prompts, those first that moved most."""

    drawdown: float
    prompts: tuple[GuardPrompt, ...]


class DriftReader:
    """Looks where the live model has drifted to, one at a time, and only when the state is another one."""

    def __init__(self, base: BaseModel, weights: Weights, guard: Guard) -> None:
        self._base, self._weights, self._guard = base, weights, guard
        self._wording = Wording(base.model, base.tokenizer)
        self._said = [self._text(tokens.target) for tokens in guard.sequences]
        self._view: View | None = None
        self._kept: tuple[str, Drift] | None = None
        """The last one, with the digest of its state: equal states are equal weights."""
        self._places, self._reading = Places("requests for the health of the model", MAX_READING), threading.Lock()

    def read(self) -> tuple[Published, Drift]:
        """What is live, and where it has drifted to. Raises Busy."""
        found = self._known()
        if found is not None:
            return found
        with self._places.one(), self._reading:
            found = self._known()  # somebody else may have looked meanwhile
            if found is not None:
                return found
            self._view = self._view or self._weights.another_view()
            published = self._weights.copy_live(self._view)
            drift = self._look(self._view)
            self._kept = published.digest, drift
            return published, drift

    def _known(self) -> tuple[Published, Drift] | None:
        now, kept = self._weights.published, self._kept
        return (now, kept[1]) if kept is not None and kept[0] == now.digest else None

    def _look(self, view: View) -> Drift:
        missed, sequences = self._guard.missed(view.upper), self._guard.sequences
        moved = [row for row, tokens in enumerate(missed.tokens) if tokens]
        live = list(self._said)
        if moved:
            asked = [sequences[row].prompt for row in moved]
            new = continue_greedily(view.model, self._base.tokenizer, asked, REFERENCE_TOKENS)
            for row, tokens in zip(moved, new, strict=True):
                live[row] = self._text(tokens)
        found = [
            GuardPrompt(prompt, len(tokens.target), *rest)
            for prompt, tokens, *rest in zip(
                self._guard.prompts, sequences, missed.tokens, self._said, live, strict=True
            )
        ]
        return Drift(missed.drawdown, tuple(sorted(found, key=lambda each: -each.moved)))

    def _text(self, tokens: tuple[int, ...] | list[int]) -> str:
        return self._wording.text([token for token in tokens if token not in self._wording.ends])
