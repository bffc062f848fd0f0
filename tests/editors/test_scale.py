"""The scale search tells what dense weights would do, and prefers the smallest change that takes."""

from __future__ import annotations

import pytest
import torch

from editors.capture import capture
from editors.scale import SCALES, ScaleSearch, search_scale, token_margins
from editors.text import encode
from editors.views import UpperBlocks
from tests.editors.dense import FACTS, changed, logits
from tests.small import small_editor


@pytest.mark.parametrize("fact", FACTS, ids=[correction for _, correction in FACTS])
class TestSearch:
    def test_margins_are_those_of_densely_changed_models(self, base, fact):
        editor, tokens = small_editor(base), encode(base.tokenizer, *fact)
        upper = UpperBlocks(base.model, editor.targets)
        hidden = upper.below([tokens.inputs])
        proposal = editor(capture(upper, hidden, [tokens]))
        found = search_scale(upper, hidden, tokens, proposal.rows_of(upper.targets, 0))
        assert len(found.margins) == len(SCALES)
        for scale, margin in list(zip(SCALES, found.margins, strict=True))[::6]:
            model = changed(base.model, editor.targets, proposal.rows_of(editor.targets, 0), scale)
            predictions = logits(model, tokens.inputs)[list(tokens.scored)]
            expected = token_margins(predictions, torch.tensor(tokens.target)).min().item()
            assert margin == pytest.approx(expected, abs=1e-3)

    def test_changes_nothing(self, base, fact):
        editor, tokens = small_editor(base), encode(base.tokenizer, *fact)
        upper = UpperBlocks(base.model, editor.targets)
        hidden = upper.below([tokens.inputs])
        before, kept = upper.logits(hidden, [tokens]), hidden.clone()
        search_scale(upper, hidden, tokens, editor(capture(upper, hidden, [tokens])).rows_of(upper.targets, 0))
        assert torch.equal(upper.logits(hidden, [tokens]), before)
        assert torch.equal(hidden, kept)


class TestMargins:
    def test_are_how_far_a_token_is_ahead_of_the_best_other(self):
        scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [5.0, 5.0, 0.0]])
        assert token_margins(scores, torch.tensor([0, 1, 0])).tolist() == [1.0, -2.0, 0.0]


class TestOrder:
    OWN = SCALES.index(1.0)

    @classmethod
    def search(cls, *from_one: float, below: float = -1.0) -> ScaleSearch:
        """Margins from the editor's own scale upwards, and one for all scales below it."""
        return ScaleSearch((below,) * cls.OWN + from_one)

    def test_begins_at_the_smallest_scale_with_the_margin_and_goes_up(self):
        assert self.search(0.5, 2.0, 3.5, 3.0).order(2.0) == [self.OWN + 1, self.OWN + 2, self.OWN + 3]

    def test_does_not_begin_below_the_editors_own_scale(self):
        assert self.search(3.0, 4.0, below=2.5).order(2.0) == [self.OWN, self.OWN + 1]

    def test_leaves_out_larger_scales_that_lose_the_margin_again(self):
        assert self.search(2.5, 1.0, -1.0, 3.0).order(2.0) == [self.OWN, self.OWN + 3]

    def test_without_the_margin_takes_what_comes_nearest_first(self):
        assert ScaleSearch((-1.0, 0.5, 1.5, 1.0, -2.0)).order(2.0) == [2, 3, 1]

    def test_never_tries_what_does_not_take(self):
        assert ScaleSearch((-1.0, -0.5, 0.0)).order(3.0) == []

    def test_of_smaller_ones_goes_down_over_those_that_take(self):
        search = ScaleSearch((-1.0, 0.5, -0.1, 1.5, 2.0))
        assert search.smaller(4) == [3, 1]
        assert search.smaller(1) == []

    def test_strongest_has_the_largest_margin(self):
        assert ScaleSearch((-3.0, -1.0, -2.0)).strongest == 1


class TestScales:
    def test_rise_through_the_editors_own(self):
        assert list(SCALES) == sorted(set(SCALES))
        assert 1.0 in SCALES
