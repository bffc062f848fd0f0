"""What can be asked of `/generate`. Field names are a contract: add to them, do not rename."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field

from service.api.requests import MAX_TEXT, Question, StrictRequest, Text, validated
from service.engine import Sampling, Wish

MAX_STOPS, MAX_STOP, MAX_LOGPROBS = 8, 256, 20


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_listed)]


class _Generate(StrictRequest):
    """A prompt, or chat messages, to continue. Greedy unless a temperature is given."""

    prompt: Text | None = None
    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31, description="Of so many tokens is sampled; 0: of all.")
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="Over 1: what was said is less likely again.")
    seed: int = Field(0, ge=0, lt=2**63)
    stop: Stops = Field([], description="The text ends before the first of these.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Tell each token with its log-probability, and so many alternatives."
    )
    stream: bool = Field(False, description="Answer by server-sent events, a piece at a time.")
    view: Literal["live", "base", "both"] = "live"
    min_revision: int | None = Field(None, ge=0, lt=2**53, description="Answer from this revision, or a later one.")
    wait_ms: int = Field(2000, ge=0, le=60_000, description="How long to wait until that is live here.")

    def wish(self) -> Wish:
        sampling = Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.seed)
        return Wish(self.max_new_tokens, sampling, tuple(self.stop), self.logprobs)


class GenerateBody(Question, _Generate):
    """A prompt, or chat messages, to continue. Greedy unless a temperature is given."""


class GenerateQuery(_Generate):
    """The same in a URL."""

    messages: str | None = Field(None, max_length=MAX_TEXT, description="The conversation, as JSON.")

    def body(self) -> GenerateBody:
        """Raises RequestValidationError."""
        fields = self.model_dump(exclude_unset=True)
        if self.messages is not None:
            try:
                fields["messages"] = json.loads(self.messages)
            except (ValueError, RecursionError) as error:
                problem = {"type": "json", "loc": ("query", "messages"), "msg": f"is not JSON: {error}"}
                raise RequestValidationError([problem]) from error
        return validated(GenerateBody, fields, "query")
