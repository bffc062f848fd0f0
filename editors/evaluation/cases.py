"""The prompts that an edit is judged on, as sequences to be scored.

A case holds up to three sequences on one prompt: `new` (the correction, or for portability what follows from it),
`true` (the prompt's right answer, where it is known) and, where the prompt must not change, `said` (what the base
goes on with).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from editors.base_model import BaseModel
from editors.data import Example
from editors.decoding import continue_greedily
from editors.errors import EmptyTextError
from editors.evaluation.reader import Reader
from editors.kinds import label_id, label_names
from editors.text import Tokens

ANSWER_TOKENS = 8
"""Length of the greedy texts that are compared with the base's."""
UNRELATED_PROMPTS = 4
"""Unrelated prompts per edit, where the data brings none: other examples' own. With one, chance moves them by 0.1."""
ATTEMPTS = 100
"""Draws for such prompts before all examples are looked through, which is slow but ends."""


@dataclass(frozen=True)
class Case:
    """owner: index of the example. kind: efficacy, paraphrase, portability; neighbour, unrelated.

    wanted: what decoding must begin with, None where it must stay what it was.
    """

    owner: int
    kind: str
    prompt: str
    wanted: str | None
    sequences: Mapping[str, Tokens]


def make_cases(pristine: Reader, examples: Sequence[Example], unrelated: Sequence[Sequence[str]]) -> list[Case]:
    """All cases of the examples. unrelated: prompts for each. Prompts without tokens are left out."""
    cases = []
    for owner, (example, elsewhere) in enumerate(zip(examples, unrelated, strict=True)):
        cases += _targets(pristine.base, owner, example)
        cases += _locality(pristine.base, owner, example, elsewhere)
    kept = [case for case in cases if case.wanted is None]
    prompts = [case.sequences["said"].prompt for case in kept]
    said = continue_greedily(pristine.whole, pristine.base.tokenizer, prompts, ANSWER_TOKENS) if kept else []
    for case, prompt, answer in zip(kept, prompts, said, strict=True):
        case.sequences["said"] = pristine.base.tokens(prompt, answer)
    return cases


def _targets(base: BaseModel, owner: int, example: Example) -> list[Case]:
    asked = [("efficacy", example.prompt, example.correction, example.answer)]
    asked += [("paraphrase", prompt, example.correction, example.answer) for prompt in example.paraphrases]
    asked += [("portability", p.prompt, p.answer, None) for p in example.portability if p.answer]
    cases = []
    for kind, prompt, wanted, answer in asked:
        new, true = encoded(base, prompt, wanted), answer and encoded(base, prompt, answer)
        if new is None:
            continue
        sequences = {"new": new}
        if true and true.target != new.target:
            sequences["true"] = true
        cases.append(Case(owner, kind, prompt, _spoken(base, wanted), sequences))
    return cases


def _locality(base: BaseModel, owner: int, example: Example, elsewhere: Sequence[str]) -> list[Case]:
    asked = [("neighbour", *pair) for pair in zip_longest(example.neighbours, example.neighbour_answers)]
    asked += [("unrelated", *pair) for pair in zip_longest(elsewhere, example.unrelated_answers[: len(elsewhere)])]
    cases = []
    for kind, prompt, answer in asked:
        said = encoded(base, prompt)
        if said is None:
            continue
        sequences = {"said": said}
        true = answer and encoded(base, prompt, answer)
        if true:
            sequences["true"] = true
            new = encoded(base, prompt, example.correction)
            if kind == "neighbour" and new and new.target != true.target:
                sequences["new"] = new
        cases.append(Case(owner, kind, prompt, None, sequences))
    return cases


def encoded(base: BaseModel, prompt: str, answer: str | None = None) -> Tokens | None:
    """The sequence of a prompt and its answer; None where either has no tokens. Raises UnknownLabel."""
    try:
        return base.encode(prompt, answer)
    except EmptyTextError:
        return None


def _spoken(base: BaseModel, answer: str) -> str:
    """How the model says an answer: a classifier's label has one name, whichever the data uses."""
    return label_names(base.model)[label_id(base.model, answer)] if base.kind == "classifier" else answer


def draw_unrelated(
    examples: Sequence[Example], seed: int, among: Sequence[Example] | None = None
) -> list[Sequence[str]]:
    """Each example's own unrelated prompts, or prompts of others about something else, if there are any.

    among: the others; the examples themselves, if not given.
    """
    rng = random.Random(seed)
    others = examples if among is None else among
    return [example.unrelated or _elsewhere(rng, example, others) for example in examples]


def _elsewhere(rng: random.Random, example: Example, others: Sequence[Example]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for _ in range(ATTEMPTS if others else 0):
        other = rng.choice(others)
        if _about_something_else(other, example):
            found[other.prompt] = None
        if len(found) == UNRELATED_PROMPTS:
            return tuple(found)
    prompts = dict.fromkeys(other.prompt for other in others if _about_something_else(other, example))
    return tuple(rng.sample(list(prompts), min(len(prompts), UNRELATED_PROMPTS)))


def _about_something_else(one: Example, other: Example) -> bool:
    same_subject = one.subject is not None and one.subject == other.subject
    return not same_subject and not _same_relation(one, other)


def _same_relation(one: Example, other: Example) -> bool:
    if not (one.subject and other.subject):
        return one.prompt == other.prompt
    return one.prompt.replace(one.subject, "") == other.prompt.replace(other.subject, "")
