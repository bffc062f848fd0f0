"""The order of an archive's weights, and its switches, are read from every form that their configuration has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from editors.errors import DataFileError
from editors.mend.archive_config import ArchiveConfig, describe, read_config
from editors.mend.variant import Variant
from editors.targets import Target

NAMES = ("transformer.h.2.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight")
LIST = "\n".join(f"- {name}" for name in NAMES)
NESTED = "\n".join(f"  - {name}" for name in NAMES)
FORMS = {
    "a model's file of the original": (f"name: gpt2\nclass_name: GPT2LMHeadModel\ninner_params:\n{LIST}\n", {}),
    "a composed configuration": (
        "alg: mend\nlr: 1e-6\nmend:\n  init: xavier\n  norm: false\n  rank: 12\n"
        f"model:\n  name: gpt2\n  inner_params:\n{NESTED}\n",
        {"identity": False, "normalise": False, "stated": {"rank": 12}},
    ),
    "an older one": (f"gtn:\n  init: xavier\n  shared: true\nmodel:\n  inner_params:\n{NESTED}\n", {
        "identity": False, "stated": {"shared": True},
    }),
    "EasyEdit's": (
        f"alg_name: MEND\nmodel_name: ./gpt2-xl\ninner_params:\n{LIST}\narchive: x\nalg: MEND\n"
        "n_hidden: 1\ninit: id\nnorm: True\ncombine: True\nrank: 1920\nshared: True\n",
        {"stated": {"shared": True, "combine": True, "n_hidden": 1, "rank": 1920}},
    ),
    "of a run in half precision": (f"inner_params:\n{LIST}\n".replace(".mlp.", ".underlying.mlp."), {}),
}  # fmt: skip


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestReads:
    @pytest.mark.parametrize("name", FORMS)
    def test_every_form(self, tmp_path, name):
        text, expected = FORMS[name]
        assert read_config(written(tmp_path / "c.yaml", text)) == ArchiveConfig(NAMES, **expected)

    @pytest.mark.parametrize("name", FORMS)
    def test_the_same_as_json(self, tmp_path, name):
        text, expected = FORMS[name]
        content = json.dumps(yaml.safe_load(text), indent="\t")  # which YAML would not read
        assert read_config(written(tmp_path / "c.json", content)) == ArchiveConfig(NAMES, **expected)

    @pytest.mark.parametrize(
        "variant",
        [Variant(rank=7), Variant(rank=7, sides="u", identity=False, normalise=False, shared=False, blocks=3)],
    )
    def test_what_an_export_writes(self, tmp_path, variant):
        targets = tuple(Target(name, 3, 4, False) for name in NAMES)
        config = read_config(written(tmp_path / "c.yaml", yaml.safe_dump(describe(targets, variant))))
        assert config.inner_params == NAMES
        assert (config.identity, config.normalise) == (variant.identity, variant.normalise)
        assert config.stated == {
            "shared": variant.shared,
            "combine": variant.sides == "joint",
            "n_hidden": variant.blocks - 1,
            "rank": 7,
        }


class TestRefuses:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "no list of names under inner_params"),
            ("5", "no list of names under inner_params"),
            ("- a\n- b", "no list of names under inner_params"),
            ("mend: {rank: 3}", "no list of names under inner_params"),
            ("model: gpt2", "no list of names under inner_params"),
            ("inner_params: []", "no list of names under inner_params"),
            ("inner_params: a.weight", "no list of names under inner_params"),
            ("inner_params: [1, 2]", "no list of names under inner_params"),
            ("inner_params: [a, b, a]", "names a twice"),
            ("inner_params: [a.underlying.b, a.b]", r"names a\.b twice"),
            ("inner_params: [a]\ninit: zeros", "has init: 'zeros', none of id, xavier"),
            ("inner_params: [a]\ninit: [id]", r"has init: \['id'\], none of"),
            ("inner_params: [a]\nmend: {norm: maybe}", "has norm: 'maybe', neither true nor false"),
            ("inner_params: [a", "cannot be read"),
            ("inner_params: !!python/object/apply:os.system [ls]", "cannot be read"),
            ("[" * 5000, "cannot be read"),
            ("\0", "cannot be read"),
        ],
    )
    def test_what_it_cannot_use_in_a_line(self, tmp_path, text, why):
        with pytest.raises(DataFileError, match=why) as refused:
            read_config(written(tmp_path / "c.yaml", text))
        assert "c.yaml" in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_json_that_is_none_bytes_that_are_no_text_and_nothing_at_all(self, tmp_path):
        (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
        for path in (written(tmp_path / "c.json", "{"), tmp_path / "b.yaml", tmp_path / "nothing.yaml", tmp_path):
            with pytest.raises(DataFileError, match="cannot be read"):
                read_config(path)
