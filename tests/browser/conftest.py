"""The dashboard in a real Chromium: the real model behind a real server, on a Redis that a test may take away.

Needs Debian's `chromium`, or another one that MEND_CHROMIUM names; without one these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.api.test_keys import made, write
from tests.e2e.server import serving
from tests.ledger.servers import Server as RedisServer

CHROMIUM = os.environ.get("MEND_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENS = Path(os.environ.get("MEND_SCREENSHOTS", "results/dashboard"))
WIDE, NARROW = (1280, 900), (380, 820)
PATIENCE_MS = 20_000
"""For what a model has to answer, on a machine that does other things as well."""


@dataclass(frozen=True)
class Dashboard:
    """url: of the service. keys: a token of each scope. client: holds the key of scope admin."""

    url: str
    keys: dict[str, str]
    client: httpx.Client
    redis: RedisServer

    def edit(self, prompt: str, correction: str, **fields: object) -> dict:
        answer = self.client.post("/edits", json={"prompt": prompt, "correction": correction, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium), and MEND_CHROMIUM names none")
    folder = tmp_path_factory.mktemp("dashboard")
    pairs = {scope: made(name, scope) for scope, name in (("read", "rita"), ("edit", "edna"), ("admin", "ada"))}
    write(folder / "keys.json", *(key for _, key in pairs.values()))
    keys = {scope: token for scope, (token, _) in pairs.items()}
    (folder / "guard.txt").write_text("The capital of Italy is\nTwo and two make\nWater boils at a temperature of\n")
    with RedisServer() as redis:
        settings = {
            "MEND_API_KEYS": str(folder / "keys.json"),
            "MEND_REDIS_URL": f"unix://{redis.path}",
            "MEND_AUDIT_EVERY_S": "0",
            "MEND_GUARD_PROMPTS": str(folder / "guard.txt"),  # few, and short answers, since there are many edits
            "MEND_ANSWER_TOKENS": "8",
            "OMP_NUM_THREADS": "1",
        }
        with serving(folder / "data", folder / "log", **settings) as server:
            server.client.headers["Authorization"] = f"Bearer {keys['admin']}"
            yield Dashboard(str(server.client.base_url).rstrip("/"), keys, server.client, redis)


@pytest.fixture(scope="session")
def chromium(dashboard: Dashboard) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: Browser, dashboard: Dashboard) -> Iterator[Callable[..., Page]]:
    """Another browser of its own, signed in with the key of a scope. No script may fail in it, and none be refused."""
    contexts, wrong = [], []

    def window(
        scope: str | None = "admin", size: tuple[int, int] = WIDE, theme: str = "light", scripts: bool = True
    ) -> Page:
        context = chromium.new_context(
            base_url=dashboard.url,
            viewport={"width": size[0], "height": size[1]},
            color_scheme=theme,
            java_script_enabled=scripts,
            reduced_motion="reduce",
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        if scope is not None:
            sign_in(page, dashboard.keys[scope])
        return page

    yield window
    for context in contexts:
        context.close()
    assert wrong == []


def sign_in(page: Page, key: str) -> None:
    page.goto("/ui/sign-in")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/")


@pytest.fixture
def clean(dashboard: Dashboard) -> Dashboard:
    """The dashboard of a service without an active edit. Its revision is not 0."""
    answer = dashboard.client.post("/rollback", json={"revision": 0})
    assert answer.status_code == 200, answer.text
    return dashboard
