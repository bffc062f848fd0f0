"""Dashboard, alerts and compose file ask for what there is: metrics of a running application, files, valid PromQL."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.settings import Settings
from tests.api.conftest import ADDRESS, wait_until
from tests.service_fixtures import Folders, never_takes, save_base, save_completed_editor

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "mend.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
SHOWN = [target["expr"] for panel in PANELS for target in panel["targets"]]
SHOWN += [each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each]
OF_PROMETHEUS = {"up"}
LABELS_OF_PROMETHEUS = {"instance", "job", "le"}
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What an application tells that has generated, audited, and been asked for an edit and a rollback.

    Its editor is solved by least squares: only such a state has a capacity.
    """
    folder = tmp_path_factory.mktemp("scraped")
    folders = Folders(folder / "base", folder / "editor", folder / "guard.txt")
    save_completed_editor(folders.editor, save_base(folders.base_model))
    folders.guard_prompts.write_text("The language of Italy is\n")
    app = create_app(Settings(**folders.settings(folder / "data")))
    with TestClient(app, ADDRESS) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        client.get("/generate", params={"prompt": "The capital of", "max_new_tokens": 2})
        client.get("/edits/audit")
        client.post("/edits", json={"prompt": never_takes().prompt, "correction": never_takes().correction})
        client.delete("/edits/edit_1")
        yield client.get("/metrics").text


@pytest.fixture(scope="module")
def told(scraped: str) -> dict[str, set[str]]:
    """The names of its samples, each with its labels."""
    labels = defaultdict(set)
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels


def asked(expression: str) -> dict[str, set[str]]:
    """The metrics that an expression names, with the labels by which it selects them."""
    found = re.findall(r"\b((?:mend|process)_\w+|up)\b(?:\{([^}]*)\})?", expression)
    return {name: set(re.findall(r"(\w+)\s*[=!]", selector)) for name, selector in found}


def grouped(expression: str) -> set[str]:
    lists = re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", expression)
    return {label.strip() for each in lists for label in each.split(",")}


@pytest.mark.parametrize("expression", [*SHOWN, *(rule["expr"] for rule in RULES)])
def test_is_asked_of_what_a_running_application_tells(told, expression):
    metrics = asked(expression)
    assert metrics
    for name, selected in metrics.items():
        assert name in told or name in OF_PROMETHEUS
        assert selected <= told[name] | LABELS_OF_PROMETHEUS
    assert grouped(expression) <= set().union(*(told[name] for name in metrics)) | LABELS_OF_PROMETHEUS


def test_every_metric_of_ours_is_on_the_dashboard(told):
    shown = {name for expression in SHOWN for name in asked(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if name.startswith("mend_")}
    assert ours == {name for name in families if name.startswith("mend_")} | {"mend_check_ok", "mend_ready"}


class TestDashboard:
    def test_asks_the_data_source_that_is_chosen(self):
        assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]
        for panel in PANELS:
            sources = {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])}
            assert sources == {"${datasource}"}

    def test_has_panels_beside_each_other(self):
        taken = set()
        for panel in DASHBOARD["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, panel["title"]
            assert place["x"] + place["w"] <= 24
            taken |= cells
        assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])

    @promtool
    def test_asks_in_valid_promql(self, tmp_path):
        constants = {"$__rate_interval": "1m", "$__interval": "1m", "$instance": ".*"}
        rules = []
        for number, expression in enumerate(SHOWN):
            for name, value in constants.items():
                expression = expression.replace(name, value)
            rules.append({"record": f"shown:{number}", "expr": expression})
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
        assert f"{len(SHOWN)} rules found" in run("check", "rules", tmp_path / "rules.yml")


class TestAlerts:
    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
    def test_say_how_bad_it_is_what_is_wrong_and_what_to_do(self, rule):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 40

    @promtool
    def test_fire_when_they_should(self):
        assert "SUCCESS" in run("test", "rules", Path(__file__).parent / "alerts.yml")

    @promtool
    def test_are_part_of_a_valid_configuration(self):
        assert f"{len(RULES)} rules found" in run("check", "config", DOCKER / "prometheus" / "prometheus.yml")


@promtool
def test_metrics_are_named_as_prometheus_wants(scraped):
    run("check", "metrics", given=scraped)


@pytest.mark.parametrize("file", ["compose.yaml", "compose.replicas.yaml"])
def test_every_service_of_ours_is_scraped(file):
    (scraped,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (by,) = scraped["dns_sd_configs"]
    services = yaml.safe_load((DOCKER / file).read_text())["services"]
    ours = {name for name, service in services.items() if service.get("image") == "mend-service"}
    assert ours
    assert ours <= set(by["names"])
    assert by["port"] == Settings.model_fields["port"].default


def test_compose_mounts_what_there_is():
    services = yaml.safe_load((DOCKER / "compose.observability.yaml").read_text())["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    ours = [DOCKER / path for path in mounted if path.startswith("./")]
    assert len(ours) == 3
    assert all(path.exists() for path in ours)


def run(*command: object, given: str | None = None) -> str:
    """What promtool says when it has nothing to complain of."""
    ended = subprocess.run(
        ["promtool", *map(str, command)], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
