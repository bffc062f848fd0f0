"""Before it is ready, and when the ledger is gone or contradicts the model."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load, save

from service.app import create_app
from service.engine import Engine
from service.ledger import EmbeddedRedis, RedisLedger, digest_of
from service.ledger.embedded import _packaged_binary
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import ADDRESS, engine_of, wait_until
from tests.ledger.entries import stored_in
from tests.service_fixtures import live_weights, namespace_of, same_bits

SAY = {"prompt": "The capital of France is", "max_new_tokens": 4}


def redis_of(client: TestClient):
    return client.app.state.service._embedded


def kill_redis(client: TestClient) -> int:
    pid = redis_of(client).pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: redis_of(client).pid != pid)
    return pid


class TestNotReady:
    def test_every_route_but_the_probes_says_so(self, folders, tmp_path, bodies):
        # Without the lifespan nothing is ever loaded.
        client = TestClient(create_app(Settings(**folders.settings(tmp_path))), ADDRESS, raise_server_exceptions=False)
        for answer in (
            client.post("/edits", json=bodies[0]),
            client.get("/edits"),
            client.get("/edits/x"),
            client.get("/edits/audit"),
            client.post("/edits/batch", json={"edits": [bodies[0]]}),
            client.delete("/edits/x"),
            client.get("/generate", params=SAY),
            client.post("/generate", json=SAY),
            client.get("/model"),
            client.get("/revision"),
            client.get("/replicas"),
            client.get("/export?format=merged"),
        ):
            assert_problem(answer, "not_ready")
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "not_ready",
            "checks": {
                "model": "loading",
                "ledger": "waiting for the model",
                "durability": "waiting for the model",
            },
            "warnings": [],
        }
        assert "mend_ready 0.0" in client.get("/metrics").text
        assert client.get("/docs").status_code == 200
        assert_problem(client.get("/nope"), "not_found")

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"base_model": "/nowhere"}, "/nowhere"),
            ({"editor": "/nowhere"}, "mend train"),
            ({"guard_prompts": Path("/nowhere")}, "MEND_GUARD_PROMPTS"),
            ({"dtype": "int3"}, "MEND_DTYPE"),
            ({"device": "nonsense"}, "MEND_DEVICE"),
            ({"device": "cuda:999"}, "MEND_DEVICE"),
            ({"redis_url": "nonsense"}, "redis://"),
            ({"redis_url": "redis://127.0.0.1:1/0"}, "127.0.0.1:1"),
            ({"redis_server": Path("/nowhere")}, "/nowhere"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_cannot_be_loaded_is_a_failure_in_one_line(self, folders, tmp_path, wrong, says):
        ended: list[bool] = []
        app = create_app(Settings(**{**folders.settings(tmp_path), **wrong}), on_failure=lambda: ended.append(True))
        with TestClient(app, ADDRESS) as client:
            wait_until(lambda: bool(ended))
            assert_problem(client.get("/revision"), "not_ready")
        assert says in app.state.service.failure
        assert "\n" not in app.state.service.failure
        assert app.state.service._embedded is None or not app.state.service._embedded.alive

    def test_a_damaged_card_is_a_failure_too(self, folders, tmp_path):
        editor = tmp_path / "editor"
        editor.mkdir()
        for file in folders.editor.iterdir():
            (editor / file.name).write_bytes(file.read_bytes())
        card = (editor / "card.json").read_text()
        (editor / "card.json").write_text(card.replace('"d_in"', '"nonsense"'))
        ended: list[bool] = []
        app = create_app(
            Settings(**{**folders.settings(tmp_path), "editor": str(editor)}), on_failure=lambda: ended.append(True)
        )
        with TestClient(app, ADDRESS):
            wait_until(lambda: bool(ended))
        assert app.state.service.failure


class TestRedisGone:
    @pytest.fixture
    def server(self, tmp_path) -> Path:
        """A server program that can be taken away."""
        server = tmp_path / "redis-server"
        server.symlink_to(_packaged_binary())
        return server

    def test_is_said_harms_nothing_and_passes_by_itself(self, serve, tmp_path, bodies, server):
        with serve(tmp_path / "data", redis_server=server) as client:
            made = client.post("/edits", json=bodies[0]).json()
            model, said = client.get("/model").json(), client.get("/generate", params=SAY).json()
            weights = live_weights(engine_of(client))
            server.unlink()
            kill_redis(client)

            for answer in (
                client.post("/edits", json=bodies[1]),
                client.post("/edits?dry_run=true", json=bodies[1]),
                client.delete(f"/edits/{made['id']}"),
            ):
                assert_problem(answer, "ledger_unavailable")
            wait_until(lambda: client.get("/readyz").status_code == 503)
            checks = client.get("/readyz").json()["checks"]
            assert checks["model"] == "ok"
            assert checks["ledger"] != "ok"
            assert str(tmp_path) not in str(checks)
            assert client.get("/livez").status_code == 200
            # What needs no ledger goes on.
            assert client.get("/generate", params=SAY).json() == said
            assert client.get("/model").json() == model
            assert client.get("/edits").json()["items"] == [made]
            assert client.get(f"/edits/{made['id']}").json() == made
            assert_problem(client.post("/edits", json=bodies[1]), "ledger_unavailable")
            assert same_bits(live_weights(engine_of(client)), weights)

            server.symlink_to(_packaged_binary())
            wait_until(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/model").json() == model
            assert client.post("/edits", json=bodies[1]).json()["revision"] == made["revision"] + 1
            assert client.delete(f"/edits/{made['id']}").status_code == 200

    def test_is_told_to_everybody_by_its_reason_and_in_the_log_by_its_address(self, serve, tmp_path, caplog):
        with (
            EmbeddedRedis(tmp_path / "redis") as redis,
            serve(tmp_path / "data", redis_url=redis.url) as client,
        ):
            address = engine_of(client).ledger._connection.address()
            redis.stop()
            wait_until(lambda: client.get("/readyz").status_code == 503)
            said = client.get("/readyz").json()["checks"]["ledger"]
        assert said == "Redis cannot be reached; the log says where, and more"
        assert address in caplog.text

    def test_for_a_moment_is_mended_by_the_service(self, fresh, bodies):
        made = fresh.post("/edits", json=bodies[0]).json()
        kill_redis(fresh)
        while (answer := fresh.delete(f"/edits/{made['id']}")).status_code != 200:
            assert_problem(answer, "ledger_unavailable")
            time.sleep(0.05)
        assert fresh.get("/revision").json()["revision"] == 2
        wait_until(lambda: fresh.get("/readyz").status_code == 200)


class TestALedgerThatContradicts:
    """Another writer of the same ledger, with other ideas."""

    def append(self, client: TestClient, factors: bytes | None = None, **changes: object) -> None:
        engine = engine_of(client)
        with closing(RedisLedger.connect(redis_of(client).url, namespace_of(engine))) as ledger:
            entry, raw = stored_in(ledger)[-1]
            factors = raw if factors is None else factors
            update = {"sequence": entry.sequence + 1, "edit_id": "other", "factors_digest": digest_of(factors)}
            ledger.append(entry.model_copy(update={**update, **changes}), factors)

    def test_is_not_served(self, fresh, bodies):
        made = fresh.post("/edits", json=bodies[0]).json()
        weights = live_weights(engine_of(fresh))
        engine = engine_of(fresh)
        self.append(fresh)  # the same factors again, but not the state that they lead to
        answer = fresh.post("/edits", json=bodies[1])
        assert_problem(answer, answer.json()["code"])
        assert answer.json()["code"] in {"ledger_diverged", "not_ready"}
        wait_until(lambda: fresh.get("/readyz").status_code == 503)
        assert "do not trust" in str(fresh.get("/readyz").json()["checks"])
        for answer in (fresh.get("/generate", params=SAY), fresh.delete(f"/edits/{made['id']}")):
            assert "do not trust" in assert_problem(answer, "not_ready")["detail"]
        assert fresh.get("/livez").status_code == 200
        assert same_bits(live_weights(engine), weights)

    @pytest.mark.parametrize("factors", [b"", b"not factors", "three dimensions"])
    def test_by_factors_that_are_none_is_not_served_and_does_not_end_the_watch(self, fresh, bodies, factors):
        fresh.post("/edits", json=bodies[0])
        if factors == "three dimensions":
            factors = three_dimensional(engine_of(fresh))
        self.append(fresh, factors)
        wait_until(lambda: fresh.get("/readyz").status_code == 503)
        assert_problem(fresh.post("/edits", json=bodies[1]), "not_ready")
        service = fresh.app.state.service
        assert service._keeper.is_alive()
        pid = kill_redis(fresh)
        wait_until(lambda: redis_of(fresh).pid not in (None, pid))


def three_dimensional(engine: Engine) -> bytes:
    """Factors that decode, but do not multiply."""
    tensors = load(next(iter(stored_in(engine.ledger)))[1])
    return save({name: tensor if not tensor.dim() else tensor[:, None] for name, tensor in tensors.items()})


def test_the_embedded_server_goes_with_the_service(serve, tmp_path):
    with serve(tmp_path) as client:
        redis = redis_of(client)
        assert redis.alive
    assert not redis.alive
    with serve(tmp_path):
        pass


def test_edits_of_another_editor_are_told_of(serve, bodies, tmp_path, caplog):
    with serve(tmp_path) as client:
        assert client.post("/edits", json=bodies[0]).status_code == 201
        editor = engine_of(client).checkpoint.digest
    caplog.clear()
    with serve(tmp_path, editor="training-free") as client:
        assert client.get("/model").json()["editor"]["trained"] is False
        assert client.get("/revision").json()["revision"] == 0
    assert f"edits of other editors of this base model ({editor[:19]}…)" in caplog.text
    caplog.clear()
    with serve(tmp_path) as client:
        assert client.get("/revision").json()["revision"] == 1
    assert "other editors" not in caplog.text


def test_edits_of_another_editor_are_not_given_up_because_none_was_named(serve, folders, bodies, tmp_path):
    """None that fits is shipped, so that the training-free one would be taken, which has made none of them."""
    with serve(tmp_path / "data") as client:
        assert client.post("/edits", json=bodies[0]).status_code == 201
        editor = engine_of(client).checkpoint.digest
    app = create_app(Settings(**{**folders.settings(tmp_path / "data"), "editor": None}))
    with TestClient(app, ADDRESS):
        wait_until(lambda: bool(app.state.service.failure))
    assert editor[:19] in app.state.service.failure
    advice = app.state.service.failure.rpartition("MEND_EDITOR=")[2]
    with serve(tmp_path / "data", editor=advice) as client:
        assert client.get("/revision").json()["revision"] == 0
    with serve(tmp_path / "new", editor=None) as client:
        made = client.get("/model").json()["editor"]
    with serve(tmp_path / "new", editor=None) as client:
        assert client.get("/model").json()["editor"] == made
