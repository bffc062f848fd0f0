"""Views share the memory of one model; the upper blocks alone give what the whole gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from editors.base_model import BaseModel
from editors.capture import Capture, capture
from editors.scale import SCALES, search_scale
from editors.state import standalone
from editors.targets import resolve_targets
from editors.text import Tokens
from editors.views import UpperBlocks, edited, view
from tests.editors.dense import changed, encoded, gradients, logits
from tests.small import small_llama

IDS = (5, 90, 17, 33, 60, 41)


def rows_for(targets, seed: int, rows: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(width: int) -> Tensor:
        return 0.3 * torch.randn(rows, width, generator=generator)

    return {target.name: (random(target.d_in), random(target.d_out)) for target in targets}


class TestView:
    def test_shares_every_parameter_but_its_own(self, model):
        own = [target.name for target in resolve_targets(model)[:2]]
        other = view(model, own)
        for name, parameter in model.named_parameters():
            mine = other.get_parameter(name)
            assert (mine is parameter) == (name not in own)
            assert torch.equal(mine, parameter)
            assert (mine.data_ptr() == parameter.data_ptr()) == (name not in own)

    def test_of_tied_weights_stays_tied(self, model):
        other = view(model, [resolve_targets(model)[0].name])
        assert other.get_output_embeddings().weight is other.get_input_embeddings().weight

    def test_writing_to_what_it_owns_changes_it_alone(self, model):
        name = resolve_targets(model)[0].name
        before, other, third = logits(model, IDS), view(model, [name]), view(model)
        other.get_parameter(name).add_(1)
        assert torch.equal(logits(model, IDS), before)
        assert torch.equal(logits(third, IDS), before)
        assert not torch.equal(logits(other, IDS), before)

    def test_what_it_owns_is_frozen_too(self, model):
        other = view(model, [resolve_targets(model)[0].name])
        assert not any(parameter.requires_grad for parameter in other.parameters())

    def test_hooks_on_one_do_not_fire_in_another(self, model):
        one, other = view(model), view(model)
        fired: list[str] = []
        module = resolve_targets(model)[0].module
        one.get_submodule(module).register_forward_hook(lambda *_: fired.append("one"))
        logits(model, IDS)
        logits(other, IDS)
        assert fired == []
        logits(one, IDS)
        assert fired == ["one"]


class TestUpperBlocks:
    def test_give_what_the_whole_model_gives_for_a_padded_batch(self, base):
        upper = UpperBlocks(base.model, resolve_targets(base.model))
        sequences = encoded(base)
        hidden = upper.below([tokens.inputs for tokens in sequences])
        for row, tokens in enumerate(sequences):
            everywhere = torch.arange(len(tokens.inputs))
            got = upper.logits(hidden, sequences, (torch.full_like(everywhere, row), everywhere))
            torch.testing.assert_close(got, logits(base.model, tokens.inputs), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("first", [0, 1, 2, 3])
    def test_may_begin_at_any_block(self, model, first):
        (pattern,) = {target.module.split(".1.")[1] for target in resolve_targets(model)[:1]}
        targets = resolve_targets(model, [rf"\.{first}\.{pattern}$"])
        upper = UpperBlocks(model, targets)
        assert (upper.first, len(upper.targets)) == (first, 1)
        places = torch.arange(len(IDS))
        got = upper.logits(upper.below([IDS]), [Tokens(IDS)], (torch.zeros_like(places), places))
        torch.testing.assert_close(got, logits(model, IDS), rtol=1e-6, atol=1e-6)

    def test_read_chosen_positions_in_the_order_asked(self, model):
        upper, expected = UpperBlocks(model, resolve_targets(model)), logits(model, IDS)
        hidden = upper.below([IDS])
        got = upper.logits(hidden, [Tokens(IDS)], (torch.tensor([0, 0, 0]), torch.tensor([4, 1, 4])))
        torch.testing.assert_close(got, expected[[4, 1, 4]], rtol=1e-6, atol=1e-6)

    def test_name_the_same_weights_in_the_same_order(self, model):
        targets = resolve_targets(model)
        upper = UpperBlocks(model, targets)
        for target, short in zip(targets, upper.targets, strict=True):
            assert upper.module.get_parameter(short.name) is model.get_parameter(target.name)
            assert (target.shape, target.transposed) == (short.shape, short.transposed)

    def test_leave_the_model_and_its_config_as_they_were(self, model):
        before, config = logits(model, IDS), copy.deepcopy(model.config.to_dict())
        upper = UpperBlocks(model, resolve_targets(model))
        upper.below([IDS])
        assert model.config.to_dict() == config
        assert torch.equal(logits(model, IDS), before)

    def test_of_an_edited_view_are_edited(self, model):
        targets = resolve_targets(model)
        live = view(model, [target.name for target in targets])
        upper = UpperBlocks(live, targets)
        for target in targets:
            live.get_parameter(target.name).mul_(1.5)
        places = torch.arange(len(IDS))
        got = upper.logits(upper.below([IDS]), [Tokens(IDS)], (torch.zeros_like(places), places))
        torch.testing.assert_close(got, logits(live, IDS), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(got, logits(model, IDS))

    def test_survive_a_failing_call(self, model):
        upper = UpperBlocks(model, resolve_targets(model))
        ids, sequences = [IDS], [Tokens(IDS)]
        expected = upper.logits(upper.below(ids), sequences)
        with pytest.raises(IndexError):
            upper.below([[10**6]])
        with pytest.raises(IndexError):
            upper.logits(upper.below(ids), sequences, (torch.tensor([0]), torch.tensor([99])))
        assert torch.equal(upper.logits(upper.below(ids), sequences), expected)


class TestWhatCannotBeCut:
    """Then every text passes through the whole model, which is slow and right, and it is said."""

    def test_is_found_out_and_said(self, caplog):
        model = DepthScaled.of(small_llama())
        upper = UpperBlocks(model, resolve_targets(model))
        assert not upper.cached
        assert upper.why_not == "cut down to its upper blocks, it says something else"
        assert "every text passes through the whole model" in caplog.text

    def test_may_even_fail_when_it_is_cut(self, caplog):
        model = Uncuttable.of(small_llama())
        upper = UpperBlocks(model, resolve_targets(model))
        assert not upper.cached
        assert "it cannot be cut down to its upper blocks (four blocks or none)" in upper.why_not
        assert upper.why_not in caplog.text

    @pytest.mark.parametrize("kind", ["DepthScaled", "Uncuttable"])
    def test_gives_the_same_logits_captures_and_scales(self, kind):
        model = globals()[kind].of(small_llama())
        targets, sequences = resolve_targets(model), [Tokens(IDS, (7, 8)), Tokens((4, 5, 6), (9,))]
        upper = UpperBlocks(model, targets)
        states = upper.below([tokens.inputs for tokens in sequences])
        hidden = upper.batch([row[: len(tokens.inputs)] for row, tokens in zip(states, sequences, strict=True)])
        rows = capture(upper, hidden, sequences)
        got = upper.logits(hidden, sequences)
        expected = torch.cat([logits(model, tokens.inputs)[list(tokens.scored)] for tokens in sequences])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for number, tokens in enumerate(sequences):
            found = gradients(model, targets, tokens)
            for u, delta, owner, gradient in zip(rows.u, rows.delta, rows.example, found, strict=True):
                mine = owner == number
                torch.testing.assert_close(delta[mine].T @ u[mine], gradient, rtol=1e-3, atol=1e-5)
        search = search_scale(upper, hidden[:1], sequences[0], standalone(capture_rows(upper, rows)))
        assert len(search.margins) == len(SCALES)


class DepthScaled(LlamaForCausalLM):
    """A model whose answers depend on how many blocks it has."""

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> LlamaForCausalLM:
        model.__class__ = cls
        return model

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * len(self.model.layers)
        return output


class Uncuttable(DepthScaled):
    """A model that does not run at all with fewer blocks."""

    def forward(self, *args, **kwargs):
        if len(self.model.layers) != 4:
            raise ValueError("four blocks or none")
        return LlamaForCausalLM.forward(self, *args, **kwargs)


def capture_rows(upper: UpperBlocks, rows: Capture) -> dict:
    first = [example == 0 for example in rows.example]
    return {
        t.name: (u[mine], -0.01 * delta[mine])
        for t, u, delta, mine in zip(upper.targets, rows.u, rows.delta, first, strict=True)
    }


class TestEdited:
    def test_every_row_runs_as_with_dense_weights_of_its_own(self, model):
        targets = resolve_targets(model)
        edits = [rows_for(targets, seed) for seed in range(3)]
        stacked = {
            t.name: tuple(torch.stack(part) for part in zip(*(e[t.name] for e in edits), strict=True)) for t in targets
        }
        with edited(model, targets, stacked), torch.no_grad():
            got = model(input_ids=torch.tensor([IDS] * 3), use_cache=False).logits
        for row, edit in enumerate(edits):
            expected = logits(changed(model, targets, edit), IDS)
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(expected, logits(model, IDS), atol=1e-2)

    def test_rows_of_zeros_change_nothing(self, model):
        targets = resolve_targets(model)
        zeros = {t.name: (torch.zeros(1, 2, t.d_in), torch.zeros(1, 2, t.d_out)) for t in targets}
        before = logits(model, IDS)
        with edited(model, targets, zeros):
            assert torch.equal(logits(model, IDS), before)

    def test_ends_with_its_block_and_with_an_exception(self, model):
        targets, before = resolve_targets(model), logits(model, IDS)
        edit = {name: (u[None], delta[None]) for name, (u, delta) in rows_for(targets, 0).items()}
        with edited(model, targets, edit):
            assert not torch.equal(logits(model, IDS), before)
        assert torch.equal(logits(model, IDS), before)
        with pytest.raises(ZeroDivisionError), edited(model, targets, edit):
            raise ZeroDivisionError
        assert torch.equal(logits(model, IDS), before)
        assert not any(model.get_submodule(target.module)._forward_hooks for target in targets)

    def test_does_not_reach_other_views(self, base: BaseModel):
        targets, other = resolve_targets(base.model), view(base.model)
        before = logits(base.model, IDS)
        edit = {name: (u[None], delta[None]) for name, (u, delta) in rows_for(targets, 0).items()}
        with edited(other, targets, edit):
            assert torch.equal(logits(base.model, IDS), before)

    def test_keeps_the_dtype_of_the_model(self, model):
        model.bfloat16()
        targets = resolve_targets(model)
        edit = {name: (u[None], delta[None]) for name, (u, delta) in rows_for(targets, 0).items()}
        with edited(model, targets, edit):
            assert logits(model, IDS).dtype == torch.bfloat16
