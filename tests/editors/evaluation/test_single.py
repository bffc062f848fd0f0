"""Single edits are measured as a service would make them: searched scale, quantised factors, greedy words."""

from __future__ import annotations

import dataclasses

import pytest

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.data import Example
from editors.decoding import generate
from editors.evaluation.single import ANSWER_TOKENS, evaluate_single
from editors.factors import quantise
from editors.state import SumState
from editors.text import begins_with, encode
from editors.views import UpperBlocks, view
from tests.editors.dense import logits
from tests.editors.mend.examples import capitals, languages
from tests.small import small_base, small_editor

AGREEMENT = {f"{kind}, {what}" for kind in ("neighbour", "unrelated") for what in ("next token", "8 tokens")}
SUCCESS = {f"{kind}, {what}" for kind in ("efficacy", "paraphrase") for what in ("token", "sequence", "greedy")}


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


class TestReport:
    def test_has_every_figure_with_the_base_beside_it(self, linear):
        examples = capitals(2)[:3] + languages()[:2]
        report = evaluate_single(linear, small_editor(linear), examples, margin=0.2)
        assert set(report.figures) == SUCCESS | AGREEMENT
        assert set(report.before) == SUCCESS
        assert report.examples == len(report.records) == len(report.scales) == 5
        counts = {name: figure.count for name, figure in report.figures.items()}
        assert counts["efficacy, greedy"] == 5
        assert counts["paraphrase, greedy"] == 3 * 2 + 2 * 2
        assert counts["neighbour, next token"] == 3
        assert counts["unrelated, next token"] == 5
        assert all(0 <= figure.low <= figure.mean <= figure.high <= 1 for figure in report.figures.values())

    def test_prints_as_a_table(self, linear):
        table = evaluate_single(linear, small_editor(linear), capitals()[:2], margin=0.2).table()
        assert table.splitlines()[0] == "| figure | base | edited (95 %) | prompts |"
        assert sum("efficacy" in line for line in table.splitlines()) == 3

    def test_says_what_a_model_with_the_edit_in_its_weights_says(self, base):
        examples = capitals() + languages()[:2]
        editor = small_editor(base)
        report = evaluate_single(base, editor, examples, margin=0.2)
        upper = UpperBlocks(base.model, editor.targets)
        greedy: dict[str, list[float]] = {"efficacy, greedy": [], "paraphrase, greedy": [], "efficacy, sequence": []}
        kept: list[float] = []
        for example, scale in zip(examples, report.scales, strict=True):
            tokens = encode(base.tokenizer, example.prompt, example.correction)
            proposal = editor(capture(upper, upper.below([tokens.inputs]), [tokens]))
            state, live = SumState(editor.targets), view(base.model, [target.name for target in editor.targets])
            state.add(quantise(proposal.rows_of(editor.targets, 0), scale))
            state.write(base.model, live)
            said = logits(live, tokens.inputs)[list(tokens.scored)].argmax(-1).tolist()
            greedy["efficacy, sequence"].append(float(said == list(tokens.target)))
            for name, prompts in (("efficacy", (example.prompt,)), ("paraphrase", example.paraphrases)):
                for prompt in prompts:
                    text = generate(live, base.tokenizer, prompt, len(tokens.target) + 2).text
                    greedy[f"{name}, greedy"].append(float(begins_with(text, example.correction)))
            for prompt in example.neighbours:
                before, after = (generate(model, base.tokenizer, prompt, ANSWER_TOKENS) for model in (base.model, live))
                kept.append(float(before.text == after.text))
        for name, values in greedy.items():
            assert report.figures[name].mean == pytest.approx(sum(values) / len(values)), name
        assert report.figures["neighbour, 8 tokens"].mean == pytest.approx(sum(kept) / len(kept))
        assert report.figures["efficacy, greedy"].mean > report.before["efficacy, greedy"].mean

    def test_of_an_editor_that_does_nothing_agrees_with_the_base_everywhere(self, base):
        report = evaluate_single(base, small_editor(base, step=1e-12), capitals(2) + languages(), margin=3.0)
        assert {name: report.figures[name].mean for name in AGREEMENT} == dict.fromkeys(AGREEMENT, 1.0)
        assert {name: report.figures[name].mean for name in SUCCESS} == {
            name: figure.mean for name, figure in report.before.items()
        }

    def test_is_the_same_twice_and_leaves_the_model_alone(self, linear):
        editor, examples = small_editor(linear), capitals()[:3] + languages()[:3]
        one, same = (evaluate_single(linear, editor, examples, margin=0.2, seed=4) for _ in range(2))
        assert one.figures == same.figures
        assert weights_digest(linear.model) == linear.digest

    def test_does_not_depend_on_who_shares_a_batch(self, linear):
        editor, examples = small_editor(linear), capitals()[:3]
        together = evaluate_single(linear, editor, examples, margin=0.2).scales
        alone = [evaluate_single(linear, editor, [example], margin=0.2).scales[0] for example in examples]
        assert together == alone

    def test_leaves_out_what_has_no_tokens(self, linear):
        blank = dataclasses.replace(capitals()[0], prompt="")
        assert evaluate_single(linear, small_editor(linear), [blank, *capitals()[1:3]], margin=0.2).examples == 2
        assert evaluate_single(linear, small_editor(linear), [], margin=0.2).figures == {}


class TestUnrelated:
    def test_prompts_are_of_another_relation(self, linear):
        """The capitals have no unrelated prompts of their own; there is but one example of another relation."""
        report = evaluate_single(linear, small_editor(linear), [*capitals(), languages()[0]], margin=0.2)
        assert report.figures["unrelated, next token"].count == 8

    @pytest.mark.timeout(30)
    def test_prompts_are_left_out_where_all_examples_are_of_one_relation(self, linear):
        report = evaluate_single(linear, small_editor(linear), capitals()[:3], margin=0.2)
        assert "unrelated, next token" not in report.figures

    @pytest.mark.timeout(30)
    def test_prompts_are_found_where_no_subject_is_known(self, linear):
        examples = [Example("The city is", "Rome"), Example("He speaks", "French"), Example("He speaks", "German")]
        report = evaluate_single(linear, small_editor(linear), examples, margin=0.2)
        assert report.figures["unrelated, next token"].count == 3
