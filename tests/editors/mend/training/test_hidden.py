"""Hidden states are those of each text alone, whoever asked for it and wherever they were kept."""

from __future__ import annotations

import dataclasses

import torch

from editors.mend.training.corpus import Corpus
from editors.mend.training.hidden import Text
from editors.targets import resolve_targets
from editors.text import Tokens
from editors.views import UpperBlocks
from tests.editors.mend.examples import capitals, languages
from tests.editors.mend.training.runs import corpus
from tests.small import small_base


class TestHiddenStates:
    def test_are_those_of_the_text_alone(self, base):
        source = corpus(base, capitals(), languages())
        upper = UpperBlocks(base.model, resolve_targets(base.model))
        texts = [item.edit for items in source.files for item in items] + source.samples
        batch = source.hidden.batch(texts)
        for row, text in zip(batch, texts, strict=True):
            length = len(text.tokens.inputs)
            fresh = upper.below([text.tokens.inputs])[0]
            torch.testing.assert_close(row[:length], fresh, rtol=1e-5, atol=1e-6)
            assert not row[length:].any()

    def test_of_a_prompt_are_read_from_its_edit(self, base):
        source = corpus(base, languages())
        edit = source.files[0][0].edit
        prompt = Text(Tokens(edit.tokens.prompt), edit.key)
        assert len(edit.tokens.inputs) > len(prompt.tokens.inputs)
        fresh = UpperBlocks(base.model, resolve_targets(base.model)).below([prompt.tokens.inputs])
        torch.testing.assert_close(source.hidden.batch([prompt]), fresh, rtol=1e-5, atol=1e-6)

    def test_survive_their_folder_bit_for_bit(self, linear, tmp_path):
        def states(source: Corpus) -> torch.Tensor:
            return source.hidden.batch([item.edit for items in source.files for item in items])

        first = states(corpus(linear, capitals(), cache=tmp_path / "cache"))
        (kept,) = (tmp_path / "cache").iterdir()
        stamp = kept.stat().st_mtime_ns
        assert torch.equal(states(corpus(linear, capitals(), cache=tmp_path / "cache")), first)
        assert kept.stat().st_mtime_ns == stamp
        assert torch.equal(states(corpus(linear, capitals())), first)

    def test_of_other_texts_or_another_model_are_kept_apart(self, linear, tmp_path):
        corpus(linear, capitals(), cache=tmp_path)
        corpus(linear, languages(), cache=tmp_path)
        corpus(small_base("conv1d"), capitals(), cache=tmp_path)
        corpus(dataclasses.replace(linear, digest="sha256:other"), capitals(), cache=tmp_path)
        assert len(list(tmp_path.glob("*.pt"))) == len(list(tmp_path.iterdir())) == 4
