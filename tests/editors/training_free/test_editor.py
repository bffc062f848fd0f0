"""Without training: edits that take on every kind of model, by the formula, and hold beside others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.checkpoint import load_checkpoint, save_checkpoint
from editors.scale import SCALES, search_scale
from editors.targets import find_stacks, last_projection
from editors.training_free.calibration import calibrate
from editors.training_free.editor import FIRST_STEP, LAMBDA
from editors.views import UpperBlocks, view
from tests.editors.families import BLOCKS, KINDS, SIZES, family_model, family_sequences
from tests.small import small_base, small_tokenizer


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


@pytest.fixture(scope="module")
def editor(linear: BaseModel):
    return calibrate(linear)


def captured(base: BaseModel, editor, tokens):
    upper = UpperBlocks(base.model, editor.captured)
    hidden = upper.below([sequence.inputs for sequence in tokens])
    return upper, hidden, capture(upper, hidden, tokens)


@pytest.mark.parametrize("family", SIZES)
def test_takes_on_every_family(family):
    model = family_model(family)
    base = BaseModel(model, small_tokenizer(), family, weights_digest(model), 0)
    editor = calibrate(base)
    (target,) = editor.targets
    stack, _ = find_stacks(model)[-1]
    assert target.name.startswith(f"{stack}.{BLOCKS - 1}.")
    assert target.d_out == 32
    taken = []
    for tokens in family_sequences(model):
        upper, hidden, found = captured(base, editor, [tokens])
        proposal = editor(found)
        assert len(proposal.u[0]) == (1 if KINDS.get(family) == "classifier" else len(tokens.scored))
        increment = editor.new_state(base.device).increment(proposal.rows_of(editor.targets, 0))
        search = search_scale(upper, hidden, tokens, {upper.targets[0].name: increment[target.name]})
        assert search.margins[SCALES.index(4.0)] > search.margins[0]
        taken.append(max(search.margins) > 0)
    # These normalise what an MLP writes, so that one weight of a random model cannot overrule all that came before.
    assert any(taken) or family in ("gemma2", "gemma3_text")


def test_takes_where_embeddings_are_narrower_than_blocks():
    """As OPT-350m's are."""
    torch.manual_seed(0)
    config = OPTConfig(**{**SIZES["opt"], "word_embed_proj_dim": 16}, vocab_size=128, bos_token_id=None, pad_token_id=1)
    assert last_projection(OPTForCausalLM(config)).name == f"model.decoder.layers.{BLOCKS - 1}.fc2.weight"


def test_without_a_gradient_there_is_no_change(linear, editor):
    _, _, found = captured(linear, editor, [linear.encode("The capital of France is", "Rome")])
    certain = dataclasses.replace(found, delta=tuple(torch.zeros_like(delta) for delta in found.delta))
    assert torch.equal(editor(certain).delta[0], torch.zeros(1, 32))


def test_is_the_natural_gradient_of_the_models_own_texts(linear, editor):
    """By dense matrices: L Lᵀ and F⁻¹ from the stored factors, the change of one edit alone from both."""
    tokens = [linear.encode("The capital of France is", "Rome"), linear.encode("In Italy", "the Oslo")]
    _, _, found = captured(linear, editor, tokens)
    proposal = editor(found)
    (target,) = editor.targets
    L, natural = editor.whitening_0.double(), editor.natural_0.double()
    for index, sequence in enumerate(tokens):
        rows = (found.example[0] == index).nonzero()[:, 0][list(sequence.scored)]
        u, delta = found.u[0][rows].double(), found.delta[0][rows].double()
        keys, changes = (part.double() for part in proposal.rows_of(editor.targets, index)[target.name])
        whitened = u @ torch.linalg.inv(L).T
        assert torch.allclose(keys, whitened / whitened.norm(dim=1, keepdim=True), atol=1e-5)
        along = delta @ natural
        moved = changes * whitened.norm(dim=1, keepdim=True)  # what the weight's output is to change by, at its own key
        wanted = -FIRST_STEP * editor.unit_0.double() * along / along.norm(dim=1).max()
        assert torch.allclose(moved, wanted, rtol=1e-3, atol=1e-5)


def test_alone_moves_its_own_output_by_its_step(linear, editor):
    tokens = [linear.encode("The capital of France is", "Rome")]
    _, _, found = captured(linear, editor, tokens)
    state, (target,) = editor.new_state(linear.device), editor.targets
    state.add(state.quantise(editor(found).rows_of(editor.targets, 0), 1.0))
    live = view(linear.model, [target.name])
    state.write(linear.model, live)
    change = (live.get_parameter(target.name) - linear.model.get_parameter(target.name)).double()
    u = found.u[0][tokens[0].scored[0]].double()
    assert (change @ u).norm().item() == pytest.approx(FIRST_STEP * editor.unit_0.item() / (1 + LAMBDA), rel=0.01)


def test_moves_its_own_texts_less_than_a_step_that_knows_nothing_of_them(linear, editor):
    """What both covariances are for, at the same step."""
    tokens = [linear.encode("The capital of France is", "Rome")]
    _, _, found = captured(linear, editor, tokens)
    texts = [linear.encode(text).prompt for text in ("A city in Norway", "Germany speaks the language of England")]
    _, _, others = captured(linear, editor, [linear.tokens(text[:1], text[1:]) for text in texts])
    keys = editor(found).u[0]
    step = torch.linalg.solve_triangular(editor.whitening_0.T, keys.T, upper=True).T
    u = found.u[0][tokens[0].scored[0]]
    plain = others.u[0] @ u / u.dot(u)
    mine = others.u[0] @ step[0] / u.dot(step[0])
    assert mine.abs().mean() < plain.abs().mean()


def test_a_checkpoint_of_it_proposes_the_same_edits(linear, editor, tmp_path):
    save_checkpoint(tmp_path, editor, linear, {})
    loaded = load_checkpoint(tmp_path, linear)
    assert not loaded.trained
    assert "mend train" in loaded.notice
    assert "without training" in (tmp_path / "card.md").read_text()
    _, _, found = captured(linear, editor, [linear.encode("The capital of France is", "Rome")])
    mine, theirs = editor(found), loaded.editor(found)
    assert torch.equal(mine.u[0], theirs.u[0])
    assert torch.equal(mine.delta[0], theirs.delta[0])
