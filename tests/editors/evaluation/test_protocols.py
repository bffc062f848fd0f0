"""Figures are what an independent reading of dense weights gives, for every kind of model and every setting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.data import Example
from editors.errors import DataFileError
from editors.evaluation.cases import UNRELATED_PROMPTS, draw_unrelated
from editors.evaluation.exam import Exam
from editors.evaluation.methods import Made, Mend
from editors.evaluation.protocols import Bench
from editors.evaluation.reader import Reader
from editors.evaluation.texts import own_text
from editors.factors import quantise
from editors.state import SumState, stacked
from editors.targets import resolve_targets
from editors.views import UpperBlocks, view
from tests.editors.dense import loss, predictions
from tests.editors.evaluation.bases import KINDS, base_of, editor_of, examples_of
from tests.editors.evaluation.exact import measure
from tests.editors.mend.examples import CITIES, COUNTRIES, capitals, languages
from tests.small import small_base, small_editor

AGREEMENT = {f"{kind}, {what}" for kind in ("neighbour", "unrelated") for what in ("next token", "8 tokens", "KL")}
SUCCESS = {f"{kind}, {what}" for kind in ("efficacy", "paraphrase") for what in ("token", "sequence", "greedy")}
EVERYTHING = AGREEMENT | SUCCESS | {f"portability, {what}" for what in ("token", "sequence", "greedy")}
EVERYTHING |= {"ES", "PS", "NS", "S", "drawdown"}


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def mend(base: BaseModel, step: float = 0.03, margin: float = 0.2) -> Mend:
    return Mend(base, editor_of(base, step), margin)


def live_under(base: BaseModel, method: Mend, edits) -> torch.nn.Module:
    """A view whose weights hold the edits as the service would write them."""
    state, live = SumState(method.targets), view(base.model, [target.name for target in method.targets])
    for edit in edits:
        state.add(edit)
    state.write(base.model, live)
    return live


def assert_alike(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=2e-4), name


class TestSingle:
    def test_values_are_those_of_a_model_with_the_edit_in_its_weights(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base), mend(base)
        report = Bench(base).single(method, examples)
        assert set(report.figures) == EVERYTHING
        for index, (example, made) in enumerate(zip(examples, method.edits(examples), strict=True)):
            live = live_under(base, method, [made.edit])
            assert report.records[index]["scale"] == made.facts["scale"]
            assert_alike(report.after[index], measure(base, live, example, example.unrelated))
            assert_alike(report.before[index], measure(base, base.model, example, example.unrelated, edited=False))

    def test_edits_take_and_move_other_prompts(self, kind):
        """Else the test above would compare nothing with nothing."""
        base = base_of(kind)
        report = Bench(base).single(mend(base), examples_of(base))
        assert report.figures["efficacy, greedy"].mean > report.figures_before["efficacy, greedy"].mean
        assert report.figures["neighbour, KL"].mean > 1e-3

    def test_of_an_editor_that_does_nothing_is_as_the_base(self, kind):
        base = base_of(kind)
        report = Bench(base).single(mend(base, step=1e-12, margin=3.0), examples_of(base))
        for name in AGREEMENT:
            assert report.figures[name].mean == pytest.approx(0.0 if "KL" in name else 1.0, abs=1e-6), name
        assert report.figures["drawdown"].mean == 0
        assert report.after[0]["efficacy, token"] == report.before[0]["efficacy, token"]
        assert report.figures["S"] == report.figures_before["S"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_of_half_precision_are_read_from_the_rounded_weights(self, dtype):
        base = base_of("decoder", dtype)
        examples, method = examples_of(base), mend(base)
        report = Bench(base).single(method, examples)
        pristine = Reader(base, view(base.model), method.targets)
        for index, (example, made) in enumerate(zip(examples, method.edits(examples), strict=True)):
            exam = Exam(pristine, examples, [other.unrelated for other in examples])
            live = Reader(base, live_under(base, method, [made.edit]), method.targets)
            assert report.after[index] == exam.mark(live, only=index)[index], example.prompt
        assert report.figures["efficacy, greedy"].mean > 0.5

    def test_changes_that_vanish_in_rounding_are_missed(self):
        """In float32 the edit takes; in bfloat16 it moves no weight by half of the distance to the next number."""
        wide, narrow = (coarse(dtype) for dtype in (torch.float32, torch.bfloat16))
        found = 0
        for example in nearly_said(wide, narrow):
            reports = [Bench(base).single(GradientStep(base, 0.0019), [example]) for base in (wide, narrow)]
            taken = [report.figures["efficacy, greedy"].mean for report in reports]
            assert taken[1] == 0
            assert [report.figures_before["efficacy, greedy"].mean for report in reports] == [0, 0]
            found += taken[0] == 1
        assert found

    def test_is_the_same_twice_and_leaves_the_model_alone(self, kind):
        base = base_of(kind)
        digest = weights_digest(base.model)
        method = mend(base)
        one, same = (Bench(base, seed=4).single(method, examples_of(base)[:3]) for _ in range(2))
        assert (one.figures, one.records) == (same.figures, same.records)
        assert weights_digest(base.model) == digest

    def test_does_not_depend_on_who_shares_a_batch(self, linear):
        method, examples = Mend(linear, small_editor(linear), 0.2), capitals()[:3]
        together = Bench(linear).single(method, examples).scales
        assert together == [Bench(linear).single(method, [example]).scales[0] for example in examples]

    def test_leaves_out_what_has_no_tokens(self, linear):
        method = Mend(linear, small_editor(linear), 0.2)
        blank = dataclasses.replace(capitals()[0], prompt="")
        assert Bench(linear).single(method, [blank, *capitals()[1:3]]).examples == 2
        assert Bench(linear).single(method, []).figures == {}
        holes = dataclasses.replace(
            capitals()[0], paraphrases=("", "{}: city?"), neighbours=("",), unrelated=("",), answer=" "
        )
        counts = {name: figure.count for name, figure in Bench(linear).single(method, [holes]).figures.items()}
        assert counts == dict.fromkeys(SUCCESS, 1)

    def test_counts_prompts(self, linear):
        examples = capitals(2)[:3] + languages()[:2]
        report = Bench(linear).single(Mend(linear, small_editor(linear), 0.2), examples)
        counts = {name: figure.count for name, figure in report.figures.items()}
        assert counts["efficacy, greedy"] == report.examples == len(report.records) == len(report.seconds) == 5
        assert counts["paraphrase, greedy"] == 3 * 2 + 2 * 2
        assert counts["neighbour, next token"] == 3
        assert counts["unrelated, next token"] == sum(map(len, draw_unrelated(examples, 0)))
        assert "ES" not in counts  # no true answers are known


class GradientStep:
    """One step down the gradient, in which no weight moves by more than `size`."""

    name, factored = "gradient step", True

    def __init__(self, base, size):
        self.base, self.size, self.targets = base, size, resolve_targets(base.model)
        self.upper = UpperBlocks(base.model, self.targets)

    def rows(self, edit):
        return stacked(self.targets, [edit])

    def write(self, edit, live):
        state = SumState(self.targets)
        state.add(edit)
        state.write(self.base.model, live)

    def edits(self, examples):
        for example in examples:
            tokens = self.base.encode(example.prompt, example.correction)
            captured = capture(self.upper, self.upper.below([tokens.inputs]), [tokens])
            pairs = zip(self.targets, captured.u, captured.delta, strict=True)
            yield Made(quantise({t.name: (u, -delta * self.size / (delta.T @ u).abs().max()) for t, u, delta in pairs}))


def coarse(dtype):
    """The small model with edited weights of one size, at which bfloat16's next number is 1/256 away."""
    base = base_of("decoder")
    for target in resolve_targets(base.model):
        base.model.get_parameter(target.name).sign_().mul_(0.625)
    return dataclasses.replace(base, model=base.model.to(dtype))


def nearly_said(wide, narrow):
    """Prompts with the word that both models hold for the second best, by a little."""
    for country, city, start in itertools.product(COUNTRIES, CITIES, ("The language of", "Born in", "A city of")):
        prompt = f"{start} {country} is in {city} of"
        (best, word), same = (predictions(base.model, base.encode(prompt))[-1].topk(2) for base in (wide, narrow))
        text = wide.tokenizer.decode(word[1]).strip()
        one_token = text and wide.encode(prompt, text).target == (word[1],)
        if best[0] - best[1] < 0.08 and torch.equal(word, same.indices) and one_token:
            yield Example(prompt, text)


class TestBatched:
    def test_is_the_sum_of_single_edits(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base), mend(base)
        report = Bench(base, others=languages()).batched(method, examples, 3)
        assert (report.setting, report.examples) == ("batched 3", 6)
        made = [one.edit for one in method.edits(examples)]
        for start in (0, 3):
            live = live_under(base, method, made[start : start + 3])
            for index in range(start, start + 3):
                assert_alike(report.after[index], measure(base, live, examples[index], examples[index].unrelated))

    def test_measures_some_of_a_large_group_under_all_of_it(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base)[:6], mend(base)
        report = Bench(base, others=languages()).batched(method, examples, 6, 2)
        live = live_under(base, method, [one.edit for one in method.edits(examples)])
        assert [record["prompt"] for record in report.records] == [examples[0].prompt, examples[3].prompt]
        assert report.heading.startswith("2 of 6 edits, batched 6")
        for values, example in zip(report.after, (examples[0], examples[3]), strict=True):
            assert_alike(values, measure(base, live, example, example.unrelated))

    def test_of_one_edit_is_a_single_one(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base)[:3], mend(base)
        batched, single = Bench(base).batched(method, examples, 1), Bench(base).single(method, examples)
        for found, expected in zip(batched.after, single.after, strict=True):
            assert_alike(found, expected)

    @pytest.mark.parametrize("count", [0, -1, 8])
    def test_needs_as_many_examples(self, linear, count):
        bench, method = Bench(linear), mend(linear)
        for measured in (bench.batched, bench.accumulated):
            with pytest.raises(DataFileError, match=rf"{count} edits at once cannot be measured on 7 examples"):
                measured(method, examples_of(linear), count)


class TestAccumulated:
    def test_edits_are_searched_on_top_of_those_before_and_measured_at_the_end(self, kind):
        base = base_of(kind)
        examples, method = examples_of(base), mend(base)
        report = Bench(base).accumulated(method, examples, 5)
        assert (report.setting, report.examples) == ("accumulated 5", 5)
        live, kept = live_under(base, method, []), []
        made = list(method.write_in_turn(examples[:5], live))
        for one, example in zip(made, examples[:5], strict=True):
            before = live_under(base, method, kept)
            tokens = base.encode(example.prompt, example.correction)
            best = predictions(before, tokens)[-len(tokens.target) :].argmax(-1).tolist()
            assert ("already" in one.facts) == (best == list(tokens.target))
            if one.edit is not None:
                kept.append(one.edit)
                after = predictions(live_under(base, method, kept), tokens)[-len(tokens.target) :].argmax(-1).tolist()
                assert after == list(tokens.target)
        assert kept
        assert weights_digest(live) == weights_digest(live_under(base, method, kept))
        for index, example in enumerate(examples[:5]):
            assert_alike(report.after[index], measure(base, live, example, example.unrelated))

    def test_what_cannot_be_taught_is_refused_and_what_is_said_already_left(self, linear):
        example = capitals()[0]
        method = mend(linear, step=1e-12)
        report = Bench(linear).accumulated(method, [example, said_already(linear)], 2)
        assert report.records[0]["refused"]
        assert report.records[1]["already"]
        assert report.heading == "2 edits, accumulated 2, 1 already, 1 refused"
        assert (report.to_json()["refused"], report.to_json()["already"], report.scales) == (1, 1, [])

    def test_tenths_are_told_apart(self, linear):
        examples = (capitals(2) + languages()) * 2
        report = Bench(linear).accumulated(mend(linear), examples, 20)
        for part, values in (("first", report.after[:2]), ("last", report.after[-2:])):
            expected = [value for example in values for value in example["efficacy, greedy"]]
            assert report.figures[f"efficacy, greedy, {part} tenth"].mean == sum(expected) / 2
        assert "efficacy, greedy, last tenth" in report.table()

    def test_unrelated_prompts_are_not_those_of_other_edits(self, linear):
        edited = capitals()
        elsewhere = {example.prompt for example in languages()}
        for prompts in draw_unrelated(edited, 0, among=languages()):
            assert len(prompts) == len(set(prompts)) == UNRELATED_PROMPTS
            assert set(prompts) <= elsewhere
        assert draw_unrelated(edited, 0, among=[*edited[1:], languages()[0]])[0] == (languages()[0].prompt,)
        report = Bench(linear, others=languages()).accumulated(mend(linear), edited, 7)
        assert report.figures["unrelated, KL"].count == 7 * UNRELATED_PROMPTS
        assert "unrelated, KL" not in Bench(linear).accumulated(mend(linear), edited, 7).figures


def said_already(base):
    for city in CITIES:
        prompt = f"In {city} he speaks"
        word = base.tokenizer.decode(predictions(base.model, base.encode(prompt))[-1].argmax()).strip()
        if word and len(base.encode(prompt, word).target) == 1:
            return Example(prompt, word)
    raise AssertionError("the small model says no whole word")


class TestPerplexity:
    def test_is_that_of_the_dense_model_averaged_over_edits(self, kind):
        base = base_of(kind)
        texts = own_text(base, 3)[:5]
        examples, method = examples_of(base)[:3], mend(base)
        reports = [Bench(base, texts=texts).single(method, examples)]
        if kind == "classifier":
            assert not texts
            assert "perplexity" not in reports[0].figures
            return
        lives = [live_under(base, method, [made.edit]) for made in method.edits(examples)]
        expected = sum(loss(live, text).item() for live in lives for text in texts) / 15
        assert reports[0].figures["perplexity"].mean == pytest.approx(math.exp(expected), rel=1e-4)
        before = sum(loss(base.model, text).item() for text in texts) / 5
        assert reports[0].figures_before["perplexity"].mean == pytest.approx(math.exp(before), rel=1e-4)
        assert abs(expected - before) > 1e-3
        whole = live_under(base, method, [made.edit for made in method.edits(examples)])
        batched = Bench(base, texts=texts).batched(method, examples, 3).figures["perplexity"].mean
        assert math.log(batched) == pytest.approx(sum(loss(whole, text).item() for text in texts) / 5, rel=1e-4)

    def test_is_measured_under_a_few_edits_only(self, linear, monkeypatch):
        monkeypatch.setattr("editors.evaluation.protocols.TEXT_EDITS", 2)
        texts, examples, method = own_text(linear, 3)[:5], examples_of(linear), mend(linear)
        many = Bench(linear, texts=texts).single(method, examples)
        assert many.losses_after == pytest.approx(Bench(linear, texts=texts).single(method, examples[:2]).losses_after)


class TestUnrelated:
    def test_prompts_are_of_another_relation(self, linear):
        """The capitals have no unrelated prompts of their own; there is but one example of another relation."""
        report = Bench(linear).single(Mend(linear, small_editor(linear), 0.2), [*capitals(), languages()[0]])
        assert report.figures["unrelated, next token"].count == 8

    @pytest.mark.timeout(30)
    def test_prompts_are_left_out_where_all_examples_are_of_one_relation(self, linear):
        report = Bench(linear).single(Mend(linear, small_editor(linear), 0.2), capitals()[:3])
        assert "unrelated, next token" not in report.figures

    @pytest.mark.timeout(30)
    def test_prompts_are_found_where_no_subject_is_known(self, linear):
        examples = [Example("The city is", "Rome"), Example("He speaks", "French"), Example("He speaks", "German")]
        report = Bench(linear).single(Mend(linear, small_editor(linear), 0.2), examples)
        assert report.figures["unrelated, next token"].count == 3


class TestReport:
    def test_prints_as_a_table(self, linear):
        report = Bench(linear).single(mend(linear), examples_of(linear)[:2])
        lines = report.table().splitlines()
        assert lines[0] == "| figure | base | edited (95 %) | prompts |"
        assert sum("efficacy" in line for line in lines) == 3
        assert len(lines) == 2 + len(report.figures)

    def test_holds_a_value_for_every_prompt(self, linear):
        report = Bench(linear, texts=own_text(linear, 0)[:3]).single(mend(linear), examples_of(linear)[:2])
        found = json.loads(json.dumps(report.to_json()))
        assert [entry["prompt"] for entry in found["values"]] == [e.prompt for e in examples_of(linear)[:2]]
        assert [len(entry["paraphrase, greedy"]) for entry in found["values"]] == [2, 2]
        assert len(found["text_losses"]) == 3
        assert found["mean_edit_ms"] > 0
        assert "values" not in report.to_json(values=False)
