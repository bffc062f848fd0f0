"""What people ask of the model, and what they are told while it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from editors.continuation import FinishReason, Piece, Wish
from service.engine.requests import Published

Which = Literal["live", "base"]


@dataclass(frozen=True)
class Ask:
    """A prompt, or its tokens, to be continued on one view."""

    prompt: str | tuple[int, ...]
    wish: Wish
    which: Which = "live"


@dataclass(frozen=True)
class Said:
    """Some more of the answer to one of the asks, by its index."""

    index: int
    piece: Piece


@dataclass(frozen=True)
class Ended:
    """The answer to one of the asks is whole."""

    index: int
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


Event = Said | Ended | Exception
"""An exception is the last of them, and ends all answers."""
Listener = Callable[[Event], None]


class Ticket:
    """Asks that are answered together, from one view and its state.

    asks: how many. published: that state; None until the first event is told. deadline: of `time.monotonic`.
    """

    def __init__(self, asks: int, tell: Listener, deadline: float) -> None:
        self._tell, self._over = tell, threading.Event()
        self.asks, self.deadline = asks, deadline
        self.published: Published | None = None

    @property
    def over(self) -> bool:
        """Nobody waits for more."""
        return self._over.is_set()

    def cancel(self) -> None:
        """Nobody wants to be told any more: decoding stops before its next step. From any thread."""
        self._over.set()

    def tell(self, event: Event) -> None:
        """Called by the thread that decodes. An exception is the last event."""
        if self.over:
            return
        try:
            self._tell(event)
        except Exception:  # nobody is there to be told, such as an event loop that was closed
            self.cancel()
        if isinstance(event, Exception):
            self.cancel()
