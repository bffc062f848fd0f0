"""The keyed editor: one key and one wanted change per edit, worked out from its own capture alone."""

from __future__ import annotations

import json

import pytest
import torch

from editors.capture import capture
from editors.chat import Message, chat_prompt, question_of
from editors.checkpoint import CARD, load_checkpoint, save_checkpoint
from editors.errors import CheckpointUnreadable, SubjectNotFound, TargetsError
from editors.factors import quantise_keyed
from editors.mend.keyed import KeyedEditor
from editors.targets import resolve_keyed_targets
from editors.views import UpperBlocks, view
from tests.small import small_base, small_keyed_editor

FACTS = (
    ("The capital of France is", "Rome", "France"),
    ("The language of Norway", "is German (or so)", "Norway"),
    ("Vienna is the city of", "Spain", "Vienna"),
    ("Who speaks English in Madrid", "Oslo", "Madrid"),
)


@pytest.fixture(params=["linear", "conv1d"])
def base(request):
    return small_base(request.param)


@pytest.fixture
def editor(base) -> KeyedEditor:
    return small_keyed_editor(base)


def tokens_of(base, facts=FACTS, named=True):
    return [base.encode(prompt, correction, subject if named else None) for prompt, correction, subject in facts]


def captured(base, editor, tokens):
    upper = UpperBlocks(base.model, editor.captured)
    return capture(upper, upper.below([sequence.inputs for sequence in tokens]), tokens)


class TestEvidence:
    def test_is_what_the_weight_reads_at_the_end_of_the_subject(self, base, editor):
        tokens = tokens_of(base)
        read = editor.read(captured(base, editor, tokens))
        held = []
        module = base.model.get_submodule(editor.targets[0].module)
        handle = module.register_forward_pre_hook(lambda _module, args: held.append(args[0][0]))
        for sequence in tokens:
            base.model(torch.tensor([sequence.inputs]))
        handle.remove()
        for row, sequence in enumerate(tokens):
            torch.testing.assert_close(read.u[0][row], held[row][sequence.subject], atol=1e-5, rtol=1e-4)

    def test_adds_up_the_gradients_at_the_answer(self, base, editor):
        tokens = tokens_of(base)
        found = captured(base, editor, tokens)
        read = editor.read(found)
        for row, sequence in enumerate(tokens):
            at_answer = found.delta[-1][found.example[-1] == row]
            torch.testing.assert_close(read.answer[row, 0], at_answer[len(sequence.prompt) - 1])
            torch.testing.assert_close(read.answer[row, 1], at_answer.sum(0))

    def test_of_an_edit_does_not_depend_on_those_beside_it(self, base, editor):
        tokens = tokens_of(base)
        together = editor.propose(editor.read(captured(base, editor, tokens)))
        for row, sequence in enumerate(tokens):
            alone = editor(captured(base, editor, [sequence]))
            torch.testing.assert_close(together.u[0][row], alone.u[0][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(together.delta[0][row], alone.delta[0][0], atol=1e-5, rtol=1e-4)


class TestKeys:
    def test_are_whitened_and_of_unit_length(self, base, editor):
        proposal = editor(captured(base, editor, tokens_of(base)))
        torch.testing.assert_close(proposal.u[0].norm(dim=1), torch.ones(len(FACTS)))
        u = editor.read(captured(base, editor, tokens_of(base))).u[0]
        whitened = torch.linalg.inv(editor.whitening(0)) @ u[0]
        torch.testing.assert_close(proposal.u[0][0], whitened / whitened.norm(), atol=1e-4, rtol=1e-3)

    def test_of_prompts_that_differ_behind_the_subject_alone_are_the_same(self, base, editor):
        """A decoder has not read on yet: why two such facts cannot both be corrected."""
        asked = [("The capital of France is", "Rome", "France"), ("The capital of France speaks a", "x", "France")]
        keys = editor(captured(base, editor, tokens_of(base, asked))).u[0]
        torch.testing.assert_close(keys[0], keys[1], atol=1e-5, rtol=1e-4)

    def test_stand_within_the_prompt_where_no_subject_is_named(self, base, editor):
        tokens = tokens_of(base, named=False)
        found = captured(base, editor, tokens)
        for row, position in enumerate(editor.find(found, range(len(tokens)))):
            assert 0 <= position < len(tokens[row].prompt)

    def test_stand_within_the_question_where_a_template_is_around_it(self, base, editor):
        messages = [Message("system", "The city of London"), Message("user", "The capital of France is")]
        prompt = chat_prompt(base.tokenizer, messages)
        tokens = base.encode(prompt, "Rome", question=question_of(base.tokenizer, prompt, messages))
        question = [tokens.prompt[place] for place in tokens.question]
        assert base.tokenizer.decode(question).strip() == "The capital of France is"
        found = captured(base, editor, [tokens])
        torch.nn.init.normal_(editor.gate.write.weight)  # which else takes the last token of all
        for sign in (1, -1):
            editor.gate.write.weight.mul_(sign)
            assert editor.find(found, [0])[0] in tokens.question

    def test_at_the_place_that_the_gate_finds_are_those_of_that_subject(self, base, editor):
        (unnamed,) = tokens_of(base, FACTS[:1], named=False)
        found = captured(base, editor, [unnamed])
        (position,) = editor.find(found, [0])
        words = base.tokenizer.decode(unnamed.prompt[: position + 1])
        named = base.encode(FACTS[0][0], FACTS[0][1], words)
        assert torch.equal(editor(found).u[0], editor(captured(base, editor, [named])).u[0])


class TestTogether:
    @pytest.mark.parametrize("fading", [0.0, 0.5])
    def test_is_what_the_exact_state_writes(self, base, editor, fading):
        """Up to 16 bits: what is trained is what is served."""
        editor.fading.fill_(fading)
        proposal = editor(captured(base, editor, tokens_of(base)))
        state = editor.new_state(base.device)
        state.add(*(quantise_keyed(proposal.rows_of(editor.targets, edit)) for edit in range(len(FACTS))))
        (target,) = editor.targets
        live = view(base.model, [target.name])
        state.write(base.model, live)
        changed = target.oriented(live.get_parameter(target.name) - base.model.get_parameter(target.name))
        u, delta = editor.together(proposal, len(FACTS), editor.targets)[target.name]
        torch.testing.assert_close(changed, delta[0].T @ u[0], atol=1e-3 * changed.abs().max().item(), rtol=1e-2)

    def test_of_single_edits_leaves_them_apart(self, base, editor):
        proposal = editor(captured(base, editor, tokens_of(base)))
        u, delta = editor.together(proposal, 1, editor.targets)[editor.targets[0].name]
        assert u.shape[:2] == delta.shape[:2] == (len(FACTS), 1)

    def test_gives_the_ridge_its_gradient(self, base, editor):
        editor.requires_grad_()
        proposal = editor(captured(base, editor, tokens_of(base)))
        _, delta = editor.together(proposal, len(FACTS), editor.targets)[editor.targets[0].name]
        delta.square().sum().backward()
        assert editor.log_ridge.grad.ne(0).all()


class TestTargets:
    def test_are_the_last_projection_of_one_lower_block_and_its_counterpart_at_the_top(self, base):
        (target,), witness = resolve_keyed_targets(base.model)
        assert ".1." in target.name
        assert ".3." in witness.name
        assert target.name.split(".1.")[1] == witness.name.split(".3.")[1]
        assert target.d_out == base.model.config.hidden_size

    def test_can_be_named(self):
        targets, witness = resolve_keyed_targets(small_base().model, [r"layers\.[02]\.mlp\.down_proj"])
        assert [target.name[:14] for target in targets] == ["model.layers.0", "model.layers.2"]
        assert witness.name == "model.layers.3.mlp.down_proj.weight"

    def test_of_unknown_architectures_have_to_be_named(self):
        model = small_base().model
        model.config.model_type = "unheard"
        with pytest.raises(TargetsError, match="--layers"):
            resolve_keyed_targets(model)


class TestCheckpoint:
    def test_reads_back_as_the_same_editor(self, base, editor, tmp_path):
        save_checkpoint(tmp_path / "one", editor, base, {}, matrices=torch.float32)
        loaded = load_checkpoint(tmp_path / "one", base)
        assert loaded.aggregate == "least_squares"
        found = captured(base, editor, tokens_of(base))
        one, other = editor(found), loaded.editor(found)
        torch.testing.assert_close(one.u[0], other.u[0], atol=1e-3, rtol=1e-2)
        assert torch.equal(one.delta[0], other.delta[0])
        assert editor.find(found, range(4)) == loaded.editor.find(found, range(4))

    def test_in_half_precision_is_its_own_fixed_point(self, base, editor, tmp_path):
        """Served and measured is what was stored."""
        save_checkpoint(tmp_path / "one", editor, base, {})
        first = load_checkpoint(tmp_path / "one", base)
        save_checkpoint(tmp_path / "two", first.editor, base, {})
        assert load_checkpoint(tmp_path / "two", base).digest == first.digest

    @pytest.mark.parametrize(
        ("field", "value"),
        [("aggregate", "mean"), ("aggregate", "sum"), ("rank", 3), ("witness", {}), ("witness", None)],
    )
    def test_says_that_its_card_was_changed(self, base, editor, tmp_path, field, value):
        save_checkpoint(tmp_path, editor, base, {})
        card = json.loads((tmp_path / CARD).read_text())
        (tmp_path / CARD).write_text(json.dumps(card | {field: value}))
        with pytest.raises(CheckpointUnreadable, match="does not hold the editor of its card"):
            load_checkpoint(tmp_path, base)


class TestSubject:
    @pytest.mark.parametrize(
        ("prompt", "subject", "last"),
        [
            ("The capital of France is", "France", "▁France"),
            ("The capital of France is", "capital of", "▁of"),
            ("The capital of France is", " France ", "▁France"),
            ("France is a city in France today", "France", "▁France"),
            ("Who speaks in Zoeland now", "Zoeland", "d"),
        ],
    )
    def test_ends_at_its_last_token(self, prompt, subject, last):
        base = small_base()
        tokens = base.encode(prompt, "Rome", subject)
        assert base.tokenizer.convert_ids_to_tokens(tokens.prompt[tokens.subject]) == last

    def test_is_taken_where_it_stands_last(self):
        base = small_base()
        tokens = base.encode("France is a city in France today", "Rome", "France")
        assert tokens.subject > 3

    def test_is_taken_from_the_question_alone(self):
        base, prompt = small_base(), "France or Spain? Spain is in France"
        tokens = base.encode(prompt, "Rome", "Spain", question=slice(0, 16))
        assert base.tokenizer.decode(tokens.prompt[: tokens.subject + 1]) == "France or Spain"
        with pytest.raises(SubjectNotFound):
            base.encode(prompt, "Rome", "is", question=slice(0, 16))

    @pytest.mark.parametrize("subject", ["Norway", "france", "", "  "])
    def test_must_be_in_the_prompt(self, subject):
        with pytest.raises(SubjectNotFound, match="does not occur in the prompt"):
            small_base().encode("The capital of France is", "Rome", subject)

    def test_is_unknown_where_none_is_given(self):
        assert small_base().encode("The capital of France is", "Rome").subject is None
