"""Keyed edits that are completed at the answer: two editors as one, and a scale for the second part alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from editors.capture import capture
from editors.checkpoint import CARD, load_checkpoint, read_card, save_checkpoint
from editors.errors import CheckpointUnreadable
from editors.mend.completed import CompletedEditor
from editors.scale import SCALES, search_edit
from editors.state import Rows
from editors.verification import verify_checkpoint
from editors.views import UpperBlocks, view
from tests.small import SMALL_MODELS, small_base, small_completed_editor

FACTS = [("The capital of France is", "Rome", "France"), ("Oslo is the capital of", "the language", "Oslo")]


@pytest.fixture(params=SMALL_MODELS)
def base(request):
    return small_base(request.param)


@pytest.fixture
def editor(base) -> CompletedEditor:
    return small_completed_editor(base)


def proposed(base, editor):
    """The tokens of the facts, and what each part of the editor, and the whole, makes of them."""
    tokens = [base.encode(*fact) for fact in FACTS]

    def run(part):
        upper = UpperBlocks(base.model, part.captured)
        return part(capture(upper, upper.below([sequence.inputs for sequence in tokens]), tokens))

    return tokens, run(editor.keyed), run(editor.late), run(editor)


def test_an_edit_is_that_of_both_parts(base, editor):
    tokens, keyed, late, whole = proposed(base, editor)
    assert [target.name for target in editor.targets] == [
        target.name for part in (editor.keyed, editor.late) for target in part.targets
    ]
    for got, expected in zip((*whole.u, *whole.delta), (*keyed.u, *late.u, *keyed.delta, *late.delta), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert [example.tolist() for example in whole.example] == [
        [0, 1],
        [0] * len(tokens[0].target) + [1] * len(tokens[1].target),
    ]


def test_its_scale_is_that_of_the_second_part(base, editor):
    _, keyed, _, whole = proposed(base, editor)
    state, alone = editor.new_state(base.device), editor.keyed.new_state(base.device)
    rows = whole.rows_of(editor.targets, 0)
    names = [target.name for target in editor.targets]
    written = {}
    for scale in (0.0, 1.0, 2.0):
        edit = state.quantise(rows, scale)
        state.add(edit)
        live = view(base.model, names)
        state.write(base.model, live)
        state.remove(edit)
        written[scale] = [live.get_parameter(name) - base.model.get_parameter(name) for name in names]
    alone.add(alone.quantise(keyed.rows_of(editor.keyed.targets, 0)))
    only_keyed = view(base.model, names)
    alone.write(base.model, only_keyed)
    first, _ = names
    for changes in written.values():
        expected = only_keyed.get_parameter(first) - base.model.get_parameter(first)
        torch.testing.assert_close(changes[0], expected, atol=1e-6, rtol=1e-3)
    assert not written[0.0][1].any()
    torch.testing.assert_close(written[2.0][1], 2 * written[1.0][1], atol=1e-5, rtol=1e-2)


def test_completes_what_the_first_part_does_not_make_the_model_say(base, editor):
    """Whatever the corrections are: with an untrained first part nothing is said of itself."""
    tokens, _, _, whole = proposed(base, editor)
    upper = UpperBlocks(base.model, editor.targets)
    state = editor.new_state(base.device)
    for row, sequence in enumerate(tokens):
        rows = whole.rows_of(editor.targets, row)
        found, search = search_edit(editor, state, upper, upper.below([sequence.inputs]), sequence, rows, 0.0)
        assert search.first == SCALES[0] == 0
        assert search.margins[0] < 0 < max(search.margins)
        assert found.keys() == rows.keys()


def test_where_it_would_not_take_less_of_the_first_part_is_tried(base, editor):
    """As of an answer whose first word the model would say at each of its tokens."""
    tokens, _, _, whole = proposed(base, editor)
    rows = whole.rows_of(editor.targets, 0)
    first, _ = (target.name for target in editor.targets)
    upper, state = UpperBlocks(base.model, editor.targets), editor.new_state(base.device)
    keys, changes = rows[first]
    hidden = upper.below([tokens[0].inputs])

    def drowned(seed: int) -> Rows:
        noise = torch.randn(changes.shape, generator=torch.Generator().manual_seed(seed))
        return rows | {first: (keys, 200 * torch.nn.functional.normalize(noise))}

    def takes(form: Rows) -> bool:
        editor_of_one = SimpleNamespace(forms=lambda form: [form], first_scale=0.0)
        return max(search_edit(editor_of_one, state, upper, hidden, tokens[0], form, 0.5)[1].margins) > 0

    form = next(form for form in map(drowned, range(100)) if not takes(form))
    found, search = search_edit(editor, state, upper, hidden, tokens[0], form, 0.5)
    assert max(search.margins) > 0
    assert torch.equal(found[first][0], keys)
    assert found[first][1].norm() < 200
    assert [each[first][1].norm().item() for each in editor.forms(form)] == pytest.approx([200, 100, 0])


class TestCheckpoint:
    def test_reads_back_as_the_same_editor(self, base, editor, tmp_path):
        save_checkpoint(tmp_path, editor, base, {})
        first = load_checkpoint(tmp_path, base)
        assert isinstance(first.editor, CompletedEditor)
        assert first.trained
        assert first.notice is None
        assert all(check.ok for check in verify_checkpoint(tmp_path, base))
        save_checkpoint(tmp_path / "two", first.editor, base, {})
        assert load_checkpoint(tmp_path / "two", base).digest == first.digest
        one, other = (proposed(base, each)[3] for each in (first.editor, load_checkpoint(tmp_path, base).editor))
        assert all(torch.equal(a, b) for a, b in zip((*one.u, *one.delta), (*other.u, *other.delta), strict=True))

    def test_says_in_its_card_what_completes_it(self, base, editor, tmp_path):
        save_checkpoint(tmp_path, editor, base, {"targets": [], "rank": 1, "note": "kept"})
        card = read_card(tmp_path)
        assert card["late"] == [target.name for target in editor.late.targets]
        assert [target["name"] for target in card["targets"]] == [target.name for target in editor.targets]
        assert (card["rank"], card["note"]) == (editor.keyed.rank, "kept")
        assert "completed at the answer" in (tmp_path / "card.md").read_text()

    @pytest.mark.parametrize("late", [None, [], ["model.layers.0.mlp.down_proj.weight"]], ids=str)
    def test_says_that_its_card_was_changed(self, base, editor, tmp_path, late):
        save_checkpoint(tmp_path, editor, base, {})
        text = (tmp_path / CARD).read_text()
        name = f'"late": [\n    "{editor.late.targets[0].name}"\n  ]'
        assert name in text
        (tmp_path / CARD).write_text(text.replace(name, f'"late": {json.dumps(late)}'))
        with pytest.raises(CheckpointUnreadable, match="does not hold the editor of its card"):
            load_checkpoint(tmp_path, base)
