"""Every variant of the editor is the formula that its fields describe, differs where it should, trains and is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from editors.base_model import BaseModel
from editors.capture import Capture, capture
from editors.checkpoint import load_checkpoint, save_checkpoint
from editors.mend.editor import MendEditor, Proposal
from editors.mend.network import RunningStatistics
from editors.mend.variant import SIDES, Variant
from editors.targets import Target, resolve_targets
from editors.views import UpperBlocks
from tests.editors.dense import encoded, gradients
from tests.editors.mend.variants import VARIANTS
from tests.small import small_base, small_editor

SMALL = {name: dataclasses.replace(variant, rank=3) for name, variant in VARIANTS.items()}
MIXED = {
    "unshared separate": Variant(rank=3, shared=False, sides="separate"),
    "xavier smaller": Variant(rank=3, identity=False, sides="smaller"),
    "unnormalised unshared": Variant(rank=3, normalise=False, shared=False, blocks=3),
    "plain unshared": Variant(plain=True, shared=False),
}
TARGETS = (Target("a.weight", 6, 4, False), Target("b.weight", 4, 6, False), Target("c.weight", 6, 4, False))
ROWS = (5, 7, 3)
"""Per target, as in an encoder-decoder: two of one shape see different numbers of rows."""


@pytest.fixture(params=[*SMALL.values(), *MIXED.values()], ids=[*SMALL, *MIXED])
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def some_capture(seed: int = 0, dtype: torch.dtype = torch.float32) -> Capture:
    generator = torch.Generator().manual_seed(seed)

    def rows(width: str) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(count, getattr(target, width), generator=generator, dtype=dtype)
            for target, count in zip(TARGETS, ROWS, strict=True)
        )

    example = tuple(torch.arange(count) * 2 // count for count in ROWS)
    return Capture(tuple(3 + u for u in rows("d_in")), tuple(1e-2 * d for d in rows("d_out")), example, torch.zeros(2))


def shaken(variant: Variant, signs: list[int] | None = None) -> MendEditor:
    """As if it had been trained: no parameter is where it began."""
    torch.manual_seed(1)
    editor = MendEditor(TARGETS, variant, signs)
    editor.update_statistics(some_capture(1))
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape))
    return editor.requires_grad_(False)


def expected(editor: MendEditor, capture: Capture) -> list[tuple[Tensor, Tensor]]:
    """(ũ, −αδ̃) of every target, one row after the other, from the parameters alone."""
    variant, found, places = editor.variant, [], {}
    for index, target in enumerate(editor.targets):
        network = editor.networks[f"{target.d_in}x{target.d_out}" if variant.shared else target.name.replace(".", "#")]
        place = places[target.shape] = places.get(target.shape, -1) + 1

        def run(blocks: torch.nn.ModuleList, h: Tensor, m: int = place) -> Tensor:
            for b in blocks:
                inside = b.u @ (b.v @ h) + b.bias
                if variant.shared:
                    inside = b.scale[m] * inside + b.shift[m]
                h = torch.relu(inside) + (h if variant.identity else 0)
            return h

        rows = []
        for u, delta in zip(capture.u[index], capture.delta[index], strict=True):
            if variant.has_statistics:
                u, delta = network.u_statistics.normalise(u), network.delta_statistics.normalise(delta)
            if variant.sides == "joint" and not variant.plain:
                both = run(network.blocks, torch.cat([u, delta]))
                u, delta = both[: target.d_in], both[target.d_in :]
            rows.append((run(network.u_blocks, u), -editor.log_steps[index].exp() * run(network.delta_blocks, delta)))
        found.append((torch.stack([u for u, _ in rows]), torch.stack([delta for _, delta in rows])))
    return found


def assert_close(got: Proposal, wanted: list[tuple[Tensor, Tensor]]) -> None:
    for u, delta, (wanted_u, wanted_delta) in zip(got.u, got.delta, wanted, strict=True):
        torch.testing.assert_close(u, wanted_u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(delta, wanted_delta, rtol=1e-4, atol=1e-5)


class TestEveryVariant:
    def test_is_the_formula_of_its_fields(self, variant):
        editor, rows = shaken(variant), some_capture()
        assert_close(editor(rows), expected(editor, rows))

    def test_has_the_networks_of_its_sides_and_no_other(self, variant):
        editor = MendEditor(TARGETS, variant)
        for name, members in editor.groups.items():
            widths = {
                stack: len(getattr(editor.networks[name], stack)[0].bias)
                for stack in ("blocks", "u_blocks", "delta_blocks")
                if len(getattr(editor.networks[name], stack))
            }
            d_in, d_out = TARGETS[members[0]].shape
            assert widths == {} if variant.plain else widths == {
                "joint": {"blocks": d_in + d_out},
                "separate": {"u_blocks": d_in, "delta_blocks": d_out},
                "u": {"u_blocks": d_in},
                "delta": {"delta_blocks": d_out},
                "smaller": {"delta_blocks": 4} if d_in > d_out else {"u_blocks": 4},
            }[variant.sides]  # fmt: skip

    def test_is_moved_by_training_in_every_parameter(self, variant):
        torch.manual_seed(0)
        editor, rows = MendEditor(TARGETS, variant), some_capture()
        editor.update_statistics(rows)
        before = {name: parameter.detach().clone() for name, parameter in editor.named_parameters()}
        optimizer = torch.optim.Adam(editor.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            proposal = editor(rows)
            # Blocks can only add: a loss that pulls every entry its own way finds something to do for each of them.
            sum((part * torch.randn(part.shape)).sum() for part in (*proposal.u, *proposal.delta)).backward()
            optimizer.step()
        assert [name for name, p in editor.named_parameters() if torch.equal(p, before[name])] == []

    def test_comes_back_from_its_checkpoint(self, variant, tmp_path):
        base = small_base()
        editor = small_editor(base, variant=variant)
        generator = torch.Generator().manual_seed(5)
        for parameter in editor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_checkpoint(tmp_path, editor, base, {}, matrices=torch.float32)
        loaded, rows = load_checkpoint(tmp_path, base).editor, real_capture(base, editor.targets)
        assert loaded.variant == variant
        for mine, theirs in zip(loaded(rows).delta, editor(rows).delta, strict=True):
            assert torch.equal(mine, theirs)

    def test_works_in_double_precision_from_end_to_end(self, variant):
        editor, rows = shaken(variant), some_capture(dtype=torch.float64)
        rough = editor(rows)
        assert {part.dtype for part in (*rough.u, *rough.delta)} == {torch.float32}
        editor.double()
        editor.update_statistics(some_capture(1, torch.float64))
        proposal = editor(rows)
        assert {part.dtype for part in (*proposal.u, *proposal.delta)} == {torch.float64}
        for (u, delta), (wanted_u, wanted_delta) in zip(
            zip(proposal.u, proposal.delta, strict=True), expected(editor, rows), strict=True
        ):
            torch.testing.assert_close(u, wanted_u, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(delta, wanted_delta, rtol=1e-12, atol=1e-12)


def real_capture(base: BaseModel, targets: tuple[Target, ...]) -> Capture:
    upper, sequences = UpperBlocks(base.model, targets), encoded(base)
    return capture(upper, upper.below([tokens.inputs for tokens in sequences]), sequences)


class TestUnshared:
    def test_each_layer_has_parameters_of_its_own(self):
        editor, rows = shaken(SMALL["unshared"]), some_capture()
        before = editor(rows)
        for parameter in editor.networks["a#weight"].parameters():
            parameter += 1
        after = editor(rows)
        same = [torch.equal(a, b) for a, b in zip(before.delta, after.delta, strict=True)]
        assert same == [False, True, True]

    def test_each_layer_has_statistics_of_its_own(self):
        editor, rows = MendEditor(TARGETS, SMALL["unshared"]), some_capture()
        editor.update_statistics(rows)
        for index, target in enumerate(TARGETS):
            statistics = editor.networks[target.name.replace(".", "#")].u_statistics
            assert statistics.count == ROWS[index]
            torch.testing.assert_close(statistics.mean, rows.u[index].mean(0))

    def test_has_no_rows_per_layer(self):
        names = {name for name, _ in MendEditor(TARGETS, SMALL["unshared"]).named_parameters()}
        assert not any(name.endswith((".scale", ".shift")) for name in names)


class TestSides:
    def test_only_u_passes_the_normalised_delta_on(self):
        editor, rows = shaken(SMALL["only-u"]), some_capture()
        proposal = editor(rows)
        for index, target in enumerate(TARGETS):
            network = editor.networks[f"{target.d_in}x{target.d_out}"]
            normal = network.delta_statistics.normalise(rows.delta[index])
            assert torch.equal(proposal.delta[index], -editor.log_steps[index].exp() * normal)
            assert not torch.equal(proposal.u[index], network.u_statistics.normalise(rows.u[index]))

    def test_only_delta_passes_the_normalised_u_on(self):
        editor, rows = shaken(SMALL["only-delta"]), some_capture()
        proposal = editor(rows)
        for index, target in enumerate(TARGETS):
            network = editor.networks[f"{target.d_in}x{target.d_out}"]
            assert torch.equal(proposal.u[index], network.u_statistics.normalise(rows.u[index]))

    @pytest.mark.parametrize(("name", "mixes"), [("mend", True), ("separate", False)])
    def test_see_each_other_only_in_a_joint_network(self, name, mixes):
        editor, rows = shaken(SMALL[name]), some_capture()
        other = dataclasses.replace(rows, delta=tuple(2 * delta for delta in rows.delta))
        assert torch.equal(editor(rows).u[0], editor(other).u[0]) is not mixes


class TestNoIdentity:
    @pytest.mark.parametrize(("name", "passes"), [("mend", True), ("xavier", False)])
    def test_differs_from_its_input_at_the_start(self, name, passes):
        editor, rows = MendEditor(TARGETS, SMALL[name]), some_capture()
        editor.update_statistics(rows)
        normal = editor.networks["4x6"].u_statistics.normalise(rows.u[1])
        assert torch.equal(editor(rows).u[1], normal) is passes

    def test_has_no_residual(self):
        editor = shaken(SMALL["xavier"])
        for name, parameter in editor.named_parameters():
            if name.endswith(".shift"):
                parameter.fill_(-1e6)
        assert not any(part.any() for part in editor(some_capture()).u)


class TestNoNormalisation:
    def test_keeps_no_statistics_and_takes_rows_as_they_are(self):
        editor, rows = MendEditor(TARGETS, SMALL["unnormalised"]), some_capture()
        assert not any(isinstance(module, RunningStatistics) for module in editor.modules())
        editor.update_statistics(rows)
        assert all(torch.equal(a, b) for a, b in zip(editor(rows).u, rows.u, strict=True))


class TestPlain:
    def test_is_the_gradient_times_the_step_exactly(self):
        editor, rows = MendEditor(TARGETS, VARIANTS["plain"]).requires_grad_(False), some_capture()
        editor.log_steps += torch.tensor([0.1, 0.2, 0.3])
        proposal = editor(rows)
        for index in range(len(TARGETS)):
            assert torch.equal(proposal.u[index], rows.u[index])
            assert torch.equal(proposal.delta[index], -editor.log_steps[index].exp() * rows.delta[index])

    def test_changes_a_weight_by_its_own_gradient(self, base):
        base.model.double()
        editor = MendEditor(resolve_targets(base.model), VARIANTS["plain"])
        proposal = editor(real_capture(base, editor.targets))
        tokens = encoded(base)[1]
        rows = proposal.rows_of(editor.targets, 1)
        for target, step, gradient in zip(
            editor.targets, editor.log_steps.exp(), gradients(base.model, editor.targets, tokens), strict=True
        ):
            u, delta = rows[target.name]
            assert (delta.T @ u + step * gradient).abs().max() < 1e-6 * (step * gradient).abs().max()

    def test_learns_nothing_but_its_steps(self):
        assert list(MendEditor(TARGETS, VARIANTS["plain"]).state_dict()) == ["log_steps"]


class TestSigns:
    def test_turn_the_edit_of_their_own_target(self):
        rows = some_capture()
        against, mixed = shaken(SMALL["mend"])(rows), shaken(SMALL["mend"], [1, -1, 1])(rows)
        for sign, one, other in zip([-1, 1, -1], against.delta, mixed.delta, strict=True):
            assert torch.equal(sign * one, other)
        assert all(torch.equal(one, other) for one, other in zip(against.u, mixed.u, strict=True))

    @pytest.mark.parametrize("signs", [[1, 1], [1, 0, 1], [1, 1, 2], []])
    def test_are_one_for_each_target(self, signs):
        with pytest.raises(ValueError, match="3 targets"):
            MendEditor(TARGETS, SMALL["mend"], signs)

    def test_are_kept_by_a_checkpoint(self, tmp_path):
        base = small_base()
        editor, signs = small_editor(base), [1, -1, -1, 1, 1, -1, 1, 1, -1]
        turned = MendEditor(editor.targets, editor.variant, signs)
        turned.load_state_dict(editor.state_dict())
        save_checkpoint(tmp_path, turned, base, {})
        assert load_checkpoint(tmp_path, base).editor.signs.tolist() == signs


class TestFields:
    @pytest.mark.parametrize(
        "fields",
        [{"rank": 0}, {"rank": "4"}, {"rank": True}, {"blocks": -1}, {"sides": "both"}, {"shared": 1}, {"plain": None}],
    )
    def test_that_cannot_be_are_refused_by_name(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Variant(**fields)

    def test_the_rank_is_at_most_the_width(self):
        editor = MendEditor(TARGETS, Variant(rank=8, sides="separate"))
        assert editor.networks["6x4"].u_blocks[0].v.shape == (6, 6)
        assert editor.networks["6x4"].delta_blocks[0].u.shape == (4, 4)

    def test_every_choice_of_sides_has_words_for_a_card(self):
        assert len({str(Variant(sides=sides)) for sides in SIDES} | {str(Variant(plain=True))}) == len(SIDES) + 1
