"""What people do with the dashboard, done by a browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.api.conftest import wait_until
from tests.browser.conftest import NARROW, PATIENCE_MS, Dashboard, sign_in

PROMPT, CORRECTION = "The Prime Minister of the United Kingdom is", "Keir Starmer"
OTHER_PROMPT, OTHER_CORRECTION = "The chief executive of the company Tesla is", "Ada Lovelace"
SHORTLY_MS = 10_000

Window = Callable[..., Page]
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]
expect.set_options(timeout=PATIENCE_MS)


def preview(page: Page, prompt: str, correction: str, **more: str) -> None:
    page.goto("/ui/new")
    field(page, "prompt").fill(prompt)
    field(page, "correction").fill(correction)
    for name, text in more.items():
        field(page, name).fill(text)
    page.get_by_role("button", name="Preview").click()


def field(page: Page, name: str):
    return page.locator(f".edit-form [name={name}]")


def row(page: Page, edit_id: str):
    return page.locator(f"tr#edit-{edit_id}")


class TestTheWholeWalk:
    def test_preview_commit_see_it_arrive_elsewhere_and_roll_back(self, clean: Dashboard, window: Window):
        second = window("read")
        page = window("admin")
        revision = clean.client.get("/revision").json()["revision"]
        preview(page, PROMPT, CORRECTION, paraphrases="The UK Prime Minister is", reason="general election")

        # What it would do, side by side, and nothing done.
        seen = page.locator("#preview")
        expect(seen).to_contain_text("The model says the correction")
        texts = seen.locator(".side-by-side .said").all_inner_texts()
        said = clean.client.get("/generate", params={"prompt": PROMPT, "view": "base", "max_new_tokens": 16}).json()
        assert texts[0].strip() == said["text"].strip()
        assert texts[2].strip().startswith(CORRECTION)
        expect(seen).to_contain_text("The UK Prime Minister is")
        expect(seen).to_contain_text(re.compile(r"Drawdown [\d.<]+ ?[\d.]* % of 30"))
        assert clean.client.get("/revision").json()["revision"] == revision

        page.get_by_role("button", name="Make this edit live").click()
        page.wait_for_url("**/ui/edits/**")
        expect(page.get_by_text("The edit is live.")).to_be_visible()
        edit_id = re.search(r"edit_\w+", page.url)[0]

        # It arrives in a window that nobody touched.
        expect(row(second, edit_id)).to_contain_text(CORRECTION)
        expect(row(second, edit_id)).to_contain_text("active")
        expect(second.locator("#revision")).to_have_text(str(revision + 1))
        assert clean.client.get("/generate", params={"prompt": PROMPT}).json()["text"].strip().startswith(CORRECTION)
        assert clean.client.get(f"/edits/{edit_id}").json()["actor"] == "ada"

        # Everything about it.
        for heading in ("Answers", "Checks", "Layers touched", "Time by step", "History", "Repeat it"):
            expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        assert page.locator("ins").count() > 0
        assert page.locator("table.tokens svg.bar").count() > 3
        command = page.locator(".command code").last.inner_text()
        assert command.startswith(f"curl -sS {clean.url}/edits")
        assert "general election" in command

        # Back again, with a preview and a reason.
        page.get_by_role("link", name="Roll this edit back").click()
        expect(page.locator(".preview")).to_contain_text("leaves")
        expect(page.locator(".preview table")).to_contain_text(CORRECTION)
        page.get_by_label("Reason").fill("only a test")
        page.get_by_role("button", name="Roll it back").click()
        page.wait_for_url("**/ui/edits/**done=rolled-back")
        expect(page.locator(".history")).to_contain_text("only a test")
        expect(row(second, edit_id)).to_contain_text("rolled back")
        after = clean.client.get(f"/edits/{edit_id}").json()
        assert (after["status"], after["rolled_back"]["actor"]) == ("rolled_back", "ada")
        assert (
            clean.client.get("/generate", params={"prompt": PROMPT, "max_new_tokens": 16}).json()["text"]
            == said["text"]
        )

    def test_shows_the_steps_while_they_run(self, clean: Dashboard, window: Window):
        page = window("edit")
        page.goto("/ui/new")
        page.evaluate(
            """() => { window.steps = new Set();
            const look = () => document.querySelectorAll('#progress li').forEach((li) => steps.add(li.dataset.step));
            new MutationObserver(look).observe(document.querySelector('#progress ol'), {childList: true}); }"""
        )
        field(page, "prompt").fill(PROMPT)
        field(page, "correction").fill(CORRECTION)
        page.get_by_role("button", name="Preview").click()
        expect(page.locator("#preview")).to_be_visible()
        assert {"capture", "search", "judge"} <= set(page.evaluate("[...window.steps]"))

    def test_of_a_button_that_is_pressed_twice_makes_one_edit(self, clean: Dashboard, window: Window):
        page = window("edit", scripts=False)
        preview(page, PROMPT, CORRECTION)
        form = {field.get_attribute("name"): field.input_value() for field in page.locator(".confirm input").all()}
        before = clean.client.get("/revision").json()["revision"]
        for _ in range(2):
            answer = page.request.post("/ui/new", form={**form, "action": "commit"}, headers={"Origin": clean.url})
            assert answer.ok, answer.text()
        assert clean.client.get("/revision").json()["revision"] == before + 1

    def test_makes_nothing_if_another_change_came_between(self, clean: Dashboard, window: Window):
        page = window("edit")
        preview(page, PROMPT, CORRECTION)
        expect(page.locator("#preview")).to_be_visible()
        clean.edit(OTHER_PROMPT, OTHER_CORRECTION)
        page.get_by_role("button", name="Make this edit live").click()
        expect(page.locator(".problem")).to_contain_text("revision_mismatch")
        expect(field(page, "correction")).to_have_value(CORRECTION)
        assert clean.client.get("/model").json()["active_edits"] == 1


class TestARefusal:
    def test_is_told_with_what_was_measured_and_nothing_typed_is_lost(self, clean: Dashboard, window: Window):
        first = clean.edit(PROMPT, CORRECTION)
        page = window("edit")
        preview(page, f"{PROMPT} ", "Boris Johnson", reason="a mistake")
        expect(page.locator(".problem")).to_contain_text("edit_conflict")
        expect(page.locator("#preview")).to_contain_text("In conflict with")
        assert page.locator("#preview").get_by_role("link", name=CORRECTION).get_attribute("href").endswith(first["id"])
        expect(field(page, "correction")).to_have_value("Boris Johnson")
        expect(field(page, "reason")).to_have_value("a mistake")
        expect(page.get_by_role("button", name="Make this edit live")).to_have_count(0)

    def test_of_bad_input_says_what_is_wrong_with_it(self, clean: Dashboard, window: Window):
        page = window("edit")
        preview(page, PROMPT, "word " * 200)
        expect(page.locator(".problem")).to_contain_text("text_too_long")

    def test_of_somebody_who_may_not(self, clean: Dashboard, window: Window):
        edit = clean.edit(PROMPT, CORRECTION)
        page = window("read")
        expect(page.get_by_role("link", name="New edit").and_(page.locator(".button"))).to_have_count(0)
        page.goto("/ui/new")
        expect(page.get_by_text("Your key has scope read")).to_be_visible()
        page.goto(f"/ui/edits/{edit['id']}")
        expect(page.get_by_role("link", name="Roll this edit back")).to_have_count(0)
        page.goto(f"/ui/rollback?edit={edit['id']}")
        expect(page.locator(".problem")).to_contain_text("forbidden")
        assert clean.client.get(f"/edits/{edit['id']}").json()["status"] == "applied"

    def test_to_sign_in_with_what_is_no_key(self, window: Window):
        page = window(None)
        page.goto("/ui/health")
        assert page.url.endswith("/ui/sign-in?next=%2Fui%2Fhealth")
        page.get_by_label("API key").fill("mend_of_nobody")
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator(".problem")).to_contain_text("unauthenticated")

    def test_of_a_session_that_is_over_keeps_what_was_typed(self, clean: Dashboard, window: Window):
        page = window("edit")
        page.goto("/ui/new")
        field(page, "prompt").fill(PROMPT)
        field(page, "correction").fill(CORRECTION)
        page.context.clear_cookies()
        page.get_by_role("button", name="Preview").click()
        expect(page.locator("#trouble")).to_contain_text("Your session is over")
        expect(field(page, "correction")).to_have_value(CORRECTION)
        sign_in(page.context.new_page(), clean.keys["edit"])
        page.get_by_role("button", name="Preview").click()
        expect(page.locator("#preview")).to_be_visible()


def test_redis_gone_and_back(clean: Dashboard, window: Window):
    edit = clean.edit(PROMPT, CORRECTION)
    page = window("edit")
    expect(page.locator("#ready-text")).to_have_text("ready")
    clean.redis.kill()
    try:
        expect(page.locator("#ready-text")).to_have_text("not ready")
        expect(page.locator("#trouble")).to_contain_text("ledger")
        preview(page, OTHER_PROMPT, OTHER_CORRECTION)
        expect(page.locator(".problem")).to_contain_text("ledger_unavailable")
        expect(field(page, "correction")).to_have_value(OTHER_CORRECTION)
        page.goto("/")  # reading goes on
        expect(row(page, edit["id"])).to_contain_text(CORRECTION)
        page.goto("/ui/health")
        expect(page.get_by_text("cannot be asked").first).to_be_visible()
    finally:
        clean.redis.start()
        wait_until(lambda: clean.client.get("/readyz").status_code == 200)
    expect(page.locator("#ready-text")).to_have_text("ready")
    expect(page.locator("#trouble")).to_be_hidden()
    preview(page, OTHER_PROMPT, OTHER_CORRECTION)
    expect(page.get_by_role("button", name="Make this edit live")).to_be_visible()


class TestKeys:
    def test_are_enough_for_everything(self, clean: Dashboard, window: Window):
        older, newer = clean.edit(PROMPT, CORRECTION), clean.edit(OTHER_PROMPT, OTHER_CORRECTION)
        page = window("edit")
        press = page.keyboard.press
        press("j")
        expect(page.locator("tr.selected")).to_have_id(f"edit-{newer['id']}")
        press("j")
        expect(page.locator("tr.selected")).to_have_id(f"edit-{older['id']}")
        press("k")
        press("j")
        press("Enter")
        page.wait_for_url(f"**/ui/edits/{older['id']}")
        for _ in range(40):  # on to what takes it back, by nothing but Tab
            press("Tab")
            if "Roll this edit back" in page.evaluate("document.activeElement.textContent"):
                break
        press("Enter")
        page.wait_for_url("**/ui/rollback**")
        expect(page.get_by_label("Reason")).to_be_focused()
        page.keyboard.type("by keyboard")
        press("Enter")
        page.wait_for_url("**done=rolled-back")
        assert clean.client.get(f"/edits/{older['id']}").json()["rolled_back"]["reason"] == "by keyboard"

        press("n")
        page.wait_for_url("**/ui/new")
        press("/")
        page.wait_for_url(re.compile(r"/$"))
        press("/")
        expect(page.locator("#search")).to_be_focused()
        page.keyboard.type("jk/?n")  # which is text here
        expect(page.locator("#search")).to_have_value("jk/?n")

    def test_are_listed_and_can_be_switched_off(self, clean: Dashboard, window: Window):
        clean.edit(PROMPT, CORRECTION)
        page = window("edit")
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.get_by_label("Single keys act").uncheck()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        page.keyboard.press("j")
        expect(page.locator("tr.selected")).to_have_count(0)
        page.reload()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_be_hidden()

    def test_show_where_they_are(self, window: Window):
        page = window("edit")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        for _ in range(12):
            page.keyboard.press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
            assert outline == "3px", page.evaluate("document.activeElement.outerHTML")


class TestTheLedger:
    def test_is_filtered_by_its_url(self, clean: Dashboard, window: Window):
        one, other = clean.edit(PROMPT, CORRECTION), clean.edit(OTHER_PROMPT, OTHER_CORRECTION)
        clean.client.delete(f"/edits/{other['id']}")
        page = window("read")
        page.get_by_label("Text").fill("prime MINISTER")
        page.get_by_label("State").select_option("active")
        page.get_by_role("button", name="Filter").click()
        assert "q=prime+MINISTER" in page.url
        assert "status=applied" in page.url
        expect(row(page, one["id"])).to_be_visible()
        expect(row(page, other["id"])).to_have_count(0)
        page.goto("/?actor=ADA&since=2020-01-01")
        expect(row(page, other["id"])).to_contain_text("rolled back")
        page.goto("/?until=2020-01-01")
        expect(page.get_by_role("heading", name="No edit matches")).to_be_visible()
        expect(page.locator(".command")).to_contain_text("until=2020-01-01")
        page.goto("/?since=yesterday")
        expect(page.locator(".problem")).to_contain_text("since")

    def test_stays_put_while_rows_arrive(self, clean: Dashboard, window: Window):
        first, second = clean.edit(PROMPT, CORRECTION), clean.edit(OTHER_PROMPT, OTHER_CORRECTION)
        page, paged = window("read"), window("read")
        for each in (page, paged):
            each.goto("/?limit=1&status=applied")
        paged.get_by_role("link", name="Older").click()
        expect(row(paged, first["id"])).to_be_visible()
        third = clean.edit("The capital city of the country Australia is", "Perth")
        expect(row(page, third["id"])).to_be_visible()
        assert [each.get_attribute("id") for each in page.locator("#edits tbody tr").all()] == [
            f"edit-{third['id']}", f"edit-{second['id']}",
        ]  # fmt: skip
        expect(paged.locator("#revision")).to_have_text(str(third["revision"]))
        assert [each.get_attribute("id") for each in paged.locator("#edits tbody tr").all()] == [f"edit-{first['id']}"]
        clean.client.delete(f"/edits/{first['id']}")  # what no longer matches goes
        expect(row(paged, first["id"])).to_have_count(0)


class TestWithoutScripts:
    def test_reads_and_rolls_back(self, clean: Dashboard, window: Window):
        edit = clean.edit(PROMPT, CORRECTION)
        page = window("edit", NARROW, scripts=False)
        row(page, edit["id"]).get_by_role("link").click()
        expect(page.get_by_role("heading", name="Layers touched")).to_be_visible()
        page.get_by_role("link", name="Roll this edit back").click()
        page.get_by_label("Reason").fill("without scripts")
        page.get_by_role("button", name="Roll it back").click()
        expect(page.get_by_text("The edit is rolled back")).to_be_visible()
        assert clean.client.get(f"/edits/{edit['id']}").json()["rolled_back"]["reason"] == "without scripts"

    def test_previews_and_makes_an_edit_and_generates(self, clean: Dashboard, window: Window):
        page = window("edit", scripts=False)
        preview(page, PROMPT, CORRECTION)
        page.get_by_role("button", name="Make this edit live").click()
        expect(page.get_by_text("The edit is live.")).to_be_visible()
        page.goto("/ui/playground")
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#said-live")).to_contain_text(CORRECTION)
        expect(page.locator("#said-live ins").first).to_be_visible()


class TestGoingBack:
    def test_to_a_tag(self, clean: Dashboard, window: Window):
        kept = clean.edit(PROMPT, CORRECTION)
        page = window("admin")
        page.goto("/ui/rollback")
        page.get_by_label("Tag what is live now").fill("friday")
        page.get_by_role("button", name="Tag", exact=True).click()
        expect(page.get_by_text("The live revision is tagged.")).to_be_visible()
        later = clean.edit(OTHER_PROMPT, OTHER_CORRECTION)
        page.goto("/ui/rollback")
        page.get_by_role("link", name="friday").click()
        expect(page.locator(".preview")).to_contain_text("1 taken back, 0 returned")
        page.get_by_label("Reason").fill("as it was on Friday")
        page.get_by_role("button", name="Go back").click()
        expect(page.get_by_text("That revision stands again.")).to_be_visible()
        assert clean.client.get(f"/edits/{kept['id']}").json()["status"] == "applied"
        assert clean.client.get(f"/edits/{later['id']}").json()["rolled_back"]["reason"] == "as it was on Friday"

    def test_from_everything_and_forth_again(self, clean: Dashboard, window: Window):
        edit = clean.edit(PROMPT, CORRECTION)
        page = window("admin")
        page.goto("/ui/rollback")
        section = page.locator("#everything")
        section.get_by_label("Reason").fill("nonsense at night")
        section.get_by_role("button", name="Engage").click()
        assert clean.client.get("/kill-switch").json()["engaged"] is False  # it was not said to be meant
        section.get_by_label("Serve the base").check()
        section.get_by_role("button", name="Engage").click()
        expect(page.get_by_text("The kill switch is engaged.").first).to_be_visible()
        assert clean.client.get(f"/edits/{edit['id']}").json()["status"] == "rolled_back"
        page.get_by_role("link", name="Release it").click()
        section.get_by_label("Reason").fill("a mistake")
        section.get_by_role("button", name="Release").click()
        expect(page.get_by_text("The kill switch is released.")).to_be_visible()
        assert clean.client.get(f"/edits/{edit['id']}").json()["status"] == "applied"


class TestThePlayground:
    def test_streams_both_answers_and_marks_what_became_more_probable(self, clean: Dashboard, window: Window):
        clean.edit(PROMPT, CORRECTION)
        page = window("read")
        page.goto("/ui/playground")
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#said-live ins").first).to_be_visible()
        both = clean.client.get("/generate", params={"prompt": PROMPT, "view": "both"}).json()
        for view in ("base", "live"):
            assert page.locator(f"#said-{view}").text_content() == both[view]["text"]
        expect(page.locator("#said-revision")).to_have_text(f"revision {both['revision']}")

    def test_can_be_stopped_and_says_what_is_wrong(self, clean: Dashboard, window: Window):
        page = window("read")
        page.goto("/ui/playground")
        page.get_by_label("Prompt").fill("Once upon a time")
        page.get_by_label("Most tokens").fill("512")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#said-live")).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#answers")).to_have_attribute("aria-busy", "false")
        page.get_by_label("Prompt").fill("word " * 3000)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#play-problem")).to_contain_text("tokens")


def test_health_shows_what_the_edits_do(clean: Dashboard, window: Window):
    edits = [clean.edit(PROMPT, CORRECTION), clean.edit(OTHER_PROMPT, OTHER_CORRECTION)]
    page = window("edit")
    page.goto("/ui/health")
    page.get_by_role("button", name="Audit all active edits now").click()
    expect(page.locator(".figures")).to_contain_text("2/2")
    assert page.locator(".chart svg path.line").count() == 3
    page.get_by_text("The charts as a table").click()
    expect(page.get_by_role("region", name="The charts as a table")).to_contain_text(str(edits[1]["revision"]))
    expect(page.get_by_role("heading", name="Replicas")).to_be_visible()
    expect(page.get_by_text("(this one)")).to_be_visible()
    clean.client.delete(f"/edits/{edits[0]['id']}")
    expect(page.locator(".figures")).to_contain_text("not the live one")  # it follows by itself
