"""One edit: durable first, judged before it is live, exactly what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editors.errors import EmptyTextError
from editors.factors import Factors
from editors.state import SumState
from editors.text import begins_with
from editors.views import view
from service.engine import (
    DidNotTake,
    DrawdownExceeded,
    EditRequest,
    RevisionMismatch,
    Sampling,
    TextTooLong,
)
from service.engine.errors import IdempotencyKeyReused
from service.ledger import Applied, EntryInvalid
from tests.ledger.entries import stored_in
from tests.service_fixtures import (
    COUNTRIES,
    LIMITS,
    Standing,
    asks,
    base_weights,
    live_weights,
    namespace_of,
    never_takes,
    same_bits,
    takes,
)
from tests.small import SMALL_MODELS

both_layouts = pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)
IMPOSSIBLE = replace(LIMITS, guard_budget=0.0)


def words(tokens: int) -> str:
    """A prompt of so many tokens."""
    return "The" + " the" * (tokens - 1)


def says(engine, prompt: str, which: str = "live", tokens: int = 4) -> str:
    return engine.generate(prompt, tokens, which)[0].text


@both_layouts
class TestACommittedEdit:
    def test_is_in_the_ledger_as_it_is_in_the_weights(self, engine, first):
        outcome = engine.apply(replace(first, actor="ops", reason="a test", metadata={"ticket": [1, None]}))
        ((entry, raw),) = stored_in(engine.ledger)
        assert isinstance(entry, Applied)
        assert entry == outcome.applied
        assert (entry.sequence, entry.actor, entry.reason) == (1, "ops", "a test")
        assert entry.metadata == {"ticket": [1, None]}

        state = SumState(engine.checkpoint.editor.targets)
        state.add(Factors.from_bytes(raw))
        assert entry.state_digest == outcome.digest == engine.published.digest == state.digest()
        expected = view(engine.base.model, list(state.targets))
        state.write(engine.base.model, expected)
        for name, parameter in engine.weights.live.model.named_parameters():
            assert torch.equal(parameter.view(torch.int32), expected.get_parameter(name).view(torch.int32)), name

    def test_moves_the_edited_weights_by_the_product_of_its_factors_and_no_others(self, engine, base, second):
        engine.apply(second)
        ((_, raw),) = stored_in(engine.ledger)
        factors = Factors.from_bytes(raw)
        targets = {target.name: target for target in engine.checkpoint.editor.targets}
        assert set(factors.layers) == set(targets)
        for name, parameter in engine.weights.live.model.named_parameters():
            before = base.model.get_parameter(name)
            if name in targets:
                u, delta = factors.layers[name].decode()
                change = targets[name].oriented(parameter) - targets[name].oriented(before)
                torch.testing.assert_close(change, delta.T @ u, rtol=1e-3, atol=1e-5)
                assert not torch.equal(parameter, before)
            else:
                assert parameter is before

    def test_tells_what_was_said_before_and_is_said_after(self, engine, first):
        before = says(engine, first.prompt)
        outcome = engine.apply(first)
        applied = outcome.applied
        assert (applied.before, applied.after) == (before, says(engine, first.prompt))
        assert not begins_with(before, first.correction)
        assert begins_with(applied.after, first.correction)
        assert says(engine, first.prompt, "base") == before
        assert applied.checks["took"] is True
        assert 0 <= applied.checks["drawdown"] <= applied.checks["drawdown_budget"] == 1.0
        assert set(applied.timings_ms) == {"before", "capture", "propose", "search", "stage", "judge"}
        assert set(outcome.publish_ms) == {"commit", "publish"}

    def test_leaves_the_base_model_alone(self, engine, base, first):
        untouched = base_weights(base)
        engine.apply(first)
        assert same_bits(base_weights(base), untouched)


class TestRevision:
    def test_grows_by_one_with_every_edit(self, engine, first, second):
        assert engine.published.revision == 0
        outcomes = [engine.apply(first), engine.apply(second)]
        assert [outcome.revision for outcome in outcomes] == [1, 2]
        assert engine.published.revision == engine.ledger.head() == 2
        assert engine.published.active_edits == 2
        assert len({outcome.digest for outcome in outcomes}) == 2

    def test_another_expectation_changes_nothing(self, engine, first, second):
        engine.apply(first)
        standing = Standing.of(engine)
        for expected in (0, 2, -1, 10**15):
            with pytest.raises(RevisionMismatch) as caught:
                engine.apply(second, expected_revision=expected)
            assert caught.value.facts == {"expected": expected, "revision": 1}
        assert Standing.of(engine) == standing
        assert engine.apply(second, expected_revision=1).revision == 2


class TestChecks:
    def test_paraphrases_and_keep_are_judged_one_by_one(self, engine, first):
        elsewhere = "Berlin is a city in"
        outcome = engine.apply(replace(first, paraphrases=(first.prompt, "Oslo is"), keep=(elsewhere,)))
        same, other = outcome.applied.checks["paraphrases"]
        assert (same["prompt"], same["took"]) == (first.prompt, True)
        assert other["took"] == begins_with(says(engine, "Oslo is"), first.correction)
        (kept,) = outcome.applied.checks["keep"]
        assert kept["prompt"] == elsewhere
        assert (kept["before"], kept["after"]) == (says(engine, elsewhere, "base"), says(engine, elsewhere))
        assert kept["kept"] == (kept["before"] == kept["after"])

    def test_a_paraphrase_is_read_as_far_as_the_correction_goes(self, open_engine):
        engine = open_engine(limits=replace(LIMITS, answer_tokens=1))
        several = [asks(country, "Rome Rome") for country in COUNTRIES]
        request = next(request for request in several if takes(engine, request))
        checks = engine.apply(replace(request, paraphrases=(request.prompt,))).applied.checks
        assert checks["took"] is True
        assert checks["paraphrases"][0]["took"] is True


class TestUnchanged:
    def test_what_the_base_says_already_is_not_edited(self, engine, first):
        standing = Standing.of(engine)
        prompt = first.prompt
        outcome = engine.apply(EditRequest(prompt, says(engine, prompt, tokens=1)))
        assert outcome.unchanged
        assert not outcome.committed
        assert (outcome.revision, outcome.digest) == (0, standing.state_digest)
        assert outcome.before == says(engine, prompt)
        assert Standing.of(engine) == standing

    def test_what_an_edit_made_true_is_not_edited_again(self, engine, first):
        engine.apply(first)
        standing = Standing.of(engine)
        assert engine.apply(first).unchanged
        assert Standing.of(engine) == standing

    def test_nor_is_a_correction_that_is_longer_than_the_answers_that_are_judged(self, open_engine, first):
        engine = open_engine(limits=replace(LIMITS, answer_tokens=2))
        prompt = first.prompt
        outcome = engine.apply(EditRequest(prompt, says(engine, prompt, tokens=5)))
        assert outcome.unchanged
        assert engine.ledger.head() == 0


class TestRefusal:
    def test_of_what_does_not_take_leaves_everything_as_it_was(self, engine, second):
        engine.apply(second)
        standing = Standing.of(engine)
        with pytest.raises(DidNotTake) as caught:
            engine.apply(never_takes())
        assert caught.value.facts["best_margin_nats"] < 0
        assert caught.value.facts["before"]["text"].startswith(says(engine, never_takes().prompt))
        assert Standing.of(engine) == standing

    def test_is_by_what_is_said_and_not_by_teacher_forcing(self, engine):
        # The tokenizer reads a snowman as <unk>, which an edit can make likely, but which nobody can read.
        standing = Standing.of(engine)
        forced = []
        for country in COUNTRIES:
            with pytest.raises(DidNotTake) as caught:
                engine.apply(asks(country, "☃"))
            facts = caught.value.facts
            if facts["best_margin_nats"] > 0:
                forced.append(country)
                assert facts["checks"]["took"] is False
                assert "☃" not in facts["after"]["text"]
        assert forced
        assert Standing.of(engine) == standing

    def test_of_what_breaks_the_budget_leaves_everything_as_it_was(self, open_engine, first):
        engine = open_engine(limits=IMPOSSIBLE)
        standing = Standing.of(engine)
        with pytest.raises(DrawdownExceeded) as caught:
            engine.apply(first)
        checks = caught.value.facts["checks"]
        assert checks["drawdown"] > checks["drawdown_budget"] == 0.0
        assert checks["took"] is True
        assert Standing.of(engine) == standing

    def test_leaves_room_for_the_next_edit(self, engine, open_engine, first):
        with pytest.raises(DidNotTake):
            engine.apply(never_takes())
        assert engine.apply(first).digest == open_engine().apply(first).digest

    def test_a_smaller_scale_is_tried_before_the_budget_refuses(self, engine, open_engine):
        spared = 0
        for request in (asks(country, answer) for country in COUNTRIES for answer in ("Rome", "German")):
            if spared or not takes(engine, request):
                continue
            free = engine.apply(request, dry_run=True).applied
            budget = free.checks["drawdown"] - 1e-6
            tighter = open_engine(limits=replace(LIMITS, guard_budget=budget))
            if takes(tighter, request):
                spared += 1
                bound = tighter.apply(request, dry_run=True).applied
                assert bound.scale < free.scale
                assert bound.checks["drawdown"] <= budget
        assert spared


class TestDryRun:
    def test_leaves_everything_as_it_was(self, engine, first, second):
        engine.apply(second)
        standing = Standing.of(engine)
        outcome = engine.apply(first, dry_run=True)
        assert not outcome.committed
        assert outcome.revision == 1
        assert Standing.of(engine) == standing
        assert len(list(engine.history.newest_first())) == 1

    @both_layouts
    def test_foretells_the_real_edit(self, engine, first):
        foretold = engine.apply(first, dry_run=True)
        made = engine.apply(first)
        assert foretold.digest == made.digest == engine.published.digest
        assert foretold.applied.scale == made.applied.scale
        assert foretold.applied.checks == made.applied.checks
        assert foretold.applied.factors_digest == made.applied.factors_digest

    def test_refuses_what_the_real_edit_would_refuse(self, engine, open_engine, first):
        with pytest.raises(DidNotTake):
            engine.apply(never_takes(), dry_run=True)
        with pytest.raises(DrawdownExceeded):
            open_engine(limits=IMPOSSIBLE).apply(first, dry_run=True)

    def test_does_not_use_up_its_idempotency_key(self, engine, first):
        request = replace(first, idempotency_key="key", request_digest="one")
        engine.apply(request, dry_run=True)
        assert not engine.apply(request).replayed


class TestIdempotencyKey:
    @pytest.fixture
    def keyed(self, first) -> EditRequest:
        return replace(first, idempotency_key="key", request_digest="one")

    def test_makes_one_edit_of_a_repeated_request(self, engine, keyed):
        made = engine.apply(keyed)
        standing = Standing.of(engine)
        again = engine.apply(keyed, expected_revision=0)
        assert again.replayed
        assert again.committed
        assert (again.applied, again.revision, again.digest) == (made.applied, made.revision, made.digest)
        assert Standing.of(engine) == standing

    def test_is_remembered_by_the_ledger(self, engine, open_engine, keyed):
        made = engine.apply(keyed)
        restarted = open_engine(namespace_of(engine))
        assert restarted.apply(keyed).applied == made.applied
        assert restarted.ledger.head() == 1

    def test_is_remembered_when_the_edit_was_rolled_back(self, engine, keyed):
        engine.rollback(engine.apply(keyed).applied.edit_id)
        assert engine.apply(keyed).replayed
        assert engine.ledger.head() == 2

    def test_of_another_request_is_refused(self, engine, keyed):
        made = engine.apply(keyed)
        standing = Standing.of(engine)
        with pytest.raises(IdempotencyKeyReused) as caught:
            engine.apply(replace(keyed, correction=" Oslo", request_digest="two"))
        assert caught.value.facts == {"revision": 1, "id": made.applied.edit_id}
        assert Standing.of(engine) == standing


class TestText:
    def test_that_is_too_long_is_refused(self, open_engine, first):
        engine = open_engine(limits=replace(LIMITS, prompt_tokens=12, correction_tokens=3))
        long = words(13)
        refused = [
            EditRequest(long, " Rome"),
            EditRequest("The capital is", " Rome" * 4),
            replace(first, paraphrases=(long,)),
            replace(first, keep=(long,)),
        ]
        for request, field in zip(refused, ("prompt", "correction", "paraphrases", "keep"), strict=True):
            with pytest.raises(TextTooLong) as caught:
                engine.apply(request)
            assert caught.value.facts["field"] == field
            assert caught.value.facts["tokens"] > caught.value.facts["limit"]
        assert engine.published.revision == 0
        with pytest.raises(TextTooLong):
            engine.generate(long, 4)

    @pytest.mark.parametrize(
        "request_",
        [EditRequest("", "x"), EditRequest(" \n", "x"), EditRequest("x", ""), EditRequest("x", " \t"),
         EditRequest("x", "<eos>"), asks("France", "Rome", keep=("",)), asks("France", "Rome", paraphrases=(" ",))],
    )  # fmt: skip
    def test_without_words_is_refused(self, engine, request_):
        with pytest.raises((EmptyTextError, DidNotTake)):
            engine.apply(request_)
        assert engine.published.revision == 0

    @both_layouts
    def test_beyond_the_model_s_own_positions_is_refused(self, engine, first):
        # A model with learnt positions, as GPT-2, would otherwise fail somewhere inside.
        room = engine.base.model.config.max_position_embeddings
        answered, _ = engine.generate(words(room - 4), 4)
        assert answered.prompt_tokens == room - 4
        for prompt_tokens, new_tokens in ((room, 1), (room - 4, 5), (1, room), (room + 100, 1)):
            with pytest.raises(TextTooLong) as caught:
                engine.generate(words(prompt_tokens), new_tokens)
            assert caught.value.facts["limit"] == room
        long = words(room)
        for request in (
            EditRequest(long, " Rome"),
            EditRequest(words(room - 9), " Rome" * 20),
            replace(first, paraphrases=(long,)),
            replace(first, keep=(long,)),
        ):
            with pytest.raises(TextTooLong):
                engine.apply(request)
        assert engine.published.revision == 0

    def test_that_cannot_be_stored_is_not_applied(self, engine, first):
        standing = Standing.of(engine)
        with pytest.raises(EntryInvalid):
            engine.apply(replace(first, reason="\ud800"))
        assert Standing.of(engine) == standing


class TestGenerate:
    def test_names_the_state_that_it_came_from(self, engine, first):
        _, before = engine.generate(first.prompt, 4)
        assert (before.revision, before.active_edits) == (0, 0)
        outcome = engine.apply(first)
        _, after = engine.generate(first.prompt, 4)
        assert (after.revision, after.digest, after.active_edits) == (1, outcome.digest, 1)

    def test_equal_seeds_give_equal_texts(self, engine, first):
        def sample(seed: int) -> str:
            return engine.generate(first.prompt, 12, sampling=Sampling(1.0, 0.9, seed))[0].text

        assert sample(1) == sample(1)
        assert len({sample(seed) for seed in range(4)}) > 1

    def test_nothing_active_is_the_base_itself(self, engine, base, first):
        assert same_bits(live_weights(engine), base_weights(base))
        for prompt in (first.prompt, "Berlin is a city in"):
            assert says(engine, prompt, tokens=12) == says(engine, prompt, "base", tokens=12)
