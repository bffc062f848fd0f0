"""What may be asked of the model: texts with words in them, within the limits and the model's own positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editors.base_model import BaseModel
from editors.chat import Message, chat_prompt, question_of
from editors.errors import EmptyTextError
from editors.text import Tokens
from service.engine.answers import Answers
from service.engine.asking import Ask
from service.engine.errors import TextTooLong, UnknownToken
from service.engine.requests import CheckForm, EditRequest, Limits


def asked(base: BaseModel, request: EditRequest, text: str) -> str:
    """Another text, as it is asked of an edit like this one. Raises ChatRefused."""
    if not request.messages:
        return text
    return chat_prompt(base.tokenizer, (*request.messages[:-1], Message("user", text)))


def in_form(base: BaseModel, request: EditRequest, form: CheckForm) -> str:
    """What an edit asks, bare or as a chat. Raises ChatRefused, NoChatTemplate."""
    if form == "text":
        return request.messages[-1].content if request.messages else request.prompt
    return request.prompt if request.messages else chat_prompt(base.tokenizer, (Message("user", request.prompt),))


class Texts:
    def __init__(self, base: BaseModel, answers: Answers, limits: Limits) -> None:
        self._base, self._answers, self._limits = base, answers, limits
        self._positions: int | None = getattr(base.model.config, "max_position_embeddings", None)

    def encode(self, request: EditRequest) -> Tokens:
        """Tokens of a prompt and its correction.

        Raises EmptyTextError, UnknownLabel, SubjectNotFound, TextTooLong, ChatRefused, NoChatTemplate.
        """
        question = question_of(self._base.tokenizer, request.prompt, request.messages) if request.messages else None
        tokens = self._base.encode(request.prompt, request.correction, request.subject, question)
        length = self._answers.length(tokens)
        self.check("prompt", request.prompt, length)
        if len(tokens.target) > self._limits.correction_tokens:
            raise TextTooLong(
                f"correction has {len(tokens.target)} tokens, more than {self._limits.correction_tokens}; shorten it",
                field="correction",
                tokens=len(tokens.target),
                limit=self._limits.correction_tokens,
            )
        for name in ("paraphrases", "keep"):
            for text in getattr(request, name):
                self.check(name, asked(self._base, request, text), length)
        for form in request.check_forms:
            self.check("check_forms", in_form(self._base, request, form), length)
        return tokens

    def put(self, request: EditRequest) -> EditRequest:
        """With its prompt as the model reads it, which of chat messages is the template's. Raises ChatRefused."""
        if not request.messages:
            return request
        return replace(request, prompt=chat_prompt(self._base.tokenizer, request.messages))

    def worded(self, ask: Ask) -> tuple[Ask, tuple[int, ...]]:
        """An ask with the tokens of its prompt, and with as many to follow as there is room for if it names no number.

        Raises EmptyTextError, TextTooLong, UnknownToken.
        """
        wanted = ask.wish.max_new_tokens
        if isinstance(ask.prompt, str):
            ids = self.check("prompt", ask.prompt, wanted or 1)
        else:
            ids = ask.prompt
            self._check_tokens(ids)
            self.check_length("prompt", len(ids), wanted or 1)
        if wanted is None:
            room = self._limits.new_tokens
            if self._positions is not None and self._base.kind == "decoder":
                room = min(room, self._positions - len(ids))
            ask = replace(ask, wish=replace(ask.wish, max_new_tokens=room))
        return ask, ids

    def read(self, ids: Sequence[int]) -> str:
        """What tokens say. Raises UnknownToken."""
        self._check_tokens(ids)
        return self._base.tokenizer.decode(ids)

    def _check_tokens(self, ids: Sequence[int]) -> None:
        words = self._base.model.get_input_embeddings().num_embeddings
        if not all(0 <= token < words for token in ids):
            raise UnknownToken(f"the model's tokens are 0 to {words - 1}; send some of these, or text", field="prompt")

    def check(self, name: str, text: str, new_tokens: int) -> tuple[int, ...]:
        """Tokens of a prompt; refused without words, beyond the limit, or without positions for what is to follow."""
        if not text.strip():
            raise EmptyTextError(f"{name} is empty; give it some words", field=name)
        ids = self._base.encode(text).prompt
        self.check_length(name, len(ids), new_tokens)
        return ids

    def check_length(self, name: str, tokens: int, new_tokens: int) -> None:
        """Refuse a prompt of so many tokens, with so many to follow it, beyond the limit or the model's positions."""
        if tokens > self._limits.prompt_tokens:
            raise TextTooLong(
                f"{name} has {tokens} tokens, more than {self._limits.prompt_tokens}; shorten it",
                field=name,
                tokens=tokens,
                limit=self._limits.prompt_tokens,
            )
        new_tokens = new_tokens if self._base.kind == "decoder" else 0  # only there do they follow in the same text
        if self._positions is not None and tokens + new_tokens > self._positions:
            raise TextTooLong(
                f"{name} has {tokens} tokens, which with {new_tokens} to follow is more than the model's "
                f"{self._positions} positions; shorten it, or ask for fewer",
                field=name,
                tokens=tokens + new_tokens,
                limit=self._positions,
            )

    def check_answer(self, name: str, tokens: Tokens) -> None:
        """Refuse an answer that is longer than what may be generated, or than a decoder of its own has positions."""
        count, limit = len(tokens.target), self._limits.new_tokens
        if self._positions is not None and tokens.decoder_inputs:
            before = len(tokens.decoder_inputs) - count  # the last one is not read
            limit = min(limit, self._positions - before)
        if count > limit:
            raise TextTooLong(
                f"{name} has {count} tokens, more than {limit}; shorten it", field=name, tokens=count, limit=limit
            )
