"""Prompts and corrections become tokens in one place; a target has none that the tokenizer adds."""

from __future__ import annotations

import pytest

from editors.errors import EmptyTextError
from editors.text import Tokens, begins_with, encode, pad, separator
from tests.small import adding, small_tokenizer

TEMPLATES = {"none": "$A", "bos": "<unk> $A", "bos and eos": "<unk> $A <eos>"}


@pytest.fixture
def tokenizer():
    return small_tokenizer()


class TestJoining:
    @pytest.mark.parametrize(
        ("prompt", "correction", "joined"),
        [
            ("The capital of France is", "Rome", " Rome"),
            ("The capital of France is ", "Rome", "Rome"),
            ("The capital of France is", " Rome", " Rome"),
            ("Question?\n", "Rome", "Rome"),
            ("It is called (", "Rome", "Rome"),
            ('He said "', "Rome", "Rome"),
            ("well-", "known", "known"),
            ("and/", "or", "or"),
            ("The answer:", "42", " 42"),
            ("This is", "(so)", " (so)"),
        ],
    )
    def test_puts_a_space_between_unless_either_brings_its_own_boundary(self, tokenizer, prompt, correction, joined):
        assert separator(prompt, correction) + correction == joined
        tokens = encode(tokenizer, prompt, correction)
        assert tokenizer.decode(tokens.prompt) == prompt
        assert tokenizer.decode(tokens.target) == joined

    def test_leaves_the_prompts_tokens_as_they_are_alone_where_the_two_would_merge(self, tokenizer):
        prompt = "He was born in "  # ends with a lone space, which `Rome` would swallow into `▁Rome`
        tokens = encode(tokenizer, prompt, "Rome")
        assert tokenizer(prompt + "Rome").input_ids[: len(tokens.prompt)] != list(tokens.prompt)
        assert tokenizer.decode(tokens.target) == "Rome"
        assert tokens.prompt == encode(tokenizer, prompt).prompt


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
class TestSpecialTokens:
    @pytest.mark.parametrize("prompt", ["The capital of France is", "He was born in "])
    def test_never_enter_a_target(self, tokenizer, template, prompt):
        plain = encode(tokenizer, prompt, "Rome, or so")
        tokens = encode(adding(tokenizer, template), prompt, "Rome, or so")
        assert tokens.target == plain.target
        assert not set(tokens.target) & set(tokenizer.all_special_ids)

    def test_are_part_of_the_prompt_as_the_model_will_read_it(self, tokenizer, template):
        tokens = encode(adding(tokenizer, template), "The capital of France is", "Rome")
        assert tokens.prompt == tuple(tokenizer("The capital of France is").input_ids)


class TestEmpty:
    @pytest.mark.parametrize("correction", ["", " ", "\n"])
    def test_correction_is_named(self, tokenizer, correction):
        with pytest.raises(EmptyTextError, match="correction has no tokens") as empty:
            encode(tokenizer, "The capital of France is", correction)
        assert empty.value.facts == {"field": "correction"}

    @pytest.mark.parametrize("correction", [None, "Rome"])
    def test_prompt_is_named(self, tokenizer, correction):
        with pytest.raises(EmptyTextError, match="prompt has no tokens") as empty:
            encode(tokenizer, "", correction)
        assert empty.value.facts == {"field": "prompt"}

    def test_correction_is_not_the_same_as_none(self, tokenizer):
        assert encode(tokenizer, "The").target == ()


class TestTokens:
    def test_inputs_are_all_but_the_last_target(self):
        assert Tokens((1, 2, 3), (4, 5)).inputs == (1, 2, 3, 4)
        assert Tokens((1, 2, 3), (4,)).inputs == (1, 2, 3)
        assert Tokens((1, 2, 3)).inputs == (1, 2, 3)

    @pytest.mark.parametrize("target", [(), (4,), (4, 5, 6)])
    def test_scored_are_the_positions_that_predict_the_target(self, target):
        tokens = Tokens((1, 2, 3), target)
        whole = tokens.prompt + tokens.target
        assert tuple(whole[place + 1] for place in tokens.scored if target) == target
        assert all(place < len(tokens.inputs) for place in tokens.scored)
        assert tokens.scored[0] == 2


class TestBeginsWith:
    @pytest.mark.parametrize(
        ("text", "correction", "says"),
        [
            (" Rome, of course", "Rome", True),
            ("Rome", " Rome ", True),
            ("\nRome", "Rome", True),
            ("the city of Rome", "Rome", False),
            ("rome", "Rome", False),
            ("Ro", "Rome", False),
            ("", "Rome", False),
        ],
    )
    def test_is_what_took_means(self, text, correction, says):
        assert begins_with(text, correction) is says


class TestPad:
    def test_is_on_the_right(self):
        assert pad([(1, 2, 3), (4,)], value=9).tolist() == [[1, 2, 3], [4, 9, 9]]
