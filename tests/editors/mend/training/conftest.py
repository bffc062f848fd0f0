"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest

from editors.base_model import BaseModel
from tests.small import small_base


@pytest.fixture(scope="package")
def linear() -> BaseModel:
    """A random model, which no run changes."""
    return small_base()
