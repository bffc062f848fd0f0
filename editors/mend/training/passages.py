"""Edits made from plain text, where there are no facts to correct: MEND's generation task (arXiv:2110.11309, 5.1).

The prompt is the beginning of a passage, the correction what the base model itself happens to write after it. Other
wordings of the prompt are the same passage with its beginning cut off. What must not change are other passages.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from editors.base_model import BaseModel
from editors.errors import DataFileError, TrainingOptionsInvalid
from editors.mend.training.samples import sample
from editors.text import Tokens

LONGEST, SHORTEST = 160, 48
"""Characters of a passage. Lines are paragraphs, as in Wikitext; each gives as many passages as it is long."""
WORDINGS = 3
"""Other wordings of each prompt; each keeps at least half of it."""


@dataclass(frozen=True)
class Passage:
    """An edit, and its other wordings with the same target."""

    edit: Tokens
    wordings: tuple[Tokens, ...]


@dataclass(frozen=True)
class PassageSet:
    """The passages of one file. digest: SHA-256 of the file's bytes."""

    name: str
    digest: str
    examples: tuple[Passage, ...]
    layout: str = "text"

    def split(self, held_out: int) -> tuple[PassageSet, PassageSet]:
        """All but the last `held_out` passages, and those."""
        edge = max(0, len(self.examples) - held_out)
        return replace(self, examples=self.examples[:edge]), replace(self, examples=self.examples[edge:])


def read_passages(
    path: Path, base: BaseModel, *, most: int, tokens: int, seed: int, cache: Path | None = None
) -> PassageSet:
    """Make edits of a text file.

    most: passages, chosen at random among more. tokens: length of each correction, sampled at temperature 1.
    Raises DataFileError where the file cannot be read or has no passage, TrainingOptionsInvalid for a classifier.
    """
    if base.kind == "classifier":
        raise TrainingOptionsInvalid(
            "a classifier writes no text; give it labelled examples with --data", option="text"
        )
    try:
        raw = path.read_bytes()
        lines = raw.decode().splitlines()
    except OSError as error:
        raise DataFileError(f"cannot read the text file {path}: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not UTF-8 at byte {error.start}", file=str(path)) from error
    # Each once: the same prompt must not be corrected to several things.
    passages = list(dict.fromkeys(passage for line in lines for passage in _passages(line.strip())))
    if not passages:
        raise DataFileError(f"{path} has no line of at least {SHORTEST} characters", file=str(path))
    rng = random.Random(f"{seed}-passages")
    if len(passages) > most:
        passages = [passages[index] for index in sorted(rng.sample(range(len(passages)), most))]
    prompts = [base.encode(passage).prompt for passage in passages]
    corrections = sample(base, prompts, tokens, seed, f"continuations of {path.name}", cache)
    return PassageSet(
        path.name,
        hashlib.sha256(raw).hexdigest(),
        tuple(
            Passage(
                base.tokens(prompt, correction),
                tuple(base.tokens(base.encode(_cut(rng, text)).prompt, correction) for _ in range(WORDINGS)),
            )
            for text, prompt, correction in zip(passages, prompts, corrections, strict=True)
        ),
    )


def _passages(line: str) -> list[str]:
    """Pieces of a line, cut between words where it has any."""
    pieces = []
    while len(line) >= SHORTEST:
        space = line.rfind(" ", SHORTEST, LONGEST) if len(line) > LONGEST else -1
        end = LONGEST if space < 0 else space
        pieces.append(line[:end].rstrip())
        line = line[end:].lstrip()
    return pieces


def _cut(rng: random.Random, text: str) -> str:
    """The text without its beginning, at most half of it."""
    start = rng.randint(1, len(text) // 2)
    space = text.find(" ", start, len(text) // 2)
    return text[start if space < 0 else space :].lstrip()
