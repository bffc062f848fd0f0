"""What all server-sent events have in common."""

from __future__ import annotations

import json
from typing import Any

from fastapi.sse import format_sse_event

PING_EVERY_S = 15.0
"""Between two signs of life of a stream, so that nobody on the way takes it for dead."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "Each event; its data is JSON.",
                    "required": ["data"],
                    "properties": {name: {"type": "string"} for name in ("event", "data", "id")},
                }
            }
        }
    }
}
"""For OpenAPI."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def frame(event: str, data: dict[str, Any], id: str | None = None) -> bytes:
    """One event."""
    # In ASCII: there are more line ends in Unicode than one, at which many a client would split.
    return format_sse_event(data_str=json.dumps(data, separators=(",", ":")), event=event, id=id)
