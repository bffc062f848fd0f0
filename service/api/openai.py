"""`/v1`: completions, chat and models in the shape of OpenAI's, so that existing clients can ask, and check edits.

Two models are listed: the live one by its name, and with `@base` behind it the untouched base.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from service.api.answering import Begin, streamed, whole
from service.api.callers import needs
from service.api.headers import Loaded, tag
from service.api.openai_requests import DEFAULT_MAX_TOKENS, ChatBody, CompletionBody
from service.api.openai_views import ChatShape, Chunks, CompletionShape
from service.api.problems import openai_responses
from service.api.requests import NoQuery
from service.api.streams import STREAM
from service.confidential import note_texts
from service.engine import Ask, Engine, Listener, ModelNotFound, Published, TextTooLong, Ticket, Which

router = APIRouter(prefix="/v1", tags=["OpenAI"])
STARTED = int(time.time())
BASE = "@base"
ANSWERS = {
    **STREAM,
    **openai_responses(400, 404, 413, 422, 429, 500, 503, 504),
}
NoParameters = Annotated[NoQuery, Query()]


@router.get("/models", dependencies=[needs("read")], responses=openai_responses(503))
def get_models(engine: Loaded, response: Response) -> dict[str, Any]:
    """The live model, and the untouched base."""
    tag(response, engine.published)
    return {"object": "list", "data": [_model(name) for name in _names(engine)]}


@router.get("/models/{model:path}", dependencies=[needs("read")], responses=openai_responses(404, 422, 503))
def get_model(model: str, engine: Loaded, response: Response) -> dict[str, Any]:
    """One of the two."""
    _which(model, engine)
    tag(response, engine.published)
    return _model(model)


@router.post("/completions", dependencies=[needs("read")], responses=ANSWERS)
async def post_completion(body: CompletionBody, engine: Loaded, request: Request, _: NoParameters) -> Response:
    """Continue prompts. OpenAI's defaults: temperature 1, a random seed, 16 tokens."""
    which = _which(body.model, engine)
    prompts, choices = body.prompts, body.choices
    echoes = await run_in_threadpool(lambda: [engine.text(each) for each in prompts]) if body.echo else []

    def begin(tell: Listener) -> Ticket:
        most = _limited(engine, body.max_tokens or DEFAULT_MAX_TOKENS)
        wishes = body.wishes(len(prompts) * choices, most, body.logprobs)
        asked = [prompt for prompt in prompts for _ in range(choices)]
        note_texts("generate", prompts=prompts)
        return engine.begin([Ask(prompt, wish, which) for prompt, wish in zip(asked, wishes, strict=True)], tell)

    def shape(published: Published) -> CompletionShape:
        return CompletionShape(body.model, published, choices, body.logprobs is not None, echoes=echoes)

    return await _answered(request, begin, body, shape, len(prompts) * choices)


@router.post("/chat/completions", dependencies=[needs("read")], responses=ANSWERS)
async def post_chat(body: ChatBody, engine: Loaded, request: Request, _: NoParameters) -> Response:
    """Answer chat messages. OpenAI's defaults: temperature 1, a random seed, as many tokens as there is room for."""
    which = _which(body.model, engine)

    def begin(tell: Listener) -> Ticket:
        prompt = engine.chat_prompt([each.as_message() for each in body.messages])
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wishes = body.wishes(body.choices, _limited(engine, body.most_tokens), logprobs)
        note_texts("generate", prompt=prompt)
        return engine.begin([Ask(prompt, wish, which) for wish in wishes], tell)

    def shape(published: Published) -> ChatShape:
        return ChatShape(body.model, published, body.choices, bool(body.logprobs))

    return await _answered(request, begin, body, shape, body.choices)


async def _answered(
    request: Request, begin: Begin, body: CompletionBody | ChatBody, shape: Any, count: int
) -> Response:
    if body.stream:
        usage = body.include_usage
        return await streamed(request, begin, lambda published: Chunks(shape(published), count, usage=usage))
    answers, published = await whole(request, begin)
    response = JSONResponse(shape(published).whole(answers))
    tag(response, published)
    return response


def _limited(engine: Engine, most: int | None) -> int | None:
    limit = engine.limits.new_tokens
    if most is not None and most > limit:
        raise TextTooLong(f"max_tokens may be {limit} at most", field="max_tokens", limit=limit)
    return most


def _names(engine: Engine) -> tuple[str, str]:
    return engine.base.name, engine.base.name + BASE


def _which(model: str, engine: Engine) -> Which:
    """Raises ModelNotFound."""
    names = _names(engine)
    if model not in names:
        raise ModelNotFound(f"there is no model {model!r} here, but {' and '.join(names)}", field="model")
    return "live" if model == names[0] else "base"


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "mend-service"}
