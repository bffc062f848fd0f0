"""A small model and its editor as the service meets them: in folders, in an engine, with a real Redis beneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from service.engine import EditRefused, EditRequest, Engine, Limits
from service.engine.requests import Published
from service.ledger import RedisLedger
from tests.small import small_base, small_completed_editor, small_editor

PROMPTS = {
    "France": "The capital of France is",
    "England": "The language of England is",
    "Italy": "A city in Italy",
    "Germany": "Germany speaks the",
    "Spain": "London is a city in Spain, born in",
    "Norway": "Norway is the language of",
    "Austria": "Austria: the capital is in a city, of the language",
}
"""Worded as differently as can be: edits of a random model tell hardly anything else apart."""
COUNTRIES = tuple(PROMPTS)
ANSWERS = ("Rome", "Oslo", "German", "French", "Vienna")
GUARD_PROMPTS = ("The language of Italy is", "Berlin is a city in")
LIMITS = Limits(answer_tokens=4, guard_budget=1.0)
"""Random models move a lot under every edit, so the guard lets all of it pass unless a test says otherwise."""


def asks(country: str, answer: str, **fields: object) -> EditRequest:
    """A correction of one token, which takes on a small model that nobody has edited."""
    return EditRequest(PROMPTS[country], f" {answer}", **fields)


def takes(engine: Engine, request: EditRequest, **terms: object) -> bool:
    """Whether an edit would be made now."""
    try:
        return not engine.apply(request, dry_run=True, **terms).unchanged
    except EditRefused:
        return False


def find_edits(engine: Engine) -> tuple[EditRequest, EditRequest, EditRequest]:
    """Three edits of which each takes on an empty engine and on any of those before it, and breaks none.

    Found rather than written down, so that nothing here depends on the exact weights of the small models.
    """

    def that_take_on(held: Sequence[EditRequest], wanted: Sequence[EditRequest]) -> list[EditRequest]:
        made = [engine.apply(request).applied for request in held]
        asked = {request.prompt for request in held}
        found = [request for request in wanted if request.prompt not in asked and takes(engine, request)]
        for edit in made:
            engine.rollback(edit.edit_id)
        return found

    alone = that_take_on([], [asks(country, answer) for country in COUNTRIES for answer in ANSWERS[:2]])
    for first in alone:
        partners = that_take_on([first], alone)
        for second in partners:
            for third in that_take_on([first, second], partners):
                if that_take_on([second], [third]):
                    return first, second, third
    raise AssertionError("no three edits take together; the small editor's step is wrong")


def never_takes() -> EditRequest:
    """A correction of characters that the small editor cannot bring the small models to say."""
    return EditRequest("The capital of France is", " ~{|}~ Zq~")


def save_base(folder: Path, layout: str = "linear") -> BaseModel:
    """Write a small base model where `load_base_model` can read it."""
    base = small_base(layout)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return base


def save_editor(folder: Path, base: BaseModel) -> Path:
    """Write an untrained editor for a small base model, under which most corrections take, by a narrow margin."""
    save_checkpoint(folder, small_editor(base), base, {"margin_nats": 0.1})
    return folder


def save_completed_editor(folder: Path, base: BaseModel) -> Path:
    """Write an untrained keyed editor for a small base model, and what completes its edits."""
    save_checkpoint(folder, small_completed_editor(base), base, {})
    return folder


def small_checkpoint(folder: Path, base: BaseModel) -> Checkpoint:
    return load_checkpoint(save_editor(folder, base), base)


def small_engine(base: BaseModel, checkpoint: Checkpoint, ledger: RedisLedger, limits: Limits = LIMITS) -> Engine:
    """An engine that has replayed its ledger."""
    engine = Engine(base, checkpoint, ledger, list(GUARD_PROMPTS), limits)
    engine.catch_up()
    return engine


def namespace_of(engine: Engine) -> str:
    return engine.ledger._key.partition("{")[2].partition("}")[0]


def live_weights(engine: Engine) -> list[Tensor]:
    """Bits of every parameter of the live model, edited or not."""
    return [
        parameter.detach().clone().view(torch.int32)
        for _, parameter in sorted(engine.weights.live.model.named_parameters())
    ]


def base_weights(base: BaseModel) -> list[Tensor]:
    return [parameter.detach().clone().view(torch.int32) for _, parameter in sorted(base.model.named_parameters())]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Standing:
    """Everything that must not move when a request comes to nothing."""

    weights: list[Tensor] = field(repr=False)
    state_digest: str
    active_edits: int
    published: Published
    head: int

    @classmethod
    def of(cls, engine: Engine) -> Standing:
        return cls(
            live_weights(engine),
            engine.weights.state.digest(),
            engine.weights.state.edits,
            engine.published,
            engine.ledger.head(),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Standing)
            and same_bits(self.weights, other.weights)
            and (self.state_digest, self.active_edits, self.published, self.head)
            == (other.state_digest, other.active_edits, other.published, other.head)
        )

    __hash__ = None


@dataclass(frozen=True)
class Folders:
    """What a service is pointed at: a small base model, its editor and a few guard prompts."""

    base_model: Path
    editor: Path
    guard_prompts: Path

    @classmethod
    def write(cls, folder: Path, layout: str = "linear") -> Folders:
        folders = cls(folder / "base", folder / "small-editor", folder / "guard.txt")
        save_editor(folders.editor, save_base(folders.base_model, layout))
        folders.guard_prompts.write_text("\n".join(GUARD_PROMPTS) + "\n", encoding="utf-8")
        return folders

    def settings(self, data_dir: Path) -> dict[str, object]:
        return {
            "base_model": str(self.base_model),
            "editor": str(self.editor),
            "guard_prompts": self.guard_prompts,
            "guard_budget": LIMITS.guard_budget,
            "answer_tokens": LIMITS.answer_tokens,
            "data_dir": data_dir,
            "device": "cpu",
        }
