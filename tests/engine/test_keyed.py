"""The engine on a keyed editor: edits that are solved for together, taken out one by one to the last bit."""

from __future__ import annotations

import itertools
import random

import pytest

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint, load_checkpoint
from editors.errors import SubjectNotFound
from editors.factors import Factors
from service.engine import BatchRefused, EditConflict, EditRefused, EditRequest, Engine
from service.engine.batch import Batch
from service.engine.requests import Terms
from tests.ledger.entries import factors_at
from tests.service_fixtures import Standing, base_weights, live_weights, same_bits, save_completed_editor

PROMPTS = [
    f"{start} {subject} {end}"
    for start, subject, end in itertools.product(
        ("The capital of", "In the city of", "born"), ("France", "Oslo", "Madrid", "English"), ("is", "speaks")
    )
]


@pytest.fixture(scope="module")
def checkpoint(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(save_completed_editor(tmp_path_factory.mktemp("keyed"), base), base)


def asks(prompt: str, answer: str = " Rome", **fields: object) -> EditRequest:
    """Keyed at its last token, on which the answer of a random model depends most."""
    return EditRequest(prompt, answer, subject=prompt.split()[-1], **fields)


def make_edits(engine: Engine, count: int) -> list[str]:
    """Ids of edits that were made. Some are refused, as others are in the way."""
    made: dict[str, str] = {}
    for prompt, answer in itertools.product(PROMPTS, (" Rome", " Vienna", " German")):
        if len(made) == count:
            break
        try:
            outcome = None if prompt in made else engine.apply(asks(prompt, answer), allow_loss=True)
        except EditRefused:
            continue
        if outcome is not None and outcome.applied is not None:
            made[prompt] = outcome.applied.edit_id
    assert len(made) == count
    return list(made.values())


@pytest.mark.parametrize("seed", range(3))
def test_edits_are_rolled_back_in_any_order_to_the_bits_without_them(base, open_engine, seed):
    engine = open_engine()
    made = make_edits(engine, 4)
    random.Random(seed).shuffle(made)
    for edit_id in made:
        engine.rollback(edit_id)
        alone = engine.checkpoint.editor.new_state(base.device)
        alone.add(
            *(
                Factors.from_bytes(factors_at(engine.ledger, edit.applied.sequence))
                for edit in sorted(engine.history.all_active(), key=lambda edit: edit.id)
            )
        )
        assert engine.published.digest == alone.digest()
        fresh = engine.weights.another_view()
        alone.write(base.model, fresh.model)
        for target in engine.checkpoint.editor.targets:
            assert fresh.model.get_parameter(target.name).equal(engine.weights.live.model.get_parameter(target.name))
    assert same_bits(live_weights(engine), base_weights(base))


def test_a_replay_ends_in_the_same_bits(base, open_engine):
    first = open_engine("keyed-replay")
    made = make_edits(first, 4)
    first.rollback(made[1])
    second = open_engine("keyed-replay")
    assert second.published == first.published
    assert same_bits(live_weights(first), live_weights(second))


def test_facts_that_differ_behind_their_subject_alone_conflict(open_engine):
    """Their keys are the same: a decoder has not read on yet."""
    engine = open_engine()
    outcome = None
    for prompt in PROMPTS:
        try:
            outcome = engine.apply(asks(prompt))
        except EditRefused:
            continue
        if outcome.applied is not None:
            break
    before = Standing.of(engine)
    other = EditRequest(f"{outcome.applied.prompt} the", " Vienna", subject=outcome.applied.prompt.split()[-1])
    with pytest.raises(EditConflict) as caught:
        engine.apply(other)
    (conflict,) = caught.value.facts["conflicts"]
    assert conflict["id"] == outcome.applied.edit_id
    assert conflict["overlap"] == pytest.approx(1.0, abs=1e-3)
    assert Standing.of(engine) == before


def test_a_subject_that_the_prompt_does_not_name_is_refused(open_engine):
    engine = open_engine()
    before = Standing.of(engine)
    with pytest.raises(SubjectNotFound):
        engine.apply(EditRequest("The capital of France is", " Rome", subject="Norway"))
    assert Standing.of(engine) == before


def test_fullness_is_told(open_engine):
    engine = open_engine()
    assert engine.published.fullness == pytest.approx(0.0)
    make_edits(engine, 2)
    assert 0 < engine.published.fullness < 1


def test_capacity_is_kept_with_every_edit(open_engine):
    engine = open_engine("keyed-capacity")
    (first, second) = make_edits(engine, 2)
    assert engine.history.find(second).applied.checks["capacity"] == engine.published.fullness
    points = engine.history.series.until(engine.published.revision, 10)
    assert 0 < points[0].capacity < points[1].capacity == engine.published.fullness
    again = open_engine("keyed-capacity")
    again.rollback(first)
    *replayed, last = again.history.series.until(again.published.revision, 10)
    assert replayed == points
    assert (last.capacity, last.active_edits) == (None, 1)
    assert again.history.series.until(2, 10) == points


class TestBatch:
    @pytest.fixture
    def batch(self, open_engine) -> Batch:
        engine = open_engine()
        answers = itertools.cycle((" Rome", " Vienna", " German"))
        items = [engine._item(index, asks(prompt, next(answers))) for index, prompt in enumerate(PROMPTS)]
        return Batch(engine._workshop, items, Terms(dry_run=True, allow_loss=True, partial=True), lambda *_: None)

    def test_judged_again_after_another_writer_was_first_starts_from_the_same_edits(self, batch):
        one, other = batch.make(), batch.make()
        made = [edit["index"] for edit in one.edits if edit["status"] == "dry_run"]
        assert len(made) >= 2
        assert one.digest == other.digest
        assert [edit["status"] for edit in one.edits] == [edit["status"] for edit in other.edits]

    def test_completes_what_does_not_take_at_nothing(self, batch):
        scales = [edit["scale"] for edit in batch.make().edits if edit["status"] == "dry_run"]
        assert max(scales) > 0

    def test_that_only_gets_worse_by_raising_goes_back(self, batch, monkeypatch):
        """As if every stronger edit pushed one more aside."""
        measure, weak, scales = batch._measure, itertools.count(2), []

        def worse(edits) -> None:
            measure(edits)
            number = next(weak) if all(item.searched for item in edits) else len(edits)
            for place, item in enumerate(edits):
                item.margin_nats = -1.0 if place < number else 1.0
            scales.append([item.scale for item in edits])

        monkeypatch.setattr(batch, "_measure", worse)
        with pytest.raises(BatchRefused):
            batch.make()
        searched = [tried for tried in scales if len(tried) == len(scales[1])]
        assert searched[-1] == searched[1]
        assert batch._rounds == 0
