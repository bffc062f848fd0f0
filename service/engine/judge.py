"""Whether what is staged is good enough to go live: measured on the candidate, before anything is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from editors.base_model import BaseModel
from editors.text import Tokens
from service.engine.answers import Answers
from service.engine.conflicts import Place
from service.engine.errors import DidNotTake, DrawdownExceeded, WouldBreakEdits
from service.engine.guard import Guard
from service.engine.held import HeldEdits
from service.engine.history import Edit
from service.engine.requests import EditRequest, Limits, Terms
from service.engine.texts import asked, in_form
from service.engine.weights import View, Weights


@dataclass(frozen=True)
class Verdict:
    """How one edit fares itself. took: greedy decoding from the prompt begins with the correction.

    paraphrases, keep: the caller's own prompts, each with what was said. forms: the edit's own, in other forms.
    """

    after: str
    took: bool
    paraphrases: list[dict[str, JsonValue]]
    keep: list[dict[str, JsonValue]]
    forms: list[dict[str, JsonValue]]


@dataclass(frozen=True)
class Harm:
    """What all that is staged does to the rest. drawdown: on the guard prompts, 0 to 1.

    capacity: how much of it is taken, 0 to 1; None of a state that has no such figure.
    lost: other active edits that hold now, and would no longer.
    """

    drawdown: float
    drawdown_budget: float
    capacity: float | None
    lost: tuple[Edit, ...]

    @property
    def over_budget(self) -> bool:
        return self.drawdown > self.drawdown_budget

    def tolerable(self, terms: Terms) -> bool:
        return not self.over_budget and (terms.allow_loss or not self.lost)


def checks(verdict: Verdict, harm: Harm, place: Place) -> dict[str, JsonValue]:
    """The measurements as they are stored in the ledger and shown to the caller."""
    return {
        "took": verdict.took,
        "paraphrases": list(verdict.paraphrases),
        "keep": list(verdict.keep),
        "forms": list(verdict.forms),
        "drawdown": harm.drawdown,
        "drawdown_budget": harm.drawdown_budget,
        "capacity": harm.capacity,
        "lost": [edit.id for edit in harm.lost],
        "conflicts": place.checks(),
    }


class Judge:
    """Compares the candidate with the pristine and the live view."""

    def __init__(
        self, base: BaseModel, weights: Weights, answers: Answers, guard: Guard, held: HeldEdits, limits: Limits
    ) -> None:
        self._base, self._weights, self._answers, self._limits = base, weights, answers, limits
        self._guard, self._held = guard, held

    def verdicts(self, staged: Sequence[tuple[EditRequest, Tokens]]) -> list[Verdict]:
        """One for each staged edit."""
        base, candidate = self._base, self._weights.candidate

        def keep_prompts(request: EditRequest) -> list[str]:
            return [asked(base, request, text) for text in request.keep]

        after = self._say(candidate, staged, lambda request: [request.prompt])
        paraphrased = self._say(
            candidate, staged, lambda request: [asked(base, request, text) for text in request.paraphrases]
        )
        formed = self._say(
            candidate, staged, lambda request: [in_form(base, request, form) for form in request.check_forms]
        )
        kept = self._say(candidate, staged, keep_prompts)
        original = self._say(self._weights.pristine, staged, keep_prompts)
        return [
            Verdict(
                after=said,
                took=self._base.says(said, request.correction),
                paraphrases=[
                    {"prompt": prompt, "took": self._base.says(text, request.correction), "text": text}
                    for prompt, text in zip(request.paraphrases, paraphrases, strict=True)
                ],
                keep=[
                    {"prompt": prompt, "kept": then == now, "before": then, "after": now}
                    for prompt, then, now in zip(request.keep, before, keep, strict=True)
                ],
                forms=[
                    {
                        "form": form,
                        "prompt": in_form(base, request, form),
                        "took": base.says(text, request.correction),
                        "text": text,
                    }
                    for form, text in zip(request.check_forms, forms, strict=True)
                ],
            )
            for (request, _), (said,), paraphrases, before, keep, forms in zip(
                staged, after, paraphrased, original, kept, formed, strict=True
            )
        ]

    def harm(self, others: Sequence[Edit]) -> Harm:
        """others: active edits that stay."""
        return Harm(
            drawdown=self._guard.drawdown(self._weights.candidate.upper),
            drawdown_budget=self._limits.guard_budget,
            capacity=self._weights.state.fullness(),
            lost=tuple(self._held.lost(others, self._weights.live, self._weights.candidate)),
        )

    def _say(
        self,
        view: View,
        staged: Sequence[tuple[EditRequest, Tokens]],
        prompts_of: Callable[[EditRequest], Sequence[str]],
    ) -> list[list[str]]:
        """What a view answers to some prompts of each edit."""
        asked = [(row, prompt) for row, (request, _) in enumerate(staged) for prompt in prompts_of(request)]
        lengths = [self._answers.length(staged[row][1]) for row, _ in asked]
        answers: list[list[str]] = [[] for _ in staged]
        for (row, _), text in zip(
            asked, self._answers.say(view, [prompt for _, prompt in asked], lengths), strict=True
        ):
            answers[row].append(text)
        return answers


def finite(nats: float) -> float | None:
    """As it is told: JSON has no NaN."""
    return round(nats, 4) if math.isfinite(nats) else None


def did_not_take(correction: str, facts: dict[str, Any]) -> DidNotTake:
    """Why an edit does not go live."""
    return DidNotTake(
        f"refused: at no scale does the model answer {correction.strip()!r} to this prompt; nothing was changed. "
        "Put the prompt so that the correction follows it naturally, or shorten the correction",
        **facts,
    )


def too_harmful(harm: Harm, facts: dict[str, Any]) -> DrawdownExceeded | WouldBreakEdits:
    """Why what is staged does not go live although it takes."""
    if harm.over_budget:
        return DrawdownExceeded(
            f"refused: unrelated behaviour would move by {harm.drawdown:.3f}, over the budget of "
            f"{harm.drawdown_budget:.3f}; nothing was changed. Roll other edits back, or raise MEND_GUARD_BUDGET",
            **facts,
        )
    lost = [{"id": edit.id, "prompt": edit.applied.prompt, "correction": edit.applied.correction} for edit in harm.lost]
    return WouldBreakEdits(
        f"refused: {len(lost)} earlier edit{'s' if len(lost) > 1 else ''} would no longer hold; nothing was changed. "
        "Roll back what is no longer needed, or accept the loss with allow_loss=true",
        lost=lost,
        **facts,
    )
