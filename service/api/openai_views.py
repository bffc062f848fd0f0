"""Answers in OpenAI's shape, whole and as chunks.

`system_fingerprint` names the revision and the digest of the state that answered. A text whose time was up ends with
the `finish_reason` that OpenAI has for it, `length`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import format_sse_event

from service.api.answering import Answer
from service.api.generation_views import TokenView
from service.api.problems import described_error, openai_error
from service.engine import Ended, Event, Published, Scored

FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}
END = format_sse_event(data_str="[DONE]")

Fields = dict[str, Any]


@dataclass
class _Shape:
    """model: as it was asked for. choices: of every prompt. scored: whether log-probabilities are told."""

    model: str
    published: Published
    choices: int
    scored: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: Sequence[Fields]) -> Fields:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"mend-{self.published.revision}-{short_digest(self.published)}",
            "choices": list(choices),
        }

    def whole(self, answers: Sequence[Answer]) -> Fields:
        return self.body(self.kind, map(self.choice, answers)) | {"usage": self.usage([each.ended for each in answers])}

    def usage(self, ended: Sequence[Ended]) -> Fields:
        """A prompt counts once, however many choices it has."""
        prompt = sum(each.prompt_tokens for each in ended if each.index % self.choices == 0)
        completion = sum(each.completion_tokens for each in ended)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass
class CompletionShape(_Shape):
    """echoes: what stands before the text of every prompt's choices."""

    echoes: Sequence[str] = ()
    prefix = "cmpl"
    kind = chunk = "text_completion"

    def choice(self, answer: Answer) -> Fields:
        text = self._echo(answer.ended.index) + answer.text
        return self._choice(answer.ended.index, text, answer.tokens, FINISH_REASONS[answer.ended.finish_reason])

    def opening(self, index: int) -> Fields | None:
        echo = self._echo(index)
        return self._choice(index, echo) if echo else None

    def piece(self, index: int, text: str, tokens: Sequence[Scored]) -> Fields:
        return self._choice(index, text, tokens)

    def closing(self, index: int, reason: str) -> Fields:
        return self._choice(index, "", (), reason)

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.choices] if self.echoes else ""

    def _choice(self, index: int, text: str, tokens: Sequence[Scored] = (), reason: str | None = None) -> Fields:
        logprobs = self._logprobs(tokens) if self.scored and (tokens or reason is None) else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Scored]) -> Fields:
        """In the old form. The token that was said is always among the alternatives."""
        return {
            "tokens": [_name(each) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [{_name(other): other.logprob for other in (*each.top, each)} for each in tokens],
            "text_offset": [each.offset for each in tokens],
        }


@dataclass
class ChatShape(_Shape):
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, answer: Answer) -> Fields:
        return {
            "index": answer.ended.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": FINISH_REASONS[answer.ended.finish_reason],
        }

    def opening(self, index: int) -> Fields | None:
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, tokens: Sequence[Scored]) -> Fields:
        return self._delta(index, {"content": text}) | {"logprobs": self._logprobs(tokens)}

    def closing(self, index: int, reason: str) -> Fields:
        return self._delta(index, {}) | {"finish_reason": reason}

    def _delta(self, index: int, delta: Fields) -> Fields:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[Scored]) -> Fields | None:
        if not self.scored:
            return None
        content = [_scored(each) | {"top_logprobs": [_scored(other) for other in each.top]} for each in tokens]
        return {"content": content, "refusal": None}


class Chunks:
    """The same in chunks, as they are streamed. count: of all choices. usage: whether it is told at the end."""

    def __init__(self, shape: CompletionShape | ChatShape, count: int, *, usage: bool) -> None:
        self._shape, self._count, self._usage = shape, count, usage
        self._opened: set[int] = set()
        self._ended: list[Ended] = []

    def of(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Exception):
            problem = described_error(event)
            yield _data(openai_error(problem["code"], problem["detail"], problem))
            return
        if event.index not in self._opened:
            self._opened.add(event.index)
            if opening := self._shape.opening(event.index):
                yield self._chunk(opening)
        if not isinstance(event, Ended):
            yield self._chunk(self._shape.piece(event.index, event.piece.text, event.piece.tokens))
            return
        yield self._chunk(self._shape.closing(event.index, FINISH_REASONS[event.finish_reason]))
        self._ended.append(event)
        if len(self._ended) == self._count:
            if self._usage:
                yield _data(self._shape.body(self._shape.chunk, []) | {"usage": self._shape.usage(self._ended)})
            yield END

    def _chunk(self, choice: Fields) -> bytes:
        return _data(self._shape.body(self._shape.chunk, [choice]) | ({"usage": None} if self._usage else {}))


def short_digest(published: Published) -> str:
    return published.digest.removeprefix("sha256:")[:12]


def _name(token: Scored) -> str:
    """A token as a string that is its own alone, also where it is a part of a character."""
    try:
        return token.spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.spelt)


def _scored(token: Scored) -> Fields:
    view = TokenView.of(token)
    return {"token": view.token, "logprob": view.logprob, "bytes": view.bytes}


def _data(fields: Fields) -> bytes:
    # In ASCII: there are more line ends in Unicode than one, at which many a client would split.
    return format_sse_event(data_str=json.dumps(fields, separators=(",", ":")))
