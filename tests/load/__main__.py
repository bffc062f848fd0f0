"""The load test: a real service, the real model, edits and generations at once. Prints tables in Markdown.

Exit status 1 if any answer was wrong or memory grew. Needs locust: pip install -e '.[load]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.e2e.server import serving

GROWTH_ALLOWED = 0.10
"""Of the memory between the second fifth of the time and the last one; each edit leaves a few kilobytes."""
SAMPLE_EVERY_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--users", type=int, default=8)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mend-load-"))
    with serving(folder / "data", folder / "log") as server:
        watched = psutil.Process(server.process.pid)
        locust = [
            sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py")),
            "--host", str(server.client.base_url), "--headless", "--json", "--skip-log-setup",
            "--users", str(given.users), "--spawn-rate", "2", "--run-time", f"{round(60 * given.minutes)}s",
            "--stop-timeout", "60",
        ]  # fmt: skip
        with (folder / "locust.json").open("w") as output:
            load = subprocess.Popen(locust, stdout=output)
            memory_bytes = []
            while load.poll() is None:
                memory_bytes.append(watched.memory_info().rss)
                time.sleep(SAMPLE_EVERY_S)
        revision = server.get("/revision", verify=True)
        active = server.get("/model")["active_edits"]
    kinds = json.loads((folder / "locust.json").read_text())
    failures = sum(kind["num_failures"] for kind in kinds)
    fifths = " ".join(f"{_median(memory_bytes, fifth) / 1e6:.0f}" for fifth in range(5))
    early, late = _median(memory_bytes, 1), _median(memory_bytes, 4)
    growth = late / early - 1
    sys.stdout.write(table(kinds))
    sys.stdout.write(
        f"\n{given.users} users, {given.minutes:g} minutes: revision {revision['revision']}, {active} active edits, "
        f"state and weights verified; {failures} failures; memory by fifths of the time {fifths} MB "
        f"({growth:+.1%} from the second to the last)\n"
    )
    if failures or growth > GROWTH_ALLOWED:
        sys.stdout.write(f"log and figures are in {folder}\n")
        return 1
    return 0


def _median(samples: Sequence[int], fifth: int) -> float:
    return statistics.median(samples[len(samples) * fifth // 5 : max(len(samples) * (fifth + 1) // 5, 1)])


def table(kinds: Sequence[dict]) -> str:
    """Requests by kind: how many, and the seconds that half, 95 and 99 of 100 took at most."""
    lines = ["| request | answers | failures | median | 95 % | 99 % |", "|---|---|---|---|---|---|"]
    for kind in sorted(kinds, key=lambda kind: kind["name"]):
        times_s = sorted(float(ms) / 1000 for ms, count in kind["response_times"].items() for _ in range(count))
        shown = [f"{times_s[min(int(share * len(times_s)), len(times_s) - 1)]:.2f} s" for share in (0.5, 0.95, 0.99)]
        lines.append(f"| `{kind['name']}` | {kind['num_requests']} | {kind['num_failures']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
