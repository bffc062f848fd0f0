"""The scale search tells what dense weights would do, and prefers the smallest change that takes."""

from __future__ import annotations

import pytest
import torch

from editors.capture import capture
from editors.factors import quantise_keyed
from editors.least_squares import LeastSquaresState
from editors.scale import SCALES, ScaleSearch, search_scale, stronger, token_margins
from editors.state import standalone
from editors.text import encode
from editors.views import UpperBlocks, view
from tests.editors.dense import FACTS, changed, logits
from tests.editors.keyed import metric, some_rows
from tests.small import small_editor


@pytest.mark.parametrize("fact", FACTS, ids=[correction for _, correction in FACTS])
class TestSearch:
    def test_margins_are_those_of_densely_changed_models(self, base, fact):
        editor, tokens = small_editor(base), encode(base.tokenizer, *fact)
        upper = UpperBlocks(base.model, editor.targets)
        hidden = upper.below([tokens.inputs])
        proposal = editor(capture(upper, hidden, [tokens]))
        found = search_scale(upper, hidden, tokens, standalone(proposal.rows_of(upper.targets, 0)))
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
        rows = editor(capture(upper, hidden, [tokens])).rows_of(upper.targets, 0)
        search_scale(upper, hidden, tokens, standalone(rows))
        assert torch.equal(upper.logits(hidden, [tokens]), before)
        assert torch.equal(hidden, kept)


@pytest.mark.parametrize("held", [0, 2, 60])
class TestSearchOnTopOfOthers:
    def test_margins_are_those_of_the_written_weights(self, base, held):
        """With least squares, where an edit moves those that are there; 60 are more than a weight has inputs."""
        editor, tokens = small_editor(base), encode(base.tokenizer, *FACTS[0])
        state = LeastSquaresState(editor.targets, *metric(editor.targets))
        state.add(*(quantise_keyed(some_rows(editor.targets, seed, 1)) for seed in range(held)))
        live = view(base.model, [target.name for target in editor.targets])
        state.write(base.model, live)
        upper = UpperBlocks(live, editor.targets)
        hidden = upper.below([tokens.inputs])
        captured = capture(upper, hidden, [tokens])
        rows = {
            target.name: (torch.nn.functional.normalize(u[-1:]), -0.3 * torch.nn.functional.normalize(delta[-1:]))
            for target, u, delta in zip(editor.targets, captured.u, captured.delta, strict=True)
        }
        increment = state.increment(rows)
        short = {full.name: short.name for full, short in zip(editor.targets, upper.targets, strict=True)}
        found = search_scale(upper, hidden, tokens, {short[name]: change for name, change in increment.items()})
        for index in range(0, len(SCALES), 6):
            more = quantise_keyed(rows, SCALES[index])
            state.add(more)
            state.write(base.model, live)
            predictions = logits(live, tokens.inputs)[list(tokens.scored)]
            expected = token_margins(predictions, torch.tensor(tokens.target)).min().item()
            assert found.margins[index] == pytest.approx(expected, abs=2e-3)
            state.remove(more)
        assert max(found.margins) - min(found.margins) > 0.1


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

    def test_begins_at_nothing_where_the_editor_does(self):
        """Whose scale is that of what is only added where it is needed."""
        assert ScaleSearch((2.5, 1.0, 3.0), first=0.0).order(2.0) == [0, 2]

    def test_without_the_margin_takes_what_comes_nearest_first(self):
        assert ScaleSearch((-1.0, 0.5, 1.5, 1.0, -2.0)).order(2.0) == [2, 3, 1]

    def test_never_tries_what_does_not_take(self):
        assert ScaleSearch((-1.0, -0.5, 0.0)).order(3.0) == []

    def test_of_smaller_ones_goes_down_over_those_that_take(self):
        search = ScaleSearch((-1.0, 0.5, -0.1, 1.5, 2.0))
        assert search.smaller(4) == [3, 1]
        assert search.smaller(1) == []

    def test_ranks_by_the_smallest_scale_that_has_the_margin_then_by_how_near_it_comes(self):
        places = [0] * len(SCALES)
        ranked = [
            *(ScaleSearch((*places[:place], 2.5, *places[place + 1 :]), first=0.0) for place in (3, 4, 12, 24)),
            ScaleSearch((1.9, 1.0, 0.5), first=0.0),
            ScaleSearch((-1.0, 1.8, 0.5), first=0.0),
            ScaleSearch((-1.0, -0.8, -0.1), first=0.0),
            ScaleSearch((-1.0, -0.8, -0.5), first=0.0),
        ]
        ranks = [search.rank(2.0) for search in ranked]
        assert ranks == sorted(set(ranks), reverse=True)

    def test_ranks_scales_of_one_octave_alike(self):
        """What is gained would not be worth another form."""
        ranks = [ScaleSearch((*[0] * place, 2.5), first=0.0).rank(2.0) for place in range(4, 8)]
        assert len(set(ranks)) == 1

    def test_strongest_has_the_largest_margin(self):
        assert ScaleSearch((-3.0, -1.0, -2.0)).strongest == 1


class TestScales:
    def test_rise_through_the_editors_own(self):
        assert list(SCALES) == sorted(set(SCALES))
        assert {0.0, 1.0} <= set(SCALES)

    def test_are_doubled_where_an_edit_is_made_stronger(self):
        assert stronger(0.0) == SCALES[4]
        assert stronger(1.0) == 2
        assert stronger(SCALES[-2]) == stronger(SCALES[-1]) == SCALES[-1]
