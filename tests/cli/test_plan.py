"""`mend plan`: one table or one object on standard output; anything wrong is one line and exit status 1."""

from __future__ import annotations

import json
import sys

import pytest

from service.cli.main import main
from tests.editors.planning.configs import small_config

SMALL = ("--rank", "4", "--batch", "2", "--tokens", "8")
HARDWARE = ("--device", "cpu", "--flops", "1e12", "--bandwidth", "1e11")


@pytest.fixture
def mend(monkeypatch, capsys):
    """Run `mend plan`; gives what it says on standard output. A refusal is an AssertionError with its line."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mend", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        if ended.value.code not in (0, None):
            raise AssertionError(ended.value.code if isinstance(ended.value.code, str) else captured.err)
        return captured.out

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small_config("decoder")))
    return str(path)


def refusal(mend, *arguments):
    with pytest.raises(AssertionError) as refused:
        mend(*arguments)
    return str(refused.value)


def test_tables(mend, config):
    said = mend("--model", config, *SMALL, *HARDWARE)
    assert said.startswith(f"{config}: ")
    assert "9 edited weights, from block 1 of 4 on; 8 tokens, rank 4, batches of 2" in said
    for name in (
        "**serving**, caches of requests aside",
        "**an edit at its peak**",
        "**a training step at its peak**",
        "forward pass",
        "search",
    ):
        assert f"| {name} |" in said


def test_one_object_for_programs(mend, config):
    said = json.loads(
        mend("--model", config, "--dtype", "bfloat16", "--layers", r"3\.mlp", "--json", *SMALL, *HARDWARE)
    )
    assert said["model"]["dtype"] == "bfloat16"
    assert {edited["name"] for edited in said["model"]["edited"]} == {
        f"model.layers.3.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert said["workload"] == {"tokens": 8, "rank": 4, "batch": 2}
    assert said["machine"]["flops"] == {"bfloat16": 1e12, "float32": 1e12, "float64": 1e12}
    assert said["bytes"]["accumulators"] == 4 * said["bytes"]["live"] == 8 * 3 * 32 * 48
    assert said["steps"]["forward pass"]["forward_passes"] == 1
    assert said["measured"] is None


def test_measured(mend, config):
    said = json.loads(
        mend("--model", config, "--measure", "--rounds", "1", "--json", "--dtype", "float32", *SMALL, *HARDWARE)
    )
    assert said["measured"]["seconds"].keys() == said["steps"].keys()


class TestRefused:
    def test_no_such_model(self, mend):
        said = refusal(mend, "--model", "llama-8b")
        assert said.startswith("mend: there is no llama-8b; give a folder")
        assert "llama-7b" in said

    def test_bad_json(self, mend, tmp_path):
        path = tmp_path / "config.json"
        path.write_text("{")
        said = refusal(mend, "--model", str(tmp_path))
        assert said.startswith(f"mend: {path} is not JSON: ")
        assert "\n" not in said

    def test_unknown_architecture(self, mend, tmp_path):
        path = tmp_path / "config.json"
        path.write_text('{"model_type": "new-thing"}')
        assert "transformers does not know the architecture 'new-thing'" in refusal(mend, "--model", str(path))

    def test_an_architecture_without_a_preset(self, mend, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}))
        said = refusal(mend, "--model", str(path))
        assert "no preset of layers for the architecture 'bloom'" in said
        assert "--layers" in said

    @pytest.mark.parametrize("pattern", ["gate_up", "(", "embed_tokens"])
    def test_layers_that_cannot_be_edited(self, mend, config, pattern):
        said = refusal(mend, "--model", config, "--layers", pattern)
        assert said.startswith(f"mend: the layer pattern {pattern!r} ")
        assert "\n" not in said

    def test_more_tokens_than_positions(self, mend, config):
        assert refusal(mend, "--model", config, "--tokens", "65") == (
            f"mend: {config} has 64 positions, fewer than --tokens 65"
        )

    @pytest.mark.parametrize("device", ["abacus", "cuda:99"])
    def test_a_device_that_is_not_there(self, mend, config, device):
        said = refusal(mend, "--model", config, "--device", device)
        assert said.startswith(f"mend: the device {device!r} cannot be used: ")
        assert "\n" not in said

    def test_to_measure_what_does_not_fit(self, mend, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(small_config("decoder", vocab_size=10**12)))
        said = refusal(mend, "--model", str(path), "--measure", *SMALL, *HARDWARE)
        assert "GB at its peak, and cpu has" in said
        assert "leave out --measure" in said

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--tokens", "1"),
            ("--rank", "0"),
            ("--batch", "0"),
            ("--dtype", "int8"),
            ("--flops", "0"),
            ("--rounds", "0"),
        ],
    )
    def test_a_value_that_makes_no_sense(self, mend, config, flag, value):
        assert flag in refusal(mend, "--model", config, flag, value)
