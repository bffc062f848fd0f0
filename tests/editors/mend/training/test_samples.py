"""What the base model says by itself: as much as is asked, the same for the same seed, and truly its own."""

from __future__ import annotations

import torch

from editors.mend.training.samples import own_samples


class TestOwnSamples:
    def test_are_a_function_of_the_seed_and_leave_torchs_generator_alone(self, base):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        one = own_samples(base, 70, seed=1)
        assert torch.equal(torch.rand(3), expected)
        assert one == own_samples(base, 70, seed=1)
        assert one != own_samples(base, 70, seed=2)

    def test_are_as_many_and_as_long_as_asked_and_begin_with_an_ordinary_word(self, base):
        samples = own_samples(base, 70, seed=1)
        assert {len(sample.inputs) for sample in samples} == {24}
        assert len(samples) == 70
        assert all(base.tokenizer.decode([sample.prompt[0]]).strip().isalpha() for sample in samples)
        assert base.tokenizer.eos_token_id not in {token for sample in samples for token in sample.prompt}
        assert own_samples(base, 0, seed=1) == []
