"""`/score`: how probable a text is after a prompt, token by token, on the live model beside the base."""

from __future__ import annotations

import math
from typing import Annotated, Self

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from service.api.callers import needs
from service.api.headers import Loaded, tag
from service.api.problems import responses
from service.api.requests import NoQuery, Question, Text
from service.confidential import note_texts
from service.engine import Scores

router = APIRouter()


class ScoreBody(Question):
    """A prompt, or chat messages, and what is to be scored behind it."""

    prompt: Text | None = Field(None, examples=["The capital of France is"])
    continuation: Text = Field(
        description="What follows the prompt, character for character as `/generate` tells it: mostly it begins with "
        "a space. Of a classifier one of its labels.",
        examples=[" Paris"],
    )


class ScoredTokenView(BaseModel):
    """bytes: of the token, which may be a part of a character; token: the same as text. live, base: its log-probability
    behind what is before it, in nats, of the model itself, before temperature and the like."""

    token: str
    id: int
    bytes: list[int]
    live: float
    base: float


class ScoreView(BaseModel):
    """revision: of the state that live is of. live_nats, base_nats: log-probabilities of the whole continuation."""

    revision: int
    prompt_tokens: int
    tokens: list[ScoredTokenView]
    live_nats: float
    base_nats: float

    @classmethod
    def of(cls, scores: Scores) -> Self:
        return cls(
            revision=scores.published.revision,
            prompt_tokens=scores.prompt_tokens,
            tokens=[
                ScoredTokenView(
                    token=each.spelt.decode(errors="replace"),
                    id=each.id,
                    bytes=list(each.spelt),
                    live=each.live,
                    base=each.base,
                )
                for each in scores.tokens
            ],
            live_nats=math.fsum(each.live for each in scores.tokens),
            base_nats=math.fsum(each.base for each in scores.tokens),
        )


@router.post("/score", dependencies=[needs("read")], responses=responses(400, 413, 422, 500, 503))
def post_score(body: ScoreBody, engine: Loaded, response: Response, _: Annotated[NoQuery, Query()]) -> ScoreView:
    """How probable a given text is after a prompt, token by token: on the live model and on the base, of one revision.

    Nothing is generated or changed. 422 `unknown_token` where the model's tokens cannot spell the text.
    """
    messages = body.messages
    prompt = body.prompt if messages is None else engine.chat_prompt([each.as_message() for each in messages])
    note_texts("score", prompt=prompt, continuation=body.continuation)
    scores = engine.scorer.score(prompt, body.continuation)
    tag(response, scores.published)
    return ScoreView.of(scores)
