"""Generation while edits come and go: every answer is that of the state which it names."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from service.engine import EditRefused, Outcome, RevisionMismatch
from service.engine.errors import RequestInFlight
from tests.service_fixtures import COUNTRIES, asks, base_weights, live_weights, namespace_of, same_bits

READERS = 4
TOGGLES = 12


def test_every_answer_is_right_for_the_revision_that_it_names(engine, base, first):
    request = first
    without = engine.generate(request.prompt, 6)[0].text
    outcome = engine.apply(request)
    with_it = engine.generate(request.prompt, 6)[0].text
    engine.rollback(outcome.applied.edit_id)
    assert without != with_it
    expected = {engine.published.digest: without, outcome.digest: with_it}
    done = threading.Event()

    def read() -> list[tuple[str, str, int]]:
        seen = []
        while not done.is_set():
            said, published = engine.generate(request.prompt, 6)
            pristine, _ = engine.generate(request.prompt, 6, "base")
            assert pristine.text == without
            seen.append((published.digest, said.text, published.revision))
        return seen

    with ThreadPoolExecutor(READERS) as readers:
        reading = [readers.submit(read) for _ in range(READERS)]
        try:
            for _ in range(TOGGLES):
                engine.rollback(engine.apply(request).applied.edit_id)
        finally:
            done.set()
        seen = [answer for each in reading for answer in each.result()]
    assert {digest: text for digest, text, _ in seen}.items() <= expected.items()
    assert all(expected[digest] == text for digest, text, _ in seen)
    # Odd revisions have the edit, even ones do not.
    assert all((digest == outcome.digest) == (revision % 2 == 1) for digest, _, revision in seen)
    assert len({revision for *_, revision in seen}) > 2
    assert engine.published.revision == 2 + 2 * TOGGLES
    assert same_bits(live_weights(engine), base_weights(base))


def test_edits_from_many_threads_become_one_sequence(engine, open_engine):
    requests = [asks(country, city) for country in COUNTRIES[:4] for city in ("Rome", "Oslo")]

    def apply(request) -> int:
        for _ in range(20):
            try:
                outcome = engine.apply(request, expected_revision=engine.published.revision)
            except RevisionMismatch:
                continue
            except EditRefused:
                return 0
            return int(outcome.committed)
        return 0

    with ThreadPoolExecutor(4) as writers:
        made = sum(writers.map(apply, requests))
    assert made >= 1
    assert engine.published.revision == engine.ledger.head() == made
    assert [edit.applied.sequence for edit in engine.history.newest_first()] == list(range(made, 0, -1))
    again = open_engine(namespace_of(engine))
    assert again.published == engine.published
    assert same_bits(live_weights(again), live_weights(engine))


@pytest.mark.parametrize("requests", [8])
def test_one_idempotency_key_from_many_threads_makes_one_edit(engine, requests, first):
    request = replace(first, idempotency_key="key", request_digest="one")

    def apply(_: int) -> Outcome:
        while True:
            try:
                return engine.apply(request)
            except RequestInFlight:
                time.sleep(0.01)

    with ThreadPoolExecutor(requests) as callers:
        outcomes = list(callers.map(apply, range(requests)))
    assert engine.ledger.head() == 1
    assert len({outcome.applied.edit_id for outcome in outcomes}) == 1
    assert sum(not outcome.replayed for outcome in outcomes) == 1
