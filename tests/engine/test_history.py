"""Which edits are active: those that stand, and that nothing which stands supersedes."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.history import History
from service.engine.series import MAX_POINTS, Series
from service.ledger import Applied, Entry, Restored, RolledBack
from tests.ledger.entries import applied, batch, restored, rolled_back, tagged

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
        if what % 2 if isinstance(what, int) else what == "b":  # as a replay does
            history.adopt(history.fork())
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
        points = [(point.revision, point.kind, point.active_edits) for point in history.series.until(sequence, 20)]
        assert points == [
            (revision, entries[revision - 1].kind, len(now))
            for revision, (before, now) in enumerate(itertools.pairwise(active), 1)
            if before != now
        ]


class TestTheSeries:
    def test_has_the_figures_of_the_judgement_where_there_are_any(self):
        history = History()
        history.record(applied(1, prompt="a", checks={"drawdown": 0.25, "capacity": 0.5}))
        history.record(applied(2, prompt="b", checks={"drawdown": 0.25, "capacity": None}))
        history.record(applied(3, prompt="c"))
        history.record(rolled_back(4))
        points = history.series.until(4, 10)
        figures = [(point.drawdown, point.capacity) for point in points]
        assert figures == [(0.25, 0.5), (0.25, None), (None, None), (None, None)]

    def test_has_one_point_for_a_batch_and_none_for_what_changes_nothing(self):
        history = History()
        for entry, _ in batch(1, [b"", b"", b""]):
            history.record(entry.model_copy(update={"prompt": entry.edit_id}))
        history.record(tagged(4, "named", 3))
        history.record(restored(5, 3))
        points = history.series.until(5, 10)
        assert [(point.revision, point.active_edits) for point in points] == [(3, 3)]

    def test_ends_where_it_is_to_and_keeps_the_newest(self):
        series = Series()
        for sequence in range(1, MAX_POINTS + 4):
            series.record(applied(sequence), 1, 0)
        points = series.until(MAX_POINTS + 1, MAX_POINTS)
        assert [points[0].revision, points[-1].revision] == [4, MAX_POINTS + 1]
        assert [point.revision for point in series.until(10, 2)] == [9, 10]
        assert points[-1].active_edits == MAX_POINTS + 1
