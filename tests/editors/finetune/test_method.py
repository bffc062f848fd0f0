"""The baselines are plain Adam on the correction's loss, on copies of the weights that the editor edits."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.nn import functional as F

from editors.base_model import BaseModel, weights_digest
from editors.evaluation.protocols import Bench
from editors.evaluation.texts import own_text
from editors.finetune.method import KL_TEXTS, FineTuning, Recipe
from editors.targets import resolve_targets
from editors.views import view
from tests.editors.dense import loss, predictions
from tests.editors.evaluation.bases import KINDS, base_of, examples_of
from tests.editors.evaluation.exact import measure
from tests.editors.evaluation.test_protocols import assert_alike, coarse, said_already


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def fine_tuning(base: BaseModel, rate=1e-3, steps=8, kl=0.0, texts=()) -> FineTuning:
    return FineTuning(base, resolve_targets(base.model), Recipe(rate, steps, kl), texts)


def samples(base: BaseModel):
    """Unrelated texts; a classifier reads tokens at random."""
    texts = own_text(base, 5)[:KL_TEXTS]
    return texts or [base.tokens(range(5 + n, 17 + n)) for n in range(KL_TEXTS)]


def encoded(base: BaseModel, example):
    return base.encode(example.prompt, example.correction)


def by_hand(base: BaseModel, sequences, rate, steps) -> torch.nn.Module:
    """Adam on the whole dense model."""
    model = copy.deepcopy(base.model)
    weights = [model.get_parameter(target.name).requires_grad_() for target in resolve_targets(model)]
    optimizer = torch.optim.Adam(weights, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(loss(model, tokens) for tokens in sequences) / len(sequences)).backward()
        optimizer.step()
    return model


def written(base: BaseModel, method: FineTuning, edit) -> torch.nn.Module:
    live = view(base.model, [target.name for target in method.targets])
    method.write(edit, live)
    return live


class TestFineTuning:
    def test_is_adam_on_the_loss_of_the_edit(self, kind):
        base = base_of(kind, torch.float64)
        example = next(e for e in examples_of(base) if loss(base.model, encoded(base, e)) > 0.7)
        method = fine_tuning(base, rate=1e-5, steps=3)
        (made,) = method.edits([example])
        assert made.facts == {"steps": 3}
        expected = by_hand(base, [encoded(base, example)], 1e-5, 3)
        for target in method.targets:
            moved, base_weight = made.edit[target.name], base.model.get_parameter(target.name)
            assert (moved - base_weight).abs().max() > 1e-6
            torch.testing.assert_close(moved, expected.get_parameter(target.name).detach(), rtol=0, atol=1e-9)

    def test_lowers_the_loss_and_leaves_the_base_untouched(self, kind):
        base = base_of(kind)
        digest = weights_digest(base.model)
        method = fine_tuning(base)
        examples = examples_of(base)[:4]
        for example, made in zip(examples, method.edits(examples), strict=True):
            tokens = encoded(base, example)
            if made.facts["steps"]:
                assert loss(written(base, method, made.edit), tokens) < loss(base.model, tokens) - 1e-3
        assert weights_digest(base.model) == digest
        assert not any(parameter.requires_grad for parameter in base.model.parameters())

    def test_every_edit_begins_at_the_base(self, kind):
        base = base_of(kind)
        method, examples = fine_tuning(base), examples_of(base)[:2]
        _, second = method.edits(examples)
        (alone,) = method.edits(examples[1:])
        assert all(torch.equal(second.edit[name], weight) for name, weight in alone.edit.items())

    def test_stops_as_soon_as_every_token_is_preferred(self, kind):
        base = base_of(kind)
        method = fine_tuning(base, rate=3e-3, steps=200)
        for example, made in zip(examples_of(base), method.edits(examples_of(base)), strict=True):
            tokens, taken = encoded(base, example), made.facts["steps"]
            assert taken < 200
            assert says(written(base, method, made.edit), tokens)
            if taken:
                (shorter,) = fine_tuning(base, rate=3e-3, steps=taken - 1).edits([example])
                assert not says(written(base, method, shorter.edit), tokens)

    def test_of_what_is_said_already_is_nothing(self):
        base = base_of("decoder")
        (made,) = fine_tuning(base).edits([said_already(base)])
        assert made.facts == {"steps": 0}
        assert all(torch.equal(weight, base.model.get_parameter(name)) for name, weight in made.edit.items())

    def test_adds_small_steps_up_before_they_are_rounded(self):
        """One step of 5e-4 moves no bfloat16 number of 0.625; six of them together do."""
        base = coarse(torch.bfloat16)
        example = examples_of(base)[0]
        (one,), (many,) = (fine_tuning(base, 5e-4, steps).edits([example]) for steps in (1, 6))
        assert (one.facts["steps"], many.facts["steps"]) == (1, 6)
        same = [
            all(torch.equal(weight, base.model.get_parameter(name)) for name, weight in made.edit.items())
            for made in (one, many)
        ]
        assert same == [True, False]

    def test_in_float16_follows_float32(self):
        """The gradients of a float16 model are scaled, or they would vanish."""
        wide, half = base_of("decoder"), base_of("decoder", torch.float16)
        example = examples_of(wide)[0]
        (expected,), (made,) = (fine_tuning(base, 1e-3, 4).edits([example]) for base in (wide, half))
        for name, weight in expected.edit.items():
            change = weight - wide.model.get_parameter(name)
            found = made.edit[name].float() - half.model.get_parameter(name).float()
            assert torch.corrcoef(torch.stack([change.flatten(), found.flatten()]))[0, 1] > 0.95

    def test_together_is_adam_on_the_mean_loss(self, kind):
        base = base_of(kind, torch.float64)
        examples = examples_of(base)[:3]
        method = fine_tuning(base, rate=1e-5, steps=3)
        live = view(base.model, [target.name for target in method.targets])
        method.write_together(examples, live)
        expected = by_hand(base, [encoded(base, example) for example in examples], 1e-5, 3)
        for target in method.targets:
            found = live.get_parameter(target.name)
            torch.testing.assert_close(found, expected.get_parameter(target.name).detach(), rtol=0, atol=1e-9)

    def test_in_turn_goes_on_from_the_edits_before(self, kind):
        base = base_of(kind)
        examples = [e for e in examples_of(base) if not says(base.model, encoded(base, e))][:2]
        method = fine_tuning(base, rate=3e-3, steps=200)
        live = view(base.model, [target.name for target in method.targets])
        states = []
        for _, example in zip(method.write_in_turn(examples, live), examples, strict=True):
            assert says(live, encoded(base, example))
            states.append({target.name: live.get_parameter(target.name).clone() for target in method.targets})
        (first,) = method.edits(examples[:1])
        assert all(torch.equal(states[0][name], weight) for name, weight in first.edit.items())
        distance = {
            start: sum((states[1][t.name] - source[t.name]).square().sum() for t in method.targets)
            for start, source in (("first", states[0]), ("base", dict(base.model.named_parameters())))
        }
        assert distance["first"] < distance["base"]


class TestDivergence:
    def test_is_that_of_the_dense_models(self, kind):
        base = base_of(kind, torch.float64)
        texts = samples(base)
        method = fine_tuning(base, rate=1e-2, steps=3, kl=1.0, texts=texts)
        unrelated = method._unrelated
        assert unrelated.divergence(method.upper, fixed()).item() == pytest.approx(0, abs=1e-12)
        method.tune([encoded(base, examples_of(base)[0])])
        with torch.no_grad():
            found = unrelated.divergence(method.upper, fixed()).item()
        kls = []
        for tokens, places in zip(texts, unrelated._positions, strict=True):
            before, after = (predictions(model, tokens).log_softmax(-1) for model in (base.model, method.model))
            rows = [tokens.predicted.index(place) for place in places]
            kls += F.kl_div(after[rows], before[rows], log_target=True, reduction="none").sum(-1).tolist()
        assert found == pytest.approx(sum(kls) / len(kls), rel=1e-3)
        assert found > 1e-4

    def test_is_held_down_by_the_second_term(self, kind):
        base = base_of(kind)
        texts = samples(base)
        example = next(e for e in examples_of(base) if loss(base.model, encoded(base, e)) > 0.7)
        reached = []
        for kl in (1e-9, 1000.0):
            method = fine_tuning(base, rate=1e-4, steps=12, kl=kl, texts=texts)
            assert method.tune([encoded(base, example)]) > 1  # the first step knows of no divergence yet
            with torch.no_grad():
                reached.append(method._unrelated.divergence(method.upper, fixed()).item())
        assert reached[1] < 0.8 * reached[0]

    def test_names_the_method(self):
        base = base_of("decoder")
        assert (fine_tuning(base).name, fine_tuning(base, kl=1.0, texts=samples(base)).name) == ("ft", "ft+kl")


class TestMeasured:
    def test_values_are_those_of_the_tuned_weights(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base)[:3], fine_tuning(base)
        report = Bench(base).single(method, examples)
        assert report.method == "ft"
        for index, (example, made) in enumerate(zip(examples, method.edits(examples), strict=True)):
            live = written(base, method, made.edit)
            assert_alike(report.after[index], measure(base, live, example, example.unrelated))
            assert report.records[index] == {"prompt": example.prompt, **made.facts}

    @pytest.mark.parametrize("way", ["batched", "accumulated"])
    def test_with_others_are_those_of_all_weights_at_the_end(self, kind, way):
        base = base_of(kind)
        examples, method = examples_of(base)[:3], fine_tuning(base, rate=3e-3, steps=30)
        report = getattr(Bench(base), way)(method, examples, 3)
        live = view(base.model, [target.name for target in method.targets])
        if way == "batched":
            method.write_together(examples, live)
        else:
            list(method.write_in_turn(examples, live))
        for index, example in enumerate(examples):
            assert_alike(report.after[index], measure(base, live, example, example.unrelated))


def says(model, tokens) -> bool:
    return predictions(model, tokens)[-len(tokens.target) :].argmax(-1).tolist() == list(tokens.target)


def fixed():
    """Draws every text once: there are as many as one step takes."""
    return random.Random(0)
