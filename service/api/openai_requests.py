"""What OpenAI's clients ask under `/v1`: what is served here, what is ignored, and what is refused by name.

Ignored is what changes no answer; whatever would change it and is not served is refused, as is what nobody knows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from editors.chat import Message
from service.api.generation_requests import MAX_LOGPROBS, Stops
from service.api.requests import MAX_MESSAGES, MAX_TEXT, StrictRequest, short_together
from service.engine import Sampling, Wish

MAX_CHOICES, MAX_PROMPTS, DEFAULT_MAX_TOKENS = 16, 64, 16
SEED_BITS = 63


def _only(*served: Any) -> Any:
    """A parameter that may be sent as long as it asks for nothing."""

    def check(value: Any) -> Any:
        if value not in served:
            raise ValueError("is not supported by this service; leave it out")
        return value

    return Annotated[Any, AfterValidator(check)]


Absent = _only(None)
Ignored = Any


class StreamOptions(StrictRequest):
    """include_usage: a last chunk tells how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class _Asked(StrictRequest):
    model: str = Field(max_length=256)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="Not of OpenAI; as in `/generate`.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Not of OpenAI; as in `/generate`.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    frequency_penalty: _only(None, 0) = None
    presence_penalty: _only(None, 0) = None
    logit_bias: _only(None, {}) = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wishes(self, count: int, max_tokens: int | None, logprobs: int | None) -> Iterator[Wish]:
        """How each of so many choices is decoded: with OpenAI's own defaults, and a seed of its own."""
        seed = secrets.randbits(SEED_BITS) if self.seed is None else self.seed
        for number in range(count):
            sampling = Sampling(
                # Nothing is left to draw from but the best.
                temperature=0.0 if self.top_p == 0 else 1.0 if self.temperature is None else self.temperature,
                top_p=self.top_p or 1.0,
                top_k=self.top_k or 0,
                repetition_penalty=self.repetition_penalty or 1.0,
                seed=(seed + number) % 2**SEED_BITS,
            )
            yield Wish(max_tokens, sampling, tuple(self.stop or ()), logprobs)

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for a stream; send stream=true too")
        return self


def _several(value: Any) -> Any:
    """A prompt is a text or a list of tokens; several are a list of those."""
    return [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])) else value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


PromptText = Annotated[str, Field(max_length=MAX_TEXT)]
PromptTokens = Annotated[list[int], Field(min_length=1, max_length=MAX_TEXT, fail_fast=True)]


class CompletionBody(_Asked):
    """A prompt to continue, or several."""

    prompt: Annotated[
        list[PromptText | PromptTokens],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        BeforeValidator(_several),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: _only(None, "") = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        if self.best_of not in (None, self.choices):
            raise ValueError("best_of other than n is not supported by this service; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported by this service; ask for one of both")
        return self


class TextPart(StrictRequest):
    """A part of what a message says."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)


class ChatMessage(StrictRequest):
    """One turn of a conversation. Tools are not served."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_parts)]
    name: Ignored = None
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: _only(None, []) = None

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return Message(role, "".join(part.text for part in self.content))


class ChatBody(_Asked):
    """A conversation to answer."""

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        AfterValidator(short_together),
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: _only(None, {"type": "text"}) = None
    modalities: _only(None, ["text"]) = None
    tools: _only(None, []) = None
    tool_choice: _only(None, "none", "auto") = None
    functions: _only(None, []) = None
    function_call: _only(None, "none", "auto") = None
    audio: Absent = None
    moderation: Absent = None
    prediction: Absent = None
    reasoning_effort: _only(None, "none") = None
    verbosity: _only(None, "medium") = None
    web_search_options: Absent = None
    parallel_tool_calls: Ignored = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _alternatives_are_of_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs=true")
        return self
