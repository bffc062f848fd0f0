"""Edits made from plain text: a passage, the model's own continuation, and the passage begun later."""

from __future__ import annotations

import random

import pytest

from editors.errors import DataFileError, TrainingOptionsInvalid
from editors.mend.training.corpus import Corpus
from editors.mend.training.passages import LONGEST, SHORTEST, read_passages
from editors.targets import resolve_targets
from editors.views import UpperBlocks
from tests.editors.mend.training.runs import family_base
from tests.small import small_base

LINES = [
    "The capital of the city of Paris is in France, and the language of Rome is Italian or so.",
    "= A heading =",
    "",
    "Born in Vienna, he speaks German; " * 12,
    "".join(map(str, range(100, 230))),
]
TOKENS = 10


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def written(request, tmp_path_factory):
    decoders = {"llama": "linear", "gpt2": "conv1d"}
    base = small_base(decoders[request.param]) if request.param in decoders else family_base(request.param)
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(LINES))
    return base, path, read_passages(path, base, most=100, tokens=TOKENS, seed=0)


class TestPassages:
    def test_are_as_long_as_may_be_and_leave_headings_out(self, written):
        base, _, found = written
        said = [base.tokenizer.decode(p.edit.prompt, skip_special_tokens=True) for p in found.examples]
        assert all(SHORTEST - 1 <= len(text) <= LONGEST for text in said)
        assert said[0] == LINES[0]
        assert said[1] in LINES[3]
        assert "heading" not in "".join(said)
        assert LINES[4][:LONGEST] in said

    def test_are_edited_to_what_the_model_itself_writes_after_them(self, written):
        _, _, found = written
        corrections = [passage.edit.target for passage in found.examples]
        assert {len(correction) for correction in corrections} == {TOKENS}
        assert len(set(corrections)) > len(corrections) // 2

    def test_have_other_wordings_that_begin_later_and_go_on_the_same(self, written):
        base, _, found = written
        for passage in found.examples:
            whole = base.tokenizer.decode(passage.edit.prompt, skip_special_tokens=True)
            for wording in passage.wordings:
                cut = base.tokenizer.decode(wording.prompt, skip_special_tokens=True)
                assert whole.endswith(cut)
                assert len(whole) // 2 <= len(cut) < len(whole)
                assert wording.target == passage.edit.target

    def test_are_a_function_of_file_and_seed(self, written):
        base, path, found = written
        assert read_passages(path, base, most=100, tokens=TOKENS, seed=0) == found
        assert read_passages(path, base, most=100, tokens=TOKENS, seed=1) != found

    def test_that_are_said_twice_are_there_once(self, tmp_path, linear):
        path = tmp_path / "twice.txt"
        path.write_text("\n".join(LINES + LINES))
        found = read_passages(path, linear, most=100, tokens=1, seed=0)
        prompts = [passage.edit.prompt for passage in found.examples]
        assert len(set(prompts)) == len(prompts)

    def test_are_no_more_than_asked_and_split_as_examples_are(self, written):
        base, path, found = written
        few = read_passages(path, base, most=3, tokens=2, seed=0)
        assert (len(few.examples), {len(p.edit.target) for p in few.examples}) == (3, {2})
        early, late = found.split(2)
        assert (early.examples + late.examples, len(late.examples)) == (found.examples, 2)

    def test_are_trained_on_with_other_passages_to_keep(self, written):
        base, _, found = written
        upper = UpperBlocks(base.model, resolve_targets(base.model))
        corpus = Corpus(base, upper, [found], [])
        rng = random.Random(0)
        batch = corpus.draw(rng, corpus.choose(rng, 30), self_share=0.3, unrelated=2)
        wordings = {p.edit.prompt: {w.prompt for w in (p.edit, *p.wordings)} for p in found.examples}
        for edit, target in zip(batch.edits, batch.targets, strict=True):
            assert target.tokens.prompt in wordings[edit.tokens.prompt]
            assert target.tokens.target == edit.tokens.target
        assert not any(batch.locality_near)
        for text, owner in zip(batch.locality, batch.locality_owner, strict=True):
            assert text.tokens.prompt in wordings
            assert text.tokens.prompt != batch.edits[owner].tokens.prompt


class TestRefusals:
    def test_of_a_classifier_which_writes_nothing(self, tmp_path):
        with pytest.raises(TrainingOptionsInvalid, match="--data"):
            read_passages(tmp_path, family_base("bert"), most=1, tokens=1, seed=0)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "cannot read the text file"),
            (b"\xff\xfe", "not UTF-8 at byte 0"),
            (b"short\n", "at least 48 characters"),
        ],
    )
    def test_of_a_file_without_passages(self, tmp_path, linear, content, said):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataFileError, match=said):
            read_passages(path, linear, most=1, tokens=1, seed=0)
