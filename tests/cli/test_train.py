"""`mend train`: flags that make no sense are refused before anything is loaded."""

from __future__ import annotations

from typer.testing import CliRunner

from editors.mend.variant import VARIANTS
from service.cli.main import app


def refused(*flags: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--data", "none.json", "--out", "nowhere", *flags])


def test_an_unknown_variant_lists_those_there_are():
    assert refused("--variant", "mand").exception.code == f"mend: --variant is 'mand', none of {', '.join(VARIANTS)}"


def test_a_rank_of_nothing_is_a_usage_error():
    ended = refused("--rank", "0")
    assert ended.exit_code == 2
    assert "--rank" in ended.stderr
