"""What Prometheus is told: every outcome and every step once, under few labels, of this application alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import anyio.to_thread
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.app import VERSION, create_app
from service.engine.errors import EditRefused
from service.failpoints import arm
from service.settings import Settings
from service.telemetry import EDITS, ROLLBACKS
from tests.api.answers import assert_problem
from tests.api.conftest import ADDRESS, engine_of, wait_until
from tests.api.test_problems import subclasses
from tests.service_fixtures import never_takes

BEFORE = ("wait", "catch_up", "before", "capture", "propose", "search", "stage", "judge")
WALK = (*BEFORE, "commit", "publish")
REFUSED = {"prompt": never_takes().prompt, "correction": never_takes().correction}


def figures(client: TestClient) -> Counter[tuple[str, ...]]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return Counter(
        {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    )


class Told:
    """What has been told since it was begun."""

    def __init__(self, client: TestClient) -> None:
        self._client, self._before = client, figures(client)

    def all(self) -> dict[tuple[str, ...], float]:
        after = figures(self._client)
        return {key: value - self._before[key] for key, value in after.items() if value != self._before[key]}

    def of(self, *name: str) -> dict[str, float]:
        """By its last label, where those before are given."""
        return {key[-1]: value for key, value in self.all().items() if key[:-1] == name}


@pytest.fixture
def told(client) -> Told:
    return Told(client)


class TestEdits:
    def test_that_is_made(self, client, bodies, told):
        client.post("/edits", json=bodies[0])
        assert told.of("mend_edits_total") == {"applied": 1}
        assert told.all()["mend_edit_seconds_count",] == 1
        assert told.of("mend_step_seconds_count") == dict.fromkeys(WALK, 1)
        assert 0 < sum(told.of("mend_step_seconds_sum").values()) <= told.all()["mend_edit_seconds_sum",]

    def test_that_is_true_already(self, client, bodies, told):
        client.post("/edits", json=bodies[0])
        client.post("/edits", json=bodies[0])
        assert told.of("mend_edits_total") == {"applied": 1, "unchanged": 1}

    def test_that_is_only_tried(self, client, bodies, told):
        client.post("/edits?dry_run=true", json=bodies[0])
        assert told.of("mend_edits_total") == {"dry_run": 1}
        assert told.of("mend_step_seconds_count") == dict.fromkeys(BEFORE, 1)

    def test_that_is_asked_for_again(self, client, bodies, told):
        for _ in range(2):
            client.post("/edits", json=bodies[0], headers={"Idempotency-Key": "metrics"})
        assert told.of("mend_edits_total") == {"applied": 1, "replayed": 1}

    def test_that_is_refused_by_its_code_with_its_steps(self, client, told):
        assert_problem(client.post("/edits", json=REFUSED), "did_not_take")
        assert told.of("mend_edits_total") == {"did_not_take": 1}
        steps = told.of("mend_step_seconds_count")
        assert set(BEFORE) >= set(steps) >= {"before", "capture", "propose", "search"}
        assert told.of("mend_problems_total") == {"did_not_take": 1}
        assert told.all()["mend_edit_seconds_count",] == 1

    def test_that_is_too_long_for_the_engine(self, client, told):
        assert_problem(client.post("/edits", json={"prompt": "a " * 400, "correction": "b"}), "text_too_long")
        assert told.of("mend_edits_total") == {"text_too_long": 1}

    def test_that_fails_on_the_way_with_the_step_that_failed(self, client, bodies, told):
        arm("append=error")
        try:
            assert_problem(client.post("/edits", json=bodies[0]), "internal_error")
        finally:
            arm("")
        assert told.of("mend_edits_total") == {"internal_error": 1}
        assert told.of("mend_step_seconds_count") == dict.fromkeys((*BEFORE, "commit"), 1)

    def test_that_never_came_to_the_engine_is_a_problem_alone(self, client, told):
        assert_problem(client.post("/edits", json={"prompt": "a"}), "invalid_request")
        assert told.of("mend_edits_total") == {}
        assert told.of("mend_problems_total") == {"invalid_request": 1}

    def test_outcomes_are_told_before_there_are_any(self):
        with_nothing = figures(TestClient(create_app(Settings()), ADDRESS))
        codes = {kind.code for kind in subclasses(EditRefused)} - {"edit_refused", "batch_refused"}
        assert codes <= set(EDITS)
        assert {key[1] for key in with_nothing if key[0] == "mend_edits_total"} == set(EDITS)
        assert {key[1:] for key in with_nothing if key[0] == "mend_rollbacks_total"} == {
            (kind, "done") for kind in ROLLBACKS
        }


class TestBatches:
    def test_count_every_edit(self, client, bodies, told):
        edits = [*bodies[:2], REFUSED]
        answer = client.post("/edits/batch?partial=true&allow_loss=true", json={"edits": edits}).json()
        statuses = Counter(edit.get("code") or edit["status"] for edit in answer["edits"])
        assert statuses == {"applied": 2, "duplicate_prompt": 1}
        assert told.of("mend_edits_total") == statuses
        assert told.all()["mend_batch_seconds_count",] == 1
        steps = told.of("mend_step_seconds_count")
        assert set(steps) >= set(WALK) - {"search"} | {"place"}
        assert steps["commit"] == steps["publish"] == 1

    def test_that_are_refused_count_every_edit_by_what_was_wrong(self, client, bodies, told):
        assert_problem(client.post("/edits/batch", json={"edits": [bodies[0], bodies[0]]}), "batch_refused")
        assert told.of("mend_edits_total") == {"batch_refused": 1, "duplicate_prompt": 1}

    def test_that_are_asked_for_again(self, client, bodies, told):
        for _ in range(2):
            body = {"edits": [bodies[0]]}
            client.post("/edits/batch", json=body, headers={"Idempotency-Key": "metrics of a batch"})
        assert told.of("mend_edits_total") == {"applied": 1, "replayed": 1}

    def test_of_too_many(self, client, bodies, told, monkeypatch):
        engine = engine_of(client)
        monkeypatch.setattr(engine, "limits", replace(engine.limits, batch_edits=1))
        assert_problem(client.post("/edits/batch", json={"edits": bodies[:2]}), "batch_too_large")
        assert told.of("mend_edits_total") == {"batch_too_large": 2}


class TestRollbacks:
    def test_by_what_became_of_them(self, client, bodies):
        edit = client.post("/edits", json=bodies[0]).json()["id"]
        told = Told(client)
        client.delete(f"/edits/{edit}?dry_run=true")
        for _ in range(2):
            client.delete(f"/edits/{edit}", headers={"Idempotency-Key": "metrics of a rollback"})
        assert_problem(client.delete(f"/edits/{edit}"), "already_rolled_back")
        assert_problem(client.delete("/edits/nothing"), "edit_not_found")
        outcomes = {"dry_run": 1, "done": 1, "replayed": 1, "already_rolled_back": 1, "edit_not_found": 1}
        assert told.of("mend_rollbacks_total", "rollback") == outcomes
        assert told.of("mend_edits_total") == {}
        assert told.all()["mend_rollback_seconds_count",] == 5
        steps = {"wait": 5, "catch_up": 5, "stage": 2, "preview": 1, "commit": 1, "publish": 1}
        assert told.of("mend_step_seconds_count") == steps

    def test_to_a_revision(self, client, bodies):
        before = client.get("/revision").json()["revision"]
        client.post("/edits", json=bodies[0])
        told = Told(client)
        for _ in range(2):
            assert client.post("/rollback", json={"revision": before}).status_code == 200
        assert_problem(client.post("/rollback", json={"tag": "nothing"}), "tag_not_found")
        assert told.of("mend_rollbacks_total", "restore") == {"done": 1, "unchanged": 1, "tag_not_found": 1}

    def test_by_the_kill_switch_which_is_told_while_it_is_engaged(self, client, bodies, told):
        for _ in range(2):
            client.put("/kill-switch")
        assert figures(client)["mend_kill_switch_engaged",] == 1
        assert_problem(client.post("/edits", json=bodies[0]), "kill_switch_engaged")
        client.delete("/kill-switch")
        assert figures(client)["mend_kill_switch_engaged",] == 0
        assert told.of("mend_rollbacks_total", "kill") == {"done": 1, "unchanged": 1}
        assert told.of("mend_rollbacks_total", "revive") == {"done": 1}
        assert told.of("mend_edits_total") == {"kill_switch_engaged": 1}

    def test_of_what_has_expired(self, client, bodies, told):
        soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        assert client.post("/edits", json={**bodies[0], "expires_at": soon}).status_code == 201
        wait_until(lambda: told.of("mend_rollbacks_total", "expire") == {"done": 1})

    def test_tags_take_nothing_back(self, client, told):
        client.put("/tags/metrics")
        client.delete("/tags/metrics")
        assert not [key for key in told.all() if key[0] in ("mend_rollbacks_total", "mend_rollback_seconds_count")]


class TestState:
    def test_drawdown_is_that_of_the_newest_edit_that_is_live(self, client, bodies):
        assert figures(client)["mend_drawdown_ratio",] == 0
        made = [client.post("/edits?allow_loss=true", json=body).json() for body in bodies[:2]]
        for edit in reversed(made):
            assert figures(client)["mend_drawdown_ratio",] == edit["checks"]["drawdown"]
            client.delete(f"/edits/{edit['id']}")
        assert figures(client)["mend_drawdown_ratio",] == 0
        assert figures(client)["mend_drawdown_budget_ratio",] == 1.0

    def test_says_what_is_loaded(self, client):
        told = figures(client)
        model = client.get("/model").json()
        assert told["mend_build_info", VERSION] == 1
        (info,) = [key for key in told if key[0] == "mend_model_info"]
        assert {model["base_model"]["digest"], model["editor"]["digest"], "float32", "cpu"} < set(info)
        assert told["process_resident_memory_bytes",] > 0

    def test_says_what_is_wrong(self, folders, tmp_path):
        told = figures(
            TestClient(create_app(Settings(**folders.settings(tmp_path))), ADDRESS)
        )  # nothing is ever loaded
        assert told["mend_ready",] == 0
        assert {key[1]: value for key, value in told.items() if key[0] == "mend_check_ok"} == {
            "model": 0, "ledger": 0, "durability": 0, "state": 1,
        }  # fmt: skip


class TestAtTheMoment:
    @pytest.fixture
    def changing(self, client):
        """A change that is under way for as long as the test wants."""

        @contextmanager
        def changing() -> Iterator[None]:
            go_on, begun = threading.Event(), threading.Event()

            def hold() -> None:
                with engine_of(client)._turns.wait():
                    begun.set()
                    go_on.wait(60)

            holder = threading.Thread(target=hold)
            holder.start()
            begun.wait(60)
            try:
                yield
            finally:
                go_on.set()
                holder.join()

        return changing

    def test_changes_wait_for_each_other(self, client, bodies, changing, told):
        with ThreadPoolExecutor(1) as pool:
            with changing():
                posted = pool.submit(client.post, "/edits", json=bodies[0])
                wait_until(lambda: figures(client)["mend_waiting_changes",] == 1)
            assert posted.result().status_code == 201
        assert figures(client)["mend_waiting_changes",] == 0
        assert told.of("mend_step_seconds_count")["wait"] == 1

    def test_is_told_while_every_thread_of_the_application_is_taken(self, client, bodies, changing):
        limiter = client.portal.call(anyio.to_thread.current_default_thread_limiter)
        free = limiter.total_tokens
        with ThreadPoolExecutor(1) as pool:
            with changing():
                client.portal.call(setattr, limiter, "total_tokens", 1)
                posted = pool.submit(client.post, "/edits", json=bodies[0])
                wait_until(lambda: figures(client)["mend_waiting_changes",] == 1)
                client.portal.call(setattr, limiter, "total_tokens", free)
            assert posted.result().status_code == 201

    def test_generations_run(self, client):
        done = threading.Event()

        def generate() -> None:
            while not done.is_set():
                client.get("/generate", params={"prompt": "The capital of", "max_new_tokens": 200})

        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(generate)
            try:
                wait_until(lambda: figures(client)["mend_running_generations",] == 1)
            finally:
                done.set()
            generating.result()
        assert figures(client)["mend_running_generations",] == 0


def test_tokens_are_those_of_the_answers(client, told):
    said = client.get("/generate", params={"prompt": "The capital of", "max_new_tokens": 3, "view": "both"}).json()
    usage = {view: said[view]["usage"] for view in ("live", "base")}
    assert {key[1:]: value for key, value in told.all().items() if key[0] == "mend_tokens_total"} == {
        (kind, view): tokens[f"{kind}_tokens"] for view, tokens in usage.items() for kind in ("prompt", "completion")
    }
    assert told.of("mend_generation_seconds_count") == {"live": 1, "base": 1}


class TestRequests:
    @pytest.mark.parametrize(
        ("method", "path", "labels"),
        [
            ("GET", "/edits/edit_1", ("GET", "/edits/{edit_id}", "404")),
            ("GET", "/edits?limit=1", ("GET", "/edits", "200")),
            ("GET", "/generate?prompt=%ff", ("GET", "/generate", "400")),  # answered before it came to a route
            ("POST", "/livez", ("POST", "/livez", "405")),
            ("GET", "/nothing/here", ("GET", "none", "404")),
            ("GET", "/docs", ("GET", "/docs", "200")),
            ("FROBNICATE", "/edits", ("other", "/edits", "405")),
        ],
    )
    def test_are_told_by_method_template_and_status(self, client, told, method, path, labels):
        client.request(method, path)
        requests = {key[1:]: value for key, value in told.all().items() if key[0] == "mend_http_requests_total"}
        requests.pop(("GET", "/metrics", "200"))
        assert requests == {labels: 1}
        assert told.all()["mend_http_request_seconds_count", *labels[:2]] == 1


def test_applications_of_one_process_share_nothing():
    one, other = (TestClient(create_app(Settings()), ADDRESS) for _ in range(2))
    before = figures(other)
    one.get("/edits")
    assert figures(one)["mend_problems_total", "not_ready"] == 1
    assert [key for key in figures(other) if key not in before and "/metrics" not in key] == []
