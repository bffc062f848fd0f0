"""A service for the commands that ask one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.running import Live, live_service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_service(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.fixture
def live(service: Live) -> Live:
    """With no edit active. Its revision is not 0."""
    service.clear()
    return service
