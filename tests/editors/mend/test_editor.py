"""The editor turns captured gradients into edits that go the right way, each on its own."""

from __future__ import annotations

import math

import pytest
import torch

from editors.base_model import BaseModel
from editors.capture import Capture, capture
from editors.mend.editor import MendEditor, Proposal
from editors.mend.variant import Variant
from editors.targets import Target, resolve_targets
from editors.text import Tokens
from editors.views import UpperBlocks
from tests.editors.dense import changed, encoded, loss
from tests.small import small_editor


def captured(base: BaseModel, targets: tuple[Target, ...], sequences: list[Tokens]) -> Capture:
    upper = UpperBlocks(base.model, targets)
    return capture(upper, upper.below([tokens.inputs for tokens in sequences]), sequences)


def trained(base: BaseModel) -> MendEditor:
    """An editor in which every parameter differs from every other, as after training."""
    editor = small_editor(base)
    generator = torch.Generator().manual_seed(4)
    for parameter in editor.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return editor


class TestSign:
    def test_an_untrained_editor_lowers_the_loss_on_each_edit(self, base):
        editor, sequences = small_editor(base, step=1e-3), encoded(base)
        proposal = editor(captured(base, editor.targets, sequences))
        for edit, tokens in enumerate(sequences):
            edited = changed(base.model, editor.targets, proposal.rows_of(editor.targets, edit))
            assert loss(edited, tokens) < loss(base.model, tokens)

    def test_a_step_below_zero_cannot_be(self, base):
        editor = small_editor(base)
        editor.log_steps.fill_(-1000.0)
        proposal = editor(captured(base, editor.targets, encoded(base)))
        assert not any(delta.any() for delta in proposal.delta)

    def test_is_minus_step_times_the_networks_rows(self, base):
        editor = small_editor(base)
        rows = captured(base, editor.targets, encoded(base))
        proposal = editor(rows)
        for name, members in editor.groups.items():
            for place, member in enumerate(members):
                layer = torch.full((len(rows.example[member]),), place)
                u, delta = editor.networks[name](rows.u[member], rows.delta[member], layer)
                torch.testing.assert_close(proposal.u[member], u)
                torch.testing.assert_close(proposal.delta[member], -0.01 * delta)


class TestSteps:
    def test_belong_to_their_own_target(self, base):
        editor, sequences = trained(base), encoded(base)
        rows = captured(base, editor.targets, sequences)
        before = editor(rows)
        for index in range(len(editor.targets)):
            editor.log_steps[index] += math.log(2)
            after = editor(rows)
            for other, (old, new) in enumerate(zip(before.delta, after.delta, strict=True)):
                torch.testing.assert_close(new, 2 * old if other == index else old)
            editor.log_steps[index] -= math.log(2)

    def test_and_layer_rows_follow_the_targets_when_these_are_reordered(self, base):
        editor, sequences = trained(base), encoded(base)
        expected = editor(captured(base, editor.targets, sequences))
        order = list(range(len(editor.targets)))[::-1]
        other = MendEditor([editor.targets[m] for m in order], editor.variant)
        state = editor.state_dict()
        state["log_steps"] = state["log_steps"][order]
        for name in state:
            if name.endswith((".scale", ".shift")):  # one row per layer of the group, in the targets' order
                state[name] = state[name].flip(0)
        other.load_state_dict(state)
        got = other(captured(base, other.targets, sequences))
        for edit in range(len(sequences)):
            mine, theirs = got.rows_of(other.targets, edit), expected.rows_of(editor.targets, edit)
            assert list(mine) != list(theirs)
            for name, (u, delta) in theirs.items():
                torch.testing.assert_close(mine[name], (u, delta))


class TestIndependence:
    def test_an_edit_does_not_depend_on_the_others_of_its_batch(self, base):
        editor, sequences = trained(base), encoded(base)
        together = editor(captured(base, editor.targets, sequences))
        for edit, tokens in enumerate(sequences):
            alone = editor(captured(base, editor.targets, [tokens])).rows_of(editor.targets, 0)
            for name, (u, delta) in together.rows_of(editor.targets, edit).items():
                # δ is tiny, so float32's rounding in the capture shows up once it is normalised.
                torch.testing.assert_close(alone[name][0], u, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(alone[name][1], delta, rtol=1e-3, atol=1e-5)


class TestStatistics:
    def test_do_not_change_while_editing(self, base):
        editor = small_editor(base)
        before = {name: tensor.clone() for name, tensor in editor.named_buffers()}
        editor.train()(captured(base, editor.targets, encoded(base)))
        assert all(torch.equal(tensor, before[name]) for name, tensor in editor.named_buffers())

    def test_are_over_every_layer_of_a_shape(self, base):
        targets = resolve_targets(base.model)
        editor, rows = MendEditor(targets, Variant(rank=2)), captured(base, targets, encoded(base))
        editor.update_statistics(rows)
        for name, members in editor.groups.items():
            # In the last block nothing reads the prompt's earlier tokens, so these carry no gradient.
            u = torch.cat([rows.u[m][rows.delta[m].any(1)] for m in members])
            assert editor.networks[name].u_statistics.count == len(u)
            torch.testing.assert_close(editor.networks[name].u_statistics.mean, u.mean(0), rtol=1e-4, atol=1e-6)


class TestProposal:
    def test_keeps_every_row_of_every_edit_when_padded(self, base):
        editor, sequences = trained(base), encoded(base)
        proposal = editor(captured(base, editor.targets, sequences))
        padded = proposal.padded(editor.targets)
        for edit in range(len(sequences)):
            for name, (u, delta) in proposal.rows_of(editor.targets, edit).items():
                own_u, own_delta = padded[name][0][edit], padded[name][1][edit]
                assert torch.equal(own_u[: len(u)], u)
                assert torch.equal(own_delta[: len(u)], delta)
                assert not own_u[len(u) :].any()
                assert not own_delta[len(u) :].any()

    def test_holds_as_many_rows_per_target_as_its_weight_has_seen(self, base):
        """As in an encoder-decoder: the encoder's weights see other rows than the decoder's."""
        editor = trained(base)
        rows = captured(base, editor.targets, encoded(base))
        whole = editor(rows)
        halved = [index % 2 == 0 for index in range(len(editor.targets))]

        def cut(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(part[::2] if half else part for part, half in zip(parts, halved, strict=True))

        proposal = editor(Capture(cut(rows.u), cut(rows.delta), cut(rows.example), rows.loss))
        for index, (u, delta) in enumerate(zip(cut(whole.u), cut(whole.delta), strict=True)):
            torch.testing.assert_close(proposal.u[index], u)
            torch.testing.assert_close(proposal.delta[index], delta)
        padded = proposal.padded(editor.targets)
        for edit in range(proposal.edits):
            for name, (u, delta) in proposal.rows_of(editor.targets, edit).items():
                assert torch.equal(padded[name][0][edit, : len(u)], u)
                assert torch.equal(padded[name][1][edit, : len(u)], delta)

    @pytest.mark.parametrize("edits", [2, 5])
    def test_gives_an_edit_without_rows_zeros(self, edits):
        target = Target("w.weight", 3, 2, False)
        proposal = Proposal((torch.ones(3, 3),), (torch.ones(3, 2),), (torch.tensor([0, 1, 1]),), edits)
        u, delta = proposal.padded([target])["w.weight"]
        assert u.sum((1, 2)).tolist() == [3, 6, *[0] * (edits - 2)]
        assert delta.sum((1, 2)).tolist() == [2, 4, *[0] * (edits - 2)]
