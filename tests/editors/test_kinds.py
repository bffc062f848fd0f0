"""How each kind of model reads a prompt and its correction."""

from __future__ import annotations

import pytest

from editors.decoding import generate_batch
from editors.errors import EmptyTextError, UnknownLabel
from editors.kinds import label_id
from editors.sampling import Sampling
from editors.text import LabelledTokens, Seq2SeqTokens
from tests.editors.saying import say
from tests.small import adding, small_base

PROMPT = "The capital of Italy is"


class TestEncoderDecoder:
    @pytest.fixture(params=["t5", "bart"])
    def base(self, request):
        return small_base(request.param)

    def test_reads_the_prompt_in_one_half_and_the_answer_in_the_other(self, base):
        tokens = base.encode(PROMPT, "Oslo")
        assert isinstance(tokens, Seq2SeqTokens)
        assert tokens.inputs == tuple(base.tokenizer(PROMPT).input_ids)
        assert tokens.decoder_inputs == tokens.start + tokens.target[:-1]
        assert [tokens.decoder_inputs[place] for place in tokens.scored][1:] == list(tokens.target[:-1])

    def test_answers_end_with_the_token_that_ends_a_text(self, base):
        tokens = base.encode(PROMPT, "Oslo")
        assert tokens.target[-1] == base.tokenizer.eos_token_id
        assert base.tokenizer.decode(tokens.target[:-1]).strip() == "Oslo"

    def test_targets_have_no_other_special_tokens(self, base):
        adding(base.tokenizer, "<unk> $A <eos>")
        tokens = base.encode(PROMPT, "Oslo")
        assert (tokens.prompt[0], tokens.prompt[-1]) == (2, 0)
        assert tokens.target.count(0) == 1
        assert 2 not in tokens.target

    def test_decoding_begins_as_the_model_is_told_to(self):
        assert small_base("t5").encode(PROMPT, "Oslo").start == (1,)
        assert small_base("bart").encode(PROMPT, "Oslo").start == (0, 2)

    def test_says_the_same_alone_and_in_a_batch(self, base):
        prompts = [PROMPT, "x", "The language of Norway"]
        texts = [say(base.model, base.tokenizer, prompt, 5) for prompt in prompts]
        assert generate_batch(base.model, base.tokenizer, prompts, 5) == texts
        assert all(text.completion_tokens <= 5 for text in texts)

    def test_samples_by_seed(self, base):
        one, same, other = (
            say(base.model, base.tokenizer, PROMPT, 6, Sampling(1.5, seed=seed)).text for seed in (1, 1, 2)
        )
        assert one == same != other

    @pytest.mark.parametrize(("prompt", "correction"), [("", "Oslo"), (PROMPT, ""), (PROMPT, "  ")])
    def test_refuses_texts_without_tokens(self, base, prompt, correction):
        adding(base.tokenizer, "$A <eos>")
        with pytest.raises(EmptyTextError):
            base.encode(prompt, correction)


class TestClassifier:
    @pytest.fixture
    def base(self):
        return small_base("bert")

    def test_reads_the_whole_prompt_and_predicts_one_label(self, base):
        tokens = base.encode(PROMPT, "LABEL_1")
        assert isinstance(tokens, LabelledTokens)
        assert (tokens.inputs, tokens.target, list(tokens.scored)) == (tokens.prompt, (1,), [0])

    def test_says_its_label(self, base):
        said = say(base.model, base.tokenizer, PROMPT, 16)
        assert said.text in ("LABEL_0", "LABEL_1")
        assert (said.finish_reason, said.completion_tokens) == ("stop", 1)
        prompts = [PROMPT, "x"]
        assert [text.text for text in generate_batch(base.model, base.tokenizer, prompts, 1)] == [
            say(base.model, base.tokenizer, prompt, 1).text for prompt in prompts
        ]

    @pytest.mark.parametrize(("name", "label"), [("LABEL_1", 1), (" label_0 ", 0), ("1", 1), ("SUPPORTS", 1)])
    def test_labels_are_known_by_name_and_by_number(self, base, name, label):
        assert label_id(base.model, name) == label

    def test_labels_that_have_names_are_not_those_of_fact_checking(self, base):
        base.model.config.id2label = {0: "true", 1: "false"}
        assert label_id(base.model, "True") == 0
        with pytest.raises(UnknownLabel, match=r"'SUPPORTS' is no label.*true, false"):
            label_id(base.model, "SUPPORTS")

    def test_labels_that_are_numbers_are_names_first(self, base):
        base.model.config.id2label = {0: "1", 1: "0"}
        assert [label_id(base.model, name) for name in ("1", "0")] == [0, 1]

    @pytest.mark.parametrize("name", ["Oslo", "", "2", "-1"])
    def test_any_other_label_is_refused_with_those_that_there_are(self, base, name):
        with pytest.raises(UnknownLabel, match="its labels are LABEL_0, LABEL_1"):
            base.encode(PROMPT, name)
