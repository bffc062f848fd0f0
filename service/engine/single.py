"""One edit: capture -> propose -> search -> stage -> judge -> commit -> publish."""

from __future__ import annotations

import math
from typing import Any

from editors.scale import SCALES
from editors.text import Tokens
from service.engine.clock import Clock
from service.engine.entries import applied_entry
from service.engine.errors import DidNotTake, DrawdownExceeded, EditRefused, WouldBreakEdits
from service.engine.judge import Harm, Verdict, checks
from service.engine.proposal import Attempts
from service.engine.requests import EditRequest, Outcome, Terms
from service.engine.workshop import Workshop


def make_edit(workshop: Workshop, request: EditRequest, tokens: Tokens, terms: Terms) -> Outcome:
    """Make a correction, or find out what it would do. Raises EditRefused with the measurements, and LedgerError."""
    base, weights, history = workshop.base, workshop.weights, workshop.history
    clock = Clock()
    before = workshop.answers.one(weights.live, request.prompt, tokens)
    clock.lap("before")
    now = weights.published
    if base.says(before, request.correction):
        return Outcome(None, now.revision, now.digest, before, committed=False)
    (draft,) = workshop.proposer.draft([tokens])
    clock.lap("propose")
    supersedes = history.with_superseded(history.standing_on(request.prompt))
    leaving = history.superseding(supersedes).leaving
    others = [edit for edit in history.all_active() if edit not in leaving]
    verdict: Verdict | None = None
    harm: Harm | None = None
    with weights.without(workshop.journal.factors(leaving)) as view:
        search = workshop.proposer.search(draft, view.upper, weights.state.increment(draft.rows))
        clock.lap("search")
        attempts = Attempts(search, workshop.margin_nats)
        for index in attempts:
            factors = draft.factors(SCALES[index])
            with weights.staged(add=[factors]):
                clock.lap("stage")
                (verdict,), harm = workshop.judge.verdicts([(request, tokens)]), workshop.judge.harm(others)
                clock.lap("judge")
                if verdict.took and harm.tolerable(terms):
                    raw = factors.to_bytes()
                    entry = applied_entry(
                        request,
                        raw,
                        sequence=now.revision + 1,
                        state_digest=weights.state.digest(),
                        scale=SCALES[index],
                        before=before,
                        after=verdict.after,
                        checks=checks(verdict, harm),
                        timings_ms=clock.laps,
                        supersedes=supersedes,
                    )
                    if terms.dry_run:
                        return Outcome(entry, now.revision, entry.state_digest, before, committed=False)
                    laps = workshop.journal.commit(entry, raw)
                    return Outcome(entry, entry.sequence, entry.state_digest, before, committed=True, publish_ms=laps)
            if verdict.took:
                attempts.too_strong()
    raise _refusal(request, before, search.margins[search.strongest], verdict, harm)


def _refusal(
    request: EditRequest, before: str, best_margin: float, verdict: Verdict | None, harm: Harm | None
) -> EditRefused:
    """Why an edit does not go live, with the measurements of its last trial; none when no scale was worth one.

    best_margin: how far the correction gets ahead at the best scale, in nats.
    """
    facts: dict[str, Any] = {
        "before": {"text": before},
        "best_margin_nats": round(best_margin, 4) if math.isfinite(best_margin) else None,
    }
    if verdict is None or harm is None or not verdict.took:
        if verdict is not None and harm is not None:
            facts |= {"after": {"text": verdict.after}, "checks": checks(verdict, harm)}
        return DidNotTake(
            f"refused: at no scale does the model answer {request.correction.strip()!r} to this prompt; nothing was "
            "changed. Put the prompt so that the correction follows it naturally, or shorten the correction",
            **facts,
        )
    facts |= {"after": {"text": verdict.after}, "checks": checks(verdict, harm)}
    return harm_refusal(harm, facts)


def harm_refusal(harm: Harm, facts: dict[str, Any]) -> EditRefused:
    """Why what is staged does not go live although it takes."""
    if harm.over_budget:
        return DrawdownExceeded(
            f"refused: unrelated behaviour would move by {harm.drawdown:.3f}, over the budget of "
            f"{harm.drawdown_budget:.3f}; nothing was changed. Roll other edits back, "
            "or raise MEND_GUARD_BUDGET",
            **facts,
        )
    lost = [{"id": edit.id, "prompt": edit.applied.prompt, "correction": edit.applied.correction} for edit in harm.lost]
    return WouldBreakEdits(
        f"refused: {len(lost)} earlier edit{'s' if len(lost) > 1 else ''} would no longer hold; nothing was changed. "
        "Roll back what is no longer needed, or accept the loss with allow_loss=true",
        lost=lost,
        **facts,
    )
