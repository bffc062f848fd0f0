"""Many corrections in one request: as JSON, answered at once, or as JSON Lines, answered while they are worked on.

A line of the answer is `{"progress": …}`, then one `{"edit": …}` for each line of the request, then `{"batch": …}`
with the new state, or `{"problem": …}` with what an error would have said. What is refused before there is any
progress is answered with a problem and its status, as anywhere.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from io import BytesIO
from queue import SimpleQueue
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from service.api.audit import Record
from service.api.batch_views import BatchItem, BatchSummary, BatchView
from service.api.callers import needs
from service.api.changing import Changing
from service.api.headers import Writable, describe
from service.api.limits import BATCH_PATH
from service.api.problems import described_error, responses
from service.api.requests import BatchBody, BatchQuery, EditBody, digest_of, validated
from service.api.views import Pending
from service.api.waiting import Waited
from service.confidential import note_texts
from service.engine import BatchOutcome, Tell

JSON, JSON_LINES = "application/json", "application/x-ndjson"
EDITS = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/EditBody"}}

router = APIRouter()


async def raw_body(request: Request) -> bytes:
    """Unread by the framework, which would take it for one JSON document."""
    return await request.body()


def is_lines(request: Request) -> bool:
    """Whether the body is JSON Lines. Raises RequestValidationError when it does not say what it is."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (JSON, JSON_LINES):
        problem = f"send {JSON} with a list of `edits`, or {JSON_LINES} with an edit on each line"
        raise RequestValidationError([{"type": "media_type", "loc": ("header", "content-type"), "msg": problem}])
    return media_type == JSON_LINES


Lines = Annotated[bool, Depends(is_lines)]


def batch_edits(raw: Annotated[bytes, Depends(raw_body)], lines: Lines) -> list[EditBody]:
    """The edits of a body. Raises HTTPException or RequestValidationError, which name the line or the edit."""
    if not lines:
        return validated(BatchBody, _parsed(raw, "the body"), "body").edits
    edits = [
        validated(EditBody, _parsed(line, f"line {number}"), "line", number)
        for number, line in enumerate(BytesIO(raw), 1)
        if line.strip()
    ]
    return validated(BatchBody, {"edits": edits}, "body").edits


def _parsed(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # the former of bad UTF-8 and of endless numbers too
        raise HTTPException(400, f"{what} is not JSON: {error}") from error


@router.post(
    BATCH_PATH,
    dependencies=[needs("edit")],
    status_code=201,
    response_model=BatchView,
    responses={
        200: {
            "model": BatchView,
            "description": "Nothing was changed: all true already, or a dry run; or JSON Lines",
            "content": {JSON_LINES: {"schema": {"type": "string"}}},
        },
        202: {"model": Pending, "description": "Not done within `wait` seconds"},
        **responses(400, 409, 412, 413, 422, 503),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"type": "object", "required": ["edits"], "properties": {"edits": EDITS}}},
                JSON_LINES: {"schema": EDITS["items"]},
            },
        }
    },
)
def post_batch(
    edits: Annotated[list[EditBody], Depends(batch_edits)],
    lines: Lines,
    engine: Writable,
    asked: Changing,
    waiting: Waited,
    request: Request,
    response: Response,
    query: Annotated[BatchQuery, Query()],
) -> Any:
    """Correct many facts as one transaction: one capture, one state, one commit.

    All are made or none, unless `partial`. The body is `{"edits": [...]}`, or JSON Lines (`application/x-ndjson`), an
    edit a line: then the answer is JSON Lines too, with progress, and its status is 200 once there is any.
    """
    digest = digest_of(*edits, query)
    requests = [edit.as_request(asked.actor, asked.idempotency_key, f"batch:{digest}") for edit in edits]
    revision = asked.expected_revision(engine)
    note_texts("batch", edits=[{"prompt": edit.prompt, "correction": edit.correction} for edit in edits])

    def apply(tell: Tell) -> BatchOutcome:
        return engine.apply_batch(requests, expected_revision=revision, tell=tell, **query.model_dump())

    if lines and query.wait is not None:
        said = "is for a body in JSON; an answer in JSON Lines tells of its progress by itself"
        raise RequestValidationError([{"type": "wait", "loc": ("query", "wait"), "msg": said}])
    if lines:
        return StreamingResponse(told(apply, request.state.audit), 200, media_type=JSON_LINES)
    outcome = waiting.made(engine, asked.idempotency_key, digest, query.wait, lambda: apply(lambda *_: None))
    if isinstance(outcome, JSONResponse):
        return outcome
    describe(response, outcome)
    return BatchView.of(outcome)


def told(apply: Callable[[Tell], BatchOutcome], record: Record) -> Iterator[str]:
    """The lines that answer. Raises what `apply` raises before it tells of any progress.

    It goes on to its end although nobody listens any more: half a transaction there is not. So its outcome is told to
    the audit from there.
    """
    events: SimpleQueue[dict[str, Any] | BatchOutcome | Exception] = SimpleQueue()
    begun = False

    def tell(step: str, done: int, of: int) -> None:
        nonlocal begun
        begun = True
        events.put({"progress": {"step": step, "done": done, "of": of}})

    def work() -> None:
        try:
            outcome = apply(tell)
        except Exception as error:  # told to the client, whatever it was
            if begun:
                record.tell(None, code=getattr(error, "code", "internal_error"))
            events.put(error)
        else:
            record.tell(None, batch_id=outcome.id, revision=outcome.revision)
            events.put(outcome)

    # In the context of the request, so that what is logged and traced there is known to belong to it.
    threading.Thread(target=copy_context().run, args=(work,), name="batch", daemon=True).start()
    first = events.get()
    if isinstance(first, Exception):
        raise first

    def lines() -> Iterator[str]:
        event = first
        while isinstance(event, dict):
            yield _line(event)
            event = events.get()
        yield from _result(event)

    return lines()


def _result(event: BatchOutcome | Exception) -> Iterator[str]:
    if isinstance(event, BatchOutcome):
        edits, last = event.edits, {"batch": BatchSummary.of(event).model_dump()}
    else:
        problem = described_error(event)
        edits, last = problem.pop("edits", []), {"problem": problem}
    for edit in edits:
        yield _line({"edit": BatchItem.model_validate(edit).model_dump(exclude_unset=True)})
    yield _line(last)


def _line(fields: dict[str, Any]) -> str:
    # In ASCII: there are more line ends in Unicode than one, at which many a client would split.
    return json.dumps(fields, separators=(",", ":")) + "\n"
