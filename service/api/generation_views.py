"""What `/generate` answers. Field names are a contract: add to them, do not rename."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel

from service.engine import Ended, FinishReason, Scored


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, *ended: Ended) -> Self:
        prompt, completion = sum(each.prompt_tokens for each in ended), sum(each.completion_tokens for each in ended)
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class TokenView(BaseModel):
    """bytes: of the token, which may be a part of a character; token: the same as text. logprob: in nats, of the model
    itself, before temperature and the like. top: the most probable tokens at this place."""

    token: str
    id: int
    logprob: float
    bytes: list[int]
    top: list[TokenView] | None = None

    @classmethod
    def of(cls, scored: Scored, *, top: bool = True) -> Self:
        return cls(
            token=scored.spelt.decode(errors="replace"),
            id=scored.id,
            logprob=scored.logprob,
            bytes=list(scored.spelt),
            top=[cls.of(each, top=False) for each in scored.top] if top else None,
        )


def token_views(tokens: Iterable[Scored]) -> list[TokenView]:
    return [TokenView.of(each) for each in tokens]


class OneView(BaseModel):
    """text: the continuation alone. finish_reason: `timeout` when there was no time for more."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenView] | None = None


class GenerateView(OneView):
    """revision: of the state that produced it."""

    view: Literal["live", "base"]
    revision: int


class GenerateBothView(BaseModel):
    live: OneView
    base: OneView
    view: Literal["both"] = "both"
    revision: int


class PieceView(BaseModel):
    """Some more of a text, as the data of a `token` event."""

    text: str
    view: Literal["live", "base"]
    revision: int
    logprobs: list[TokenView] | None = None
