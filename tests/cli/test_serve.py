"""`mend serve` as a process: it says in one line why it cannot start, and it stops in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from editors.base_model import load_base_model
from service.cli.serve import _listen
from service.ledger import EmbeddedRedis, RedisLedger
from service.settings import Settings
from tests.api.conftest import wait_until
from tests.e2e.server import Server, serving
from tests.ledger.servers import Server as RedisServer
from tests.service_fixtures import Folders, find_edits, save_base, save_editor, small_checkpoint, small_engine

MEND = [sys.executable, "-c", "from service.cli import main; main()"]
ENDS_WITHIN_S = 240


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def environment(folders: Folders) -> dict[str, str]:
    """Settings of a service that starts."""
    return {
        f"MEND_{name.upper()}": str(value) for name, value in folders.settings(Path()).items() if name != "data_dir"
    }


@pytest.fixture(scope="module")
def live(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A service that runs, and its data folder."""
    folder = tmp_path_factory.mktemp("live")
    with serving(folder / "data", folder / "log", **environment) as server:
        yield server, folder / "data"


def refusal(environment: dict[str, str], data_dir: Path, *flags: str, **settings: str) -> str:
    """Why a service does not start: the only line that it leaves."""
    settings = {"MEND_PORT": "0", "MEND_DATA_DIR": str(data_dir), **environment, **settings}
    ended = subprocess.run(
        [*MEND, "serve", *flags],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=False,
    )
    assert ended.returncode not in (0, -signal.SIGKILL), ended.stderr
    assert ended.returncode > 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "is ready" not in ended.stdout
    *before, last = ended.stderr.splitlines()
    assert last.startswith("mend: "), ended.stderr
    assert all(line.startswith("mend: listening on") for line in before if line.startswith("mend: "))
    return last.removeprefix("mend: ")


class TestWillNotStart:
    def test_without_its_base_model(self, environment, tmp_path):
        missing = tmp_path / "nothing here"
        said = refusal(environment, tmp_path, "--base-model", str(missing))
        assert str(missing) in said
        assert "MEND_BASE_MODEL" in said

    def test_with_the_editor_of_another_model_and_names_both(self, environment, tmp_path):
        other = save_base(tmp_path / "other", "conv1d")
        editor = save_editor(tmp_path / "other-editor", other)
        said = refusal(environment, tmp_path, MEND_EDITOR=str(editor))
        digests = [word.strip(";,") for word in said.split() if word.startswith("sha256:")]
        assert len(set(digests)) == 2
        assert other.digest in digests

    def test_without_its_guard_prompts(self, environment, tmp_path):
        said = refusal(environment, tmp_path, "--guard-prompts", str(tmp_path / "nothing"))
        assert "MEND_GUARD_PROMPTS" in said
        assert str(tmp_path / "nothing") in said

    @pytest.mark.parametrize(
        ("flags", "settings"),
        [(["--port", "many"], {}), ([], {"MEND_GUARD_BUDGET": "1.5"})],
        ids=["flag", "variable"],
    )
    def test_with_a_setting_that_makes_no_sense(self, environment, tmp_path, flags, settings):
        environment = {name: value for name, value in environment.items() if name not in settings}
        said = refusal(environment, tmp_path, *flags, **settings)
        assert said.startswith("MEND_PORT is 'many'" if flags else "MEND_GUARD_BUDGET is '1.5'")

    def test_on_a_port_that_is_taken(self, environment, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            said = refusal(environment, tmp_path, "--port", port)
        assert port in said
        assert "MEND_PORT" in said

    def test_without_the_keys_that_it_should_have(self, environment, tmp_path):
        said = refusal(environment, tmp_path, "--api-keys", str(tmp_path / "keys.json"))
        assert str(tmp_path / "keys.json") in said
        assert "mend keys create" in said

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    def test_for_everybody_unless_it_is_told_twice(self, environment, tmp_path, host):
        said = refusal(environment, tmp_path, MEND_HOST=host)
        for way in ("MEND_API_KEYS", "127.0.0.1", "MEND_OPEN_TO_ALL=true"):
            assert way in said

    def test_on_the_data_of_a_service_that_runs(self, environment, live):
        server, data_dir = live
        said = refusal(environment, data_dir)
        assert str(data_dir) in said
        assert str(server.process.pid) in said
        assert server.get("/readyz")["status"] == "ready"


class TestListens:
    """Where, and for whom, by the settings alone."""

    @pytest.fixture
    def bound(self) -> Iterator[Callable[..., str]]:
        with ExitStack() as stack:
            yield lambda **settings: stack.enter_context(_listen(Settings(port=0, **settings))).getsockname()[0]

    @pytest.mark.parametrize(
        ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("127.0.0.9", "127.0.0.9"),
                              ("::1", "::1")],
    )  # fmt: skip
    def test_to_this_machine_without_being_asked_twice(self, bound, host, address):
        assert bound(host=host) == address

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
    def test_to_others_when_told_twice_or_with_keys(self, bound, tmp_path, host):
        with pytest.raises(SystemExit, match="MEND_OPEN_TO_ALL=true"):
            bound(host=host)
        assert bound(host=host, open_to_all=True) == bound(host=host, api_keys=tmp_path)


class TestStop:
    def test_by_sigterm_is_in_order_and_takes_the_redis_server_along(self, environment, tmp_path):
        log = tmp_path / "log"
        with serving(tmp_path / "data", log, **environment) as server:
            (redis,) = psutil.Process(server.process.pid).children(recursive=True)
            assert server.stop() == 0
            assert not redis.is_running()
        assert "Traceback" not in log.read_text()
        assert not (tmp_path / "data" / "redis.sock").exists()

    def test_by_sigterm_before_it_is_ready_is_in_order_too(self, environment, tmp_path):
        settings = {"MEND_PORT": "0", "MEND_DATA_DIR": str(tmp_path), **environment}
        process = subprocess.Popen(
            [*MEND, "serve"], env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert any(line.startswith("mend: listening on") for line in iter(process.stderr.readline, ""))
            process.terminate()
            _, said = process.communicate(timeout=ENDS_WITHIN_S)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert not (tmp_path / "redis.sock").exists()


class TestStopWhileAnEditIsMade:
    @pytest.fixture
    def slow(self, environment, tmp_path):
        """A service in which an edit takes long to be judged."""

        @contextmanager
        def slow(seconds: float) -> Iterator[Server]:
            settings = {**environment, "MEND_FAILPOINT": f"judge=sleep:{seconds}"}
            with serving(tmp_path / "data", tmp_path / "log", **settings) as server:
                yield server

        return slow

    @contextmanager
    def posting(self, server: Server, edit: dict) -> Iterator[Future]:
        with ThreadPoolExecutor(1) as pool:
            posted = pool.submit(server.client.post, "/edits", json=edit)
            time.sleep(1)
            assert not posted.done()
            yield posted

    def test_answers_it_first(self, slow, edit, environment, tmp_path):
        with slow(3) as server:
            with self.posting(server, edit) as posted:
                server.process.terminate()
                time.sleep(0.5)
                with pytest.raises(httpx.ConnectError), httpx.Client() as late:
                    late.get(server.client.base_url.join("/livez"))
                made = posted.result()
                assert made.status_code == 201, made.text
            assert server.process.wait(timeout=60) == 0
        with serving(tmp_path / "data", tmp_path / "log", **environment) as server:
            assert server.get(f"/edits/{made.json()['id']}") == made.json()

    def test_twice_is_at_once_and_leaves_nothing_half_done(self, slow, edit, environment, tmp_path):
        with slow(60) as server:
            (redis,) = psutil.Process(server.process.pid).children(recursive=True)
            with self.posting(server, edit) as posted:
                server.process.terminate()
                time.sleep(0.5)
                start = time.monotonic()
                server.process.terminate()
                assert server.process.wait(timeout=10) == 128 + signal.SIGTERM
                assert time.monotonic() - start < 2
                with pytest.raises(httpx.TransportError):
                    posted.result()
            redis.wait(timeout=10)
        with serving(tmp_path / "data", tmp_path / "log", **environment) as server:
            assert server.get("/revision", verify=True)["revision"] == 0


class TestARedisThatMayLoseEdits:
    @pytest.fixture
    def careless(self):
        with RedisServer({"appendonly": "no", "maxmemory-policy": "allkeys-lru"}) as redis:
            yield redis

    def test_is_refused_where_durability_is_strict(self, environment, careless, tmp_path):
        url = f"unix://{careless.path}"
        said = refusal(environment, tmp_path, "--durability", "strict", MEND_REDIS_URL=url)
        assert "appendonly" in said
        assert "allkeys-lru" in said
        assert "MEND_DURABILITY" in said

    def test_is_warned_of_else_and_served(self, environment, careless, tmp_path):
        log = tmp_path / "log"
        with serving(tmp_path / "data", log, **environment, MEND_REDIS_URL=f"unix://{careless.path}") as server:
            warnings = server.get("/readyz")["warnings"]
            assert any("appendonly" in warning for warning in warnings)
            assert any("maxmemory-policy" in warning for warning in warnings)
            assert all(warning in log.read_text() for warning in warnings)

    def test_takes_a_strict_service_out_when_it_becomes_so(self, environment, edit, tmp_path):
        with (
            RedisServer() as redis,
            serving(
                tmp_path / "data", tmp_path / "log", **environment,
                MEND_REDIS_URL=f"unix://{redis.path}", MEND_DURABILITY="strict",
            ) as server,
        ):  # fmt: skip
            redis.client.config_set("appendonly", "no")
            wait_until(lambda: server.client.get("/readyz").status_code == 503)
            assert "appendonly" in server.client.get("/readyz").json()["checks"]["durability"]
            refused = server.client.post("/edits", json=edit)
            assert (refused.status_code, refused.json()["code"]) == (503, "ledger_not_durable")
            assert server.get("/generate", prompt="The")["revision"] == 0
            redis.client.config_set("appendonly", "yes")
            wait_until(lambda: server.client.get("/readyz").status_code == 200)
            assert server.client.post("/edits", json=edit).status_code == 201


@pytest.fixture(scope="module")
def edit(folders, tmp_path_factory) -> dict[str, str]:
    """An edit that takes on a model that nobody has edited."""
    folder = tmp_path_factory.mktemp("edit")
    base = load_base_model(str(folders.base_model))
    with EmbeddedRedis(folder / "redis") as redis, closing(RedisLedger.connect(redis.url, "edits")) as ledger:
        edit, *_ = find_edits(small_engine(base, small_checkpoint(folder / "editor", base), ledger))
    return {"prompt": edit.prompt, "correction": edit.correction}


def test_an_edit_over_real_http(live, edit):
    server, _ = live
    answer = server.client.post("/edits", json=edit)
    assert answer.status_code == 201, answer.text
    assert server.get("/generate", prompt=edit["prompt"])["text"].strip().startswith(edit["correction"].strip())
    for query in ("prompt=%ff", "prompt=%ed%a0%80"):
        assert server.client.get(f"/generate?{query}").json()["code"] == "invalid_utf8"
    assert server.client.get("/edits/%00%ff").json()["code"] == "edit_not_found"
    assert server.client.post("/edits", content=b" " * 2_000_001).json()["code"] == "body_too_large"
    assert server.client.delete(f"/edits/{answer.json()['id']}").json()["revision"] == 2


def test_every_setting_has_a_flag():
    shown = subprocess.run(
        [*MEND, "serve", "--help"],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=True,
    ).stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in shown
        assert f"MEND_{name.upper()}." in shown
