"""The losses and figures are those of densely edited models."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from editors.mend.training.corpus import locality_positions
from editors.mend.training.hidden import Text
from editors.mend.training.objective import UNRELATED, VALIDATION_BATCH, Validation, _Divergence
from editors.text import Tokens
from tests.editors.dense import changed, loss, predictions
from tests.editors.mend.training.runs import FAMILIES, assert_same_state, family_base, trainer


class TestLosses:
    @pytest.mark.parametrize("together", [1, 3])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_those_of_densely_edited_models(self, tmp_path, family, together):
        """The paraphrase under the sum of its group's edits, and how far that moves neighbours and other texts."""
        base = family_base(family)
        run = trainer(base, tmp_path, batch=6, self_share=0.0, together=together)
        run.calibrate()
        run.editor.log_steps.data += 3.0  # enough to be seen
        editor, config = copy.deepcopy(run.editor), run.config
        got = run.step()

        chosen = run.corpus.choose(random.Random(f"{config.seed}-0"), 6, together)
        rng = random.Random(f"{config.seed}-0-0")
        batch = run.corpus.draw(rng, chosen, self_share=0.0, unrelated=config.unrelated, together=together)
        captured = run.objective.capture(batch)
        editor.update_statistics(captured)
        proposal = editor(captured)
        models = [base.model] * (6 // together)
        for edit in range(6):
            rows = proposal.rows_of(editor.targets, edit)
            models[edit // together] = changed(models[edit // together], editor.targets, rows)
        models = [models[edit // together] for edit in range(6)]
        nll = torch.stack([loss(models[o], t.tokens) for o, t in zip(batch.target_owner, batch.targets, strict=True)])
        assert got["edit"] == pytest.approx(nll.mean().item(), rel=1e-3)

        scored: dict[int, list[float]] = {}
        for row, position in zip(*locality_positions(rng, batch.locality), strict=True):
            tokens = batch.locality[row].tokens
            place = tokens.predicted.index(position)
            before = predictions(base.model, tokens)[place].log_softmax(-1)
            after = predictions(models[batch.locality_owner[row]], tokens)[place].log_softmax(-1)
            scored.setdefault(row, []).append(F.kl_div(after, before, log_target=True, reduction="sum").item())
        sums = {True: 0.0, False: 0.0}
        for row, values in scored.items():
            sums[batch.locality_near[row]] += batch.locality_weight[row] * sum(values) / len(values) / 6
        assert got["neighbour"] == pytest.approx(sums[True], rel=1e-3, abs=1e-6)
        assert got["unrelated"] == pytest.approx(sums[False], rel=1e-3, abs=1e-6)
        weighed = config.c_edit * got["edit"] + config.c_neighbour * sums[True] + config.c_unrelated * sums[False]
        assert got["loss"] == pytest.approx(weighed, rel=1e-3)
        assert sums[False] > 1e-4
        assert (sums[True] > 1e-4) == (base.kind != "classifier")  # which has no neighbours

    def test_divergence_is_kl_with_its_own_gradient(self):
        torch.manual_seed(0)
        base, edited = torch.randn(2, 5, 7, dtype=torch.float64)
        edited.requires_grad_()
        expected = F.kl_div(edited.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(_Divergence.apply(edited, base), expected)
        assert torch.autograd.gradcheck(lambda logits: _Divergence.apply(logits, base), (edited,))


class TestChanges:
    def test_of_edits_that_stand_alone_are_the_editors_own_bit_for_bit(self, base, tmp_path):
        run = trainer(base, tmp_path)
        run.calibrate()
        (micro,) = run._prepare("alone", 1)
        own = run.editor(micro.captured).padded(run.objective.upper.targets)
        assert_same_state(run.objective._changes(micro.batch, micro.captured), own)


class TestValidation:
    @pytest.mark.parametrize("together", [1, 3])
    @pytest.mark.parametrize(("family", "step"), [("llama", 0.03), ("t5", 0.01), ("bert", 0.001)])
    def test_is_that_of_densely_edited_models(self, tmp_path, family, step, together):
        base = family_base(family)
        run = trainer(
            base, tmp_path, batch=6, together=together, validation_edits=VALIDATION_BATCH // together * together
        )
        run.calibrate()
        run.editor.log_steps.data.fill_(math.log(step))  # some of what must not move does
        got = run.validate()

        rng = random.Random("validation")
        judged = run.judgement
        chosen = judged.corpus.choose(rng, run.config.validation_edits, together)
        batch = judged.corpus.draw(rng, chosen, self_share=0.0, unrelated=UNRELATED, together=together)
        proposal = run.editor(judged.capture(batch))
        models = [base.model] * (len(chosen) // together)
        for edit in range(len(chosen)):
            rows = proposal.rows_of(run.editor.targets, edit)
            models[edit // together] = changed(models[edit // together], run.editor.targets, rows)

        def said(model: PreTrainedModel, tokens: Tokens) -> Tensor:
            scored = [tokens.predicted.index(position) for position in tokens.scored]
            return predictions(model, tokens)[scored].argmax(-1)

        def right(texts: list[Text], owners: list[int]) -> float:
            pairs = zip(texts, owners, strict=True)
            found = [tuple(said(models[o // together], t.tokens).tolist()) == t.tokens.target for t, o in pairs]
            return sum(found) / len(found)

        assert got.efficacy == right(batch.edits, list(range(len(chosen))))
        assert got.paraphrase == right(batch.targets, batch.target_owner)
        kept: dict[bool, list[bool]] = {True: [], False: []}
        for text, owner, near in zip(batch.locality, batch.locality_owner, batch.locality_near, strict=True):
            same = said(base.model, text.tokens) == said(models[owner // together], text.tokens)
            kept[near] += same.tolist()
        assert got.unrelated == sum(kept[False]) / len(kept[False])
        assert math.isnan(got.neighbour) if not kept[True] else got.neighbour == sum(kept[True]) / len(kept[True])
        assert family == "t5" or got.efficacy > 0
        assert 0 < got.unrelated < 1

    def test_score_is_a_harmonic_mean_of_what_was_measured(self):
        assert Validation(1.0, 0.5, 1.0, 0.5).score == pytest.approx(4 / 6)
        assert Validation(1.0, 0.5, math.nan, 0.5).score == pytest.approx(3 / 5)
        assert Validation(0.0, 1.0, 1.0, 1.0).score < 1e-5

    def test_of_an_editor_that_does_nothing_is_the_base_itself(self, base, tmp_path):
        run = trainer(base, tmp_path)
        run.calibrate()
        run.editor.log_steps.data.fill_(-100)
        figures = run.validate()
        assert (figures.neighbour, figures.unrelated) == (1.0, 1.0)
        assert figures.efficacy == figures.paraphrase == 0.0

    def test_is_the_same_every_time_and_changes_nothing(self, linear, tmp_path):
        run = trainer(linear, tmp_path)
        run.calibrate()
        before = copy.deepcopy(run.editor.state_dict())
        assert run.validate() == run.validate()
        assert_same_state(before, run.editor.state_dict())
