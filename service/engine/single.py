"""One edit: capture -> propose -> search -> stage -> judge -> commit -> publish."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from editors.scale import SCALES
from editors.text import Tokens
from service.engine.capacity import require_room
from service.engine.clock import Clock
from service.engine.conflicts import find_near, find_place
from service.engine.entries import applied_entry, new_id
from service.engine.errors import AlreadyExpired
from service.engine.judge import checks, did_not_take, finite, too_harmful
from service.engine.proposal import Attempts
from service.engine.requests import EditRequest, Outcome, Terms
from service.engine.workshop import Workshop
from service.ledger import Applied


def make_edit(workshop: Workshop, request: EditRequest, tokens: Tokens, terms: Terms) -> Outcome:
    """Make a correction, or find out what it would do.

    Raises AlreadyExpired; EditRefused with the measurements; LedgerError.
    """
    require_time(request)
    with Clock(workshop.telemetry) as clock:
        return _make(workshop, clock, request, tokens, terms)


def _make(workshop: Workshop, clock: Clock, request: EditRequest, tokens: Tokens, terms: Terms) -> Outcome:
    weights, history, judge = workshop.weights, workshop.history, workshop.judge
    clock.begin("before")
    before = workshop.answers.one(weights.live, request.prompt, tokens)
    now = weights.published
    if workshop.base.says(before, request.correction):
        return Outcome(None, now.revision, now.digest, before, committed=False, prompt=request.prompt)
    clock.begin("capture")
    captured = workshop.proposer.capture([tokens])
    clock.begin("propose")
    (draft,) = workshop.proposer.draft(captured)
    clock.begin("search")
    workshop.give_way()
    near = find_near(weights.state.overlaps(draft.rows), history)
    place = find_place(request, near, history, terms.on_conflict)
    others = [edit for edit in history.all_active() if edit.id not in place.supersedes]
    facts: dict[str, Any] = {}
    took = harm = None
    with weights.without(workshop.journal.factors(history.superseding(place.supersedes).leaving)) as view:
        draft, search = workshop.proposer.search(draft, view.upper, weights.state)
        attempts = Attempts(search, workshop.margin_nats)
        for index in attempts:
            clock.begin("stage", scale=SCALES[index])
            workshop.give_way()
            factors = draft.factors(SCALES[index])
            with weights.staged(add=[factors]):
                require_room(weights.state.fullness())
                clock.begin("judge", scale=SCALES[index])
                (verdict,), harm = judge.verdicts([(request, tokens)]), judge.harm(others)
                clock.end()
                workshop.give_way()
                took = verdict.took
                measured = {"after": verdict.after, "checks": checks(verdict, harm, place)}
                if took and harm.tolerable(terms):
                    raw = factors.to_bytes()
                    entry = applied_entry(
                        request,
                        raw,
                        edit_id=new_id(),
                        sequence=now.revision + 1,
                        state_digest=weights.state.digest(),
                        scale=SCALES[index],
                        before=before,
                        timings_ms=clock.laps,
                        supersedes=place.supersedes,
                        **measured,
                    )
                    return _made(workshop, entry, raw, terms)
            facts = {**measured, "after": {"text": verdict.after}}
            if took:
                attempts.too_strong()
    facts |= {"before": {"text": before}, "best_margin_nats": finite(search.margins[search.strongest])}
    raise too_harmful(harm, facts) if took else did_not_take(request.correction, facts)


def _made(workshop: Workshop, entry: Applied, raw: bytes, terms: Terms) -> Outcome:
    now = workshop.weights.published
    if terms.dry_run:
        return Outcome(entry, now.revision, entry.state_digest, entry.before, committed=False, prompt=entry.prompt)
    laps = workshop.journal.commit((entry, raw))
    return replace(repeated_edit(entry), replayed=False, publish_ms=laps)


def require_time(request: EditRequest) -> None:
    """Raises AlreadyExpired when an edit would be rolled back at once."""
    at = request.expires_at
    if at is not None and at <= datetime.now(UTC):
        raise AlreadyExpired(f"expires_at is {at.isoformat()}, which is over; give a time to come", field="expires_at")


def repeated_edit(applied: Applied) -> Outcome:
    """The outcome of an edit as its entry in the ledger tells it."""
    return Outcome(
        applied,
        applied.sequence,
        applied.state_digest,
        applied.before,
        committed=True,
        prompt=applied.prompt,
        replayed=True,
    )
