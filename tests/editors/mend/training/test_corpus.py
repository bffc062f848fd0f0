"""What an editor is trained on: the paraphrase and not the edit, neighbours that are not the edit, nothing padded."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from editors.errors import DataFileError
from editors.mend.training.corpus import Batch, Corpus, locality_positions
from editors.targets import resolve_targets
from editors.text import encode
from editors.views import UpperBlocks
from tests.editors.dense import logits, predictions
from tests.editors.mend.examples import capitals, languages
from tests.editors.mend.training.runs import FAMILIES, SAMPLES, corpus, family_base, files
from tests.small import adding, small_base


def drawn(source: Corpus, seed: str, edits: int = 64, self_share: float = 0.0) -> Batch:
    rng = random.Random(seed)
    return source.draw(rng, source.choose(rng, edits), self_share=self_share, unrelated=2)


class TestTargets:
    def test_are_a_paraphrase_with_the_edits_own_correction(self, linear):
        batch = drawn(corpus(linear, capitals(3), languages()), "a")
        assert batch.target_owner == list(range(64))
        for edit, target in zip(batch.edits, batch.targets, strict=True):
            assert target.tokens.prompt != edit.tokens.prompt
            assert target.tokens.target == edit.tokens.target

    def test_are_the_edit_itself_as_often_as_is_asked(self, linear):
        batch = drawn(corpus(linear, capitals(3)), "b", edits=400, self_share=0.25)
        own = sum(edit == target for edit, target in zip(batch.edits, batch.targets, strict=True))
        assert 60 < own < 140

    def test_are_the_edit_itself_where_it_has_no_paraphrase(self, linear):
        examples = [dataclasses.replace(example, paraphrases=()) for example in capitals()]
        batch = drawn(corpus(linear, examples), "c")
        assert batch.targets == batch.edits

    def test_may_borrow_the_phrasing_of_another_example_of_their_template(self, linear):
        first, second = (dataclasses.replace(e, paraphrases=(p,)) for e, p in zip(
            capitals(), ("France: city?", "In the city of England"), strict=False))  # fmt: skip
        other = dataclasses.replace(languages()[0], paraphrases=("He is Rome",))
        (items,) = corpus(linear, [first, second, other]).files
        said = [{linear.tokenizer.decode(text.tokens.prompt) for text in item.paraphrases} for item in items]
        assert said == [
            {"France: city?", "In the city of France"},
            {"In the city of England", "England: city?"},
            {"He is Rome"},
        ]
        assert all(text.tokens.target == item.edit.tokens.target for item in items for text in item.paraphrases)

    def test_never_carry_a_token_that_the_tokenizer_adds(self, linear):
        tokenizer = adding(small_base().tokenizer, "<unk> $A <eos>")
        (items,) = corpus(dataclasses.replace(linear, tokenizer=tokenizer), capitals()).files
        for item in items:
            assert item.edit.tokens.prompt[0] == tokenizer.unk_token_id
            for text in (item.edit, *item.paraphrases):
                assert not {tokenizer.unk_token_id, tokenizer.eos_token_id} & set(text.tokens.target)

    def test_that_have_no_tokens_are_left_out(self, linear):
        blank = dataclasses.replace(capitals()[0], prompt="")
        (items,) = corpus(linear, [blank, *capitals()[1:]]).files
        assert len(items) == len(capitals()) - 1


class TestLocality:
    def test_never_reads_the_edits_own_prompt(self, linear):
        twice = [dataclasses.replace(example, subject=None, neighbours=()) for example in capitals()[:3]] * 2
        for data in ([capitals(), languages()], [capitals()], [twice]):
            batch = drawn(corpus(linear, *data), "d", edits=200)
            for text, owner in zip(batch.locality, batch.locality_owner, strict=True):
                assert text.tokens.prompt != batch.edits[owner].tokens.prompt

    def test_has_a_neighbour_and_another_subject_of_the_same_template(self, linear):
        batch = drawn(corpus(linear, capitals(), languages()), "e", edits=200)
        capital_prompts = {encode(linear.tokenizer, example.prompt).prompt for example in capitals()}
        near = [
            {text.tokens.prompt for text, owner, is_near in zip(
                batch.locality, batch.locality_owner, batch.locality_near, strict=True) if is_near and owner == edit}
            for edit in range(200)
        ]  # fmt: skip
        of_capitals = [edit for edit in range(200) if batch.edits[edit].tokens.prompt in capital_prompts]
        assert of_capitals
        with_relative = [edit for edit in of_capitals if near[edit] & capital_prompts]
        assert len(with_relative) > 0.7 * len(of_capitals)
        assert all(near[edit] - capital_prompts for edit in of_capitals)

    def test_unrelated_text_is_never_of_the_same_template(self, linear):
        batch = drawn(corpus(linear, capitals(), languages(), samples=()), "f", edits=200)
        capital_prompts = {encode(linear.tokenizer, example.prompt).prompt for example in capitals()}
        for text, owner, near in zip(batch.locality, batch.locality_owner, batch.locality_near, strict=True):
            if not near and batch.edits[owner].tokens.prompt in capital_prompts:
                assert text.tokens.prompt not in capital_prompts

    def test_weights_of_each_edit_add_up_to_one_of_either_kind(self, linear):
        batch = drawn(corpus(linear, capitals(), languages()), "g")
        sums = {(owner, near): 0.0 for owner in range(64) for near in (True, False)}
        for owner, near, weight in zip(batch.locality_owner, batch.locality_near, batch.locality_weight, strict=True):
            sums[owner, near] += weight
        assert all(sums[owner, False] == 1 for owner in range(64))
        assert {round(sums[owner, True], 6) for owner in range(64)} <= {0.0, 1.0}  # a language may draw no relative

    def test_positions_are_those_whose_next_token_the_model_would_say(self, linear):
        source = corpus(linear, capitals(), languages())
        batch = drawn(source, "h")
        rows, positions = locality_positions(random.Random(0), batch.locality)
        last = [len(text.tokens.prompt) - 1 for text in batch.locality]
        assert {(row, place) for row, place in enumerate(last)} <= set(zip(rows, positions, strict=True))
        assert all(0 <= place <= last[row] for row, place in zip(rows, positions, strict=True))
        upper = UpperBlocks(linear.model, resolve_targets(linear.model))
        sequences, where = [text.tokens for text in batch.locality], (torch.tensor(rows), torch.tensor(positions))
        got = upper.logits(source.hidden.batch(batch.locality), sequences, where)
        for row, place, mine in zip(rows, positions, got, strict=True):
            read = batch.locality[row].tokens.prompt[: place + 1]
            torch.testing.assert_close(mine, logits(linear.model, read)[-1], rtol=1e-5, atol=1e-5)


class TestDraw:
    def test_is_a_function_of_the_generator_alone(self, linear):
        source, again = (corpus(linear, capitals(), languages()) for _ in range(2))
        first = drawn(source, "seed")
        torch.manual_seed(99)
        random.seed(99)
        drawn(source, "something else")
        assert drawn(source, "seed") == first == drawn(again, "seed")
        assert drawn(source, "another seed") != first

    def test_hears_a_small_file_beside_a_large_one(self, linear):
        small = languages()[:1]
        batch = drawn(corpus(linear, capitals() * 20, small), "i", edits=500)
        of_small = encode(linear.tokenizer, small[0].prompt).prompt
        share = sum(edit.tokens.prompt == of_small for edit in batch.edits) / 500
        assert 0.04 < share < 0.12  # 1 / (1 + sqrt(140)) = 0.078

    @pytest.mark.timeout(20)
    def test_ends_where_every_example_is_of_one_template(self, linear):
        batch = drawn(corpus(linear, capitals()), "j")
        unrelated = {t.tokens.prompt for t, near in zip(batch.locality, batch.locality_near, strict=True) if not near}
        assert unrelated == {tokens.prompt for tokens in SAMPLES}

    @pytest.mark.timeout(20)
    def test_ends_with_a_single_example(self, linear):
        assert len(drawn(corpus(linear, capitals()[:1]), "k").edits) == 64

    @pytest.mark.timeout(20)
    def test_says_so_where_there_is_nothing_unrelated(self, linear):
        with pytest.raises(DataFileError, match="unrelated"):
            drawn(corpus(linear, capitals(), samples=()), "l")

    def test_leaves_out_a_file_without_examples(self, linear):
        source = corpus(linear, [], capitals(), languages())
        assert len(drawn(source, "m").edits) == 64

    def test_without_any_example_says_so(self, linear):
        with pytest.raises(DataFileError, match="example"):
            corpus(linear, [])

    def test_with_a_text_that_the_model_cannot_read_says_so(self):
        base = family_base("gpt2")
        long = dataclasses.replace(capitals()[0], prompt="word " * 20)
        with pytest.raises(DataFileError, match=r"more than the 64 that the model reads: 'word"):
            corpus(base, [long])


class TestGroups:
    def test_never_have_a_prompt_twice(self, linear):
        source = corpus(linear, capitals() * 2, languages())
        chosen = source.choose(random.Random("n"), 60, together=6)
        for first in range(0, 60, 6):
            prompts = {item.edit.tokens.prompt for item in chosen[first : first + 6]}
            assert len(prompts) == 6

    def test_keep_no_text_that_one_of_them_edits(self, linear):
        source = corpus(linear, capitals(), languages())
        rng = random.Random("o")
        chosen = source.choose(rng, 150, together=3)
        batch = source.draw(rng, chosen, self_share=0.0, unrelated=2, together=3)
        edited = [item.edit.tokens.prompt for item in chosen]
        templates = {item.edit.tokens.prompt: item.template for items in source.files for item in items}
        near = unrelated = 0
        for text, owner, is_near in zip(batch.locality, batch.locality_owner, batch.locality_near, strict=True):
            group = edited[owner - owner % 3 :][:3]
            assert text.tokens.prompt not in group
            if text.tokens.prompt in templates and not is_near:
                assert templates[text.tokens.prompt] != templates[edited[owner]]
                unrelated += 1
            near += is_near
        assert near > 20
        assert unrelated > 5

    def test_of_one_are_what_is_drawn_without_groups(self, linear):
        source = corpus(linear, capitals(), languages())
        one, other = random.Random("p"), random.Random("p")
        assert source.choose(one, 20) == source.choose(other, 20, together=1)
        chosen = source.choose(one, 20)
        assert source.choose(other, 20) == chosen
        drawn_one = source.draw(one, chosen, self_share=0.2, unrelated=2)
        assert drawn_one == source.draw(other, chosen, self_share=0.2, unrelated=2, together=1)


class TestAnswers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_an_encoder_decoder_are_kept_whole(self, family):
        """So that locality is the distribution at every position of what the model itself would say."""
        base = family_base(family)
        source = corpus(base, *files(base))
        batch = drawn(source, "q")
        own = {text.tokens.prompt for text in source.samples}
        rows, _ = locality_positions(random.Random(0), batch.locality)
        assert set(rows) == set(range(len(batch.locality)))
        for row, text in enumerate(batch.locality):
            if base.kind != "encoder-decoder":
                assert text.tokens.target == ()
            elif text.tokens.prompt not in own:
                said = predictions(base.model, text.tokens).argmax(-1)
                assert tuple(said.tolist()) == text.tokens.target
                assert rows.count(row) == len(text.tokens.target) > 0


class TestWithoutLocalityOfItsOwn:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_data_of_one_relation_is_judged_on_what_the_model_itself_says(self, family):
        base = family_base(family)
        examples = [dataclasses.replace(example, neighbours=(), unrelated=()) for example in files(base)[0]]
        if base.kind == "classifier":  # its claims have no template, so that others are unrelated to them
            examples = examples[:1]
        source = corpus(base, examples)
        batch = drawn(source, "r")
        unrelated = [t for t, near in zip(batch.locality, batch.locality_near, strict=True) if not near]
        assert {text.tokens.prompt for text in unrelated} == {text.tokens.prompt for text in source.samples}
