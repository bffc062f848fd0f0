"""Decoding: equal seeds say equal things, a batch says what each prompt alone says, and an end is an end."""

from __future__ import annotations

import pytest
import torch

from editors.base_model import BaseModel
from editors.decoding import continue_greedily, generate_batch
from editors.errors import EmptyTextError
from editors.sampling import GumbelNoise, Sampling
from editors.text import encode
from tests.editors.dense import logits
from tests.editors.saying import say
from tests.small import small_base

PROMPTS = ("The capital of France is", "x", "The language of Norway, in the city of Oslo, is", "German is")


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


def greedy(base: BaseModel, prompt: str, count: int) -> list[int]:
    """One token at a time, by arg max over the whole model."""
    ids = list(encode(base.tokenizer, prompt).prompt)
    new: list[int] = []
    for _ in range(count):
        new.append(int(logits(base.model, ids + new)[-1].argmax()))
    return new


def ending_with(base: BaseModel, token: int) -> BaseModel:
    """The same model, whose texts end at that token."""
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(token)
    base.model.generation_config.eos_token_id = token
    return base


class TestGreedy:
    def test_is_the_arg_max_at_every_step(self, base):
        for prompt in PROMPTS:
            said = say(base.model, base.tokenizer, prompt, 6)
            assert said.text == base.tokenizer.decode(greedy(base, prompt, 6))
            assert said.prompt_tokens == len(base.tokenizer(prompt).input_ids)

    def test_in_a_batch_equals_each_alone(self, base):
        together = generate_batch(base.model, base.tokenizer, PROMPTS, 8)
        assert together == [say(base.model, base.tokenizer, prompt, 8) for prompt in PROMPTS]
        ids = [encode(base.tokenizer, prompt).prompt for prompt in PROMPTS]
        assert continue_greedily(base.model, base.tokenizer, ids, 8) == [greedy(base, prompt, 8) for prompt in PROMPTS]

    def test_leaves_no_graph_and_no_gradient_behind(self, linear):
        say(linear.model, linear.tokenizer, PROMPTS[0], 3)
        assert not any(parameter.requires_grad for parameter in linear.model.parameters())

    def test_of_a_prompt_without_tokens_is_refused(self, linear):
        with pytest.raises(EmptyTextError):
            say(linear.model, linear.tokenizer, "", 3)
        with pytest.raises(EmptyTextError):
            generate_batch(linear.model, linear.tokenizer, ["x", ""], 3)


class TestEnd:
    def test_at_the_limit_is_length(self, base):
        said = say(base.model, base.tokenizer, PROMPTS[0], 5)
        assert (said.finish_reason, said.completion_tokens) == ("length", 5)

    def test_at_the_end_of_sequence_is_stop_and_is_not_said(self, base):
        for prompt in PROMPTS:
            path = greedy(base, prompt, 8)
            end = path[4]
            said = say(*parts(ending_with(base, end)), prompt, 8)
            kept = path[: path.index(end)]
            assert (said.finish_reason, said.completion_tokens) == ("stop", len(kept))
            assert said.text == base.tokenizer.decode(kept)

    def test_of_one_text_of_a_batch_does_not_end_the_others(self, base):
        paths = [greedy(base, prompt, 8) for prompt in PROMPTS]
        end = next(token for token in paths[0] if sum(token in path for path in paths) < len(paths))
        together = generate_batch(*parts(ending_with(base, end)), PROMPTS, 8)
        assert {said.finish_reason for said in together} == {"stop", "length"}
        assert together == [say(*parts(base), prompt, 8) for prompt in PROMPTS]
        ids = [encode(base.tokenizer, prompt).prompt for prompt in PROMPTS]
        for row, path in zip(continue_greedily(*parts(base), ids, 8), paths, strict=True):
            assert row == (path[: path.index(end) + 1] if end in path else path)

    def test_may_be_another_token_of_the_models_own(self, base):
        """Chat models end their texts with tokens that are not the tokenizer's end of sequence."""
        path = greedy(base, PROMPTS[0], 8)
        base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, path[4]]
        kept = path[: path.index(path[4])]
        together = generate_batch(*parts(base), PROMPTS, 8)
        for said in (say(*parts(base), PROMPTS[0], 8), together[0]):
            assert (said.finish_reason, said.completion_tokens) == ("stop", len(kept))
            assert said.text == base.tokenizer.decode(kept)
        ids = [encode(base.tokenizer, prompt).prompt for prompt in PROMPTS]
        assert continue_greedily(*parts(base), ids, 8)[0] == [*kept, path[4]]


class TestSampling:
    def test_of_equal_seeds_is_equal_whatever_ran_before(self, base):
        one = say(*parts(base), PROMPTS[0], 12, Sampling(1.0, seed=7))
        torch.manual_seed(3)
        torch.rand(5)
        assert say(*parts(base), PROMPTS[0], 12, Sampling(1.0, seed=7)) == one

    def test_of_other_seeds_differs_from_each_other_and_from_greedy(self, base):
        texts = {say(*parts(base), PROMPTS[0], 12, Sampling(1.0, seed=seed)).text for seed in range(5)}
        assert len(texts) == 5
        assert say(*parts(base), PROMPTS[0], 12).text not in texts

    @pytest.mark.parametrize("sampling", [Sampling(1e-4, seed=3), Sampling(1.0, top_p=1e-6, seed=3)])
    def test_without_room_is_greedy(self, base, sampling):
        assert say(*parts(base), PROMPTS[0], 8, sampling) == say(*parts(base), PROMPTS[0], 8)

    def test_does_not_disturb_torchs_own_generator(self, linear):
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        say(*parts(linear), PROMPTS[0], 4, Sampling(1.0))
        assert torch.equal(torch.rand(2), expected)

    def test_draws_from_the_softmax(self):
        scores = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
        drawn = GumbelNoise(0)(None, scores.expand(20_000, -1)).argmax(-1)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(shares, scores.softmax(-1), rtol=0, atol=0.012)  # more than three deviations

    def test_ends_are_named_as_for_greedy(self, linear):
        said = [say(*parts(linear), PROMPTS[1], 40, Sampling(1.5, seed=seed)) for seed in range(12)]
        assert {one.finish_reason for one in said} == {"stop", "length"}
        assert all((one.completion_tokens == 40) == (one.finish_reason == "length") for one in said)
        assert not any("<eos>" in one.text for one in said)


def parts(base: BaseModel):
    return base.model, base.tokenizer
