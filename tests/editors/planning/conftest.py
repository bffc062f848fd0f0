"""Small shapes of all three kinds, and what is planned for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from editors.planning.plan import Plan, plan
from editors.planning.shapes import Shape, read_shape
from tests.editors.planning.configs import FAMILIES, WORK, small_config

MakeShape = Callable[..., Shape]


@pytest.fixture(scope="session", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_shape(tmp_path_factory: pytest.TempPathFactory) -> MakeShape:
    """A small shape of a kind, read from a file. Its attention is of separate operations on every device."""
    folder: Path = tmp_path_factory.mktemp("shapes")

    def make(kind: str, **changes: object) -> Shape:
        path = folder / "config.json"
        path.write_text(json.dumps(small_config(kind, **changes)))
        shape = read_shape(str(path))
        shape.config._attn_implementation = "eager"
        return shape

    return make


@pytest.fixture(scope="session")
def planned(make_shape: MakeShape, kind: str) -> Plan:
    return plan(make_shape(kind), torch.float32, WORK)
