"""Whatever is done to an engine, in whatever order: it is in the state of its active edits, and so is every other one.

A plain list of what was made is the model. Which edits are active follows from it by definition alone, and what they
must add up to is worked out afresh after every step.
"""

from __future__ import annotations

import os
import random
import signal
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint, load_checkpoint
from editors.factors import Factors
from service.engine import EditRefused, EditRequest, Engine, Note
from service.engine.errors import KillSwitchEngaged, RevisionNotRestorable
from service.failpoints import Failed, arm
from service.ledger import Applied, EmbeddedRedis, RedisLedger
from tests.ledger.entries import factors_at
from tests.service_fixtures import (
    PROMPTS,
    Standing,
    base_weights,
    live_weights,
    same_bits,
    save_completed_editor,
    save_editor,
    small_engine,
)
from tests.small import small_base

NOT_STORED, STORED = ("propose", "judge", "append"), ("commit", "settle")
"""Failpoints before and after the moment in which a change becomes durable."""
KINDS = {"sum": ("linear", save_editor), "sum of Conv1D": ("conv1d", save_editor),
         "least squares": ("linear", save_completed_editor)}  # fmt: skip
ASKED = {subject: PROMPTS[subject] for subject in ("France", "England", "Italy", "Norway")}
ASKED |= {"Oslo": "In the city of Oslo is", "Madrid": "born Madrid speaks"}
requests = st.builds(
    lambda subject, answer: EditRequest(ASKED[subject], f" {answer}", subject=subject),
    st.sampled_from(list(ASKED)),
    st.sampled_from(["Rome", "Vienna", "German"]),
)
terms = st.fixed_dictionaries(
    {"allow_loss": st.sampled_from([True, True, True, False]), "on_conflict": st.sampled_from(["refuse", "supersede"])}
)


@dataclass
class Made:
    """An edit that the engine said it made."""

    applied: Applied
    standing: bool = True


class Engines(RuleBasedStateMachine):
    """One engine under test, and one beside it on the same ledger, which writes too."""

    base: BaseModel
    checkpoint: Checkpoint
    server: EmbeddedRedis

    @initialize()
    def start(self) -> None:
        self.namespace = uuid.uuid4().hex
        self.ledgers: list[RedisLedger] = []
        self.made: list[Made] = []
        self.active_at: dict[int, list[str]] = {0: []}
        self.standing_at: dict[int, set[str]] = {0: set()}
        self.tagged: int | None = None
        self.compacted = False
        self.engine, self.other = self.open(), self.open()

    def open(self) -> Engine:
        self.ledgers.append(RedisLedger.connect(self.server.url, self.namespace))
        return small_engine(self.base, self.checkpoint, self.ledgers[-1])

    def teardown(self) -> None:
        for ledger in self.ledgers:
            ledger.close()

    @rule(request=requests, terms=terms)
    def edit(self, request, terms):
        self.attempt(self.engine, request, terms)

    @rule(request=requests, terms=terms)
    def edit_elsewhere(self, request, terms):
        self.attempt(self.other, request, terms)
        self.engine.follow()

    def attempt(self, engine: Engine, request: EditRequest, terms: dict) -> None:
        standing = Standing.of(self.engine)
        outcome = None
        with suppress(EditRefused):
            outcome = engine.apply(request, **terms)
        if outcome is not None and outcome.committed:
            self.made.append(Made(outcome.applied))
        else:
            assert Standing.of(self.engine) == standing

    @rule(request=requests, terms=terms)
    def dry_run(self, request, terms):
        standing = Standing.of(self.engine)
        with suppress(EditRefused):
            self.engine.apply(request, dry_run=True, **terms)
        assert Standing.of(self.engine) == standing

    @rule(
        batch=st.lists(requests, min_size=1, max_size=4), terms=terms, mode=st.sampled_from(["", "", "dry", "partial"])
    )
    def edit_in_a_batch(self, batch, terms, mode):
        dry_run, partial = mode == "dry", mode == "partial"
        standing = Standing.of(self.engine)
        outcome = None
        with suppress(EditRefused):
            outcome = self.engine.apply_batch(batch, partial=partial, dry_run=dry_run, **terms)
        if outcome is None or not outcome.committed:
            assert Standing.of(self.engine) == standing
            return
        assert not dry_run
        ids = [item["id"] for item in outcome.edits if item["status"] == "applied"]
        assert partial or all(item["status"] in ("applied", "unchanged") for item in outcome.edits)
        assert outcome.revision == standing.published.revision + len(ids)
        self.made += [Made(self.engine.history.find(edit_id).applied) for edit_id in ids]

    @rule(number=st.integers(0, 99), elsewhere=st.booleans())
    def roll_back(self, number, elsewhere):
        standing = [made for made in self.made if made.standing]
        if standing:
            before = set(self.active())
            made = standing[number % len(standing)]
            done = (self.other if elsewhere else self.engine).rollback(made.applied.edit_id)
            self.engine.follow()
            made.standing = False
            assert {edit.id for edit in done.change.returning} == set(self.active()) - before

    @rule(number=st.integers(0, 99), preview=st.booleans(), tag=st.booleans())
    def restore(self, number, preview, tag):
        """What was rolled back by itself may have lost its factors, but for what stood at a tag."""
        revision, standing = list(self.standing_at.items())[number % len(self.standing_at)]
        to = "tag" if tag and self.tagged is not None else revision
        if to == "tag":
            standing = self.standing_at[self.tagged]
        before = Standing.of(self.engine)
        try:
            done = self.engine.restore(to, dry_run=preview)
        except RevisionNotRestorable:
            assert self.compacted
            assert to != "tag"
            return
        if not done.committed:
            assert (done.entry is None) == (standing == self.standing())
            assert Standing.of(self.engine) == before
            return
        for made in self.made:
            made.standing = made.applied.edit_id in standing

    @rule()
    def tag(self):
        wanted = self.engine.published.revision
        self.tagged = self.other.tag("tag", wanted).revision
        self.engine.follow()
        assert self.tagged == wanted

    @rule(elsewhere=st.booleans())
    def kill_and_revive(self, elsewhere):
        before = self.engine.published.digest
        self.engine.kill()
        assert same_bits(live_weights(self.engine), base_weights(self.base))
        with pytest.raises(KillSwitchEngaged):
            self.engine.apply(EditRequest(PROMPTS["France"], " Rome"))
        self.compact()
        self.other.follow()
        (self.other if elsewhere else self.engine).revive()
        self.engine.follow()
        assert self.engine.published.digest == before

    @precondition(lambda self: len(self.active()) >= 3)
    @rule()
    def roll_back_everything(self):
        for made in self.made[::-1]:
            if made.standing:
                self.engine.rollback(made.applied.edit_id)
                made.standing = False
        assert same_bits(live_weights(self.engine), base_weights(self.base))

    @rule()
    def restart(self):
        self.engine = self.open()

    @rule()
    def restart_elsewhere(self):
        self.other = self.open()

    @rule(request=requests, terms=terms, point=st.sampled_from(NOT_STORED + STORED))
    def die_while_editing(self, request, terms, point):
        """Whoever lost the answer asks again with the same key: one edit, made before or now."""
        request = replace(request, idempotency_key=uuid.uuid4().hex, request_digest="digest")
        arm(f"{point}=error")
        try:
            with suppress(EditRefused):
                assert not self.engine.apply(request, **terms).committed  # it never came to that point
            return
        except Failed:
            pass
        finally:
            arm("")
        self.engine = self.open()
        assert self.engine.published.revision == self.engine.ledger.head()
        outcome = self.again(request, terms)
        assert (outcome is not None and outcome.replayed) == (point in STORED)
        if outcome is not None and outcome.committed:
            self.made.append(Made(outcome.applied))
            assert replace(self.again(request, terms), publish_ms={}) == replace(outcome, replayed=True, publish_ms={})

    def again(self, request, terms):
        with suppress(EditRefused):
            return self.engine.apply(request, **terms)

    @rule(number=st.integers(0, 99), point=st.sampled_from(("append", *STORED)))
    def die_while_rolling_back(self, number, point):
        standing = [made for made in self.made if made.standing]
        if not standing:
            return
        made = standing[number % len(standing)]
        note = Note(idempotency_key=uuid.uuid4().hex, request_digest="digest")
        arm(f"{point}=error")
        with pytest.raises(Failed):
            self.engine.rollback(made.applied.edit_id, note)
        arm("")
        self.engine = self.open()
        assert self.engine.history.find(made.applied.edit_id).standing == (point not in STORED)
        done = self.engine.rollback(made.applied.edit_id, note)
        again = self.engine.rollback(made.applied.edit_id, note)
        assert (again.entry, again.revision, again.digest) == (done.entry, done.revision, done.digest)
        made.standing = False

    @rule()
    def kill_redis(self):
        os.kill(self.server.pid, signal.SIGKILL)
        while not self.server.ensure_running():
            pass

    @rule()
    def compact(self):
        self.compacted = True
        self.engine.ledger.compact()

    @rule()
    def audit(self):
        audit = self.engine.audit()
        assert audit.published == self.engine.published
        assert [each.edit.id for each in audit.edits] == self.active()

    def standing(self) -> set[str]:
        return {made.applied.edit_id for made in self.made if made.standing}

    def active(self) -> list[str]:
        standing = [made.applied for made in self.made if made.standing]
        return [each.edit_id for each in standing if not any(each.edit_id in other.supersedes for other in standing)]

    @invariant()
    def is_in_the_state_of_its_active_edits(self):
        engine, active = self.engine, self.active()
        prompts = [made.applied.prompt for made in self.made if made.applied.edit_id in active]
        assert len(set(prompts)) == len(prompts)
        assert engine.published.revision == engine.ledger.head()
        assert engine.published.active_edits == len(active)
        assert [edit.id for edit in engine.history.all_active()] == active

        fresh = self.checkpoint.editor.new_state(self.base.device)
        sequences = [made.applied.sequence for made in self.made if made.applied.edit_id in active]
        random.Random(0).shuffle(sequences)
        fresh.add(*(Factors.from_bytes(factors_at(engine.ledger, sequence)) for sequence in sequences))
        assert engine.published.digest == fresh.digest() == engine.weights.state.digest()
        expected = engine.weights.another_view().model
        fresh.write(self.base.model, expected)
        for name, parameter in expected.named_parameters():
            assert parameter.equal(engine.weights.live.model.get_parameter(name)), name

    @invariant()
    def knows_what_was_active_at_every_revision(self):
        self.active_at[self.engine.published.revision] = self.active()
        self.standing_at[self.engine.published.revision] = self.standing()
        for revision, active in self.active_at.items():
            assert [edit.id for edit in self.engine.history.active_at(revision)] == active

    @invariant()
    def every_engine_on_its_ledger_becomes_the_same(self):
        self.other.follow()
        assert self.other.published == self.engine.published
        assert same_bits(live_weights(self.other), live_weights(self.engine))
        assert list(self.other.history.newest_first()) == list(self.engine.history.newest_first())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_changes(kind: str, tmp_path: Path) -> None:
    layout, save = KINDS[kind]
    base = small_base(layout)
    checkpoint = load_checkpoint(save(tmp_path / "editor", base), base)
    with EmbeddedRedis(tmp_path / "redis") as server:
        machine = type("Machine", (Engines,), {"base": base, "checkpoint": checkpoint, "server": server})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=8,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
