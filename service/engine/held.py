"""Do active edits still hold? Many at once, over the upper blocks alone.

The hidden states under each edit's prompt are worked out once, since nothing there ever changes. An edit is far from
lost while the model, reading prompt and correction, prefers every token of the correction; where it does not, or
hardly, greedy decoding decides, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from editors.base_model import BaseModel
from editors.margins import smallest_margins, states_below, sure_nats
from editors.text import Tokens
from editors.views import UpperBlocks
from service.engine.answers import Answers
from service.engine.history import Edit
from service.engine.weights import View


@dataclass(frozen=True)
class Held:
    """How an edit fares. margin_nats: how far the least preferred token of the correction is ahead of any other.

    text: what the model says, where it was decoded to find out.
    """

    edit: Edit
    holds: bool
    margin_nats: float
    text: str | None = None


class HeldEdits:
    """Several threads may share one, each with views of its own."""

    def __init__(self, base: BaseModel, answers: Answers) -> None:
        self._base, self._answers = base, answers
        self._known: dict[str, tuple[Tokens, Tensor]] = {}
        self._sure_nats = sure_nats(base.dtype)

    def check(self, edits: Sequence[Edit], view: View) -> list[Held]:
        """How each edit fares on a view, in their order."""
        margins = self._margins(edits, view.upper)
        doubtful = [row for row, margin in enumerate(margins) if not margin > self._sure_nats]
        said = dict(zip(doubtful, self._say([edits[row] for row in doubtful], view), strict=True))
        return [
            Held(edit, row not in said or self._base.says(said[row], edit.applied.correction), margin, said.get(row))
            for row, (edit, margin) in enumerate(zip(edits, margins, strict=True))
        ]

    def lost(self, edits: Sequence[Edit], before: View, after: View) -> list[Edit]:
        """Those whose correction is preferred in one view, and no longer said in another."""
        self._known = {edit.id: self._known[edit.id] for edit in edits if edit.id in self._known}
        margins = self._margins(edits, after.upper)
        doubtful = [edit for edit, margin in zip(edits, margins, strict=True) if not margin > self._sure_nats]
        held = [
            edit for edit, margin in zip(doubtful, self._margins(doubtful, before.upper), strict=True) if margin > 0
        ]
        said = self._say(held, after)
        return [
            edit for edit, text in zip(held, said, strict=True) if not self._base.says(text, edit.applied.correction)
        ]

    def _say(self, edits: Sequence[Edit], view: View) -> list[str]:
        lengths = [self._answers.length(self._encode(edit)) for edit in edits]
        return self._answers.say(view, [edit.applied.prompt for edit in edits], lengths)

    def _margins(self, edits: Sequence[Edit], upper: UpperBlocks) -> list[float]:
        known = dict(self._known)  # another thread may forget some meanwhile
        new = [edit for edit in edits if edit.id not in known]
        tokens = [self._encode(edit) for edit in new]
        for edit, *pair in zip(new, tokens, states_below(upper, tokens), strict=True):
            known[edit.id] = self._known[edit.id] = tuple(pair)
        recalled = [known[edit.id] for edit in edits]
        return smallest_margins(upper, [tokens for tokens, _ in recalled], [hidden for _, hidden in recalled])

    def _encode(self, edit: Edit) -> Tokens:
        return self._base.encode(edit.applied.prompt, edit.applied.correction)
