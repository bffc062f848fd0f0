"""The Dockerfile says what the service needs, and nothing that contradicts it. It is built by hand: see the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from editors import packaged
from service.cli.main import app
from service.settings import Settings
from tests.docker.files import DOCKER, ROOT, dockerfile, last_stage

LINES = dockerfile()
SAYS = dict(last_stage())
ENVIRONMENT = dict(
    part.split("=", 1) for name, text in last_stage() if name == "ENV" for part in text.split() if "=" in part
)


def test_runs_as_somebody_who_is_a_number_and_not_root():
    user, _, group = SAYS["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_is_told_of_signals_and_runs_a_command_that_there_is():
    (command,) = json.loads(SAYS["ENTRYPOINT"])
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert command in tomllib.load(file)["project"]["scripts"]
    (subcommand,) = json.loads(SAYS["CMD"])
    assert subcommand in {each.name or each.callback.__name__ for each in app.registered_commands}
    assert SAYS["STOPSIGNAL"] == "SIGTERM"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_environment_is_that_of_the_service(device, monkeypatch):
    known = {name: value.replace("${DEVICE}", device) for name, value in ENVIRONMENT.items() if name[:5] == "MEND_"}
    assert {name.removeprefix("MEND_").lower() for name in known} <= Settings.model_fields.keys()
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.device == device
    assert str(settings.data_dir) == SAYS["VOLUME"] == SAYS["WORKDIR"]
    assert str(settings.port) == SAYS["EXPOSE"]
    assert ENVIRONMENT["HF_HOME"].startswith(f"{settings.data_dir}/")  # all else may be read-only


def test_is_for_a_cpu_unless_it_is_told_otherwise():
    arguments = [text for name, text in LINES if name == "ARG"]
    assert "DEVICE=cpu" in arguments
    assert arguments.count("DEVICE") == 2  # of the stage that installs, and of the one that runs


def test_torch_is_installed_before_anything_of_the_project_is_copied():
    steps = [(name, text) for name, text in LINES if name in ("RUN", "COPY")]
    torch = next(at for at, (name, text) in enumerate(steps) if name == "RUN" and "torch ;;" in text)
    assert [text.split()[0] for name, text in steps[:torch] if name == "COPY"] == ["docker/constraints.txt"]


def test_what_it_copies_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {part for name, text in LINES if name == "COPY" and "--from" not in text for part in text.split()[:-1]}
    assert copied == sent
    assert all((ROOT / path).exists() for path in copied)


def test_every_stage_that_is_copied_from_is_there():
    stages = {text.split()[-1] for name, text in LINES if name == "FROM"}
    assert set(re.findall(r"--from=(\S+)", " ".join(text for _, text in LINES))) <= stages


def test_versions_are_those_of_the_project():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert f'image.version="{project["version"]}"' in SAYS["LABEL"]
    assert any(f"{packaged.WHEEL}=={packaged.VERSION}" in text for name, text in LINES if name == "RUN")
    (base,) = (text for name, text in LINES if name == "ARG" and text.startswith("BASE_IMAGE="))
    (tested,) = re.findall(r"for CPython (\S+)\.", (DOCKER / "constraints.txt").read_text(encoding="utf-8"))
    assert re.fullmatch(rf"BASE_IMAGE=python:{re.escape(tested)}\.\d+-slim-\w+", base)


class Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def is_healthy(port: int) -> bool:
    """As HEALTHCHECK says, in a container that is to use a proxy."""
    _, command = SAYS["HEALTHCHECK"].split(" CMD ")
    python, script = json.loads(command)
    assert python == "python"
    (source,) = {text.split()[0] for name, text in last_stage() if name == "COPY" and text.split()[-1] == script}
    environment = {**os.environ, "MEND_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, ROOT / source], env=environment, timeout=30).returncode == 0


def test_is_healthy_when_the_service_is_ready():
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert is_healthy(server.server_port)
        Answers.status = 503
        assert not is_healthy(server.server_port)
        server.shutdown()
    assert not is_healthy(server.server_port)
