"""The engine on an editor that was never trained: edits take, hold beside each other, and leave without a trace."""

from __future__ import annotations

import pytest

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint, load_checkpoint
from editors.training_free.calibration import calibrated_folder
from tests.service_fixtures import asks, base_weights, live_weights, same_bits


@pytest.fixture(scope="module")
def checkpoint(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(calibrated_folder(base, tmp_path_factory.mktemp("editors")), base)


def test_edits_take_and_leave_without_a_trace(base, engine):
    digests, made = [engine.published.digest], []
    for country, answer in (("France", "Rome"), ("England", "Oslo"), ("Germany", "Vienna")):
        applied = engine.apply(asks(country, answer), allow_loss=True).applied
        assert engine.generate(applied.prompt, 1)[0].text.strip() == answer
        made.append(applied)
        digests.append(engine.published.digest)
    for applied in made[::-1]:
        digests.pop()
        engine.rollback(applied.edit_id)
        assert engine.published.digest == digests[-1]
    assert same_bits(live_weights(engine), base_weights(base))


def test_the_same_prompt_supersedes(engine):
    first = engine.apply(asks("France", "Rome")).applied
    second = engine.apply(asks("France", "Oslo")).applied
    assert second.supersedes == (first.edit_id,)
    assert engine.published.active_edits == 1


def test_a_replay_ends_in_the_same_bits(open_engine):
    one = open_engine("training-free-replay")
    one.apply(asks("France", "Rome"))
    other = open_engine("training-free-replay")
    assert other.published == one.published
    assert same_bits(live_weights(one), live_weights(other))
