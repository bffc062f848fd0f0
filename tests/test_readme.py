"""The README names everything that a user can set, call or be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from editors.targets import MLP_BY_FAMILY
from service.api import batch, generation, metrics, openai, routes
from service.api.problems import STATUS_BY_CODE
from service.settings import Settings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_names_the_setting(name):
    assert f"`MEND_{name.upper()}`" in README


@pytest.mark.parametrize("code", STATUS_BY_CODE)
def test_names_the_error_code(code):
    assert f"`{code}`" in README


ROUTES = [
    f"{method} {route.path}"
    for part in (batch, generation, metrics, openai, routes)
    for route in part.router.routes
    for method in route.methods
]


@pytest.mark.parametrize("route", ROUTES)
def test_names_the_route(route):
    assert route in README


@pytest.mark.parametrize("family", MLP_BY_FAMILY)
def test_names_the_family_with_a_tick_per_tested_property(family):
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"`{family}`" in line]
    assert row.count("✓") == 6
