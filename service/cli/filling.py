"""A ledger as it is after years: many edits that came and went, and a tenth of all entries that are active edits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count, cycle, islice
from typing import Any

from editors.factors import Factors, digest
from service.engine import EditRequest, Engine
from service.engine.entries import applied_entry, new_id
from service.ledger import Applied, Entry, RolledBack

PIECE = 500
CAPTURED = 16
FACTS = ("The capital of Australia is", "Melbourne"), ("The headquarters of Nokia is in", "Lyon")
NOT_ASKED = digest(b"a replay asks for the last one alone")


def fill(engine: Engine, entries: int) -> None:
    """Append about so many entries to an empty ledger. The edits are worked out as always, and not judged."""
    engine.catch_up()
    active = entries // 10
    drafts = list(islice(_drafts(engine), active))
    sequences = count(1)
    stored: list[tuple[Entry, bytes]] = []
    for factors in islice(cycle(drafts), (entries - active) // 2):
        edit = _applied(next(sequences), factors)
        rolled_back = RolledBack(
            sequence=next(sequences), edit_id=edit.edit_id, created_at=datetime.now(UTC), state_digest=NOT_ASKED
        )
        stored += [(edit, factors.to_bytes()), (rolled_back, b"")]
    stored += [(_applied(next(sequences), factors), factors.to_bytes()) for factors in drafts]
    state = engine.checkpoint.editor.new_state(engine.base.device)
    state.add(*drafts)
    last, raw = stored[-1]
    stored[-1] = last.model_copy(update={"state_digest": state.digest()}), raw
    for start in range(0, len(stored), PIECE):
        engine.ledger.append_all(stored[start : start + PIECE])


def _drafts(engine: Engine) -> Iterator[Factors]:
    proposer = engine._workshop.proposer
    for number in count():
        tokens = [
            engine.base.encode(f"In {PIECE * number + each}, {prompt}", correction)
            for each in range(CAPTURED)
            for prompt, correction in FACTS
        ]
        for draft in proposer.draft(proposer.capture(tokens)):
            yield draft.factors(1.0)


def _applied(sequence: int, factors: Factors) -> Applied:
    prompt, correction = FACTS[sequence % len(FACTS)]
    measured: dict[str, Any] = {"scale": 1.0, "before": prompt, "after": correction, "state_digest": NOT_ASKED}
    request = EditRequest(f"{sequence}: {prompt}", correction, actor="bench", reason="to be replayed")
    return applied_entry(request, factors.to_bytes(), edit_id=new_id(), sequence=sequence, **measured)
