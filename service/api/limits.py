"""What no route should have to think of: bodies that are too large, and query strings that are not UTF-8."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem

MAX_BODY_BYTES = 2_000_000


BYTES_PER_EDIT = 8_192
"""Of a batch, on the average."""
BATCH_PATH = "/edits/batch"


class LimitsMiddleware:
    """Refuses a body beyond MAX_BODY_BYTES as it arrives, whatever its headers say, and malformed query strings.

    batch_edits: most edits of one batch, whose body may be as much larger.
    """

    def __init__(self, app: ASGIApp, batch_edits: int = 0) -> None:
        self.app = app
        self._batch_bytes = max(MAX_BODY_BYTES, batch_edits * BYTES_PER_EDIT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            unquote_to_bytes(scope.get("query_string", b"")).decode()
        except UnicodeDecodeError as error:
            answer = problem(scope["path"], "invalid_utf8", f"the query string is not UTF-8 at byte {error.start}")
            await answer(scope, receive, send)
            return
        limit = self._batch_bytes if scope["path"] == BATCH_PATH else MAX_BODY_BYTES
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            answer = problem(scope["path"], "body_too_large", f"the body may have {limit} bytes at most")
            await answer(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"the body may have {limit} bytes at most")
            return message

        await self.app(scope, limited, send)
