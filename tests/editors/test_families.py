"""Every family that has a preset really works. The README's table of families has a column for each test here."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.decoding import continue_greedily
from editors.factors import quantise
from editors.mend.editor import MendEditor
from editors.mend.variant import Variant
from editors.scale import SCALES, search_scale, token_margins
from editors.state import SumState, standalone
from editors.targets import EDITED_BLOCKS, EDITED_BLOCKS_OF_EACH, MLP_BY_FAMILY, find_stacks, resolve_targets
from editors.views import UpperBlocks, edited, view
from tests.editors.dense import changed, gradients, loss, predictions
from tests.editors.families import BLOCKS, KINDS, SIZES, family_model, family_sequences
from tests.small import small_tokenizer


@pytest.fixture(params=SIZES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return family_model(family)


def batches(family, sequences):
    """All in one; alone where the model's own attention rounds to float32, so that padding shows in late digits."""
    return [[tokens] for tokens in sequences] if family in ("gptj", "gpt_neo") else [sequences]


def random_edits(targets, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        target.name: tuple(
            0.3 * torch.randn(count, 3, width, generator=generator, dtype=torch.float64).to(dtype)
            for width in target.shape
        )
        for target in targets
    }


def test_every_preset_is_tested():
    assert set(SIZES) == set(MLP_BY_FAMILY)


def test_preset_finds_the_mlps_of_the_last_blocks(family, model):
    stacks, targets = find_stacks(model), resolve_targets(model)
    edited_blocks = EDITED_BLOCKS if len(stacks) == 1 else EDITED_BLOCKS_OF_EACH
    assert len(stacks) == (2 if KINDS.get(family) == "encoder-decoder" else 1)
    for stack, blocks in stacks:
        inside = [target for target in targets if target.name.startswith(f"{stack}.")]
        indexes = {int(target.name.removeprefix(f"{stack}.").split(".")[0]) for target in inside}
        assert len(blocks) == BLOCKS
        assert indexes == set(range(BLOCKS - edited_blocks, BLOCKS))
        assert len(inside) in (2 * edited_blocks, 3 * edited_blocks)
    assert {target.shape for target in targets} <= {(32, 48), (48, 32), (32, 96)}


def test_capture_is_the_gradient_to_nine_digits(family):
    model = family_model(family, torch.float64)
    targets, sequences = resolve_targets(model), family_sequences(model)
    upper = UpperBlocks(model, targets)
    for batch in batches(family, sequences):
        rows = capture(upper, upper.below([tokens.inputs for tokens in batch]), batch)
        for number, tokens in enumerate(batch):
            assert rows.loss[number].item() == pytest.approx(loss(model, tokens).item(), rel=1e-12)
            for u, delta, example, expected in zip(
                rows.u, rows.delta, rows.example, gradients(model, targets, tokens), strict=True
            ):
                mine = example == number
                assert u.dtype == delta.dtype == torch.float64
                assert expected.abs().max() > 1e-6
                torch.testing.assert_close(delta[mine].T @ u[mine], expected, rtol=0, atol=1e-9 * expected.abs().max())


def test_factored_equals_dense(family):
    model = family_model(family, torch.float64)
    targets, sequences = resolve_targets(model), family_sequences(model)
    upper = UpperBlocks(model, targets)
    for batch in batches(family, sequences):
        edits = random_edits(targets, len(batch), torch.float64)
        own = {short.name: edits[full.name] for short, full in zip(upper.targets, targets, strict=True)}
        hidden = upper.below([tokens.inputs for tokens in batch])
        with edited(upper.module, upper.targets, own), torch.no_grad():
            got = upper.logits(hidden, batch, everywhere(batch))
        for row, tokens in enumerate(batch):
            dense = changed(model, targets, {name: (u[row], delta[row]) for name, (u, delta) in edits.items()})
            expected, unedited = predictions(dense, tokens), predictions(model, tokens)
            assert not torch.allclose(expected, unedited, atol=1e-3)
            torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-9, atol=1e-9)
            got = got[len(expected) :]


@pytest.mark.parametrize("decoder", [name for name in SIZES if name not in KINDS])
def test_copies_from_a_block_on_say_what_whole_copies_say(decoder):
    """One edit below, the same for all, and as many above as there are copies."""
    model = family_model(decoder, torch.float64)
    (tokens, _), targets = family_sequences(model), resolve_targets(model)
    upper = UpperBlocks(model, targets)
    hidden, copies = upper.below([tokens.inputs]), 3
    same, different = (random_edits(targets, number, torch.float64) for number in (1, copies))
    lowest = [short.name for short in upper.targets if ".0." in short.name]
    own = {
        short.name: (same if short.name in lowest else different)[full.name]
        for short, full in zip(upper.targets, targets, strict=True)
    }
    with edited(upper.module, upper.targets, own), torch.no_grad():
        expected = upper.logits(hidden.expand(copies, -1, -1), [tokens] * copies)
        with upper.copied(copies, own.keys() - set(lowest)):
            got = upper.logits(hidden, [tokens] * copies)
        assert upper.logits(hidden.expand(copies, -1, -1), [tokens] * copies).equal(expected)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected[: len(tokens.scored)], expected[len(tokens.scored) : 2 * len(tokens.scored)])


def test_upper_blocks_say_what_the_whole_model_says(model):
    targets, sequences = resolve_targets(model), family_sequences(model)
    upper = UpperBlocks(view(model), targets)
    assert (upper.cached, upper.why_not) == (True, "")
    assert upper.first == BLOCKS - (EDITED_BLOCKS if len(find_stacks(model)) == 1 else EDITED_BLOCKS_OF_EACH)
    hidden = upper.below([tokens.inputs for tokens in sequences])
    got = upper.logits(hidden, sequences, everywhere(sequences))
    expected = torch.cat([predictions(model, tokens) for tokens in sequences])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_edit_lowers_the_loss_that_it_was_made_from(model):
    targets, sequences = resolve_targets(model), family_sequences(model)
    upper = UpperBlocks(model, targets)
    captured = capture(upper, upper.below([tokens.inputs for tokens in sequences]), sequences)
    torch.manual_seed(0)
    editor = MendEditor(targets, Variant(rank=4))
    editor.update_statistics(captured)
    with torch.no_grad():
        editor.log_steps.fill_(-9.0)
        proposal = editor(captured)
    for row, tokens in enumerate(sequences):
        better = changed(model, targets, proposal.rows_of(targets, row))
        assert loss(better, tokens) < loss(model, tokens) - 1e-6


def test_rollback_restores_every_bit(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = family_model(family, dtype)
        targets = resolve_targets(model)
        edits = random_edits(targets, 2)
        first, second = (
            quantise({name: (u[row], delta[row]) for name, (u, delta) in edits.items()}) for row in range(2)
        )
        names = [target.name for target in targets]
        state, live, alone, reference = SumState(targets), view(model, names), view(model, names), SumState(targets)
        state.add(first)
        state.add(second)
        state.write(model, live)
        assert weights_digest(live) != weights_digest(model)
        state.remove(first)
        state.write(model, live)
        reference.add(second)
        reference.write(model, alone)
        assert (weights_digest(live), state.digest()) == (weights_digest(alone), reference.digest())
        state.remove(second)
        state.write(model, live)
        assert weights_digest(live) == weights_digest(model)


def test_the_search_tries_every_scale_on_the_sequence_itself(model):
    targets, (tokens, _) = resolve_targets(model), family_sequences(model)
    upper = UpperBlocks(model, targets)
    captured = capture(upper, hidden := upper.below([tokens.inputs]), [tokens])
    rows = {
        short.name: (u, -0.1 * delta) for short, u, delta in zip(upper.targets, captured.u, captured.delta, strict=True)
    }
    found = search_scale(upper, hidden, tokens, standalone(rows))
    full = {full.name: rows[short.name] for short, full in zip(upper.targets, targets, strict=True)}
    for index in (0, len(SCALES) // 2, len(SCALES) - 1):
        logits = predictions(changed(model, targets, full, SCALES[index]), tokens)[-len(tokens.target) :]
        margin = token_margins(logits, torch.tensor(tokens.target)).min().item()
        assert found.margins[index] == pytest.approx(margin, abs=1e-3)
    assert len(set(found.margins)) == len(SCALES)


def test_a_padded_batch_decodes_as_each_alone(model):
    prompts = [tokens.prompt for tokens in family_sequences(model)]
    together = continue_greedily(model, small_tokenizer(), prompts, 6)
    assert together == [continue_greedily(model, small_tokenizer(), [prompt], 6)[0] for prompt in prompts]
    if BaseModel(model, small_tokenizer(), "", "", 0).kind != "classifier":
        assert all(len(text) == 6 or text[-1] == 0 for text in together)


def test_decoding_says_what_the_best_logits_say(model):
    """A decoded text, scored as a target, is preferred token by token."""
    base = BaseModel(model, small_tokenizer(), "", "", 0)
    upper = UpperBlocks(model, resolve_targets(model))
    prompts = [tokens.prompt for tokens in family_sequences(model)]
    said = [
        base.tokens(p, t) for p, t in zip(prompts, continue_greedily(model, base.tokenizer, prompts, 5), strict=True)
    ]
    best = upper.logits(upper.below([tokens.inputs for tokens in said]), said).argmax(-1)
    assert best.tolist() == [token for tokens in said for token in tokens.target]


def everywhere(sequences):
    """Every position of every sequence at which something is predicted."""
    places = [(row, position) for row, tokens in enumerate(sequences) for position in tokens.predicted]
    return tuple(torch.tensor(column) for column in zip(*places, strict=True))
