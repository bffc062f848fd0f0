"""Every page, and the two files that they need."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

from service.dashboard import health, ledger, new_edit, playground, rollback, sign_in
from service.dashboard.rendering import STATIC, TYPES

router = APIRouter(include_in_schema=False)
for part in (ledger, new_edit, rollback, health, playground, sign_in):
    router.include_router(part.router)


@router.get("/ui/static/{name}")
async def static(name: str) -> Response:
    """The style sheet and the module."""
    if name not in STATIC:
        raise HTTPException(404, "there is no such file")
    return Response(STATIC[name], media_type=TYPES[name])
