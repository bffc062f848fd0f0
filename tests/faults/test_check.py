"""What the checks are worth: a loss that is made on purpose is found, whichever it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.check import Model, Replay, find_losses
from tests.faults.clients import Answer, Record
from tests.faults.faults import prepare
from tests.faults.processes import Scene

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="services end with the process that forked them"),
]
Lose = Callable[[Scene, Record], None]


@pytest.fixture(scope="module")
def model(models: tuple[Model, Model]) -> Model:
    return models[0]


@pytest.fixture
def scene(model: Model, tmp_path: Path) -> Iterator[Scene]:
    """A service on a Redis of its own."""
    with Scene(tmp_path, model.environment(), beside=True) as scene:
        scene.add()
        yield scene


@pytest.fixture
def record(scene: Scene) -> Record:
    """Of a few edits, the last of which is rolled back."""
    record, rng = Record(), Random(0)
    prepare(scene, record, rng)
    record.draw(rng, "rollback").send(scene.service.http)
    return record


def everything(scene: Scene, record: Record) -> None:
    with scene.client() as client:
        client.flushall()
    scene.service.kill()


def factors(scene: Scene, record: Record) -> None:
    """Those of all edits become those of the first."""
    with scene.client() as client:
        (key,) = client.keys("mend:*:factors")
        stored = client.hgetall(key)
        client.hset(key, mapping=dict.fromkeys(stored, stored[min(stored)]))


def the_answer_that_it_was_refused(scene: Scene, record: Record) -> None:
    record.of("made")[0].answers = [Answer(422, {"code": "did_not_take"})]


def a_good_reason(scene: Scene, record: Record) -> None:
    record.draw(Random(1), "edit").answers.append(Answer(422, {"code": "invalid_request"}))


def the_same_answer(scene: Scene, record: Record) -> None:
    made = record.of("made")[0]
    made.answers = [Answer(201, {**made.answers[0].body, "scale": -1.0})]


def who_asked(scene: Scene, record: Record) -> None:
    record.asks.remove(record.of("made")[0])


def what_was_live(scene: Scene, record: Record) -> None:
    record.seen.add((1, "sha256:0"))


FOUND = {
    everything: "but the ledger holds []",
    factors: "GET /revision should be",
    the_answer_that_it_was_refused: "(refused) was answered with [], but the ledger holds [('applied'",
    a_good_reason: "refused for no good reason",
    the_same_answer: "'scale': -1.0",
    who_asked: "nobody asked for",
    what_was_live: "revision 1 was live with the state sha256:0",
}


@pytest.mark.parametrize("lose", FOUND, ids=lambda lose: lose.__name__)
def test_finds_the_loss_of(lose: Lose, scene: Scene, record: Record, model: Model) -> None:
    assert find_losses(scene, record, model) == []
    lose(scene, record)
    assert FOUND[lose] in "\n".join(find_losses(scene, record, model))


def test_finds_that_an_entry_was_altered(scene: Scene, record: Record) -> None:
    with scene.client() as client:
        assert Replay.of(client).problems == []
        (key,) = client.keys("mend:*:entries")
        stored = client.xrange(key)
        client.delete(key)
        for entry_id, fields in stored:
            space = b" " * (entry_id == b"2-0")
            client.xadd(key, {**fields, b"entry": fields[b"entry"] + space}, id=entry_id)
        assert Replay.of(client).problems == ["the chain breaks at entry 2"]
