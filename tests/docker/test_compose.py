"""What the compose files start: a Redis that keeps what it acknowledges, services that nobody else reaches."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from contextlib import closing

import pytest
import redis
import yaml

from service.cli.serve import DRAIN_S
from service.ledger.durability import Durability
from service.ledger.embedded import _packaged_binary
from service.settings import Settings
from tests.docker.files import DOCKER, compose, last_stage

WHOLE = ("compose.yaml", "compose.replicas.yaml")
OVERRIDES = ("compose.gpu.yaml",)


def services(name: str) -> dict[str, dict]:
    """With what they take over from another file."""
    found = {}
    for service, own in compose(name)["services"].items():
        extends = own.pop("extends", None)
        found[service] = {**(compose(extends["file"])["services"][extends["service"]] if extends else {}), **own}
    return found


def mends(name: str) -> dict[str, dict]:
    return {service: own for service, own in services(name).items() if service.partition("-")[0] == "mend"}


def seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", duration).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def environment(service: dict) -> dict[str, str]:
    """As compose passes it on where nothing else is set."""
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in service["environment"].items()}


@pytest.mark.parametrize("name", WHOLE)
def test_settings_are_those_of_the_service(name, monkeypatch):
    assert mends(name)
    for service in mends(name).values():
        given = {key: value for key, value in environment(service).items() if key.startswith("MEND_")}
        assert {key.removeprefix("MEND_").lower() for key in given} <= Settings.model_fields.keys()
        for key, value in given.items():
            monkeypatch.setenv(key, value)
        settings = Settings()
        assert settings.durability == "strict"
        assert settings.redis_url == "redis://redis:6379/0"


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("compose*.yaml")))
def test_ports_are_published_on_loopback_alone(name):
    ports = [port for service in services(name).values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert name not in WHOLE or [port.split(":")[1] for port in ports] == ["8000"]


@pytest.mark.parametrize("name", WHOLE)
def test_what_runs_may_do_little_and_has_time_to_end(name):
    for service, own in services(name).items():
        assert own["security_opt"] == ["no-new-privileges:true"], service
        assert ":" in own["image"] or "build" in own, service
        if service != "redis":
            assert own["read_only"]
            assert own["cap_drop"] == ["ALL"]
            assert seconds(own["stop_grace_period"]) > DRAIN_S + 10


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("compose*.yaml")))
def test_redis_is_reached_by_the_services_of_the_ledger_alone(name):
    among = {service for service, own in services(name).items() if "ledger" in own.get("networks", ())}
    if name not in WHOLE:
        assert among == set()
        return
    assert among == {"redis", *mends(name)}
    assert services(name)["redis"]["networks"] == ["ledger"]
    assert compose(name)["networks"] == {"ledger": {"internal": True}}
    assert all("default" in own["networks"] for own in mends(name).values())  # for the port, the proxy and the hub


def test_grafana_knows_nobody_who_may_change_anything():
    given = services("compose.observability.yaml")["grafana"]["environment"]
    assert given["GF_AUTH_DISABLE_LOGIN_FORM"] == given["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert given["GF_AUTH_BASIC_ENABLED"] == "false"
    assert given.get("GF_AUTH_ANONYMOUS_ORG_ROLE", "Viewer") == "Viewer"


@pytest.mark.parametrize("name", WHOLE)
def test_volumes_are_named_and_that_of_the_service_is_the_image_s(name):
    volumes = compose(name)["volumes"]
    (kept,) = [text for instruction, text in last_stage() if instruction == "VOLUME"]
    for service in mends(name).values():
        assert service["volumes"] == [f"data:{kept}"]
    assert services(name)["redis"]["volumes"] == ["ledger:/data"]
    assert set(volumes) == {"data", "ledger"}


def test_replicas_are_the_one_service_thrice_without_its_port():
    (one,) = mends("compose.yaml").values()
    replicas = mends("compose.replicas.yaml")
    assert len(replicas) == 3
    apart = {"MEND_ALLOWED_HOSTS"}
    for each in (one, *replicas.values()):
        each["environment"] = {name: value for name, value in each["environment"].items() if name not in apart}
    del one["ports"]
    assert all(replica == one for replica in replicas.values())


def test_prometheus_finds_every_service():
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == {service for name in WHOLE for service in mends(name)}


def test_the_files_are_of_one_project_and_say_how_they_are_started():
    assert len({compose(name)["name"] for name in WHOLE}) == 1
    for name in (*WHOLE, *OVERRIDES):
        first = (DOCKER / name).read_text(encoding="utf-8").partition("\n\n")[0]
        (command,) = set(re.findall(r"^#   docker compose (.*--build)$", first, re.MULTILINE))
        assert re.findall(r"docker/(\S+)", command) == ([WHOLE[0], name] if name in OVERRIDES else [name])


def test_the_override_for_a_gpu_changes_what_there_is():
    ((service, own),) = compose("compose.gpu.yaml")["services"].items()
    assert service in services("compose.yaml")
    assert own["build"]["args"] == {"DEVICE": "cuda"}
    (device,) = own["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_redis_keeps_what_it_acknowledges(tmp_path):
    """A real server, started as compose starts it."""
    program, *options = services("compose.yaml")["redis"]["command"]
    assert program == "redis-server"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    server = subprocess.Popen([_packaged_binary(), *options, *place], stdout=subprocess.DEVNULL)
    try:
        with closing(redis.Redis(port=port)) as client:
            for _ in range(200):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
            durability = Durability.of(client)
    finally:
        server.terminate()
        server.wait()
    assert (durability.weaknesses, durability.refuses) == ((), None)
    # Also for a Redis that cannot confirm an fsync.
    assert (durability.appendonly, durability.appendfsync) == ("yes", "always")
    assert durability.maxmemory_policy == "noeviction"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".rdb")]
