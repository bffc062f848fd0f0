"""What the base model says by itself: as much as is asked, the same for the same seed, and truly its own."""

from __future__ import annotations

import pytest
import torch

from editors.mend.training.samples import ANSWER_TOKENS, own_answers, own_samples, sample
from tests.editors.dense import predictions
from tests.editors.mend.training.runs import FAMILIES, family_base

DRAWS = 1500


class TestOwnSamples:
    def test_are_a_function_of_the_seed_and_leave_torchs_generator_alone(self, base):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        one = own_samples(base, 70, seed=1)
        assert torch.equal(torch.rand(3), expected)
        assert one == own_samples(base, 70, seed=1)
        assert one != own_samples(base, 70, seed=2)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_there_for_every_kind_of_model(self, family):
        base = family_base(family)
        samples = own_samples(base, 5, seed=1)
        assert len(samples) == 5
        assert {type(one) for one in samples} == {type(base.tokens((5,)))}
        answered = base.kind == "encoder-decoder"
        assert {len(one.target) for one in samples} == {16 if answered else 0}
        shortest = 8 if answered else 24
        assert all(shortest <= len(one.prompt) <= 2 * shortest for one in samples)  # as the tokenizer reads it

    def test_are_as_many_and_as_long_as_asked_and_begin_with_an_ordinary_word(self, base):
        samples = own_samples(base, 70, seed=1)
        assert {len(sample.inputs) for sample in samples} == {24}
        assert len(samples) == 70
        assert all(base.tokenizer.decode([sample.prompt[0]]).strip().isalpha() for sample in samples)
        assert base.tokenizer.eos_token_id not in {token for sample in samples for token in sample.prompt}
        assert own_samples(base, 0, seed=1) == []


class TestSample:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
    def test_draws_from_the_models_own_distribution_whatever_the_texts_beside_it(self, family):
        base = family_base(family)
        prompts = [tuple(range(5, 16)), (9, 8, 13)]
        drawn = sample(base, prompts * DRAWS, 1, seed=0, what="")
        for prompt, found in zip(prompts, (drawn[::2], drawn[1::2]), strict=True):
            likely = predictions(base.model, base.tokens(prompt))[-1]
            likely[base.model.generation_config.eos_token_id] = -torch.inf  # it is not let to end
            seen = torch.bincount(torch.tensor(found)[:, 0], minlength=len(likely)) / DRAWS
            assert (seen - likely.softmax(-1)).abs().sum() / 2 < 0.15  # total variation

    def test_writes_as_much_as_is_asked(self, base):
        assert {len(text) for text in sample(base, [(5, 6, 7), (8,)] * 40, 7, seed=0, what="")} == {7}


class TestOwnAnswers:
    @pytest.mark.parametrize("family", ["t5", "bart"])
    def test_are_the_models_arg_max_token_by_token(self, family):
        base = family_base(family)
        prompts = [tuple(range(5, 5 + length)) for length in range(1, 12)]
        answers = own_answers(base, prompts)
        assert set(answers) == set(prompts)
        for prompt, answer in answers.items():
            assert 1 <= len(answer) <= ANSWER_TOKENS
            said = predictions(base.model, base.tokens(prompt, answer)).argmax(-1)
            assert tuple(said.tolist()) == answer
            ended = base.model.generation_config.eos_token_id
            assert len(answer) == ANSWER_TOKENS or answer[-1] == ended
            assert ended not in answer[:-1]
