"""What every answer has in common."""

from __future__ import annotations

from service.api.problems import STATUS_BY_CODE


def assert_problem(answer, code: str) -> dict:
    """It is an RFC 9457 problem with this code and the code's status. Returns its body."""
    assert answer.status_code == STATUS_BY_CODE[code], answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["code"] == code
    assert body["status"] == answer.status_code
    assert body["type"] == f"urn:mend-service:problem:{code}"
    assert body["title"]
    assert body["detail"]
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) > 0
    return body


def assert_fields(body: dict, *names: str) -> None:
    assert set(names) <= set(body), set(names) - set(body)
