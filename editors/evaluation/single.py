"""Measure an editor, one edit active at a time, as a service would use it: searched scale, quantised factors.

For each example, before and after its edit:
- efficacy and paraphrase: the correction follows the prompt: teacher-forced (all of its tokens right, and the
  fraction of tokens right) and by greedy decoding (the decoded text begins with it);
- neighbour and unrelated: the model still says what the base says: the same next token, and the same greedy text.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.capture import capture
from editors.data import Example
from editors.decoding import generate_batch
from editors.errors import EmptyTextError
from editors.evaluation.metrics import Figure, figure
from editors.factors import Factors, quantise
from editors.mend.editor import MendEditor
from editors.scale import SCALES, search_scale
from editors.text import Tokens, begins_with, scored_positions
from editors.views import UpperBlocks, edited, view

BATCH = 24
ANSWER_TOKENS = 8
"""Length of the greedy texts that are compared with the base's."""
UNRELATED_PROMPTS = 1
"""Unrelated prompts per edit, where the data brings none: other examples' own."""
ATTEMPTS = 100
"""Draws for such a prompt before all examples are looked through, which is slow but ends."""


@dataclass
class Report:
    """What was measured. figures: by name, after editing. before: the same on the base model."""

    examples: int
    figures: dict[str, Figure]
    before: dict[str, Figure]
    scales: list[float] = field(repr=False, default_factory=list)
    records: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def table(self) -> str:
        """Markdown: one row per figure, with 95 % bootstrap intervals."""
        lines = ["| figure | base | edited (95 %) | prompts |", "|---|---|---|---|"]
        for name, value in self.figures.items():
            if value.count:
                before = self.before.get(name)
                lines.append(f"| {name} | {f'{before.mean:.3f}' if before else ''} | {value} | {value.count} |")
        return "\n".join(lines)


def evaluate_single(
    base: BaseModel, editor: MendEditor, examples: Sequence[Example], *, margin: float, seed: int = 0
) -> Report:
    """Measure single edits over `examples`. margin: of the scale search, in nats."""
    run = _Evaluation(base, editor, margin)
    examples = [example for example in examples if _has_tokens(base, example)]
    kept = list(zip(examples, _unrelated(examples, seed), strict=True))
    with tqdm(total=len(kept), desc="evaluating", unit="edit", disable=None) as bar:
        for start in range(0, len(kept), BATCH):
            run.measure(kept[start : start + BATCH])
            bar.update(len(kept[start : start + BATCH]))
    return Report(
        examples=len(kept),
        figures={name: figure(values, seed) for name, values in run.after.items()},
        before={name: figure(values, seed) for name, values in run.before.items()},
        scales=run.scales,
        records=run.records,
    )


class _Evaluation:
    def __init__(self, base: BaseModel, editor: MendEditor, margin: float) -> None:
        self.base, self.editor, self.margin = base, editor, margin
        self.upper = UpperBlocks(base.model, editor.targets)
        self.whole = view(base.model)
        self.after: dict[str, list[float]] = defaultdict(list)
        self.before: dict[str, list[float]] = defaultdict(list)
        self.scales: list[float] = []
        self.records: list[dict[str, Any]] = []

    def measure(self, batch: Sequence[tuple[Example, Sequence[str]]]) -> None:
        examples = [example for example, _ in batch]
        edits = self._propose(examples)
        self._targets("efficacy", edits, [(i, e.prompt, e.correction) for i, e in enumerate(examples)])
        self._targets(
            "paraphrase", edits, [(i, text, e.correction) for i, e in enumerate(examples) for text in e.paraphrases]
        )
        self._agreement("neighbour", edits, [(i, text) for i, e in enumerate(examples) for text in e.neighbours])
        self._agreement("unrelated", edits, [(i, text) for i, (_, texts) in enumerate(batch) for text in texts])

    def _propose(self, examples: Sequence[Example]) -> list[Factors]:
        """One quantised edit per example, at its searched scale (the nearest, where it does not take)."""
        tokens = [self.base.encode(example.prompt, example.correction) for example in examples]
        hidden = self.upper.below([t.inputs for t in tokens])
        with torch.no_grad():
            proposal = self.editor(capture(self.upper, hidden, tokens))
        edits = []
        for index, sequence in enumerate(tokens):
            search = search_scale(
                self.upper,
                hidden[index : index + 1, : len(sequence.inputs)],
                sequence,
                proposal.rows_of(self.upper.targets, index),
            )
            order = search.order(self.margin)
            scale = SCALES[order[0] if order else search.strongest]
            self.scales.append(scale)
            self.records.append({"prompt": examples[index].prompt, "scale": scale, "margins": search.margins})
            edits.append(quantise(proposal.rows_of(self.editor.targets, index), scale))
        return edits

    def _targets(self, name: str, edits: list[Factors], cases: list[tuple[int, str, str]]) -> None:
        if not cases:
            return
        tokens = [self.base.encode(prompt, correction) for _, prompt, correction in cases]
        owners = [owner for owner, _, _ in cases]
        rows, _ = scored_positions(tokens, self.base.device)
        wanted = torch.tensor([token for sequence in tokens for token in sequence.target], device=self.base.device)
        length = max(len(sequence.target) for sequence in tokens) + 2
        for results, context in self._before_and_after(edits, owners):
            with context(self.upper.module, self.upper.targets):
                right = self._logits(tokens).argmax(-1) == wanted
            for row in range(len(cases)):
                mine = right[rows == row]
                results[f"{name}, token"].append(mine.float().mean().item())
                results[f"{name}, sequence"].append(float(mine.all().item()))
            with context(self.whole, self.editor.targets):
                texts = generate_batch(self.whole, self.base.tokenizer, [prompt for _, prompt, _ in cases], length)
            for (_, _, correction), said in zip(cases, texts, strict=True):
                results[f"{name}, greedy"].append(float(begins_with(said.text, correction)))

    def _agreement(self, name: str, edits: list[Factors], cases: list[tuple[int, str]]) -> None:
        if not cases:
            return
        tokens = [self.base.encode(prompt) for _, prompt in cases]
        said: list[tuple[Tensor, list[str]]] = []
        for _, context in self._before_and_after(edits, [owner for owner, _ in cases]):
            with context(self.upper.module, self.upper.targets):
                following = self._logits(tokens).argmax(-1)
            with context(self.whole, self.editor.targets):
                prompts = [prompt for _, prompt in cases]
                texts = [g.text for g in generate_batch(self.whole, self.base.tokenizer, prompts, ANSWER_TOKENS)]
            said.append((following, texts))
        (token_before, text_before), (token_after, text_after) = said
        self.after[f"{name}, next token"] += (token_before == token_after).float().tolist()
        self.after[f"{name}, {ANSWER_TOKENS} tokens"] += [
            float(a == b) for a, b in zip(text_before, text_after, strict=True)
        ]

    def _logits(self, tokens: Sequence[Tokens]) -> Tensor:
        hidden = self.upper.below([sequence.inputs for sequence in tokens])
        with torch.no_grad():
            return self.upper.logits(hidden, tokens)

    def _before_and_after(
        self, edits: list[Factors], owners: list[int]
    ) -> Iterator[tuple[dict[str, list[float]], Callable]]:
        """The base model, then every case under the edit that owns it."""
        stacked = _stack(edits, owners, self.base.device)

        def under_edit(module: nn.Module, targets: Sequence) -> Any:
            names = (target.name for target in self.editor.targets)
            return edited(module, targets, {t.name: stacked[name] for t, name in zip(targets, names, strict=True)})

        yield self.before, lambda module, targets: torch.no_grad()
        yield self.after, under_edit


def _stack(edits: list[Factors], owners: list[int], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Per target, the decoded factors of every case's edit, padded to one rank with zero rows."""
    stacked = {}
    for name in edits[0].layers:
        decoded = [edit.layers[name].decode() for edit in edits]
        u = torch.nn.utils.rnn.pad_sequence([u for u, _ in decoded], batch_first=True)[owners]
        delta = torch.nn.utils.rnn.pad_sequence([delta for _, delta in decoded], batch_first=True)[owners]
        stacked[name] = (u.to(device), delta.to(device))
    return stacked


def _has_tokens(base: BaseModel, example: Example) -> bool:
    try:
        base.encode(example.prompt, example.correction)
    except EmptyTextError:
        return False
    return True


def _unrelated(examples: Sequence[Example], seed: int) -> list[Sequence[str]]:
    """Each example's own unrelated prompts, or the prompts of other examples about something else, if there are any."""
    rng = random.Random(seed)
    return [example.unrelated or _elsewhere(rng, example, examples) for example in examples]


def _elsewhere(rng: random.Random, example: Example, examples: Sequence[Example]) -> tuple[str, ...]:
    for _ in range(ATTEMPTS):
        other = rng.choice(examples)
        if _about_something_else(other, example):
            return (other.prompt,) * UNRELATED_PROMPTS
    others = [other.prompt for other in examples if _about_something_else(other, example)]
    return (rng.choice(others),) * UNRELATED_PROMPTS if others else ()


def _about_something_else(one: Example, other: Example) -> bool:
    same_subject = one.subject is not None and one.subject == other.subject
    return not same_subject and not _same_relation(one, other)


def _same_relation(one: Example, other: Example) -> bool:
    if not (one.subject and other.subject):
        return one.prompt == other.prompt
    return one.prompt.replace(one.subject, "") == other.prompt.replace(other.subject, "")
