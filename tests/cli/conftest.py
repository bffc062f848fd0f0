"""A service for the commands that ask one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.cli import client
from tests.cli.running import Live, Mend, live_service, run_mend


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_service(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.fixture
def live(service: Live) -> Live:
    """With no edit active. Its revision is not 0."""
    service.clear()
    return service


@pytest.fixture
def mend(service: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mend:
    """`mend …` for that service, unless it names another."""
    monkeypatch.delenv("MEND_ACTOR", raising=False)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setenv("MEND_SERVICE", service.url)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_mend(monkeypatch, capsys, *arguments)
