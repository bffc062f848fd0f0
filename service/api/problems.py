"""Every error as `application/problem+json` (RFC 9457), with a stable `code`.

Domain errors carry a code and facts; the table here says which HTTP status each code means.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from structlog.contextvars import get_contextvars

from service.api.callers import AccessRefused
from service.api.requests import clipped
from service.api.templates import Templates
from service.api.views import OpenAIError, OpenAIProblem, Problem

logger = logging.getLogger("mend.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
MAX_ERRORS, MAX_TOLD = 20, 5
"""Mistakes of one request that are listed, and that its detail tells of."""

STATUS_BY_CODE = {
    "malformed_body": 400,
    "malformed_request": 400,
    "invalid_utf8": 400,
    "unauthenticated": 401,
    "cross_site": 403,
    "csrf_failed": 403,
    "forbidden": 403,
    "not_found": 404,
    "edit_not_found": 404,
    "revision_not_found": 404,
    "tag_not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "already_rolled_back": 409,
    "edit_conflict": 409,
    "kill_switch_engaged": 409,
    "ledger_conflict": 409,
    "nothing_to_export": 409,
    "request_in_flight": 409,
    "revision_not_restorable": 409,
    "state_full": 409,
    "would_break_edits": 409,
    "factors_dropped": 410,
    "revision_mismatch": 412,
    "revision_not_reached": 412,
    "batch_too_large": 413,
    "body_too_large": 413,
    "host_not_allowed": 421,
    "invalid_request": 422,
    "already_expired": 422,
    "empty_text": 422,
    "chat_refused": 422,
    "no_chat_template": 422,
    "unknown_label": 422,
    "unknown_token": 422,
    "subject_not_found": 422,
    "text_too_long": 422,
    "batch_refused": 422,
    "did_not_take": 422,
    "drawdown_exceeded": 422,
    "duplicate_prompt": 422,
    "idempotency_key_reused": 422,
    "entry_invalid": 422,
    "state_overflow": 422,
    "rate_limited": 429,
    "headers_too_large": 431,
    "generation_failed": 500,
    "internal_error": 500,
    "busy": 503,
    "factors_missing": 503,
    "ledger_corrupt": 503,
    "ledger_diverged": 503,
    "ledger_not_durable": 503,
    "ledger_unavailable": 503,
    "outcome_unknown": 503,
    "not_ready": 503,
    "generation_timeout": 504,
    "export_unwritable": 507,
}
"""Every code that a client can meet, with its status."""

OF_ACCESS = (401, 403, 429)
"""How every route that takes a scope may answer."""
TOO_LONG = 431
"""How it may answer to a URL or headers that are too long."""

UNEXPECTED = (
    "an error on our side; it is in the service's log. Nothing was half-done: what the ledger holds is made live with "
    "the next request, and nothing else"
)

_codes: ContextVar[list[str]] = ContextVar("codes")
_BY_STATUS = {
    400: "malformed_body", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "body_too_large",
}  # fmt: skip


OF_THE_FRAMEWORK = {
    "Not Found": "there is nothing at this path; /openapi.json lists what there is, and an id may hold no slash",
    "There was an error parsing the body": "the body cannot be read; send JSON in UTF-8",
}
"""What it says of a request without saying what to do."""

OPENAI = "/v1/"
"""Below it errors have OpenAI's shape."""
OPENAI_STATUS = {422: 400, "busy": 429}
"""Where OpenAI's clients know another status, of a code or of all codes with that status."""
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def told_codes() -> list[str]:
    """Where the codes of the problems are put that are told from here on, in this context."""
    _codes.set([])
    return _codes.get()


def last_code() -> str | None:
    """The code of the problem that was told last in this context, if there was any."""
    codes = _codes.get([])
    return codes[-1] if codes else None


def problem(
    path: str,
    code: str,
    detail: str,
    facts: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer that says what was wrong and what to do, in the shape that clients of a path expect."""
    status = STATUS_BY_CODE[code]
    later = status == HTTPStatus.SERVICE_UNAVAILABLE or code == "request_in_flight"
    headers = {**({"Retry-After": str(RETRY_AFTER_S)} if later else {}), **(headers or {})}
    if path.startswith(OPENAI):
        return JSONResponse(openai_error(code, detail, facts), _openai_status(code), headers)
    return JSONResponse(described(code, detail, facts), status, headers, MEDIA_TYPE)


def openai_error(code: str, detail: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The body of such an answer as OpenAI writes it. `param` is the field that is wrong, if one is."""
    facts, status = facts or {}, _openai_status(code)
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    wrong = facts.get("field") or next((each["field"] for each in facts.get("errors", ())), "")
    param = wrong.removeprefix("body").removeprefix(".").partition(".")[0]
    error = OpenAIError(message=detail, type=kind, param=param or None, code=code)
    return OpenAIProblem(error=error).model_dump()


def _openai_status(code: str) -> int:
    status = STATUS_BY_CODE[code]
    return OPENAI_STATUS.get(code) or OPENAI_STATUS.get(status, status)


def described(code: str, detail: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The body of such an answer."""
    _codes.get([]).append(code)
    body = Problem(
        type=f"urn:mend-service:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=STATUS_BY_CODE[code],
        detail=detail,
        code=code,
        request_id=get_contextvars().get("request_id"),
    ).model_dump(exclude_none=True)
    return {**(facts or {}), **body}


def described_error(error: Exception) -> dict[str, Any]:
    """The body that tells of an error when the answer has begun already."""
    code = getattr(error, "code", None)
    if code in STATUS_BY_CODE:
        return described(code, str(error), error.facts)
    logger.error("unexpected error", exc_info=error)
    return described("internal_error", UNEXPECTED)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses answer with a problem, and so do those of whoever may not ask, or not now."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status in sorted({*statuses, *OF_ACCESS, TOO_LONG})
    }


def openai_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses answer as OpenAI does, and so do those of whoever may not ask, or not now."""
    return {
        status: {"model": OpenAIProblem, "description": HTTPStatus(status).phrase}
        for status in sorted({*statuses, *OF_ACCESS})
    }


def install(app: FastAPI, *domain_errors: type[Exception]) -> None:
    """Answer errors of the app as problems. domain_errors: bases of errors with `code` and `facts`.

    What nobody expects is answered by the outermost layer (`service.api.access_log`).
    """
    for error_type in domain_errors:
        app.add_exception_handler(error_type, _domain)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(AccessRefused, _refused)


async def _domain(request: Request, error: Any) -> JSONResponse:
    code = error.code if error.code in STATUS_BY_CODE else "internal_error"
    if STATUS_BY_CODE[code] >= HTTPStatus.INTERNAL_SERVER_ERROR and code != "not_ready":
        logger.error("%s: %s", error.code, error)
    return problem(request.url.path, code, str(error), error.facts)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    # The input itself is left out: it may be large, and it may not even be encodable.
    found = error.errors()
    errors = [
        {"field": clipped(".".join(str(part) for part in item["loc"])), "message": _readable(item)}
        for item in found[:MAX_ERRORS]
    ]
    errors = [{name: text.encode(errors="replace").decode() for name, text in item.items()} for item in errors]
    if any(item["type"] == "json_invalid" for item in found):
        return problem(
            request.url.path, "malformed_body", f"the body is not JSON: {errors[0]['message']}", {"errors": errors}
        )
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:MAX_TOLD])
    if len(found) > MAX_TOLD:
        detail += f"; and {len(found) - MAX_TOLD} more"
    return problem(request.url.path, "invalid_request", detail, {"errors": errors})


def _readable(item: dict[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "is not a known field; remove it"
    if item["type"] == "json_invalid":
        return str(item.get("ctx", {}).get("error", item["msg"]))
    return str(item["msg"]).removeprefix("Value error, ")


async def _http(request: Request, error: Any) -> JSONResponse:
    headers, detail = dict(error.headers or {}), str(error.detail)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # starlette names the methods of the first route alone
        headers["Allow"] = ", ".join(Templates(request.app.routes).methods(request.url.path))
        detail = f"{request.method} is not served at this path; send one of {headers['Allow']}"
    elif detail in OF_THE_FRAMEWORK:
        detail = OF_THE_FRAMEWORK[detail]
    return problem(request.url.path, _BY_STATUS.get(error.status_code, "internal_error"), detail, headers=headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _refused(request: Request, error: Any) -> JSONResponse:
    return refused(request.url.path, error)


def refused(path: str, error: AccessRefused) -> JSONResponse:
    """The answer to somebody who may not."""
    return problem(path, error.code, str(error), error.facts, error.headers)
