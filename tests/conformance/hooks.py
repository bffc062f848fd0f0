"""What Schemathesis does not know by itself: bodies of JSON Lines, and kinds of changes that stop all others."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def as_lines(_context: schemathesis.SerializationContext, value: Any) -> bytes:
    edits = value if isinstance(value, list) else [value]
    return "\n".join(json.dumps(edit) for edit in edits).encode()


@schemathesis.hook
def after_call(_context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    """Release the kill switch at once, or everything behind it would only be refused."""
    if case.method == "PUT" and case.path == "/kill-switch" and response.status_code == 200:
        case.operation.schema["/kill-switch"]["DELETE"].Case().call(headers=dict(case.headers or {}))
