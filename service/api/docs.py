"""GET /docs: the API to be read and tried in a browser, by Swagger UI.

Its script and style come from a CDN, each as the very file that its hash names. The page's policy lets in nothing else.
"""

from __future__ import annotations

import base64
import hashlib

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from service.api.shield import CONTENT_POLICY

PACKAGE = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
SCRIPT, STYLE = f"{PACKAGE}/swagger-ui-bundle.js", f"{PACKAGE}/swagger-ui.css"
SCRIPT_HASH = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
STYLE_HASH = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, persistAuthorization: false})'
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mend-service</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{STYLE}" integrity="{STYLE_HASH}" crossorigin="anonymous">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{SCRIPT}" integrity="{SCRIPT_HASH}" crossorigin="anonymous"></script>
<script>{START}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    # Styles are also written into elements by the script, which no hash can name.
    f"{CONTENT_POLICY}; script-src {SCRIPT} {_hash(START)}; style-src {STYLE} 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'"
)

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def get_docs() -> HTMLResponse:
    """Read the API, and try it."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})
