"""Captured rows are the fine-tuning gradient of one example, in factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editors.base_model import BaseModel, weights_digest
from editors.capture import Capture, capture, target_losses
from editors.errors import TargetsError
from editors.targets import resolve_targets
from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks
from tests.editors.dense import FACTS, encoded, gradients, logits, loss
from tests.editors.families import family_model, family_sequences
from tests.small import small_base


def captured(base: BaseModel, sequences: list[Tokens], upper: UpperBlocks | None = None) -> Capture:
    upper = upper or UpperBlocks(base.model, resolve_targets(base.model))
    return capture(upper, upper.below([sequence.inputs for sequence in sequences]), sequences)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


class TestGradient:
    def test_of_every_example_of_a_batch_is_autograds_own(self, base):
        base.model.double()
        targets, sequences = resolve_targets(base.model), encoded(base)
        rows = captured(base, sequences)
        for example, tokens in enumerate(sequences):
            expected = gradients(base.model, targets, tokens)
            for u, delta, owner, gradient in zip(rows.u, rows.delta, rows.example, expected, strict=True):
                mine = owner == example
                assert_same(delta[mine].T @ u[mine], gradient)

    def test_of_an_example_does_not_depend_on_its_neighbours(self, base):
        base.model.double()
        sequences = encoded(base)
        together = captured(base, sequences)
        for example, tokens in enumerate(sequences):
            mine, alone = together.example[0] == example, captured(base, [tokens])
            for u, delta, own_u, own_delta in zip(together.u, together.delta, alone.u, alone.delta, strict=True):
                assert_same(u[mine], own_u)
                assert_same(delta[mine], own_delta)

    def test_is_that_of_the_mean_over_the_corrections_tokens(self, base):
        sequences = encoded(base)
        expected = torch.stack([loss(base.model, tokens) for tokens in sequences])
        torch.testing.assert_close(captured(base, sequences).loss, expected)

    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [(torch.float64, torch.float64)] + [(half, torch.float32) for half in (torch.bfloat16, torch.float16)],
    )
    def test_rows_have_at_least_the_precision_of_float32(self, base, dtype, kept):
        base.model.to(dtype)
        rows = captured(base, encoded(base))
        assert {tensor.dtype for tensor in (*rows.u, *rows.delta, rows.loss)} == {kept}

    def test_of_a_float16_model_does_not_vanish(self):
        """A prediction that is nearly sure has gradients below what float16 can hold."""
        base = small_base()
        base.model.get_output_embeddings().weight.mul_(16)
        (prompt, _), *_ = FACTS
        ids = base.encode(prompt).prompt
        likely = int(logits(base.model, ids)[-1].argmax())
        exact = captured(base, [Tokens(ids, (likely,))])
        base.model.half()
        for precise, rounded in zip(exact.delta, captured(base, [Tokens(ids, (likely,))]).delta, strict=True):
            moves = precise != 0
            assert moves.any()
            assert (rounded[moves] != 0).float().mean() > 0.95


class TestOtherLayers:
    @pytest.mark.parametrize("family", ["t5", "bart"])
    @pytest.mark.parametrize("part", ["q", "k", "v"])
    def test_cross_attention_is_captured_where_it_reads(self, family, part):
        """Its keys and values read the encoder's tokens, though they are part of the decoder."""
        model = family_model(family, torch.float64)
        pattern = rf"EncDecAttention\.{part}$" if family == "t5" else rf"encoder_attn\.{part}_proj$"
        targets, sequences = resolve_targets(model, [pattern]), family_sequences(model)
        upper = UpperBlocks(model, targets)
        rows = capture(upper, upper.below([tokens.inputs for tokens in sequences]), sequences)
        for number, tokens in enumerate(sequences):
            found = gradients(model, targets, tokens)
            for u, delta, owner, expected in zip(rows.u, rows.delta, rows.example, found, strict=True):
                assert_same(delta[owner == number].T @ u[owner == number], expected)

    def test_that_run_several_times_in_a_pass_are_refused(self):
        model = small_base().model
        layers = model.model.layers
        layers[2].mlp = layers[3].mlp
        with pytest.raises(TargetsError, match=r"up_proj is not used exactly once on every token \(it runs 2"):
            UpperBlocks(model, resolve_targets(model, [r"\.2\.mlp\.up_proj"]))


class TestPadding:
    def test_leaves_no_rows(self, base):
        sequences = encoded(base)
        rows = captured(base, sequences)
        for u, delta, example in zip(rows.u, rows.delta, rows.example, strict=True):
            assert torch.bincount(example).tolist() == [len(tokens.inputs) for tokens in sequences]
            assert len(u) == len(delta) == len(example)

    def test_is_never_scored(self, base):
        sequences = encoded(base)
        rows, positions = scored_positions(sequences, torch.device("cpu"))
        for row, tokens in enumerate(sequences):
            predicted = (positions[rows == row] + 1).tolist()
            assert [(*tokens.prompt, *tokens.target)[place] for place in predicted] == list(tokens.target)

    def test_does_not_enter_a_mean(self):
        sequences = [Tokens((1, 2), (3,)), Tokens((1,), (0, 0, 0))]
        rows, _ = scored_positions(sequences, torch.device("cpu"))
        sure = torch.full((4, 5), -1e9)
        sure[0, 3] = sure[1:, 1] = 0  # the first is certain and right, the second certain and wrong
        assert target_losses(sure, sequences, rows).tolist() == [0.0, 1e9]


class TestWhatItCosts:
    def test_nothing_below_the_first_edited_layer_gets_a_graph(self, base):
        down = [target for target in resolve_targets(base.model) if ".2.mlp" in target.name or ".h.2." in target.name]
        upper = UpperBlocks(base.model, down[-1:])
        assert upper.first == 2
        graphs: dict[str, bool] = {}

        def note(name: str) -> None:
            def hook(_module: torch.nn.Module, _args: tuple, output: Tensor | tuple) -> None:
                graphs[name] = (output[0] if isinstance(output, tuple) else output).requires_grad

            upper.module.get_submodule(name).register_forward_hook(hook)

        stack = upper.targets[0].name.split(".0.")[0]
        attention = "self_attn" if hasattr(upper.module.get_submodule(f"{stack}.0"), "self_attn") else "attn"
        for name in (f"{stack}.0.{attention}", f"{stack}.0", f"{stack}.1"):
            note(name)
        captured(base, encoded(base), upper)
        assert graphs == {f"{stack}.0.{attention}": False, f"{stack}.0": True, f"{stack}.1": True}

    def test_the_hidden_states_below_carry_no_graph(self, base):
        upper = UpperBlocks(base.model, resolve_targets(base.model))
        assert not upper.below([[5, 6, 7]]).requires_grad

    def test_the_model_stays_frozen_and_unchanged(self, base):
        before = weights_digest(base.model)
        captured(base, encoded(base))
        assert weights_digest(base.model) == before == base.digest
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert all(parameter.grad is None for parameter in base.model.parameters())


class TestFailure:
    def test_leaves_no_hook_behind(self, base):
        sequences, upper = encoded(base), UpperBlocks(base.model, resolve_targets(base.model))
        hidden = upper.below([tokens.inputs for tokens in sequences])
        expected = capture(upper, hidden, sequences)
        with pytest.raises(IndexError):
            capture(upper, hidden[:, :2], sequences)
        assert not any(upper.module.get_submodule(target.module)._forward_hooks for target in upper.targets)
        again = capture(upper, hidden, sequences)
        assert all(torch.equal(a, b) for a, b in zip(again.delta, expected.delta, strict=True))
