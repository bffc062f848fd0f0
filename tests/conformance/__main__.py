"""Ask a real service everything that its OpenAPI document allows, and much that it does not.

Flow: small model, service, OpenAPI document -> Schemathesis -> its report; exit status 1 for any answer that is not as
documented, or on the side of the service. With --snapshot: write the document that is committed, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from service.api.keys import changed
from service.app import create_app
from service.settings import Settings
from tests.api.test_keys import made
from tests.conformance.snapshot import SNAPSHOT, written

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--snapshot", action="store_true")
    given = parser.parse_args()
    if given.snapshot:
        SNAPSHOT.write_text(written(create_app(Settings()).openapi()), encoding="utf-8")
        return 0
    return conform(Path(tempfile.mkdtemp(prefix="mend-conformance-")), round(60 * given.minutes), given.seed)


def conform(folder: Path, seconds: int, seed: int | None = None) -> int:
    """The exit status of Schemathesis. Its report goes to stdout, the service's log into the folder."""
    from tests.cli.running import live_service

    keys = folder / "keys.json"
    with changed(keys) as held:
        token, key = made("conformance", "admin")
        held.append(key)
    with live_service(folder, MEND_API_KEYS=str(keys)) as live:
        said = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "--config-file", HERE / "schemathesis.toml",
                "run", f"{live.url}/openapi.json", "--max-time", str(seconds), "--continue-on-failure",
                "--exclude-path", "/events",  # which does not end
                "--request-timeout", "60", "--header", f"Authorization: Bearer {token}",
                *(() if seed is None else ("--seed", str(seed))),
            ],
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.conformance.hooks", "PYTHONPATH": str(HERE.parents[1])},
            cwd=folder,
            check=False,
        )  # fmt: skip
    return said.returncode


if __name__ == "__main__":
    sys.exit(main())
