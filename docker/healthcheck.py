"""Exit 0 when the service in this container is ready to answer, 1 when it is not. Standard library only."""

from __future__ import annotations

import os
import sys
import urllib.request

TIMEOUT_SECONDS = 4


def ready(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this loopback
    try:
        with direct.open(f"http://127.0.0.1:{port}/readyz", timeout=TIMEOUT_SECONDS) as answer:
            return answer.status == 200
    except OSError:  # refused, timed out, or an HTTP status that means "not ready"
        return False


if __name__ == "__main__":
    sys.exit(0 if ready(int(os.environ.get("MEND_PORT", "8000"))) else 1)
