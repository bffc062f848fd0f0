"""Which edits are active: those that stand, and that nothing which stands supersedes."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.history import History
from service.ledger import Applied, Entry, Restored, RolledBack
from tests.ledger.entries import applied, restored, rolled_back

NOW = datetime.now(UTC)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.sampled_from("abc"), st.sets(st.integers(0, 4), max_size=2)),
        st.tuples(st.just("roll back"), st.integers(0, 20), st.none()),
        st.tuples(st.just("restore"), st.integers(0, 20), st.none()),
    ),
    max_size=14,
)


def standing_by_definition(entries: list[Entry]) -> set[str]:
    standing = set()
    for entry in entries:
        if isinstance(entry, Restored):
            standing = standing_by_definition(entries[: entry.revision])
        elif isinstance(entry, RolledBack):
            standing.remove(entry.edit_id)
        else:
            standing.add(entry.edit_id)
    return standing


def active_by_definition(entries: list[Entry]) -> list[str]:
    names = standing_by_definition(entries)
    standing = [entry for entry in entries if isinstance(entry, Applied) and entry.edit_id in names]
    return [each.edit_id for each in standing if not any(each.edit_id in other.supersedes for other in standing)]


@settings(max_examples=300, deadline=None)
@given(steps=steps)
def test_is_what_the_definition_says_after_any_entries(steps):
    history, entries, active = History(), [], [[]]
    for kind, what, conflicts in steps:
        sequence = len(entries) + 1
        if kind == "apply":
            # An edit takes the place of those of its prompt, and of some others that are active.
            others = [edit for row, edit in enumerate(history.all_active()) if row in conflicts]
            supersedes = history.with_superseded([*history.standing_on(what), *others])
            entry = applied(sequence, prompt=what, supersedes=supersedes, created_at=NOW)
        elif kind == "restore":
            revision = what % sequence
            change = history.restoring(revision, NOW)
            entry = restored(sequence, revision, taken=change.taken, returned=change.returned)
        else:
            standing = [edit.id for edit in history.newest_first() if edit.standing]
            if not standing:
                continue
            entry = rolled_back(sequence, standing[what % len(standing)], created_at=NOW)
        change = history.change(entry)
        history.record(entry)
        entries.append(entry)
        active.append(active_by_definition(entries))

        assert [edit.id for edit in history.all_active()] == active[-1]
        leaving, returning = ({edit.id for edit in edits} for edits in (change.leaving, change.returning))
        own = {entry.edit_id} if kind == "apply" else set()
        assert (set(active[-2]) - leaving) | returning | own == set(active[-1])
        assert leaving <= set(active[-2])
        assert not returning & set(active[-2])
        prompts = [history.find(edit_id).applied.prompt for edit_id in active[-1]]
        assert len(set(prompts)) == len(prompts)
        for edit in history.newest_first():
            assert edit.active == (edit.id in active[-1])
            assert (edit.superseded_by is None) or edit.superseded_by in active[-1]
            assert edit.status == ("applied" if edit.active else "superseded" if edit.standing else "rolled_back")
        for revision, expected in enumerate(active):
            assert [edit.id for edit in history.active_at(revision)] == expected
