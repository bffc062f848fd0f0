"""Every error that a client can meet has a status, and every route says which it answers with."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re

import pytest
from fastapi.routing import APIRoute

import editors
import service
from editors.errors import EditorsError
from service.api import generation, openai
from service.api.callers import AccessRefused
from service.api.problems import MEDIA_TYPE, STATUS_BY_CODE
from service.api.routes import router
from service.app import create_app
from service.engine import EngineError
from service.ledger import LedgerError
from service.settings import Settings

BASES = {"engine_error", "edit_refused", "ledger_error", "editors_error", "state_error"}
"""Never raised themselves."""
AT_START = {
    "base_model_error", "base_model_not_found", "base_model_unreadable", "checkpoint_error", "checkpoint_not_found",
    "checkpoint_unreadable", "base_model_mismatch", "targets_error", "embedded_redis_error", "device_unusable",
    "editor_changed",
}  # fmt: skip
"""End the process before it is ready; a Redis that cannot be brought back later is said by /readyz."""
OF_COMMANDS = {
    "data_file_error", "report_error", "training_error", "training_options_invalid", "resume_refused",
    "training_diverged", "archive_unreadable", "archive_unsafe", "archive_mismatch",
    "ledger_file_error",
}  # fmt: skip
"""Of training, evaluation, checkpoints and ledgers as files, which no client meets."""
INSIDE = {"factors_corrupt", "factors_not_held", "already_standing"}
"""Told to a client as `ledger_diverged`, since it is the ledger that holds them."""
OF_HTTP = {
    "malformed_body", "malformed_request", "headers_too_large", "invalid_utf8", "not_found", "method_not_allowed",
    "body_too_large", "request_timeout", "invalid_request", "internal_error",
}  # fmt: skip
"""Not errors of ours, but of what was sent."""

OF_ACCESS = {kind.code for kind in AccessRefused.__subclasses__()}


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def codes_of_errors() -> dict[str, type]:
    for package in (editors, service):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "errors" in module.name:
                importlib.import_module(module.name)
    kinds = set.union(*(subclasses(root) for root in (EngineError, LedgerError, EditorsError)))
    return {kind.code: kind for kind in kinds if kind.__module__.startswith(("editors", "service"))}


class TestCodes:
    def test_of_every_error_that_can_reach_a_client_have_a_status(self):
        elsewhere = BASES | AT_START | OF_COMMANDS | INSIDE
        codes = set(codes_of_errors())
        assert elsewhere <= codes
        assert codes - elsewhere == set(STATUS_BY_CODE) - OF_HTTP - OF_ACCESS

    def test_are_each_of_one_error(self):
        kinds = set.union(*(subclasses(root) for root in (EngineError, LedgerError, EditorsError)))
        kinds = {kind for kind in kinds if kind.__module__.startswith(("editors", "service"))}
        assert len({kind.code for kind in kinds}) == len(kinds)


@pytest.fixture(scope="module")
def openapi() -> dict:
    return create_app(Settings()).openapi()


ROUTES = [route for route in (*router.routes, *generation.router.routes) if isinstance(route, APIRoute)]


def answers(route: APIRoute) -> set[int]:
    """Statuses of the problems that a route may answer with, by what it takes."""
    if route.path in {"/livez", "/readyz"}:
        return set()
    takes_query = bool(route.dependant.query_params)
    takes_body = bool(route.dependant.body_params)
    statuses = {401, 403, 429, 503}
    statuses |= {400, 422} if takes_query or takes_body else set()
    statuses |= {413} if takes_body else set()
    statuses |= {404} if "{" in route.path else set()
    statuses |= {409, 507} if route.path == "/export" else set()
    statuses |= {409, 412} if route.methods & {"POST", "DELETE"} and route.path.startswith("/edits") else set()
    return statuses


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{sorted(route.methods)[0]} {route.path}")
class TestOpenAPI:
    def operation(self, openapi, route) -> dict:
        (method,) = route.methods
        return openapi["paths"][route.path][method.lower()]

    def test_documents_what_it_answers(self, openapi, route):
        operation = self.operation(openapi, route)
        assert operation["summary"]
        assert operation["description"]
        documented = {int(status) for status in operation["responses"] if int(status) >= 400}
        assert answers(route) <= documented

    def test_documents_every_problem_as_one(self, openapi, route):
        for status, answer in self.operation(openapi, route)["responses"].items():
            if int(status) >= 400 and route.path != "/readyz":
                assert set(answer["content"]) == {MEDIA_TYPE}, status
                schema = answer["content"][MEDIA_TYPE]["schema"]
                assert {"type", "title", "status", "detail", "code"} <= set(schema["properties"])


def test_openapi_is_json_and_names_no_error_of_the_framework(openapi):
    text = json.dumps(openapi)
    assert "HTTPValidationError" not in text


@pytest.mark.parametrize("route", openai.router.routes, ids=lambda route: route.path)
def test_openapi_documents_errors_under_v1_in_their_own_shape(openapi, route):
    (method,) = route.methods
    answers = openapi["paths"][route.path_format][method.lower()]["responses"]
    errors = {status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
              for status, answer in answers.items() if int(status) >= 400}  # fmt: skip
    assert errors == dict.fromkeys(errors, "OpenAIProblem")
    assert "503" in errors


def test_openapi_refers_to_nothing_that_is_not_there(openapi):
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(openapi)):
        found = openapi
        for part in reference.split("/"):
            assert part in found, reference
            found = found[part]
