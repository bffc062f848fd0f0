"""What is kept between runs is what was computed, under a name that says what it depends on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editors.mend.training.cache import cached
from editors.mend.training.samples import own_answers, own_samples
from tests.editors.mend.training.runs import family_base


class TestCached:
    def test_computes_once_for_each_key(self, tmp_path):
        folder = tmp_path / "new" / "cache"
        computed: list[str] = []

        def get(key: str) -> torch.Tensor:
            return cached(folder, key, lambda: computed.append(key) or torch.tensor([0.1, -0.0, len(key)]))

        first = get("one")
        assert torch.equal(get("one").view(torch.int32), first.view(torch.int32))
        assert not torch.equal(get("other"), first)
        assert computed == ["one", "other"]
        assert len(list(folder.iterdir())) == 2

    def test_keeps_nothing_without_a_folder(self):
        assert cached(None, "key", lambda: torch.ones(1)) == 1

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_gives_the_same_samples_and_answers_again(self, tmp_path, family):
        base = family_base(family)
        prompts = [(5, 6, 7), (8, 9)]
        for _ in range(2):
            assert own_samples(base, 3, 0, tmp_path) == own_samples(base, 3, 0)
            if base.kind == "encoder-decoder":
                assert own_answers(base, prompts, tmp_path) == own_answers(base, prompts)
        kept = len(list(tmp_path.iterdir()))
        own_samples(dataclasses.replace(base, digest="sha256:other"), 3, 0, tmp_path)
        own_samples(base, 3, 1, tmp_path)
        assert len(list(tmp_path.iterdir())) == kept + 2
