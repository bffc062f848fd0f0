"""An archive of the original code becomes an editor that proposes what the original would, and goes back."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from editors.base_model import BaseModel
from editors.checkpoint import load_checkpoint, save_checkpoint
from editors.errors import ArchiveMismatch, ArchiveUnreadable, CheckpointError, TargetsError
from editors.mend.archive import read_archive, write_archive
from editors.mend.archive_config import ArchiveConfig, read_config
from editors.mend.archive_import import _logarithm, editor_of, ordered_targets
from editors.mend.editor import MendEditor
from editors.mend.variant import Variant
from editors.targets import resolve_targets
from tests.editors.mend.archives import Original
from tests.small import small_base, small_editor, small_keyed_editor

NONE = {"combine": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "unshared": {"shared": False},
    "separate": NONE,
    "only x": {**NONE, "x_only": True},
    "only delta": {**NONE, "delta_only": True},
    "one-sided": {**NONE, "one_sided": True},
    "xavier": {"init": "xavier"},
    "unnormalised": {"norm": False},
    "three layers": {"n_hidden": 2},
    "rank above the width": {"rank": 1920},
    "unshared separate xavier": {**NONE, "shared": False, "init": "xavier"},
    "unshared one-sided unnormalised": {**NONE, "shared": False, "one_sided": True, "norm": False},
}
EXPECTED = {
    "published": Variant(rank=5),
    "unshared": Variant(rank=5, shared=False),
    "separate": Variant(rank=5, sides="separate"),
    "only x": Variant(rank=5, sides="u"),
    "only delta": Variant(rank=5, sides="delta"),
    "one-sided": Variant(rank=5, sides="smaller"),
    "xavier": Variant(rank=5, identity=False),
    "unnormalised": Variant(rank=5, normalise=False),
    "three layers": Variant(rank=5, blocks=3),
    "rank above the width": Variant(rank=80),
    "unshared separate xavier": Variant(rank=5, shared=False, sides="separate", identity=False),
    "unshared one-sided unnormalised": Variant(rank=5, shared=False, sides="smaller", normalise=False),
}


def shuffled(base: BaseModel) -> list[str]:
    """Names of the edited weights, in an order that is not the model's."""
    names = [target.name for target in resolve_targets(base.model)]
    return names[1::2] + names[::2][::-1]


def config_of(original: Original) -> ArchiveConfig:
    return ArchiveConfig(tuple(original.inner_params), original.settings["init"] == "id", original.settings["norm"])


def imported(path: Path, base: BaseModel, config: ArchiveConfig, layers: tuple[str, ...] = ()) -> MendEditor:
    """Through import, saving and loading."""
    archive = read_archive(path)
    editor = editor_of(archive, ordered_targets(archive, base.model, config.inner_params, layers), config)
    save_checkpoint(path.parent / "imported", editor, base, {}, matrices=torch.float32)
    return load_checkpoint(path.parent / "imported", base).editor


def assert_same_changes(editor: MendEditor, original: Original) -> None:
    """Both change every weight alike, to a millionth of the largest entry: what is kept of a step is its logarithm,
    in float32. Computed in float32 too, the rows are rounded on top of that."""
    rows = original.rows([target.name for target in editor.targets])
    for runs, tolerance in ((editor, 3e-6), (copy.deepcopy(editor).double(), 1e-6)):
        proposal = runs(rows)
        for index, target in enumerate(editor.targets):
            expected = original.change(target.name, (rows.u[index], rows.delta[index]))
            got = target.oriented(proposal.delta[index].double().T @ proposal.u[index].double())
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= tolerance * expected.abs().max(), target.name
            assert expected.abs().max() > 0


@pytest.fixture
def linear() -> BaseModel:
    return small_base()


class TestProposesWhatTheOriginalWould:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_in_every_variant(self, base, tmp_path, name):
        original = Original(base.model, shuffled(base), VARIANTS[name])
        editor = imported(original.save(tmp_path / "a"), base, config_of(original))
        assert editor.variant == EXPECTED[name]
        assert_same_changes(editor, original)

    @pytest.mark.parametrize("steps", [[-1e-4] * 6, [3e-5, -2e-3, 0.7, -11.0, 0.0, 1e-9]])
    def test_with_steps_of_either_sign(self, tmp_path, steps):
        base = small_base("conv1d")
        original = Original(base.model, shuffled(base), steps=steps)
        editor = imported(original.save(tmp_path / "a"), base, config_of(original))
        if 0.0 in steps:
            place = steps.index(0.0)
            assert not editor(original.rows(original.inner_params)).delta[place].any()
            # And the others are as they should be.
            editor.log_steps[place], editor.signs[place], original.state["edit_lrs"][place] = 0.0, 1.0, 1.0
        assert_same_changes(editor, original)

    def test_from_an_older_file_that_says_gtn(self, base, tmp_path):
        original = Original(base.model, shuffled(base))
        content = original.content()
        content["model"] = {name.replace("mend.", "gtn."): value for name, value in original.state.items()}
        torch.save(content, tmp_path / "a")
        assert_same_changes(imported(tmp_path / "a", base, config_of(original)), original)

    @pytest.mark.parametrize("name", ["published", "unshared"])
    def test_from_a_file_of_before_torch_1_6(self, base, tmp_path, name):
        original = Original(base.model, shuffled(base), VARIANTS[name])
        editor = imported(original.save(tmp_path / "a", legacy=True), base, config_of(original))
        assert_same_changes(editor, original)

    def test_when_the_statistics_contradict_each_other_the_deviation_counts(self, base, tmp_path):
        original = Original(base.model, shuffled(base))
        for name in original.state:
            if name.endswith(("u_s", "v_s")):
                original.state[name] = original.state[name] * 7 if "u_s" in name else original.state[name] * torch.nan
        assert_same_changes(imported(original.save(tmp_path / "a"), base, config_of(original)), original)

    def test_from_a_run_in_half_precision_whose_modules_are_wrapped(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear), {"shared": False})
        content = original.content()
        content["model"] = {name.replace("#mlp#", "#underlying#mlp#"): v for name, v in original.state.items()}
        torch.save(content, tmp_path / "a")
        wrapped = [name.replace(".mlp.", ".underlying.mlp.") for name in original.inner_params]
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"inner_params": wrapped}))
        assert_same_changes(imported(tmp_path / "a", linear, read_config(tmp_path / "c.yaml")), original)

    def test_from_tensors_in_half_precision(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear), {"norm": False})
        for name, value in original.state.items():
            if isinstance(value, torch.Tensor):
                original.state[name] = value.bfloat16()
        assert_same_changes(imported(original.save(tmp_path / "a"), linear, config_of(original)), original)


class TestOrder:
    def test_is_not_in_a_shared_archive_and_it_says_so(self, linear, tmp_path):
        archive = read_archive(Original(linear.model, shuffled(linear)).save(tmp_path / "a"))
        with pytest.raises(ArchiveMismatch, match=r"does not tell .* in which order.*--inner-params.*--layers"):
            ordered_targets(archive, linear.model)

    def test_is_in_an_archive_that_is_not_shared(self, base, tmp_path):
        original = Original(base.model, shuffled(base), {"shared": False})
        assert_same_changes(imported(original.save(tmp_path / "a"), base, ArchiveConfig()), original)

    def test_can_be_given_by_patterns_one_after_the_other(self, base, tmp_path):
        names = [target.name for target in resolve_targets(base.model)]
        blocks = [name for block in (3, 1) for name in names if f".{block}." in name]
        original = Original(base.model, blocks)
        editor = imported(original.save(tmp_path / "a"), base, ArchiveConfig(), (r"\.3\.mlp\.", r"\.1\.mlp\."))
        assert [target.name for target in editor.targets] == blocks
        assert_same_changes(editor, original)

    def test_of_another_configuration_than_the_archives_own_is_refused(self, linear, tmp_path):
        names = shuffled(linear)
        archive = read_archive(Original(linear.model, names, {"shared": False}).save(tmp_path / "a"))
        with pytest.raises(ArchiveMismatch, match=f"edits {names[0]}, .* in this order, not {names[1]}, {names[0]}"):
            ordered_targets(archive, linear.model, [names[1], names[0], *names[2:]])

    def test_names_every_weight_that_the_base_model_lacks(self, linear, tmp_path):
        archive = read_archive(Original(linear.model, shuffled(linear)).save(tmp_path / "a"))
        with pytest.raises(TargetsError, match=r"transformer\.h\.9\.mlp\.c_fc\.weight, model\.norm\.weight"):
            ordered_targets(archive, linear.model, ["transformer.h.9.mlp.c_fc.weight", "model.norm.weight"])


class TestIsRefused:
    @staticmethod
    def saved(original: Original, path: Path, **changes: object) -> Path:
        for name, value in changes.items():
            if value is None:
                original.state.pop(name)
            else:
                original.state[name] = value
        return original.save(path)

    def why(self, original: Original, path: Path, base: BaseModel, **changes: object) -> str:
        archive = read_archive(self.saved(original, path, **changes))
        config = config_of(original)
        targets = ordered_targets(archive, base.model, config.inner_params)
        with pytest.raises(ArchiveMismatch) as refused:
            editor_of(archive, targets, config)
        return str(refused.value)

    def test_when_it_was_never_trained(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        untrained = {
            name: torch.full_like(value, torch.nan)
            for name, value in original.state.items()
            if name.endswith(("_mean", "_std", "_s", ".k"))
        }
        assert "never trained: its statistics are NaN" in self.why(original, tmp_path / "a", linear, **untrained)
        original.settings["norm"] = False
        assert_same_changes(imported(tmp_path / "a", linear, config_of(original)), original)

    def test_naming_every_tensor_that_is_not_finite(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        block = "mend.(32, 48).mlp.layers.1"
        why = self.why(
            original,
            tmp_path / "a",
            linear,
            **{
                f"{block}.bias": original.state[f"{block}.bias"] / 0,
                "mend.(48, 32).u_std": torch.cat([torch.tensor([torch.inf]), torch.ones(47)]),
                "edit_lrs": torch.tensor([1.0] * 8 + [torch.nan]),
            },
        )
        assert f"NaN or infinity in {block}.bias, mend.(48, 32).u_std, edit_lrs" in why

    def test_naming_all_counts_and_shapes_that_are_wrong(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        why = self.why(
            original,
            tmp_path / "a",
            linear,
            **{
                "edit_lrs": torch.ones(7),
                "mend.(32, 48).mlp.layers.0.bias": None,
                "mend.(32, 48).mlp.layers.1.mode_scale.weight": torch.ones(5, 80),
                "mend.(48, 32).u_mean": torch.ones(40),
                "mend.(48, 32).mlp.layers.1.v": torch.ones(5),
                "mend.(48, 32).k": torch.tensor(3.0),
            },
        )
        for fact in (
            "it has 7 edit_lrs for 9 weights",
            "mend.(32, 48).mlp.layers.0.bias is missing",
            "mode_scale.weight is (5, 80), not (6, 80) (5 modes for 6 named weights of this shape)",
            "mend.(48, 32).u_mean is (40,), not (48,)",
            "mend.(48, 32).mlp.layers.1.v is (5,), not (5, 80)",
            "mend.(48, 32).k is (), not (1,)",
        ):
            assert fact in why

    def test_when_fewer_or_more_weights_are_named_than_it_has_modes(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        archive = read_archive(original.save(tmp_path / "a"))
        targets = ordered_targets(archive, linear.model, original.inner_params[:-1])
        with pytest.raises(ArchiveMismatch, match=r"6 modes for 5 named weights.*9 edit_lrs for 8 weights"):
            editor_of(archive, targets, ArchiveConfig())

    def test_when_its_networks_are_of_other_shapes(self, linear, tmp_path):
        original = Original(small_base("conv1d").model, ["transformer.h.1.attn.c_attn.weight"])
        archive = read_archive(original.save(tmp_path / "a"))
        targets = resolve_targets(linear.model, [r"3\.mlp\.up_proj"])
        with pytest.raises(ArchiveMismatch, match=r"no network for \(32, 48\); a network for \(32, 96\), which no"):
            editor_of(archive, targets, ArchiveConfig())

    def test_when_its_networks_make_no_variant(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear), {**NONE, "delta_only": True})
        odd = {n.replace("mlp2", "mlp1"): v for n, v in original.state.items() if "(32, 48).mlp2" in n}
        gone = dict.fromkeys(name.replace("mlp1", "mlp2") for name in odd)
        original.state.update({"mend.(48, 32).mlp1.layers.0.u": torch.ones(48, 5)})
        assert "no variant of MEND ((32, 48): mlp1; (48, 32): mlp1, mlp2)" in self.why(
            original, tmp_path / "a", linear, **odd, **gone
        )

    def test_with_more_layers_than_it_names(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        far = "mend.(32, 48).mlp.layers.999999999.bias"
        why = self.why(original, tmp_path / "a", linear, **{far: torch.ones(80)})
        assert f"{far} has no place in it" in why

    @pytest.mark.parametrize(
        ("stated", "why"),
        [
            ({"shared": False}, "its shared is True, not False"),
            ({"combine": False, "n_hidden": 2}, "its combine is True, not False; its n_hidden is 1, not 2"),
            ({"rank": 1920}, "its rank is 5, not 80"),
            ({"rank": 4}, "its rank is 5, not 4"),
        ],
    )
    def test_with_the_configuration_of_another_editor(self, linear, tmp_path, stated, why):
        original = Original(linear.model, shuffled(linear))
        archive = read_archive(original.save(tmp_path / "a"))
        targets = ordered_targets(archive, linear.model, original.inner_params)
        with pytest.raises(ArchiveMismatch, match=why):
            editor_of(archive, targets, ArchiveConfig(stated=stated))

    @pytest.mark.parametrize(
        "content",
        [
            [1, 2],
            {"model": torch.ones(2)},
            {"model": {"edit_lrs": 3}},
            {"model": {"edit_lrs": torch.ones(2)}},
            {"model": {"edit_lrs": torch.ones(2, dtype=torch.int64), "mend.(3, 4).k": torch.ones(1)}},
            {"model": {"edit_lrs": torch.ones(()), "mend.(3, 4).k": torch.ones(1)}},
            {"model": {"edit_lrs": torch.ones(2), "mend.(3, 4).k": torch.ones(1, dtype=torch.int64)}},
            {"model": {"edit_lrs": torch.ones(2), "mend.(3, 4).mlp.layers.0.weight": torch.ones(1)}},
            {"model": {"edit_lrs": torch.ones(2), "learner.lstm.weight": torch.ones(1), 5: "five"}},
        ],
    )
    def test_when_it_holds_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "a")
        with pytest.raises(ArchiveUnreadable, match="is no archive of MEND"):
            read_archive(tmp_path / "a")


class TestFacts:
    def test_are_told_of_where_it_comes_from(self, linear, tmp_path):
        linear.model.config._name_or_path = "gpt9"
        archive = read_archive(Original(linear.model, shuffled(linear)).save(tmp_path / "gpt9.2021"))
        assert (archive.file, archive.step, archive.model) == ("gpt9.2021", 123, "LlamaConfig gpt9")
        assert archive.val_stats == {"edit/acc_val": 0.75, "n_tokens/pre_val": 12}
        assert len(archive.digest) == 64

    def test_are_left_out_where_they_are_odd(self, linear, tmp_path):
        original = Original(linear.model, shuffled(linear))
        original.state["model_config"] = {"a": 1}
        content = original.content() | {"step": "many", "val_stats": None}
        torch.save(content, tmp_path / "a")
        archive = read_archive(tmp_path / "a")
        assert (archive.step, archive.val_stats, archive.model) == (None, {}, "")


class TestSteps:
    def test_come_back_exactly_from_an_export(self):
        """Whatever logarithm training reaches, through the step that an archive keeps of it.

        Near 1 the nearest logarithm's exponential is now and then not the nearest exponential.
        """
        logs = torch.cat([torch.linspace(-20, 5, 4001), torch.linspace(-2, 2, 500_000)])
        assert torch.equal(_logarithm(logs.exp()).exp(), logs.exp())


EXPORTED = {
    "published": Variant(rank=4),
    "unshared": Variant(rank=4, shared=False),
    "separate": Variant(rank=4, sides="separate"),
    "only u": Variant(rank=4, sides="u"),
    "only delta": Variant(rank=4, sides="delta"),
    "smaller": Variant(rank=4, sides="smaller"),
    "xavier": Variant(rank=4, identity=False),
    "unnormalised": Variant(rank=4, normalise=False),
    "one block": Variant(rank=4, blocks=1),
}


def exported(base: BaseModel, folder: Path, variant: Variant, **facts: object) -> tuple[MendEditor, Path]:
    """An editor as after training, and the archive that was made of it."""
    editor = small_editor(base, variant=variant)
    generator = torch.Generator().manual_seed(6)
    for parameter in editor.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    editor.signs.copy_(torch.tensor([(-1.0) ** (i // 2) for i in range(len(editor.targets))]))
    save_checkpoint(folder / "own", editor, base, {"step": 7, **facts}, matrices=torch.float32)
    checkpoint = load_checkpoint(folder / "own", base)
    write_archive(checkpoint, base, folder / "own.pt")
    return checkpoint.editor, folder / "own.pt"


class TestExport:
    @pytest.mark.parametrize("name", EXPORTED)
    def test_read_again_proposes_the_same_bits(self, base, tmp_path, name):
        editor, path = exported(base, tmp_path, EXPORTED[name])
        again = imported(path, base, read_config(path.with_suffix(".yaml")))
        assert (again.variant, again.targets) == (editor.variant, editor.targets)
        rows = Original(base.model, [target.name for target in editor.targets]).rows([t.name for t in editor.targets])
        mine, theirs = editor(rows), again(rows)
        for one, other in zip((*mine.u, *mine.delta), (*theirs.u, *theirs.delta), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("name", EXPORTED)
    def test_is_what_the_original_would_have_saved(self, base, tmp_path, name):
        """The same names, shapes and types as an archive of the original with those settings, and the same edits."""
        editor, path = exported(base, tmp_path, EXPORTED[name])
        sidecar = yaml.safe_load(path.with_suffix(".yaml").read_text())
        original = Original(base.model, sidecar["inner_params"], sidecar["mend"])
        content = torch.load(path, weights_only=False)
        expected = original.content()
        assert content.keys() == expected.keys()
        assert content["step"] == 7
        assert type(content["model"]["model_config"]) is type(base.model.config)
        shapes = [
            {n: (v.shape, v.dtype) for n, v in state.items() if isinstance(v, torch.Tensor)}
            for state in (content["model"], original.state)
        ]
        assert shapes[0] == shapes[1]
        original.state = content["model"]
        assert_same_changes(editor, original)

    def test_of_what_the_original_cannot_do_is_refused(self, linear, tmp_path):
        with pytest.raises(ArchiveMismatch, match="has no networks, which the original code cannot do"):
            exported(linear, tmp_path, Variant(plain=True))
        save_checkpoint(tmp_path / "keyed", small_keyed_editor(linear), linear, {})
        with pytest.raises(ArchiveMismatch, match="joins edits by least squares"):
            write_archive(load_checkpoint(tmp_path / "keyed", linear), linear, tmp_path / "own.pt")
        assert not (tmp_path / "own.pt").exists()

    def test_names_the_base_model_as_it_was_asked_for(self, linear, tmp_path):
        linear.model.config._name_or_path = "/home/somebody/cache"
        _, path = exported(linear, tmp_path, Variant(rank=4))
        assert read_archive(path).model == "LlamaConfig small-linear"
        assert linear.model.config._name_or_path == "/home/somebody/cache"

    @pytest.mark.parametrize("name", ["own.pt", "own.yaml"])
    def test_replaces_what_is_there_only_when_told_so_and_leaves_no_draft(self, linear, tmp_path, name):
        (tmp_path / name).write_bytes(b"before")
        with pytest.raises(CheckpointError, match="is there already"):
            exported(linear, tmp_path, Variant(rank=4))
        assert (tmp_path / name).read_bytes() == b"before"
        write_archive(load_checkpoint(tmp_path / "own", linear), linear, tmp_path / "own.pt", replace=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "own.pt", "own.yaml"]
        read_archive(tmp_path / "own.pt")

    def test_is_not_written_over_its_own_configuration(self, linear, tmp_path):
        exported(linear, tmp_path, Variant(rank=4))
        with pytest.raises(CheckpointError, match="give the archive another ending"):
            write_archive(load_checkpoint(tmp_path / "own", linear), linear, tmp_path / "own.yaml")

    def test_of_an_imported_archive_is_that_archive(self, base, tmp_path):
        original = Original(base.model, shuffled(base), steps=None)
        editor = imported(original.save(tmp_path / "a"), base, config_of(original))
        write_archive(load_checkpoint(tmp_path / "imported", base), base, tmp_path / "b")
        mine, theirs = read_archive(tmp_path / "b"), read_archive(tmp_path / "a")
        assert mine.tensors.keys() == theirs.tensors.keys()
        torch.testing.assert_close(mine.steps, theirs.steps, rtol=1e-6, atol=0)
        for name, tensor in theirs.tensors.items():
            torch.testing.assert_close(mine.tensors[name], tensor, rtol=1e-6, atol=0)
        assert dataclasses.asdict(editor.variant) == dataclasses.asdict(Variant(rank=5))
