"""Look up known vulnerabilities of the versions that constraints.txt pins, by pip-audit.

Exit status 1 when there is one. A machine that reaches no service of vulnerabilities checks nothing: then that is said,
and the exit status is 0, since nothing is known to be wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("constraints.txt")
SERVICES = ("osv", "pypi")
TIMEOUT_S = 10


def look_up(pins: Path, service: str, osv_url: str | None) -> tuple[list[dict[str, Any]], str]:
    """What a service knows of the pins that it knows, and why it knows nothing of the others."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--desc", "off", "--timeout", str(TIMEOUT_S)]
    command += ["--vulnerability-service", service, *(["--osv-url", osv_url] if osv_url else [])]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        asked = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        return [], (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    skipped = [each["skip_reason"] for each in asked if "skip_reason" in each]
    return [each for each in asked if "vulns" in each], skipped[0] if skipped else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pins", type=Path, default=PINS)
    parser.add_argument("--osv-url", help="of another service that speaks as osv.dev does; asked alone")
    given = parser.parse_args()
    if find_spec("pip_audit") is None:
        sys.exit("audit: pip-audit is not installed; `make setup` installs it")
    pinned = sum("==" in line for line in given.pins.read_text(encoding="utf-8").splitlines())
    found: list[dict[str, Any]] = []
    told: list[str] = []
    for service in ("osv",) if given.osv_url else SERVICES:
        found, why_not = look_up(given.pins, service, given.osv_url)
        told += [f"audit: {service}: {why_not}"] if why_not else []
        if found:
            break
    flawed = [each for each in found if each["vulns"]]
    for each in flawed:
        for flaw in each["vulns"]:
            fixed = f"; fixed in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else ""
            told.append(f"audit: {each['name']} {each['version']} has {flaw['id']}{fixed}")
    if not found:
        told.append(f"audit: NOT CHECKED: none of {pinned} pins could be looked up from here")
    elif flawed:
        told.append(f"audit: {len(flawed)} of {pinned} pins are known to be vulnerable; raise them with `make lock`")
    else:
        told.append(f"audit: nothing is known against {len(found)} of {pinned} pins")
    sys.stdout.write("\n".join(told) + "\n")
    return 1 if flawed else 0


if __name__ == "__main__":
    sys.exit(main())
