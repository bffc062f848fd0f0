"""How pages look, for everybody: accessibility, width, themes; and that nothing that is shown can become a page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import NARROW, PATIENCE_MS, SCREENS, WIDE, Dashboard
from tests.browser.test_walk import CORRECTION, OTHER_CORRECTION, OTHER_PROMPT, PROMPT, preview

Window = Callable[..., Page]
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]
expect.set_options(timeout=PATIENCE_MS)

HARM = "\"'{{ 7 * 7 }}</textarea><script>harmed=1</script><img src=x onerror=harmed=1>"
"""For every place that text of others could break out of: elements, fields, attributes, templates."""


@pytest.fixture
def full(clean: Dashboard) -> dict[str, str]:
    """Every page, with something on it, by name."""
    edit = clean.edit(
        PROMPT, CORRECTION, paraphrases=["The UK Prime Minister is"], keep=["The capital of Germany is"],
        reason="general election",
    )  # fmt: skip
    other = clean.edit(OTHER_PROMPT, OTHER_CORRECTION, reason="she took over")
    clean.client.delete(f"/edits/{other['id']}", params={"reason": "she did not"})
    clean.client.get("/edits/audit", params={"fresh": "true"})
    return {
        "ledger": "/",
        "nothing-found": "/?q=nothing+of+the+kind",
        "new": "/ui/new",
        "edit": f"/ui/edits/{edit['id']}",
        "rolled-back": f"/ui/edits/{other['id']}",
        "rollback": f"/ui/rollback?edit={edit['id']}",
        "revision": f"/ui/rollback?revision={other['revision']}",
        "health": "/ui/health",
        "playground": "/ui/playground",
        "problem": "/ui/edits/edit_of_nobody",
        "sign-in": "/ui/sign-in",
    }


def test_pages_are_accessible_and_fit_at_both_widths_in_both_themes(full: dict[str, str], window: Window):
    page = window("admin")
    SCREENS.mkdir(parents=True, exist_ok=True)

    def look(name: str) -> None:
        for width, height in (NARROW, WIDE):
            page.set_viewport_size({"width": width, "height": height})
            for theme in ("dark", "light"):
                page.emulate_media(color_scheme=theme)
                page.screenshot(path=SCREENS / f"{name}-{theme}-{width}.png", full_page=True)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
                found = Axe().run(page).response["violations"]
                grave = [each for each in found if each["impact"] in ("serious", "critical")]
                assert not grave, (name, [(each["id"], [node["html"] for node in each["nodes"]]) for each in grave])

    for name, path in full.items():
        page.goto(path)
        if name != "sign-in":
            expect(page.locator("#ready-text")).to_have_text("ready")
        look(name)
    preview(page, OTHER_PROMPT, OTHER_CORRECTION)
    expect(page.get_by_role("button", name="Make this edit live")).to_be_visible()
    look("preview")
    page.goto("/ui/playground")
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#said-live ins").first).to_be_visible()
    look("generated")
    page.goto("/")
    page.keyboard.press("?")
    look("keys")


def test_what_is_shown_stays_text(clean: Dashboard, window: Window):
    answer = clean.client.post(
        "/edits",
        json={
            "prompt": f"{HARM} The Prime Minister of the United Kingdom is",
            "correction": HARM,
            "paraphrases": [HARM],
            "keep": [HARM],
            "reason": HARM,
            "metadata": {HARM: HARM},
        },
        headers={"X-Actor": HARM},
        params={"allow_loss": "true"},
    )
    assert answer.status_code == 201, answer.text
    edit = answer.json()
    page = window("admin")
    pages = ["/", f"/ui/edits/{edit['id']}", f"/ui/rollback?edit={edit['id']}", "/ui/health"]
    for path in [*pages, f"/?q={HARM}&actor={HARM}&status=", f"/ui/new?prompt={HARM}&correction={HARM}"]:
        page.goto(path)
        expect(page.locator("#ready-text")).to_have_text("ready")
        assert page.evaluate("window.harmed") is None, path
        assert page.locator("main img, main script, main svg[onload]").count() == 0, path
    page.goto(f"/ui/edits/{edit['id']}")
    for place in ("h1", ".history", ".command", ".facts"):
        assert HARM in " ".join(page.locator(place).all_text_contents()), place

    # What the model says, and streams.
    page.goto("/ui/playground")
    page.get_by_label("Prompt").fill(edit["prompt"])
    page.get_by_label("Most tokens").fill("64")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#answers")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#said-live")).to_contain_text(HARM.strip())
    assert page.evaluate("window.harmed") is None

    # What somebody types.
    preview(page, f"{HARM} again", HARM)
    expect(page.locator("#preview, .problem").first).to_be_visible()
    assert page.evaluate("window.harmed") is None


def test_scripts_of_others_would_not_run(chromium: Browser, dashboard: Dashboard):
    """Whatever came through the escaping all the same."""
    page = chromium.new_page(base_url=dashboard.url)
    refused = []
    page.on("console", lambda said: refused.append(said.text))
    page.goto("/ui/sign-in")
    page.evaluate(
        """() => { document.body.insertAdjacentHTML('beforeend', '<p id="put" onclick="window.harmed = 1">x</p>');
        const script = document.createElement('script');
        script.textContent = 'window.harmed = 1';
        document.body.append(script); }"""
    )
    page.locator("#put").click()
    assert page.evaluate("window.harmed") is None
    assert any("Content Security Policy" in said for said in refused)
    page.close()
