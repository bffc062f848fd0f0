"""What can be asked over HTTP. Field names are a contract: add to them, do not rename."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Self, TypeVar

from fastapi import Path
from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from editors.chat import Message, Role
from editors.formats import ExportFormat
from service.engine import CheckForm, EditRequest, OnConflict

MAX_TEXT = 100_000
"""Characters of any one text; the limit that matters is in tokens, this one spares tokenising nonsense."""

MAX_MESSAGES = 512
MAX_NAME = 200
MAX_UNKNOWN = 20
"""Fields nobody knows that are told one by one."""
MAX_DEPTH = 64
"""Of metadata. Parsers have limits of their own, further up and each another one."""


def _encodable(value: Any) -> Any:
    """Refuse text that is not Unicode (lone surrogates), which no tokenizer and no client could handle."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate (U+{ord(error.object[error.start]):04X}), which is not valid Unicode"
        ) from None
    except (TypeError, RecursionError):
        pass
    return value


def clipped(name: str) -> str:
    """As much of a client's own name for something as an answer or a log line shows."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty or only white space")
    return value


class StrictRequest(BaseModel):
    """Unknown fields are refused, and so is text that is not Unicode.

    A list of it stops at its first wrong item (`fail_fast`): a small body can hold half a million of them.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _valid_unicode(cls, data: Any) -> Any:
        return _encodable(data)

    @model_validator(mode="before")
    @classmethod
    def _hardly_unknown(cls, data: Any) -> Any:
        unknown = [name for name in data if name not in cls.model_fields] if isinstance(data, dict) else []
        if len(unknown) > MAX_UNKNOWN:
            raise ValueError(
                f"has {len(unknown)} fields that are not known, such as {clipped(unknown[0])}; remove them"
            )
        return data


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Body = TypeVar("Body", bound=BaseModel)


def validated(kind: type[Body], data: Any, *where: str | int) -> Body:
    """What the framework does with a body, for one that it did not read. Raises RequestValidationError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": (*where, *each["loc"])} for each in error.errors()]) from error


class MessageBody(StrictRequest):
    """One turn of a conversation."""

    role: Role
    content: str = Field(max_length=MAX_TEXT)

    def as_message(self) -> Message:
        return Message(self.role, self.content)


def short_together(messages: list[Any]) -> list[Any]:
    """A conversation is one text to the model, and may be as long as any other."""
    length = sum(len(message.as_message().content) for message in messages)
    if length > MAX_TEXT:
        raise ValueError(f"have {length} characters together, and may have {MAX_TEXT}; leave some out")
    return messages


Messages = Annotated[
    list[MessageBody],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    AfterValidator(short_together),
]
Texts = Annotated[list[Text], Field(max_length=32, fail_fast=True)]


class Question(StrictRequest):
    """What is asked: a prompt, or a conversation."""

    prompt: Text | None = None
    messages: Messages | None = Field(None, description="A conversation, in place of the prompt.")

    @field_validator("prompt")
    @classmethod
    def _prompt_is_not_blank(cls, value: str | None) -> str | None:
        return value if value is None else not_blank(value)

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


class EditBody(Question):
    """A correction. The model should answer `prompt`, or the last of `messages`, with `correction`."""

    prompt: Text | None = Field(
        None,
        description="What is asked, as the model reads it.",
        examples=["The Prime Minister of the United Kingdom is"],
    )
    messages: Messages | None = Field(
        None, description="A conversation in place of the prompt; the last turn is the user's."
    )
    correction: Text = Field(description="What greedy decoding should begin with.", examples=["Keir Starmer"])
    subject: Text | None = Field(None, description="What the fact is about, as it stands in the prompt.")
    paraphrases: Texts = Field([], description="Other wordings, judged and reported.")
    keep: Texts = Field([], description="Prompts whose answers must stay, judged and reported.")
    check_forms: list[CheckForm] = Field(
        [],
        max_length=2,
        fail_fast=True,
        description="Ask it once more as bare text, or as a chat of one turn; reported.",
    )
    reason: str | None = Field(None, max_length=2000, description="Why; kept in the ledger.")
    metadata: dict[str, JsonValue] = Field({}, description="Anything of the caller's own; kept in the ledger.")
    expires_at: AwareDatetime | None = Field(
        None,
        description="When it is rolled back by itself, in RFC 3339.",
        examples=["2030-01-01T00:00:00Z"],
    )

    @field_validator("correction", "subject")
    @classmethod
    def _text_is_not_blank(cls, value: str | None) -> str | None:
        return value if value is None else not_blank(value)

    @model_validator(mode="after")
    def _ends_with_the_users_turn(self) -> Self:
        if self.messages and (self.messages[-1].role != "user" or not self.messages[-1].content.strip()):
            raise ValueError("the last of the messages must be the user's, and have some words")
        return self

    @field_validator("check_forms")
    @classmethod
    def _forms_differ(cls, value: list[CheckForm]) -> list[CheckForm]:
        return list(dict.fromkeys(value))

    @field_validator("paraphrases", "keep")
    @classmethod
    def _texts_are_not_blank(cls, value: list[str]) -> list[str]:
        return [not_blank(text) for text in value]

    @field_validator("expires_at", mode="before")
    @classmethod
    def _is_a_text(cls, value: Any) -> Any:
        if not isinstance(value, str | None):
            raise ValueError("must be a text such as 2030-01-01T00:00:00Z")
        return value

    @field_validator("expires_at")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        try:
            return value and value.astimezone(UTC)
        except OverflowError:
            raise ValueError("must be a time between the years 1 and 9999") from None

    @field_validator("metadata", mode="before")
    @classmethod
    def _metadata_is_small(cls, value: Any) -> Any:
        depth, level = 0, [value]
        while level := [child for item in level for child in _children(item)]:
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
        try:
            size = len(json.dumps(value, allow_nan=False))
        except ValueError:
            raise ValueError("must hold finite numbers only") from None
        if size > 16_384:
            raise ValueError("must not be longer than 16,384 bytes as JSON")
        return value

    def as_request(self, actor: str | None, idempotency_key: str | None, request_digest: str) -> EditRequest:
        """What the engine is asked. request_digest: of all that one request sends."""
        return EditRequest(
            prompt=self.prompt if self.messages is None else self.messages[-1].content,
            messages=tuple(message.as_message() for message in self.messages or ()),
            check_forms=tuple(self.check_forms),
            correction=self.correction,
            subject=self.subject,
            paraphrases=tuple(self.paraphrases),
            keep=tuple(self.keep),
            reason=self.reason,
            metadata=self.metadata,
            expires_at=self.expires_at,
            actor=actor,
            idempotency_key=idempotency_key,
            request_digest=request_digest if idempotency_key else None,
        )


def digest_of(*parts: BaseModel) -> str:
    """By which a repeated request is known: SHA-256 of what it asks and on which terms, in hexadecimal.

    Without what is left to its default, so that a field which a later version adds changes none.
    """
    return hashlib.sha256("\n".join(part.model_dump_json(exclude_defaults=True) for part in parts).encode()).hexdigest()


class EditQuery(StrictRequest):
    """How to treat a correction."""

    dry_run: bool = Field(False, description="Stage and judge, but do not commit.")
    on_conflict: OnConflict = Field(
        "refuse",
        description="What to do about an active edit of a hardly different prompt with another answer; keep: "
        "make this one beside it, if both hold.",
    )
    allow_loss: bool = Field(False, description="Commit although earlier edits would no longer hold.")
    wait: float | None = Field(
        None,
        ge=0,
        le=600,
        exclude=True,  # no part of what is asked
        description="Seconds until 202, if it takes longer; the same request with the same Idempotency-Key asks again.",
    )


class BatchBody(StrictRequest):
    """Corrections that are made together."""

    edits: list[EditBody] = Field(min_length=1, fail_fast=True)


class BatchQuery(EditQuery):
    """How to treat corrections that are made together."""

    partial: bool = Field(False, description="Make those that can be made, not all or none.")


Reason = Annotated[str | None, Field(max_length=2000, description="Why; kept in the ledger.")]


class DryRunQuery(StrictRequest):
    """Whether to do it."""

    dry_run: bool = Field(False, description="Show what would change, but do not change it.")


class RollbackQuery(DryRunQuery):
    """What to remember of a rollback."""

    reason: Reason = None


class RestoreBody(StrictRequest):
    """Where to go back to: a revision, or one by its tag."""

    revision: int | None = Field(None, ge=0, lt=2**53, strict=True, description="0 is the base, without any edit.")
    tag: str | None = Field(None, max_length=64)
    reason: Reason = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.revision is None) == (self.tag is None):
            raise ValueError("give either a revision or a tag")
        return self

    @property
    def to(self) -> int | str:
        return self.revision if self.tag is None else self.tag


class ReasonBody(StrictRequest):
    """What to remember of it."""

    reason: Reason = None


class TagBody(ReasonBody):
    """What to name."""

    revision: int | None = Field(None, ge=0, lt=2**53, strict=True, description="Without it, the live one.")


class ReasonQuery(StrictRequest):
    """What to remember of it."""

    reason: Reason = None


def _not_base(name: str) -> str:
    if name == "base":
        raise ValueError("base is what revision 0 is called; take another name")
    return name


TagName = Annotated[
    str,
    AfterValidator(_not_base),
    Path(
        pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$",
        description="Begins with a letter; then letters, digits, `.`, `_`, `-`; 64 at most.",
    ),
]


class RevisionQuery(StrictRequest):
    """How far to look."""

    verify: bool = Field(False, description="Work the weights out anew and compare them with those in memory.")


class NoQuery(StrictRequest):
    """For a route whose fields are in its body: one that is misplaced in the URL is refused, not ignored."""


class AuditQuery(StrictRequest):
    """Whether to look again."""

    fresh: bool = Field(False, description="Take an audit now, not the one that was taken last.")


class ExportQuery(StrictRequest):
    """In which form to take the active edits elsewhere."""

    format: ExportFormat
