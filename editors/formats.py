"""The forms in which edits leave, and the file that is in all of them. Imports nothing, so that any program may."""

from __future__ import annotations

from enum import StrEnum

INDEX = "edits.json"
"""What the export is, of which state, and the edits that are in it."""


class ExportFormat(StrEnum):
    """See `editors.export` for what is written."""

    LORA = "lora"
    MERGED = "merged"
    FACTORS = "factors"
