"""Training on sets: what is drawn, that captures are kept, and that the losses are those of densely edited models."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional as F

from editors.checkpoint import load_checkpoint
from editors.data import Example
from editors.errors import DataFileError, TrainingOptionsInvalid
from editors.least_squares_editor import RIDGE
from editors.mend.training import fitting
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Corpus, locality_positions
from editors.mend.training.fitting import fit
from editors.mend.training.objective import Objective, Validation
from editors.mend.training.recipe import _new_editor, train
from editors.mend.training.settling import nearness
from editors.mend.training.trainer import Trainer
from editors.text import Tokens
from editors.views import UpperBlocks
from tests.editors.dense import changed, loss, predictions
from tests.editors.mend.examples import capitals, data_set, languages
from tests.editors.mend.training.runs import SAMPLES, SMALL, assert_same_state, family_base, nothing
from tests.small import small_base

KEYED = SMALL | {"aggregate": "least_squares", "together": 5, "unrelated": 1}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate for a few small texts is trained sooner."""
    monkeypatch.setattr(fitting, "GATE_STEPS", 200)


@pytest.fixture(params=["linear", "conv1d"])
def base(request):
    return small_base(request.param)


def keyed_trainer(base, folder, fitted=True, **config) -> Trainer:
    whole = TrainingConfig(**(KEYED | config))
    editor = _new_editor(base, whole, None)
    upper = UpperBlocks(base.model, editor.captured)
    early, late = ([data_set(file[part]) for file in (capitals(2), languages())] for part in (slice(5), slice(5, None)))
    learnt, held_out = (Corpus(base, upper, data, SAMPLES) for data in (early, late))
    if fitted:
        fit(editor, base, upper, learnt, 0)
    return Trainer(editor, upper, learnt, held_out, whole, folder)


class TestDraw:
    def test_gives_sets_of_every_size_up_to_the_largest(self, base, tmp_path):
        objective = keyed_trainer(base, tmp_path).objective
        sizes = {objective.draw("seed", index)[0].together for index in range(60)}
        assert sizes == {1, 2, 3, 4, 5}

    def test_is_bounded_by_the_data(self, base, tmp_path):
        objective = keyed_trainer(base, tmp_path, together=1000).objective
        sizes = [objective.draw("seed", index)[0].together for index in range(60)]
        assert max(sizes) <= len(objective.corpus.prompts)

    def test_judges_as_many_edits_whatever_the_size(self, base, tmp_path):
        objective = keyed_trainer(base, tmp_path).objective
        for index in range(20):
            batch, _ = objective.draw("seed", index)
            groups = len(batch.edits) // batch.together
            assert len(batch.edits) == groups * batch.together
            assert 4 // 2 <= len(batch.targets) <= 4
            for first in range(0, len(batch.edits), batch.together):
                prompts = [text.tokens.prompt for text in batch.edits[first : first + batch.together]]
                assert len(set(prompts)) == len(prompts)

    def test_keeps_no_prompt_that_is_corrected(self, base, tmp_path):
        objective = keyed_trainer(base, tmp_path).objective
        for index in range(20):
            batch, _ = objective.draw("seed", index)
            for owner, text in zip(batch.locality_owner, batch.locality, strict=True):
                first = owner - owner % batch.together
                asked = [edit.tokens.prompt for edit in batch.edits[first : first + batch.together]]
                assert text.tokens.prompt not in asked


class TestCapture:
    def test_is_kept_and_is_that_of_each_edit_alone(self, base, tmp_path):
        objective = keyed_trainer(base, tmp_path).objective
        batch, _ = objective.draw("seed", 3)
        kept = objective.capture(batch)
        direct = objective.editor.read(Objective.capture(objective, batch))
        torch.testing.assert_close(kept.u, direct.u, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept.delta, direct.delta, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(kept.answer, direct.answer, atol=1e-6, rtol=1e-3)

    def test_knows_the_subjects_that_prompts_name(self, base, tmp_path):
        edits = [item.edit for items in keyed_trainer(base, tmp_path).corpus.files for item in items]
        assert all(text.tokens.subject is not None for text in edits)


class TestLosses:
    @pytest.mark.parametrize("index", range(4))
    def test_are_those_of_densely_edited_models(self, base, tmp_path, index):
        objective = keyed_trainer(base, tmp_path, self_share=0.5).objective
        with torch.no_grad():
            for network in objective.editor.networks:
                network.skip.weight *= 30  # enough to be seen
        batch, rng = objective.draw("dense", index)
        captured = objective.capture(batch)
        got = objective.losses(batch, captured, rng)

        editor, models = objective.editor, []
        proposal = editor.propose(captured)
        factored = editor.together(proposal, batch.together, editor.targets)[editor.targets[0].name]
        for u, delta in zip(*factored, strict=True):
            models.append(changed(base.model, editor.targets, {editor.targets[0].name: (u, delta)}))
        nll = [
            loss(models[owner // batch.together], text.tokens)
            for owner, text in zip(batch.target_owner, batch.targets, strict=True)
        ]
        assert got[0].item() == pytest.approx(torch.stack(nll).mean().item(), rel=1e-3)
        _, rng = objective.draw("dense", index)
        scored: dict[int, list[float]] = {}
        for row, position in zip(*locality_positions(rng, batch.locality), strict=True):
            tokens, model = batch.locality[row].tokens, models[batch.locality_owner[row] // batch.together]
            before = predictions(base.model, tokens)[position].log_softmax(-1)
            after = predictions(model, tokens)[position].log_softmax(-1)
            scored.setdefault(row, []).append(F.kl_div(after, before, log_target=True, reduction="sum").item())
        for place, near in ((1, True), (2, False)):
            rows = [row for row in scored if batch.locality_near[row] == near]
            total = sum(batch.locality_weight[row] * sum(scored[row]) / len(scored[row]) for row in rows)
            assert got[place].item() == pytest.approx(total / len(batch.targets), rel=1e-3, abs=1e-6)

    def test_come_down(self, base, tmp_path):
        run = keyed_trainer(base, tmp_path, steps=60, learning_rate=5e-3, c_edit=1.0)
        batch, _ = run.objective.draw("measured", 0)
        before = run.objective.losses(batch, run.objective.capture(batch), random.Random(0))[0].item()
        run.run(nothing, nothing)
        assert run.objective.losses(batch, run.objective.capture(batch), random.Random(0))[0].item() < before - 0.1

    def test_reach_every_parameter_but_the_gate(self, base, tmp_path):
        run = keyed_trainer(base, tmp_path)
        before = {name: parameter.detach().clone() for name, parameter in run.editor.named_parameters()}
        for run.progress.step in range(3):
            run.step()
        unmoved = [name for name, parameter in run.editor.named_parameters() if torch.equal(parameter, before[name])]
        assert unmoved == [name for name in before if name.startswith("gate")]


class TestRun:
    def test_goes_on_as_if_it_had_not_stopped(self, base, tmp_path):
        first = keyed_trainer(base, tmp_path / "cut", validate_every=2, steps=2, schedule="constant")
        whole = keyed_trainer(base, tmp_path / "whole", validate_every=2, steps=4, schedule="constant")
        whole.run(nothing, nothing)
        first.run(nothing, nothing)
        second = keyed_trainer(
            base, tmp_path / "cut", fitted=False, validate_every=2, steps=4, schedule="constant"
        )  # whitening, statistics and gate come from the file
        second.resume()
        second.run(nothing, nothing)
        assert_same_state(second.editor.state_dict(), whole.editor.state_dict())

    def test_is_the_same_in_micro_batches_up_to_what_is_drawn(self, base, tmp_path):
        run = keyed_trainer(base, tmp_path, accumulate=2)
        run.run(nothing, nothing)
        assert all(parameter.isfinite().all() for parameter in run.editor.parameters())

    def test_leaves_a_checkpoint_that_serves(self, tmp_path):
        base = small_base()
        config = TrainingConfig(**KEYED)
        best = train(base, [data_set(capitals(2))], [data_set(languages())], config, tmp_path)
        assert best is not None
        checkpoint = load_checkpoint(tmp_path, base)
        assert checkpoint.aggregate == "least_squares"
        found: dict[tuple[float, ...], dict[int, Validation]] = {}
        for row in checkpoint.card["settled"]:
            figures = {name: math.nan if row[name] is None else row[name] for name in checkpoint.card["validation"]}
            choice = tuple(row[name] for name in ("ridge", "strength", "fading"))
            found.setdefault(choice, {})[row["edits"]] = Validation(**figures)
        scores = {choice: nearness(sizes) for choice, sizes in found.items()}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert len(scores) > 1
        ridge, _, fading = next(iter(scores))
        assert checkpoint.editor.keyed.fading.item() == pytest.approx(fading)
        assert checkpoint.editor.keyed.log_ridge.exp().tolist() == pytest.approx([ridge])
        assert f"| {ridge:g} | " in (tmp_path / "card.md").read_text()
        train(base, [data_set(capitals(2))], [data_set(languages())], config, tmp_path, resume=True)
        again = load_checkpoint(tmp_path, base)  # settled from what was trained, not from what was settled
        assert (again.digest, again.card["settled"]) == (checkpoint.digest, checkpoint.card["settled"])
        assert "keyed at the subject's last token" in (tmp_path / "card.md").read_text()

    def test_needs_another_weight_to_complete_edits_with(self, base, tmp_path):
        data, layers = [data_set(capitals())], [r"\.[13]\.mlp\.(down_proj|c_proj)"]
        with pytest.raises(TrainingOptionsInvalid, match="name lower blocks by --layers"):
            train(base, data, data, TrainingConfig(**KEYED), tmp_path, layers=layers)

    @pytest.mark.parametrize("family", ["t5", "bert"])
    def test_is_for_decoders(self, family, tmp_path):
        base = family_base(family)
        with pytest.raises(TrainingOptionsInvalid, match="--aggregate sum"):
            train(base, [data_set(capitals())], [data_set(capitals())], TrainingConfig(**KEYED), tmp_path)


class TestNearness:
    WORST, BEST = Validation(0.0, 0.0, 0.0, 0.0), Validation(1.0, 1.0, 1.0, 1.0)

    def test_is_the_mean_share_of_the_aims_of_that_many_edits(self):
        half = Validation(0.95 / 2, 0.45 / 2, 0.6 / 2, 0.9 / 2)
        assert nearness({100: half}) == nearness({999: half}) == pytest.approx(0.5)
        assert nearness({1: self.WORST, 1000: self.BEST}) == 0.5

    def test_does_not_make_up_for_one_figure_with_another(self):
        assert nearness({1000: Validation(0.8, 0.25, 0.6, 0.0)}) == nearness({1000: Validation(1, 1, 1, 0)}) == 0.75

    def test_leaves_out_what_was_not_measured(self):
        assert nearness({10: Validation(0.97, 0.0, math.nan, math.nan)}) == 0.5


class TestFit:
    def test_whitens_by_the_covariance_of_what_weights_read(self, base, tmp_path):
        run = keyed_trainer(base, tmp_path)
        corpus, (target,) = run.corpus, run.editor.targets
        texts = [*corpus.samples, *(t for items in corpus.files for i in items for t in (i.edit, *i.neighbours))]
        held = []
        module = base.model.get_submodule(target.module)
        handle = module.register_forward_pre_hook(lambda _module, args: held.append(args[0].reshape(-1, target.d_in)))
        for text in texts:
            base.model(torch.tensor([text.tokens.inputs]))
        handle.remove()
        rows = torch.cat(held).double()
        covariance = rows.T @ rows / len(rows)
        expected = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(target.d_in)
        L = run.editor.whitening(0).double()
        assert torch.equal(L, L.tril())
        torch.testing.assert_close(L @ L.T, expected, atol=2e-3 * expected.diagonal().max().item(), rtol=0)

    def test_teaches_the_gate_where_subjects_end(self, base):
        """In these prompts it is always the fourth token, which says so by its place alone."""
        facts = [
            Example(f"{a} {b} of {city} is", "Rome", subject=city)
            for city in ("Paris", "London", "Rome", "Berlin", "Madrid", "Oslo", "Vienna")
            for a, b in (("The", "city"), ("The", "capital"), ("In", "a"), ("born", "in"), ("the", "language"))
        ]
        config = TrainingConfig(**(KEYED | {"rank": 64}))
        editor = _new_editor(base, config, None)
        upper = UpperBlocks(base.model, editor.captured)
        found = fit(editor, base, upper, Corpus(base, upper, [data_set(facts)], SAMPLES), 0)
        assert found >= 0.75

    def test_does_without_subjects(self, base):
        facts = [Example("Hello there", "Rome"), Example("Who is he", "Oslo")]
        editor = _new_editor(base, TrainingConfig(**KEYED), None)
        upper = UpperBlocks(base.model, editor.captured)
        found = fit(editor, base, upper, Corpus(base, upper, [data_set(facts)], SAMPLES), 0)
        assert found != found
        assert editor.networks[0].deviation.gt(0).all()

    def test_is_the_same_every_time(self, base, tmp_path):
        one, other = keyed_trainer(base, tmp_path), keyed_trainer(base, tmp_path)
        assert_same_state(one.editor.state_dict(), other.editor.state_dict())


def test_nothing_to_learn_from_is_said():
    base = small_base()
    editor = _new_editor(base, TrainingConfig(**KEYED), None)
    upper = UpperBlocks(base.model, editor.captured)
    corpus = Corpus(base, upper, [data_set(capitals())], [Tokens((5, 6))])
    corpus.files, corpus.samples = [], []
    with pytest.raises(DataFileError, match="no text to learn"):
        fit(editor, base, upper, corpus, 0)
