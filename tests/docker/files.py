"""The container's files, as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what they say, in order; continued lines are joined."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    lines = dockerfile()
    return lines[max(at for at, (name, _) in enumerate(lines) if name == "FROM") :]
