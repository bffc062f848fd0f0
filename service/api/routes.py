"""The routes: each validates, calls the engine once, and renders."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from service.api.archive import ArchiveResponse, archived
from service.api.callers import Asking, needs
from service.api.changing import Changing
from service.api.headers import Loaded, Writable, describe, tag
from service.api.listing import EditsQuery
from service.api.problems import responses
from service.api.requests import (
    AuditQuery,
    EditBody,
    EditQuery,
    ExportQuery,
    RevisionQuery,
    RollbackQuery,
    digest_of,
)
from service.api.rollback_views import RollbackView
from service.api.views import (
    AuditSummary,
    AuditView,
    BaseModelView,
    CapacityView,
    EditorView,
    EditPage,
    EditView,
    Health,
    ModelView,
    Pending,
    RevisionView,
)
from service.api.waiting import Waited
from service.confidential import note_texts

router = APIRouter()


@router.post(
    "/edits",
    dependencies=[needs("edit")],
    status_code=201,
    response_model=EditView,
    responses={200: {"model": EditView, "description": "Nothing was changed: already true, or a dry run"},
               202: {"model": Pending, "description": "Not done within `wait` seconds"},
               **responses(400, 409, 412, 413, 422, 503)},
)  # fmt: skip
def post_edit(
    body: EditBody,
    engine: Writable,
    asked: Changing,
    waiting: Waited,
    response: Response,
    query: Annotated[EditQuery, Query()],
) -> Any:
    """Correct a fact: stage it, judge it, write it to the ledger, publish it.

    201 with the edit; 200 when the model already answers so, or for a dry run; 422 with the measurements when the
    edit does not take or would break the guard's budget, 409 when it would break earlier edits: then nothing was
    changed. An edit of the same prompt is superseded, and comes back when this one is rolled back.
    """
    digest = digest_of(body, query)
    request = body.as_request(asked.actor, asked.idempotency_key, digest)
    revision = asked.expected_revision(engine)
    note_texts("edit", prompt=body.prompt, correction=body.correction)
    outcome = waiting.made(
        engine,
        asked.idempotency_key,
        digest,
        query.wait,
        lambda: engine.apply(request, expected_revision=revision, **query.model_dump()),
    )
    if isinstance(outcome, JSONResponse):
        return outcome
    describe(response, outcome)
    if outcome.applied is not None and outcome.committed:
        response.headers["Location"] = f"/edits/{outcome.applied.edit_id}"
    return EditView.of_outcome(outcome, body)


@router.get("/edits", dependencies=[needs("read")], responses=responses(400, 422, 503))
def get_edits(query: Annotated[EditsQuery, Query()], engine: Loaded, response: Response) -> EditPage:
    """List edits, newest first."""
    items: list[EditView] = []
    more = False
    for edit in engine.history.newest_first():
        if not query.picks(edit):
            continue
        if len(items) == query.limit:
            more = True
            break
        items.append(EditView.of_edit(edit))
    tag(response, engine.published)
    return EditPage(items=items, next_cursor=str(items[-1].revision) if more else None)


@router.get("/edits/audit", dependencies=[needs("read")], responses=responses(400, 422, 503))
def get_audit(query: Annotated[AuditQuery, Query()], engine: Loaded, caller: Asking, response: Response) -> AuditView:
    """Does every active edit still hold, with what margin, and which edit took those that do not?

    The last audit of the background task; one is taken now if there was none, or it is to be `fresh`, which takes a
    key of scope edit.
    """
    if query.fresh:
        caller.demand("edit")
    audit = engine.last_audit
    if audit is None or query.fresh:
        audit = engine.audit()
    tag(response, audit.published)
    return AuditView.of(audit, engine.published)


@router.get("/edits/{edit_id}", dependencies=[needs("read")], responses=responses(400, 404, 422, 503))
def get_edit(edit_id: str, engine: Loaded, response: Response) -> EditView:
    """One edit, with everything that was measured when it was judged."""
    tag(response, engine.published)
    return EditView.of_edit(engine.history.find(edit_id))


@router.delete("/edits/{edit_id}", dependencies=[needs("edit")], responses=responses(400, 404, 409, 412, 422, 503))
def delete_edit(
    edit_id: str,
    engine: Writable,
    asked: Changing,
    response: Response,
    query: Annotated[RollbackQuery, Query()],
) -> RollbackView:
    """Roll one edit back, exactly; what it superseded comes back. The ledger keeps both the edit and its rollback.

    `dry_run=true` shows what would change, with the answers before and after.
    """
    note = asked.note(query.reason, "rollback", edit_id, query.dry_run)
    done = engine.rollback(edit_id, note, expected_revision=asked.expected_revision(engine), dry_run=query.dry_run)
    tag(response, done.revision)
    return RollbackView.of(done, engine.history.find(edit_id))


@router.get("/model", dependencies=[needs("read")], responses=responses(503))
def get_model(engine: Loaded, response: Response) -> ModelView:
    """What is loaded, and the digest of the exact state of its weights."""
    published = engine.published
    base, checkpoint = engine.base, engine.checkpoint
    tag(response, published)
    return ModelView(
        base_model=BaseModelView(ref=base.name, kind=base.kind, digest=base.digest, parameters=base.parameters),
        editor=EditorView(
            name=checkpoint.name,
            digest=checkpoint.digest,
            aggregate=checkpoint.aggregate,
            trained=checkpoint.trained,
            notice=checkpoint.notice,
        ),
        revision=published.revision,
        active_edits=published.active_edits,
        digest=published.digest,
        capacity=CapacityView.of(published.fullness),
        audit=engine.last_audit and AuditSummary.of(engine.last_audit),
        kill_switch_engaged=engine.history.killed is not None,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )


@router.get("/revision", dependencies=[needs("read")], responses=responses(400, 422, 503))
def get_revision(
    query: Annotated[RevisionQuery, Query()], engine: Loaded, caller: Asking, request: Request, response: Response
) -> RevisionView:
    """What is live here, and how far behind the ledger it is. Cheap to poll, unless it is to `verify`, which takes a
    key of scope edit."""
    if query.verify:
        caller.demand("edit")
    proof = engine.prove() if query.verify else None
    published = proof.published if proof else engine.published
    tag(response, published)
    return RevisionView.of(published, request.app.state.service.head(), proof and proof.weights_digest)


@router.get(
    "/export",
    dependencies=[needs("admin")],
    status_code=200,
    response_class=ArchiveResponse,
    responses=responses(400, 409, 422, 503, 507),
)
def get_export(query: Annotated[ExportQuery, Query()], engine: Loaded) -> ArchiveResponse:
    """Take the active edits elsewhere, as a zip: a PEFT adapter, a merged model, or the factors of each edit.

    `edits.json` in it names the revision, the digest of the state, and the edits.
    """
    index, zipped = archived(lambda folder: engine.export(query.format, folder))
    response = ArchiveResponse(zipped, f"mend-{query.format}-{index['revision']}.zip")
    tag(response, index["revision"])
    return response


@router.get("/livez")
async def get_livez() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses={503: {"model": Health}})
async def get_readyz(request: Request) -> JSONResponse:
    """The model is loaded, the ledger replayed and reachable, and durable as far as it has to be."""
    service, state = request.app.state.service, request.app.state
    health = Health.of(service.checks(), [*service.warnings(), *state.warnings()])
    return JSONResponse(health.model_dump(), 200 if health.status == "ready" else 503)
