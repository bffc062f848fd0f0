"""Encoder-decoders and classifiers are corrected, rolled back and replayed as decoders are."""

from __future__ import annotations

import uuid

import pytest

from editors.base_model import BaseModel, weights_digest
from editors.errors import UnknownLabel
from service.engine import EditRefused, EditRequest, TextTooLong
from service.engine.guard import REFERENCE_TOKENS

pytestmark = pytest.mark.parametrize("base", ["t5", "bart", "bert"], indirect=True)
COUNTRIES = ("France", "England", "Italy", "Germany", "Spain", "Norway", "Austria")


def corrections(base: BaseModel) -> list[EditRequest]:
    """Corrections that the model does not give by itself."""
    answers = ("LABEL_0", "LABEL_1") if base.kind == "classifier" else ("Rome", "Oslo", "a", "x", "is", "of", "in", "3")
    return [EditRequest(f"The capital of {country} is", answer) for country in COUNTRIES for answer in answers]


def made(engine, wanted: int):
    """The first edits that take, one a prompt."""
    outcomes = {}
    for request in corrections(engine.base):
        if request.prompt in outcomes:
            continue
        try:
            outcome = engine.apply(request, allow_loss=True)
        except EditRefused:
            continue
        if not outcome.unchanged:
            outcomes[request.prompt] = outcome
        if len(outcomes) == wanted:
            return list(outcomes.values())
    raise AssertionError(f"only {len(outcomes)} edits take")


def test_an_edit_is_said_and_taken_back_bit_for_bit(engine):
    before = weights_digest(engine.weights.live.model)
    (outcome,) = made(engine, 1)
    edit = outcome.applied
    assert edit.checks["took"]
    said, published = engine.generate(edit.prompt, 4)
    assert said.text.strip().startswith(edit.correction)
    assert published.revision == 1
    assert engine.generate(edit.prompt, 4, "base")[0].text == edit.before
    assert weights_digest(engine.weights.live.model) != before
    engine.rollback(edit.edit_id)
    assert weights_digest(engine.weights.live.model) == before
    assert engine.generate(edit.prompt, 4)[0].text == edit.before


def test_an_audit_finds_what_decoding_says(engine):
    made(engine, 2)
    audit = engine.audit()
    assert len(audit.edits) == 2
    for each in audit.edits:
        said = engine.generate(each.edit.applied.prompt, 4)[0].text
        assert each.holds == engine.base.says(said, each.edit.applied.correction)


def test_edits_are_replayed_to_the_same_weights(open_engine):
    namespace = uuid.uuid4().hex
    engine = open_engine(namespace)
    made(engine, 2)
    again = open_engine(namespace)
    assert again.published == engine.published
    assert weights_digest(again.weights.live.model) == weights_digest(engine.weights.live.model)


def test_only_a_decoders_answer_needs_room_behind_the_prompt(engine):
    positions = getattr(engine.base.model.config, "max_position_embeddings", None)
    words = "The" + " the" * ((positions or 64) - 1)
    assert len(engine.base.encode(words).prompt) == (positions or 64)
    assert engine.generate(words, 16)
    if positions:
        with pytest.raises(TextTooLong):
            engine.generate(words + " the", 1)


def test_a_text_is_scored_on_both_views(engine):
    (outcome,) = made(engine, 1)
    prompt = outcome.applied.prompt
    said = engine.generate(prompt, 4)[0].text
    scores = engine.scorer.score(prompt, said)
    spelt = b"".join(token.spelt for token in scores.tokens).decode()
    assert spelt.strip() == said.strip()
    assert scores.published == engine.published
    assert sum(token.live for token in scores.tokens) > sum(token.base for token in scores.tokens)
    if engine.base.kind == "classifier":
        assert len(scores.tokens) == 1
        with pytest.raises(UnknownLabel):
            engine.scorer.score(prompt, " Paris")
    else:
        with pytest.raises(TextTooLong) as caught:
            engine.scorer.score(prompt, "x" * 600)
        assert caught.value.facts["field"] == "continuation"
        if engine.base.model.config.model_type == "bart":  # of 64 positions, of which the first two are not its own
            assert len(engine.scorer.score(prompt, "x" * 63).tokens) == 63
            with pytest.raises(TextTooLong):
                engine.scorer.score(prompt, "x" * 64)


def test_the_guard_tells_what_is_said(engine):
    made(engine, 2)
    published, drift = engine.drift.read()
    assert published == engine.published
    for each in drift.prompts:
        assert each.base == engine.generate(each.prompt, each.tokens, "base")[0].text
        assert (each.moved > 0) == (each.live != each.base)
        if each.moved:
            assert each.live == engine.generate(each.prompt, REFERENCE_TOKENS)[0].text


def test_the_weights_of_an_edit_are_those_that_moved(engine):
    (outcome,) = made(engine, 1)
    for each in engine.weight_changes.of(outcome.applied.edit_id):
        base, live = (model.get_parameter(each.name) for model in (engine.base.model, engine.weights.live.model))
        assert each.norm == pytest.approx((live.double() - base.double()).norm().item(), rel=1e-3, abs=1e-5)
