"""Every option of a training run, with what it means: the command line is made from this."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from editors.errors import TrainingOptionsInvalid
from editors.mend.variant import SIDES, Variant

SCHEDULES = ("cosine", "linear", "constant")
AGGREGATES = ("sum", "least_squares")
PRECISIONS = ("float32", "bfloat16")
LOWEST_RATE = 0.05
"""Of the peak learning rate: where cosine and linear end."""


Fixes = Literal["shape", "run", "free"]
"""What another value of an option means when a run is resumed: another editor, another run, or nothing of the kind."""


def _option(
    default: Any,
    meaning: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    choices: Sequence[str] = (),
    no: str = "",
    fixes: Fixes = "run",
) -> Any:
    """no: the flag that says no."""
    limits = {"least": least, "most": most, "choices": choices}
    return field(default=default, metadata={"meaning": meaning, "no": no, "fixes": fixes, **limits})


@dataclass(frozen=True)
class TrainingConfig:
    """What a run depends on, besides its data and its base model.

    Raises TrainingOptionsInvalid, naming the option, for values that make no sense alone or together.
    """

    aggregate: str = _option("sum", "How several edits join in one change.", choices=AGGREGATES, fixes="shape")
    rank: int = _option(512, "Rank of the editor's networks, at most their width.", least=1, fixes="shape")
    shared: bool = _option(True, "One network per shape of weight, or one per layer.", no="--unshared", fixes="shape")
    normalise: bool = _option(True, "Rows are normalised by running statistics.", no="--no-normalise", fixes="shape")
    sides: str = _option("joint", "What the networks rewrite of u and δ.", choices=SIDES, fixes="shape")
    identity: bool = _option(True, "Networks begin as the identity.", no="--no-identity", fixes="shape")
    plain: bool = _option(False, "No networks: the gradient itself, with a learned step per layer.", fixes="shape")
    steps: int = _option(2400, "Optimiser steps.", least=1, fixes="free")
    batch: int = _option(24, "Edits in a step.", least=1)
    accumulate: int = _option(1, "Micro-batches that a step is cut into; shared out among processes.", least=1)
    together: int = _option(
        1, "Edits in one change; with least squares the most, each step's number is drawn log-uniformly.", least=1
    )
    c_edit: float = _option(0.2, "Weight of the edit loss.", least=0, fixes="free")
    c_neighbour: float = _option(1.0, "Weight of the locality loss on neighbours.", least=0, fixes="free")
    c_unrelated: float = _option(2.0, "Weight of the locality loss on unrelated text.", least=0, fixes="free")
    unrelated: int = _option(2, "Unrelated texts of each edit.", least=1)
    neighbours: int = _option(2, "Neighbours of each edit, at most.", least=0, most=2)
    self_share: float = _option(0.2, "How often an edit is scored on its own prompt instead.", least=0, most=1)
    learning_rate: float = _option(2e-4, "Peak learning rate of the networks.", least=0, fixes="free")
    step_learning_rate: float = _option(
        1e-2, "Peak learning rate of the logarithm of the step sizes.", least=0, fixes="free"
    )
    schedule: str = _option("cosine", "Of the learning rates, after the warm-up.", choices=SCHEDULES, fixes="free")
    warmup: int = _option(50, "Steps in which the learning rates rise to their peaks.", least=0, fixes="free")
    gradient_clip: float = _option(10.0, "Largest norm of a step's gradient; 0 is no limit.", least=0, fixes="free")
    samples: int = _option(1024, "Texts of the base model's own, for locality.", least=0)
    validate_every: int = _option(100, "Steps between validations.", least=1, fixes="free")
    validation_edits: int = _option(192, "Edits in a validation.", least=1)
    patience: int = _option(20, "Validations without improvement before stopping.", least=1, fixes="free")
    precision: str = _option("float32", "Of the matrix products in training.", choices=PRECISIONS)
    seed: int = _option(0, "Fixes the run.")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, limits = getattr(self, option.name), option.metadata
            problem = ""
            if limits["choices"]:
                problem = "" if value in limits["choices"] else f"one of {', '.join(limits['choices'])}"
            elif not (limits["least"] <= value and math.isfinite(value)):
                problem = f"at least {limits['least']}"
            elif value > limits["most"]:
                problem = f"at most {limits['most']}"
            if problem:
                raise TrainingOptionsInvalid(
                    f"{flag(option.name)} is {value!r}; it must be {problem}", option=option.name
                )
        groups = self.together if self.aggregate == "sum" else 1
        if self.batch % (self.accumulate * groups):
            raise TrainingOptionsInvalid(
                f"{self.batch} edits (--batch) cannot be cut into {self.accumulate} micro-batches (--accumulate) "
                f"of whole groups of {groups} (--together); make --batch a multiple of {self.accumulate * groups}",
                option="batch",
            )

    @property
    def variant(self) -> Variant:
        """The shape of the editor to train."""
        return Variant(self.rank, self.shared, self.normalise, self.sides, self.identity, self.plain)

    @property
    def micro_batch(self) -> int:
        """Edits in a micro-batch."""
        return self.batch // self.accumulate

    def rate(self, step: int) -> float:
        """What the peak learning rates are multiplied with at a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = min(1.0, step / self.steps)
        height = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return warm * (LOWEST_RATE + (1 - LOWEST_RATE) * height)

    def differences(self, saved: Mapping[str, Any]) -> dict[Fixes, list[str]]:
        """How a saved configuration differs from this one, in words, by what that means."""
        found: dict[Fixes, list[str]] = {"shape": [], "run": [], "free": []}
        for option in dataclasses.fields(self):
            value, before = getattr(self, option.name), saved.get(option.name, option.default)
            if value != before:
                found[option.metadata["fixes"]].append(f"{flag(option.name)} was {before}, now it is {value}")
        return found

    def require_shares(self, processes: int) -> None:
        """Raises TrainingOptionsInvalid where some processes would have more to do than others."""
        if self.accumulate % processes:
            raise TrainingOptionsInvalid(
                f"{self.accumulate} micro-batches (--accumulate) cannot be shared out evenly among {processes} "
                f"processes; make --accumulate a multiple of {processes}",
                option="accumulate",
            )

    def require_groups(self, *prompts: Collection[object]) -> None:
        """Raises TrainingOptionsInvalid where some data has too few different prompts for one group.

        With least squares a group is as large as the data allows.
        """
        fewest = min(map(len, prompts))
        if self.together > fewest and self.aggregate == "sum":
            raise TrainingOptionsInvalid(
                f"{self.together} edits in one change (--together) need as many different prompts, in the training "
                f"and in the validation data; one of them has {fewest}",
                option="together",
            )


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
