"""What no route should have to think of: bodies that are too large or too slow, and queries that are not UTF-8."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote_to_bytes

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem

MAX_BODY_BYTES = 2_000_000


BYTES_PER_EDIT = 8_192
"""Of a batch, on the average."""
BATCH_PATH = "/edits/batch"


def arrived_late(within_s: float) -> str:
    return f"the request did not arrive whole within {within_s:g} s (MEND_REQUEST_TIMEOUT_S); send it again, faster"


class LimitsMiddleware:
    """Refuses a body beyond MAX_BODY_BYTES as it arrives, whatever its headers say, and malformed query strings.

    batch_edits: most edits of one batch, whose body may be as much larger. arrives_within_s: for the whole body.
    """

    def __init__(self, app: ASGIApp, batch_edits: int = 0, arrives_within_s: float | None = None) -> None:
        self.app = app
        self._arrives_within_s = arrives_within_s
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
        received, whole = 0, False
        within_s = self._arrives_within_s
        deadline = within_s and asyncio.get_running_loop().time() + within_s

        async def limited() -> Message:
            nonlocal received, whole
            if whole:  # what is waited for from now on is that the client goes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, arrived_late(within_s), {"Connection": "close"}) from error
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"the body may have {limit} bytes at most")
            return message

        await self.app(scope, limited, send)
