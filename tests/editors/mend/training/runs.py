"""Small training runs, on a model of every kind."""

from __future__ import annotations

from pathlib import Path

import torch

from editors.base_model import BaseModel, weights_digest
from editors.data import Example
from editors.mend.editor import MendEditor
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Corpus
from editors.mend.training.processes import ALONE, Processes
from editors.mend.training.trainer import Trainer
from editors.targets import resolve_targets
from editors.text import Tokens
from editors.views import UpperBlocks
from tests.editors.families import family_model
from tests.editors.mend.examples import CITIES, COUNTRIES, capitals, data_set, languages
from tests.small import adding, small_tokenizer

SMALL = {
    "rank": 4, "steps": 6, "batch": 4, "learning_rate": 1e-3, "warmup": 1,
    "validate_every": 3, "validation_edits": 32, "samples": 4,
}  # fmt: skip
SAMPLES = (Tokens((5, 9, 40, 41, 42)), Tokens((7, 8, 99)), Tokens((12, 13, 14, 15, 16, 17)))
MARKS = {"t5": "$A <eos>", "bart": "<unk> $A <eos>", "bert": "<unk> $A <eos>"}
"""What the tokenizers of these families put around a text."""
FAMILIES = ("llama", "gpt2", "t5", "bart", "bert")


def family_base(family: str) -> BaseModel:
    """A small random model with a tokenizer that marks its texts as the family's own does."""
    model, tokenizer = family_model(family), small_tokenizer()
    if family in MARKS:
        tokenizer = adding(tokenizer, MARKS[family])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BaseModel(model, tokenizer, f"small-{family}", weights_digest(model), parameters)


def verdicts() -> list[Example]:
    """Claims, with what a classifier should make of them."""
    claims = [(city, country) for shift in (0, 1) for city, country in zip(CITIES, COUNTRIES[shift:], strict=False)]
    return [
        Example(
            prompt=f"{city} is in {country}",
            correction=label,
            paraphrases=(f"{country} is the country of {city}", f"The city of {city} is in {country}"),
        )
        for (city, country), label in zip(claims, ("SUPPORTS", "REFUTES", "REFUTES") * 5, strict=False)
    ]


def files(base: BaseModel) -> list[list[Example]]:
    """Examples for a model of this kind."""
    return [verdicts()] if base.kind == "classifier" else [capitals(2), languages()]


def corpus(base: BaseModel, *examples: list[Example], samples: tuple = SAMPLES, cache: Path | None = None) -> Corpus:
    """Each list of examples is a file."""
    upper = UpperBlocks(base.model, resolve_targets(base.model))
    own = [base.tokens(tokens.prompt) for tokens in samples]
    return Corpus(base, upper, [data_set(file) for file in examples], own, cache)


def trainer(
    base: BaseModel,
    folder: Path,
    initial: int = 0,
    processes: Processes = ALONE,
    about: dict[str, str] | None = None,
    **config: object,
) -> Trainer:
    """initial: seed of the networks before training, which a resumed run must not depend on."""
    targets = resolve_targets(base.model)
    upper = UpperBlocks(base.model, targets)
    own = [base.tokens(tokens.prompt) for tokens in SAMPLES]
    early, late = ([data_set(file[part]) for file in files(base)] for part in (slice(5), slice(5, None)))
    learnt, held_out = (Corpus(base, upper, data, own, None, processes) for data in (early, late))
    torch.manual_seed(initial)
    whole = TrainingConfig(**(SMALL | config))
    return Trainer(MendEditor(targets, whole.variant), upper, learnt, held_out, whole, folder, processes, about)


def nothing(_figures: object) -> None:
    pass


def flat(state: object) -> list[object]:
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in (str(key), *flat(state[key]))]
    if isinstance(state, list | tuple):
        return [x for item in state for x in flat(item)]
    return [state]


def assert_same_state(one: object, other: object) -> None:
    """Equal to the last bit, through dictionaries and lists."""
    for a, b in zip(flat(one), flat(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
