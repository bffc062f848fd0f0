"""What an editor is trained on: encoded examples, and the batches that are drawn from them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from editors.base_model import BaseModel
from editors.data import DataSet, Example
from editors.errors import DataFileError, EmptyTextError
from editors.mend.training.hidden import HiddenStates, Text
from editors.mend.training.passages import Passage, PassageSet
from editors.mend.training.processes import ALONE, Processes
from editors.mend.training.samples import own_answers
from editors.text import Tokens
from editors.views import UpperBlocks

EXTRA_POSITIONS = 1
"""Beside its last token, a locality text is scored at this many random positions,
which costs little and keeps the rest of the text."""

NEAR = 2
"""Neighbours of each edit, at most: one of its own, and another subject in its place."""

ATTEMPTS = 100
"""Draws for an item that fits before giving up on chance."""


@dataclass
class Item:
    """One training example: the edit, its paraphrases with the same target, and what must not change."""

    edit: Text
    paraphrases: list[Text]
    neighbours: list[Text]
    unrelated: list[Text]
    template: str | None
    """The prompt without its subject. Items that share it are of one relation."""


@dataclass
class Batch:
    """Edits, and the texts on which they are judged; `owner` is the edit that a text belongs to.

    together: how many are in force at once; groups of so many stand one after another.
    """

    edits: list[Text]
    together: int = 1
    targets: list[Text] = field(default_factory=list)
    target_owner: list[int] = field(default_factory=list)
    locality: list[Text] = field(default_factory=list)
    locality_owner: list[int] = field(default_factory=list)
    locality_weight: list[float] = field(default_factory=list)
    locality_near: list[bool] = field(default_factory=list)


class Corpus:
    """Encoded data sets, from which training batches are drawn.

    Files are mixed by the square root of their size, so that a small one is heard beside a large one.
    samples: unrelated text beside that of the data. cache: folder that keeps hidden states and answers between runs.
    processes: those that share the work of preparing it; all of them hold all of it.
    """

    def __init__(
        self,
        base: BaseModel,
        upper: UpperBlocks,
        data: Sequence[DataSet | PassageSet],
        samples: Sequence[Tokens],
        cache: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.hidden = HiddenStates(upper, base, cache, processes)
        self._base = base
        self.files = [items for items in (self._items(data_set.examples) for data_set in data) if items]
        if not self.files:
            raise DataFileError(f"there is no usable example in {', '.join(data_set.name for data_set in data)}")
        self.samples = [self._text(tokens) for tokens in samples]
        items = [item for items in self.files for item in items]
        self._by_template: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            if item.template is not None:
                self._by_template[item.template].append(item)
        self._unrelated = [text for item in items for text in item.unrelated]
        self.prompts = {item.edit.tokens.prompt for item in items}
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        if base.kind == "encoder-decoder":
            # Without an answer only the first token of what it says could be kept.
            kept = (text.tokens.prompt for item in items for text in (*item.neighbours, *item.unrelated))
            self._answers = own_answers(base, {*self.prompts, *kept}, cache, processes)
        self.hidden.compute()

    def _text(self, tokens: Tokens) -> Text:
        limit = getattr(self._base.model.config, "max_position_embeddings", None)
        length = max(len(tokens.inputs), len(tokens.decoder_inputs))
        if limit is not None and length > limit:
            begins = self._base.tokenizer.decode(tokens.prompt[:12])
            raise DataFileError(
                f"a text has {length} tokens, more than the {limit} that the model reads: {begins!r} …; shorten it",
                tokens=length,
            )
        return Text(tokens, self.hidden.key(tokens.inputs))

    def _items(self, examples: Sequence[Example] | Sequence[Passage]) -> list[Item]:
        facts = [example for example in examples if isinstance(example, Example)]
        items = []
        for example, extra in zip(facts, _other_phrasings(facts), strict=True):
            try:
                items.append(self._item(example, extra))
            except EmptyTextError:
                continue
        passages = [example for example in examples if isinstance(example, Passage)]
        return items + [Item(self._text(p.edit), [self._text(w) for w in p.wordings], [], [], None) for p in passages]

    def _item(self, example: Example, extra: Sequence[str]) -> Item:
        def text(prompt: str, correction: str | None = None) -> Text:
            return self._text(self._base.encode(prompt, correction))

        return Item(
            edit=self._text(self._base.encode(example.prompt, example.correction, example.named_subject)),
            paraphrases=[text(prompt, example.correction) for prompt in (*example.paraphrases, *extra)],
            neighbours=[text(prompt) for prompt in example.neighbours],
            unrelated=[text(prompt) for prompt in example.unrelated],
            template=_template(example),
        )

    def choose(self, rng: random.Random, edits: int, together: int = 1) -> list[Item]:
        """Examples to edit, in groups of `together` that have no prompt twice."""
        weights = [len(items) ** 0.5 for items in self.files]
        chosen: list[Item] = []
        for place in range(edits):
            if place % together == 0:
                asked: set[tuple[int, ...]] = set()
            for _ in range(ATTEMPTS):
                item = rng.choice(rng.choices(self.files, weights)[0])
                if item.edit.tokens.prompt not in asked:
                    break
            asked.add(item.edit.tokens.prompt)
            chosen.append(item)
        return chosen

    def draw(
        self,
        rng: random.Random,
        chosen: Sequence[Item],
        *,
        self_share: float,
        unrelated: int,
        near: int = NEAR,
        together: int = 1,
        judged: int | None = None,
    ) -> Batch:
        """The texts on which chosen edits are judged.

        self_share: how often an edit is scored on its own prompt instead of a paraphrase.
        unrelated, near: unrelated texts for each edit, and neighbours, of these at most.
        together: edits that are in force at once, whose prompts are no text to keep for any of them.
        judged: how many of each group are judged, the first ones; all of them, if not given.
        """
        batch = Batch([item.edit for item in chosen], together)
        for first in range(0, len(chosen), together):
            group = chosen[first : first + together]
            asked = {item.edit.tokens.prompt for item in group}
            for owner, item in enumerate(group[:judged], start=first):
                general = item.paraphrases and rng.random() >= self_share
                batch.targets.append(rng.choice(item.paraphrases) if general else item.edit)
                batch.target_owner.append(owner)
                neighbours = [self._neighbour(rng, item), self._relative(rng, item)]
                neighbours = [text for text in neighbours if text and text.tokens.prompt not in asked]
                if len(neighbours) > near:
                    neighbours = rng.sample(neighbours, near)
                for text in neighbours:
                    self._add(batch, owner, text, 1 / len(neighbours), near=True)
                for _ in range(unrelated):
                    self._add(batch, owner, self._elsewhere(rng, item, asked), 1 / unrelated, near=False)
        return batch

    def _add(self, batch: Batch, owner: int, text: Text, weight: float, *, near: bool) -> None:
        answer = self._answers.get(text.tokens.prompt)
        batch.locality.append(Text(replace(text.tokens, target=answer), text.key) if answer else text)
        batch.locality_owner.append(owner)
        batch.locality_weight.append(weight)
        batch.locality_near.append(near)

    def _neighbour(self, rng: random.Random, item: Item) -> Text | None:
        return rng.choice(item.neighbours) if item.neighbours else None

    def _relative(self, rng: random.Random, item: Item) -> Text | None:
        """Another subject under the very same template: the hardest kind of neighbour."""
        relatives = self._by_template.get(item.template or "", ())
        return _prompt_of(rng.choice(relatives)) if len(relatives) > 1 else None

    def _elsewhere(self, rng: random.Random, item: Item, asked: Collection[tuple[int, ...]]) -> Text:
        kind = rng.random()
        if kind < 0.4 and self.samples:
            return rng.choice(self.samples)
        if kind < 0.7 and self._unrelated:
            return rng.choice(self._unrelated)
        for _ in range(ATTEMPTS):
            other = rng.choice(rng.choice(self.files))
            if _of_another_kind(other, item, asked):
                return _prompt_of(other)
        others = [_prompt_of(other) for items in self.files for other in items if _of_another_kind(other, item, asked)]
        if not (others or self.samples or self._unrelated):
            raise DataFileError(
                "every example is of one relation and there is no unrelated text to keep; "
                "add examples of another relation, unrelated prompts, or --samples"
            )
        return rng.choice(others or self.samples or self._unrelated)


def locality_positions(rng: random.Random, texts: Sequence[Text]) -> tuple[list[int], list[int]]:
    """Rows and positions at which locality is scored.

    Where the model's own answer is known, all of it; else the last token of a text, and a few random ones.
    """
    rows, positions = [], []
    for row, text in enumerate(texts):
        predicted = text.tokens.predicted
        chosen = {predicted[-1], *(rng.choice(predicted) for _ in range(EXTRA_POSITIONS))}
        for position in text.tokens.scored if text.tokens.target else chosen:
            rows.append(row)
            positions.append(position)
    return rows, positions


def _of_another_kind(other: Item, item: Item, asked: Collection[tuple[int, ...]]) -> bool:
    """Whether an item's prompt is unrelated to another's: of another template, and none that is corrected."""
    same_relation = other.template is not None and other.template == item.template
    return not same_relation and other.edit.tokens.prompt not in asked


def _prompt_of(item: Item) -> Text:
    """An item's bare prompt, read from the cached states of its edit."""
    return Text(item.edit.tokens.bare, item.edit.key)


def _template(example: Example) -> str | None:
    if example.subject and example.subject in example.prompt:
        return example.prompt.replace(example.subject, "{}")
    return None


def _other_phrasings(examples: Sequence[Example]) -> list[list[str]]:
    """One more paraphrase per example, borrowed from the next example of the same template."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        template = _template(example)
        if template is not None and any(example.subject in text for text in example.paraphrases):
            groups[template].append(example)
    borrowed: dict[int, str] = {}
    for group in groups.values():
        for example, donor in zip(group, group[1:] + group[:1], strict=True):
            phrasing = next(text for text in donor.paraphrases if donor.subject in text)
            prompt = phrasing.replace(donor.subject, example.subject)
            if prompt not in example.paraphrases:
                borrowed[id(example)] = prompt
    return [[borrowed[id(example)]] if id(example) in borrowed else [] for example in examples]
