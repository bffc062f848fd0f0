"""`/generate`: continue a prompt, or answer chat messages, on the live view, on the base, or on both side by side.

The same answer comes whole, or as server-sent events: a `token` event for every piece, then `done` with the whole
answer, or `error` with the problem. What is refused before the first piece is a problem with its status, as anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from service.api.answering import Answer, streamed, whole
from service.api.callers import needs
from service.api.generation_requests import GenerateBody, GenerateQuery
from service.api.generation_views import (
    GenerateBothView,
    GenerateView,
    OneView,
    PieceView,
    Usage,
    token_views,
)
from service.api.headers import Loaded, tag
from service.api.problems import described_error, responses
from service.api.requests import NoQuery
from service.api.streams import STREAM, frame
from service.confidential import note_texts
from service.engine import Ask, Ended, Engine, Event, Listener, Published, TextTooLong, Ticket

router = APIRouter()
ANSWERS: dict[str, Any] = {"response_model": GenerateView | GenerateBothView, "response_model_exclude_none": True}


def in_url(query: Annotated[GenerateQuery, Query()]) -> GenerateBody:
    return query.body()


@router.get(
    "/generate",
    dependencies=[needs("read")],
    responses={**STREAM, **responses(400, 412, 422, 500, 503, 504)},
    **ANSWERS,
)
async def get_generate(
    asked: Annotated[GenerateBody, Depends(in_url)], engine: Loaded, request: Request, response: Response
) -> Any:
    """Continue a prompt with the live model, the base, or both side by side; with `stream`, by server-sent events."""
    return await _generate(asked, engine, request, response)


@router.post(
    "/generate",
    dependencies=[needs("read")],
    responses={**STREAM, **responses(400, 412, 413, 422, 500, 503, 504)},
    **ANSWERS,
)
async def post_generate(
    asked: GenerateBody, engine: Loaded, request: Request, response: Response, _: Annotated[NoQuery, Query()]
) -> Any:
    """The same for prompts that are too long for a URL, and for chat messages."""
    return await _generate(asked, engine, request, response)


async def _generate(asked: GenerateBody, engine: Engine, request: Request, response: Response) -> Any:
    views = ("live", "base") if asked.view == "both" else (asked.view,)

    def begin(tell: Listener) -> Ticket:
        if asked.min_revision is not None:
            engine.require(asked.min_revision, asked.wait_ms / 1000)
        limit = engine.limits.new_tokens
        if asked.max_new_tokens > limit:
            raise TextTooLong(f"max_new_tokens may be {limit} at most", field="max_new_tokens", limit=limit)
        messages = asked.messages
        prompt = asked.prompt if messages is None else engine.chat_prompt([each.as_message() for each in messages])
        note_texts("generate", prompt=prompt)
        return engine.begin([Ask(prompt, asked.wish(), view) for view in views], tell)

    if asked.stream:
        return await streamed(request, begin, lambda published: _Frames(views, published, asked.logprobs is not None))
    answers, published = await whole(request, begin)
    tag(response, published)
    return _answer(views, answers, published, scored=asked.logprobs is not None)


def _answer(views: Sequence[str], answers: Sequence[Answer], published: Published, *, scored: bool) -> BaseModel:
    shown = [
        OneView(
            text=answer.text,
            finish_reason=answer.ended.finish_reason,
            usage=Usage.of(answer.ended),
            logprobs=token_views(answer.tokens) if scored else None,
        )
        for answer in answers
    ]
    if len(views) > 1:
        return GenerateBothView(live=shown[0], base=shown[1], revision=published.revision)
    return GenerateView(**shown[0].model_dump(), view=views[0], revision=published.revision)


class _Frames:
    """scored: whether tokens are told with their log-probabilities."""

    def __init__(self, views: Sequence[str], published: Published, scored: bool) -> None:
        self._views, self._published, self._scored = views, published, scored
        self._texts = [""] * len(views)
        self._ended: dict[int, Ended] = {}

    def of(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Exception):
            yield frame("error", described_error(event))
        elif isinstance(event, Ended):
            self._ended[event.index] = event
            if len(self._ended) == len(self._views):
                answers = [Answer(self._ended[index], text, []) for index, text in enumerate(self._texts)]
                done = _answer(self._views, answers, self._published, scored=False)
                yield frame("done", done.model_dump(exclude_none=True))
        else:
            self._texts[event.index] += event.piece.text
            piece = PieceView(
                text=event.piece.text,
                view=self._views[event.index],
                revision=self._published.revision,
                logprobs=token_views(event.piece.tokens) if self._scored else None,
            )
            yield frame("token", piece.model_dump(exclude_none=True))
