"""Generations beside each other: as if each were alone, and none of them in the way of the others for long."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest
import torch

from editors.sampling import Sampling
from service.engine import (
    Ask,
    Busy,
    Ended,
    Engine,
    Event,
    GenerationFailed,
    GenerationTimeout,
    Limits,
    NotReady,
    Said,
    Wish,
)
from service.engine.asking import Ticket
from tests.api.conftest import wait_until
from tests.service_fixtures import LIMITS, PROMPTS
from tests.small import SMALL_MODELS

POISON = 2
"""A token, that for unknown words, at which the model fails or says what is no number."""


@dataclass
class Heard:
    """Everything that was told of one request."""

    events: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    texts: dict[int, str] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    ticket: Ticket | None = None

    def wait(self, asks: int = 1) -> Heard:
        while len(self.ended) < asks:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Ended):
                self.ended[event.index] = event
            else:
                self.texts[event.index] = self.texts.get(event.index, "") + event.piece.text
        return self

    @property
    def text(self) -> str:
        return self.texts.get(0, "")


def ask(engine: Engine, *asks: Ask) -> Heard:
    heard = Heard()
    heard.ticket = engine.begin(asks, heard.events.put)
    return heard


@contextmanager
def hooked(model, hook) -> Iterator[None]:
    """hook: is given the tokens that the model reads, and what it makes of them."""

    def run(_module, _args, told, output):
        hook(told["input_ids"], output.logits)

    handle = model.register_forward_hook(run, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def slowed(model, seconds: float = 0.02) -> Iterator[list[int]]:
    """Every pass takes a while. Counts the rows of each."""
    rows: list[int] = []
    with hooked(model, lambda ids, _logits: (rows.append(len(ids)), time.sleep(seconds))):
        yield rows


def limited(**limits: object) -> Limits:
    return Limits(**{"answer_tokens": LIMITS.answer_tokens, "guard_budget": LIMITS.guard_budget, **limits})


class TestTogether:
    @pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)
    def test_everybody_is_told_what_is_said_alone(self, engine):
        drawn = random.Random(5)
        asks = [
            Ask(
                drawn.choice([*PROMPTS.values()]) + drawn.choice(["", " the city of", " a" * 20]),
                Wish(drawn.randint(1, 24), drawn.choice([Sampling(), Sampling(1.2, 0.9, seed=drawn.randint(0, 9))])),
                drawn.choice(["live", "base"]),
            )
            for _ in range(30)
        ]
        expected = [engine.generate(each.prompt, each.wish.max_new_tokens, each.which, each.wish.sampling)[0].text
                    for each in asks]  # fmt: skip
        heard = []
        for each in asks:
            heard.append(ask(engine, each))
            time.sleep(drawn.choice([0, 0.003]))
        assert [each.wait().text for each in heard] == expected

    def test_texts_share_passes(self, engine):
        with slowed(engine.weights.live.model) as rows:
            heard = [ask(engine, Ask("The city", Wish(10))) for _ in range(6)]
            for each in heard:
                each.wait()
        assert max(rows) == 6
        assert len(rows) < 30

    def test_one_request_may_ask_for_several(self, engine):
        asks = [Ask("The city", Wish(5)), Ask("The city", Wish(5), "base"), Ask(PROMPTS["Italy"], Wish(3))]
        heard = ask(engine, *asks).wait(3)
        assert [heard.texts[n] for n in range(3)] == [
            engine.generate(each.prompt, each.wish.max_new_tokens)[0].text for each in asks
        ]
        assert heard.ticket.published == engine.published

    def test_a_newcomer_does_not_wait_for_the_end_of_others(self, engine):
        with slowed(engine.weights.live.model):
            long = [ask(engine, Ask("The city", Wish(100, Sampling(1.0, seed=n)))) for n in range(3)]
            short = ask(engine, Ask("Germany", Wish(3))).wait()
            assert not any(each.ticket.over for each in long)
            assert short.ended[0].completion_tokens <= 3
            for each in long:
                each.ticket.cancel()

    def test_who_comes_while_the_thread_is_about_to_end_is_served(self, engine, monkeypatch):
        monkeypatch.setattr("service.engine.generator.LINGERS_S", 0.0005)
        drawn = random.Random(1)
        for _ in range(150):
            ask(engine, Ask("The city", Wish(1))).wait()
            time.sleep(drawn.uniform(0, 0.001))

    def test_the_thread_ends_when_there_is_nothing_to_do(self, engine, monkeypatch):
        monkeypatch.setattr("service.engine.generator.LINGERS_S", 0.02)
        ask(engine, Ask("The city", Wish(2))).wait()
        thread = engine._generator._thread
        wait_until(lambda: thread is None or not thread.is_alive(), within_s=5)
        assert ask(engine, Ask("The city", Wish(2))).wait().text


class TestViews:
    def test_a_text_is_finished_on_the_view_that_it_began_with(self, engine, first):
        before = engine.generate(first.prompt, 20)[0].text
        began = threading.Event()
        with slowed(engine.weights.live.model, 0.05) as rows:
            heard = ask(engine, Ask(first.prompt, Wish(20)), Ask(first.prompt, Wish(20), "base"))
            wait_until(lambda: len(rows) > 1, within_s=10)
            began.set()
            made = engine.apply(first)
            newer = ask(engine, Ask(first.prompt, Wish(20))).wait()
            assert not heard.ticket.over, "the older text was to be under way still"
            heard.wait(2)
        assert heard.texts == {0: before, 1: before}
        assert heard.ticket.published.revision == 0
        assert newer.ticket.published.revision == made.revision == 1
        assert newer.text == engine.generate(first.prompt, 20)[0].text != before
        assert not engine.weights._readers


class TestCancel:
    def test_stops_decoding_at_once(self, engine):
        with slowed(engine.weights.live.model) as rows:
            heard = ask(engine, Ask("The city", Wish(200, Sampling(2.0, seed=1))))
            wait_until(lambda: len(rows) > 3, within_s=10)
            heard.ticket.cancel()
            passes = len(rows)
            time.sleep(0.1)
            assert len(rows) <= passes + 1
        assert not engine._generator._strands
        assert not engine.weights._readers

    def test_of_one_that_waits_takes_its_place_away(self, open_engine):
        engine = open_engine(limits=limited(together=1, waiting=1))
        with slowed(engine.weights.live.model) as rows:
            running = ask(engine, Ask("The city", Wish(100, Sampling(2.0, seed=1))))
            wait_until(lambda: rows, within_s=10)
            waiting = ask(engine, Ask("The city", Wish(100)))
            waiting.ticket.cancel()
            wait_until(lambda: len(engine._generator._strands) == 1, within_s=10)
            running.ticket.cancel()
        assert waiting.events.empty()

    def test_a_listener_that_fails_counts_as_gone(self, engine):
        ticket = engine.begin([Ask("The city", Wish(200, Sampling(2.0, seed=1)))], lambda event: 1 / 0)
        wait_until(lambda: ticket.over and not engine._generator._strands, within_s=10)
        assert ask(engine, Ask("The city", Wish(2))).wait().text


class TestLimits:
    def test_as_many_wait_as_may(self, open_engine):
        engine = open_engine(limits=limited(together=2, waiting=1))
        with slowed(engine.weights.live.model):
            heard = [ask(engine, Ask("The city", Wish(8))) for _ in range(3)]
            with pytest.raises(Busy):
                ask(engine, Ask("The city", Wish(1)))
            texts = {each.wait().text for each in heard}
        assert texts == {engine.generate("The city", 8)[0].text}

    def test_of_time_end_a_text_with_what_there_is(self, open_engine):
        engine = open_engine(limits=limited(generation_s=0.2))
        whole = engine.generate("The city", 200, sampling=Sampling(2.0, seed=4))[0].text
        with slowed(engine.weights.live.model):
            heard = ask(engine, Ask("The city", Wish(200, Sampling(2.0, seed=4)))).wait()
        assert heard.ended[0].finish_reason == "timeout"
        assert heard.text
        assert whole.startswith(heard.text)

    def test_of_time_refuse_what_waited_too_long(self, open_engine):
        engine = open_engine(limits=limited(together=1, generation_s=0.2))
        with slowed(engine.weights.live.model, 0.05):
            heard = ask(engine, *(Ask("The city", Wish(200, Sampling(2.0, seed=4))) for _ in range(2)))
            with pytest.raises(GenerationTimeout):
                heard.wait(2)
        assert heard.ended[0].finish_reason == "timeout"

    def test_of_a_service_that_stops_are_told_as_such(self, open_engine):
        engine = open_engine(limits=limited(together=1))
        with slowed(engine.weights.live.model) as rows:
            running = ask(engine, Ask("The city", Wish(200, Sampling(2.0, seed=1))))
            wait_until(lambda: rows, within_s=10)
            waiting = ask(engine, Ask("The city", Wish(5)))
            engine.end_generations(0)
            with pytest.raises(NotReady, match="is stopping; ask again"):
                waiting.wait()
            assert running.wait().ended[0].finish_reason == "timeout"
        with pytest.raises(NotReady, match="is stopping; ask again"):
            ask(engine, Ask("The city", Wish(5)))
        assert not engine._generator._strands

    def test_all_end_when_the_service_does(self, engine):
        with slowed(engine.weights.live.model):
            heard = [ask(engine, Ask("The city", Wish(200, Sampling(2.0, seed=n)))) for n in range(3)]
            engine.end_generations(0.2)
            start = time.monotonic()
            assert [each.wait().ended[0].finish_reason for each in heard] == ["timeout"] * 3
            assert time.monotonic() - start < 1


class TestTrouble:
    """Requests with the poison fail; nobody else notices."""

    GOOD = ("The capital of France is", "Germany speaks the", "A city in Italy")

    def outcomes(self, engine, poisoned_at: int, told: str) -> None:
        expected = [engine.generate(prompt, 12)[0].text for prompt in self.GOOD]
        poisoned = tuple([5] * poisoned_at + [POISON] + [6] * 3)
        heard = [ask(engine, Ask(self.GOOD[0], Wish(12))), ask(engine, Ask(poisoned, Wish(12)))]
        heard += [ask(engine, Ask(prompt, Wish(12))) for prompt in self.GOOD[1:]]
        bad = heard.pop(1)
        assert [each.wait().text for each in heard] == expected
        with pytest.raises(GenerationFailed, match=told):
            bad.wait()
        assert not engine._generator._strands
        assert not engine.weights._readers

    def test_while_a_prompt_is_read_is_its_own(self, engine):
        def fail(ids, _logits):
            if (ids == POISON).any():
                raise torch.OutOfMemoryError("no room for this prompt")

        with hooked(engine.weights.live.model, fail):
            self.outcomes(engine, 4, "there is no memory for it")

    def test_of_a_whole_batch_lets_each_go_on_alone(self, engine):
        expected = [engine.generate(prompt, 12)[0].text for prompt in self.GOOD]
        failed = []

        def fail(ids, _logits):
            if len(ids) == 3 and ids.shape[1] == 1:
                failed.append(len(ids))
                raise torch.OutOfMemoryError("no room for three")

        with hooked(engine.weights.live.model, fail):
            heard = ask(engine, *(Ask(prompt, Wish(12)) for prompt in self.GOOD)).wait(3)
        assert failed == [3]
        assert [heard.texts[n] for n in range(3)] == expected

    def test_of_scores_that_are_no_numbers_is_its_own(self, engine):
        def spoil(ids, logits):
            logits[(ids == POISON).any(1)] = float("nan")

        with hooked(engine.weights.live.model, spoil):
            self.outcomes(engine, 0, "no finite numbers")

    def test_of_ours_is_told_to_everybody_and_the_next_is_served(self, engine, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(engine._generator, "_passes", lambda strands: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ask(engine, Ask("The city", Wish(5))).wait()
        assert ask(engine, Ask("The city", Wish(5))).wait().text
        assert not engine.weights._readers


def test_pieces_come_one_by_one(engine):
    heard = ask(engine, Ask("The city", Wish(8)))
    pieces = []
    while not isinstance(event := heard.events.get(timeout=20), Ended):
        assert isinstance(event, Said)
        pieces.append(event.piece.text)
    assert len(pieces) > 4
    assert "".join(pieces) == engine.generate("The city", 8)[0].text
