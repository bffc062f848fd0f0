"""What the ledger remembers: one frozen entry per change of the live weights.

Flow: engine -> Applied | RolledBack | Restored | Tagged -> encode -> JSON bytes in Redis -> decode -> the same entry.
The factor bytes of an applied edit travel beside its entry, never inside; the entry holds their digest.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from service.ledger.errors import EntryInvalid


def _in_utc(moment: datetime) -> datetime:
    if moment.utcoffset() != timedelta(0):
        raise ValueError("must be in UTC")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    # JSON has no NaN and no infinity: refused here rather than found as null after a restart.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Recorded(_Strict):
    """What every entry says.

    sequence: 1, 2, 3…, without gaps; also the revision that the entry leads to.
    created_at: UTC, to the microsecond. state_digest: `sha256:…` of the exact state after this entry.
    idempotency_key, request_digest: of the request, where it was sent with a key.
    """

    sequence: int = Field(ge=1)
    created_at: Moment
    actor: str | None = None
    reason: str | None = None
    state_digest: Digest
    idempotency_key: str | None = None
    request_digest: str | None = None


class InBatch(_Strict):
    """The place of an entry in the batch that it was stored with, all at once.

    position: 1 to size. left_out: in the last entry, by their index in the request, the edits that have no entry, each
    as it was answered: refused, with the measurements, or unchanged.
    """

    id: str
    position: int = Field(ge=1)
    size: int
    left_out: dict[int, dict[str, JsonValue]] = Field(default_factory=dict)

    @property
    def ends(self) -> bool:
        return self.position == self.size


class ChatMessage(_Strict):
    """One turn of a conversation. role: as the model's template knows it."""

    role: str
    content: str


class Applied(_Recorded):
    """An edit went live.

    messages: of which the prompt was made, by the model's chat template. check_forms: see `service.engine.EditRequest`.
    before, after: the greedy answers to `prompt`.
    scale: of the edit, or of what completes it (see `editors.scale`).
    timings_ms: milliseconds per step.
    factors_digest: `sha256:…` of the factor bytes stored beside this entry.
    supersedes: ids of every standing edit in whose place this one is, those included that they had superseded.
    expires_at: when it is to be rolled back by itself.
    state_digest: None inside a batch, which leads to a state of its own only as a whole.
    """

    kind: Literal["applied"] = "applied"
    edit_id: str
    state_digest: Digest | None
    prompt: str
    correction: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    scale: float
    before: str
    after: str
    checks: dict[str, JsonValue] = Field(default_factory=dict)
    timings_ms: dict[str, float] = Field(default_factory=dict)
    factors_digest: Digest
    supersedes: tuple[str, ...] = ()
    batch: InBatch | None = None
    expires_at: Moment | None = None
    messages: tuple[ChatMessage, ...] = ()
    check_forms: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_its_digest(self) -> Self:
        if (self.state_digest is None) != (self.batch is not None and not self.batch.ends):
            raise ValueError("state_digest must be there, but inside a batch it must not")
        return self


class RolledBack(_Recorded):
    """The edit `edit_id` was taken back. expired: because its time had come."""

    kind: Literal["rolled_back"] = "rolled_back"
    edit_id: str
    expired: bool = False


class Restored(_Recorded):
    """Edits were taken back, and others returned, so that what stood at an earlier revision stands again.

    revision: that one; 0 is the base. tag: by which it was named.
    taken, returned: ids of the edits, in the order of application. expired: of those that had to stay away.
    kill_switch: that was engaged, or released, by this.
    """

    kind: Literal["restored"] = "restored"
    revision: int = Field(ge=0)
    tag: str | None = None
    taken: tuple[str, ...]
    returned: tuple[str, ...]
    expired: tuple[str, ...] = ()
    kill_switch: Literal["engaged", "released"] | None = None


class Tagged(_Recorded):
    """A revision was given a name. revision: None where the name was taken from it."""

    kind: Literal["tagged"] = "tagged"
    name: str
    revision: int | None


Entry = Annotated[Applied | RolledBack | Restored | Tagged, Field(discriminator="kind")]

_entries: TypeAdapter[Applied | RolledBack | Restored | Tagged] = TypeAdapter(Entry)


def digest_of(factors: bytes) -> str:
    """`sha256:…` of factor bytes, as `Applied.factors_digest` holds it."""
    return f"sha256:{hashlib.sha256(factors).hexdigest()}"


def encode(entry: Entry) -> bytes:
    """One entry as JSON in UTF-8; equal entries give equal bytes.

    Raises EntryInvalid when it would not read back as the same entry: stored, it would stop every later replay.
    """
    try:
        raw = entry.model_dump_json().encode()
        same = decode(raw) == entry
    except ValueError as error:
        raise EntryInvalid(f"entry {entry.sequence} cannot be stored: {error}", sequence=entry.sequence) from error
    if not same:
        raise EntryInvalid(f"entry {entry.sequence} would not read back the same", sequence=entry.sequence)
    return raw


def decode(raw: bytes) -> Entry:
    """The entry that `encode` wrote. Raises ValueError, in one line, for anything else."""
    try:
        return _entries.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field}: {first['msg']}" if field else first["msg"]) from error
