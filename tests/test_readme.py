"""The README names everything that a user can set, call or be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.api.problems import STATUS_BY_CODE
from service.api.routes import router
from service.settings import Settings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_names_the_setting(name):
    assert f"`MEND_{name.upper()}`" in README


@pytest.mark.parametrize("code", STATUS_BY_CODE)
def test_names_the_error_code(code):
    assert f"`{code}`" in README


@pytest.mark.parametrize("route", [f"{method} {route.path}" for route in router.routes for method in route.methods])
def test_names_the_route(route):
    assert route in README
