"""Edits of a keyed editor, measured as they are served: through the exact state that joins them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editors.evaluation.methods import Mend
from editors.evaluation.protocols import Bench
from editors.margins import smallest_margins, states_below
from editors.scale import SCALES
from editors.views import UpperBlocks, view
from tests.editors.mend.examples import capitals, languages
from tests.small import small_base, small_completed_editor, small_keyed_editor

EXAMPLES = (*capitals(2), *languages())
AT_THE_END = [replace(example, subject=example.prompt.split()[-1]) for example in EXAMPLES]
"""Keyed at the last token: a random model's answer hardly depends on any other."""


@pytest.fixture(params=["linear", "conv1d"])
def method(request):
    base = small_base(request.param)
    return Mend(base, small_keyed_editor(base), margin=0.5)


def changes(method: Mend, live) -> torch.Tensor:
    (target,) = method.targets
    return target.oriented(live.get_parameter(target.name) - method.base.model.get_parameter(target.name))


def fresh(method: Mend):
    return view(method.base.model, [target.name for target in method.targets])


def test_a_single_edit_is_read_as_it_is_written(method):
    live = fresh(method)
    for made in method.edits(EXAMPLES[:4]):
        method.write(made.edit, live)
        u, delta = method.rows(made.edit)[method.targets[0].name]
        torch.testing.assert_close(changes(method, live).double(), delta.T @ u, atol=1e-6, rtol=1e-4)


def test_figures_of_single_edits_are_those_of_written_weights(method):
    bench = Bench(method.base)
    by_row = bench.single(method, EXAMPLES)
    method.factored = False
    written = bench.single(method, EXAMPLES)
    for one, other in zip(by_row.after, written.after, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert values == pytest.approx(other[name], abs=1e-4), name


def said(method: Mend, live) -> int:
    """How many of the edits the model says."""
    tokens = [method._encode(example) for example in AT_THE_END]
    margins = smallest_margins(UpperBlocks(live, method.targets), tokens, states_below(method._upper, tokens))
    return sum(margin > 0 for margin in margins)


def test_many_are_solved_for_together_and_the_weak_completed(method):
    """Of an untrained first part next to none takes by itself."""
    completed = Mend(method.base, small_completed_editor(method.base), margin=0.5)
    live, alone = fresh(completed), fresh(completed)
    state = completed.editor.new_state(method.base.device)
    state.add(*(state.quantise(rows, 0.0) for _, _, rows in completed._proposed(AT_THE_END)))
    state.write(method.base.model, alone)
    completed.write_together(AT_THE_END, live)
    assert said(completed, live) > said(completed, alone)


def test_in_turn_each_holds_when_it_is_made(method):
    live, kept = fresh(method), 0
    upper = method._alone.upper
    for example, made in zip(AT_THE_END, method.write_in_turn(AT_THE_END, live), strict=True):
        if made.edit is not None:
            assert made.facts["scale"] in SCALES
            tokens = method._encode(example)
            whole = live(torch.tensor([tokens.inputs])).logits[0]
            said = [int(whole[place].argmax()) for place in tokens.scored]
            assert said == list(tokens.target)
            kept += 1
    assert kept >= 2
    assert not any(parameter.requires_grad for parameter in upper.module.parameters())


def test_subjects_that_a_prompt_does_not_name_are_left_to_the_gate(method):
    example = EXAMPLES[0]
    for subject in ("Atlantis", "", None):
        unnamed = type(example)(example.prompt, example.correction, subject=subject)
        assert method._encode(unnamed).subject is None
    assert method._encode(example).subject is not None
