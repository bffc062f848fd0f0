"""Encoder-decoders and classifiers are corrected, rolled back and replayed as decoders are."""

from __future__ import annotations

import uuid

import pytest

from editors.base_model import BaseModel, weights_digest
from service.engine import EditRefused, EditRequest, TextTooLong

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
