"""Small models that services of these tests serve, each written once."""

from __future__ import annotations

import pytest

from tests.faults.check import Model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """One whose edits are summed, and one whose edits are joined by least squares."""
    folder = tmp_path_factory.mktemp("models")
    return Model.write(folder / "summed"), Model.write(folder / "keyed", keyed=True)
