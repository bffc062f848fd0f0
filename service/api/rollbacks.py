"""Routes for going back: to a revision or a tag, to the base and back by the kill switch; and the tags themselves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.api.callers import needs
from service.api.changing import Changing
from service.api.headers import Loaded, Writable, tag
from service.api.problems import responses
from service.api.requests import DryRunQuery, NoQuery, ReasonBody, ReasonQuery, RestoreBody, TagBody, TagName
from service.api.rollback_views import KillSwitchView, RestoreView, TagList, TagView
from service.engine import Engine
from service.ledger import Restored

router = APIRouter()


@router.post("/rollback", dependencies=[needs("admin")], responses=responses(400, 404, 409, 412, 413, 422, 503))
def post_rollback(
    body: RestoreBody,
    engine: Writable,
    asked: Changing,
    response: Response,
    query: Annotated[DryRunQuery, Query()],
) -> RestoreView:
    """Make exactly those edits stand that stood at a revision, or at that of a tag: the same weights, bit for bit.

    Edits that were made since are taken back, and those that were taken back since are returned, unless they have
    expired. `dry_run=true` shows which, with the answers before and after.
    """
    note = asked.note(body.reason, "restore", body.to, query.dry_run)
    done = engine.restore(body.to, note, expected_revision=asked.expected_revision(engine), dry_run=query.dry_run)
    tag(response, done.revision)
    return RestoreView.of(done)


@router.get("/kill-switch", dependencies=[needs("read")], responses=responses(400, 503))
def get_kill_switch(engine: Loaded, response: Response) -> KillSwitchView:
    """Whether the base is served, and nothing changed, and who wanted that why."""
    return _switched(engine, engine.history.switched, response, live=True)


@router.put("/kill-switch", dependencies=[needs("admin")], responses=responses(400, 409, 412, 413, 422, 503))
def put_kill_switch(
    engine: Writable,
    asked: Changing,
    response: Response,
    _: Annotated[NoQuery, Query()],
    body: ReasonBody | None = None,
) -> KillSwitchView:
    """Serve the pristine base, and make no change until it is released, on every replica.

    It waits for nobody: a change that is under way is given up at its next step.
    """
    note = asked.note(body and body.reason, "kill")
    entry = engine.kill(note, expected_revision=asked.expected_revision(engine))
    return _switched(engine, entry, response, live=asked.idempotency_key is None)


@router.delete("/kill-switch", dependencies=[needs("admin")], responses=responses(400, 409, 412, 422, 503))
def delete_kill_switch(
    engine: Writable,
    asked: Changing,
    response: Response,
    query: Annotated[ReasonQuery, Query()],
) -> KillSwitchView:
    """Serve again what was served before, but for what has expired since."""
    note = asked.note(query.reason, "revive")
    entry = engine.revive(note, expected_revision=asked.expected_revision(engine))
    return _switched(engine, entry or engine.history.switched, response, live=asked.idempotency_key is None)


def _switched(engine: Engine, entry: Restored | None, response: Response, *, live: bool) -> KillSwitchView:
    """live: beside who switched it, the state that is live now, not the one that it led to, as a repeat is told it."""
    published = engine.published
    if live or entry is None:
        revision, digest, active = published.revision, published.digest, published.active_edits
    else:
        revision, digest = entry.sequence, entry.state_digest
        active = len(engine.history.active_at(revision))
    tag(response, revision)
    return KillSwitchView.of(entry, revision, digest, active)


@router.get("/tags", dependencies=[needs("read")], responses=responses(400, 503))
def get_tags(engine: Loaded, response: Response) -> TagList:
    """Every tag, newest first."""
    tag(response, engine.published)
    return TagList(items=[TagView.of(tagged) for tagged in engine.history.tags()])


@router.get("/tags/{name}", dependencies=[needs("read")], responses=responses(400, 404, 422, 503))
def get_tag(name: TagName, engine: Loaded, response: Response) -> TagView:
    """One tag."""
    tag(response, engine.published)
    return TagView.of(engine.history.tag(name))


@router.put("/tags/{name}", dependencies=[needs("edit")], responses=responses(400, 404, 409, 412, 413, 422, 503))
def put_tag(
    name: TagName,
    engine: Writable,
    asked: Changing,
    response: Response,
    _: Annotated[NoQuery, Query()],
    body: TagBody | None = None,
) -> TagView:
    """Name a revision, by default the live one. What a tag names can be restored, however much is compacted.

    The tag is an entry of the ledger, and so a revision itself, of the same state.
    """
    body = body or TagBody()
    note = asked.note(body.reason, "tag", name, body.revision)
    tagged = engine.tag(name, body.revision, note, expected_revision=asked.expected_revision(engine))
    tag(response, tagged.sequence if asked.idempotency_key else engine.published)
    return TagView.of(tagged)


@router.delete("/tags/{name}", dependencies=[needs("edit")], responses=responses(400, 404, 409, 412, 422, 503))
def delete_tag(
    name: TagName,
    engine: Writable,
    asked: Changing,
    response: Response,
    query: Annotated[ReasonQuery, Query()],
) -> TagView:
    """Take a name away. The revision stays, but compaction may drop what is needed to restore it."""
    note = asked.note(query.reason, "untag", name)
    tagged = engine.untag(name, note, expected_revision=asked.expected_revision(engine))
    tag(response, tagged.sequence)
    return TagView.of(tagged)
