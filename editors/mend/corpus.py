"""What an editor is trained on: encoded texts, and the hidden states below the edited blocks, computed once.

The lower blocks never change, so a text passes through them a single time. Texts of one length are grouped
without padding and in a fixed order, so that the cached values do not depend on which batch asked first: that is
what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.data import DataSet, Example
from editors.errors import DataFileError, EmptyTextError
from editors.text import Tokens
from editors.views import UpperBlocks

TOKENS_PER_PASS = 2048
SAMPLE_TOKENS = 24
EXTRA_POSITIONS = 1
"""Beside its last token, a locality text is scored at this many random positions,
which costs little and keeps the rest of the text."""

ATTEMPTS = 100
"""Draws for an unrelated item before all of them are looked through, which is slow but ends."""


@dataclass(frozen=True)
class Text:
    """A sequence whose hidden states are cached under `key`, which may be longer than what is read of it."""

    tokens: Tokens
    key: int


@dataclass
class Item:
    """One training example: the edit, its paraphrases with the same target, and what must not change."""

    edit: Text
    paraphrases: list[Text]
    neighbours: list[Text]
    unrelated: list[Text]
    template: str | None
    """The prompt without its subject. Items that share it are of one relation."""


class HiddenStates:
    """Hidden states that enter the first edited block, for a growing set of texts.

    cache: a folder that keeps them between runs, by the digest of the base model and the texts.
    """

    def __init__(self, upper: UpperBlocks, base: BaseModel, cache: Path | None = None) -> None:
        self._upper = upper
        self._cache = cache
        self._identity = f"{base.digest} {base.dtype} {upper.first}"
        self._keys: dict[tuple[int, ...], int] = {}
        self._states: list[Tensor] = []

    def key(self, ids: tuple[int, ...]) -> int:
        return self._keys.setdefault(ids, len(self._keys))

    def compute(self) -> None:
        """Run the lower blocks over every text."""
        texts = list(self._keys)
        kept = self._kept(texts)
        if kept is not None and kept.is_file():
            flat = torch.load(kept, weights_only=True)
            self._states = list(flat.split([len(text) for text in texts]))
            return
        states: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda key: (len(texts[key]), key))
        with tqdm(total=len(order), desc="hidden states", unit="text", disable=None) as bar:
            for chunk in _equal_lengths(order, texts):
                states.update(zip(chunk, self._upper.below([texts[key] for key in chunk]).cpu(), strict=True))
                bar.update(len(chunk))
        self._states = [states[key] for key in range(len(texts))]
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft = kept.with_suffix(".draft")
            torch.save(torch.cat(self._states), draft)
            draft.replace(kept)

    def _kept(self, texts: list[tuple[int, ...]]) -> Path | None:
        if self._cache is None:
            return None
        return self._cache / f"{hashlib.sha256(repr((self._identity, texts)).encode()).hexdigest()}.pt"

    def batch(self, texts: Sequence[Text]) -> Tensor:
        """What `UpperBlocks.logits` takes, (batch, tokens, width), padded on the right."""
        return self._upper.batch([self._states[text.key][: len(text.tokens.inputs)] for text in texts])


def _equal_lengths(keys: Iterable[int], texts: Sequence[tuple[int, ...]]) -> Iterable[list[int]]:
    chunk: list[int] = []
    for key in keys:
        length = len(texts[key])
        if chunk and (length != len(texts[chunk[0]]) or (len(chunk) + 1) * length > TOKENS_PER_PASS):
            yield chunk
            chunk = []
        chunk.append(key)
    if chunk:
        yield chunk


@dataclass
class Batch:
    """Edits of one step, and the texts on which each is judged; `owner` is the edit that a text runs under."""

    edits: list[Text]
    targets: list[Text] = field(default_factory=list)
    target_owner: list[int] = field(default_factory=list)
    locality: list[Text] = field(default_factory=list)
    locality_owner: list[int] = field(default_factory=list)
    locality_weight: list[float] = field(default_factory=list)
    locality_near: list[bool] = field(default_factory=list)


class Corpus:
    """Encoded data sets, from which training batches are drawn.

    Files are mixed by the square root of their size, so that a small one is heard beside a large one.
    """

    def __init__(
        self,
        base: BaseModel,
        upper: UpperBlocks,
        data: Sequence[DataSet],
        samples: Sequence[Tokens],
        cache: Path | None = None,
    ) -> None:
        self.hidden = HiddenStates(upper, base, cache)
        self._base = base
        self.files = [items for items in (self._items(data_set.examples) for data_set in data) if items]
        if not self.files:
            raise DataFileError(f"there is no usable example in {', '.join(data_set.name for data_set in data)}")
        self.samples = [Text(tokens, self.hidden.key(tokens.inputs)) for tokens in samples]
        self._by_template: dict[str, list[Item]] = defaultdict(list)
        for item in (item for items in self.files for item in items):
            if item.template is not None:
                self._by_template[item.template].append(item)
        self._unrelated = [text for items in self.files for item in items for text in item.unrelated]
        self.hidden.compute()

    def _items(self, examples: Sequence[Example]) -> list[Item]:
        phrasings = _other_phrasings(examples)
        items = []
        for example, extra in zip(examples, phrasings, strict=True):
            try:
                items.append(self._item(example, extra))
            except EmptyTextError:
                continue
        return items

    def _item(self, example: Example, extra: Sequence[str]) -> Item:
        def text(prompt: str, correction: str | None = None) -> Text:
            tokens = self._base.encode(prompt, correction)
            return Text(tokens, self.hidden.key(tokens.inputs))

        return Item(
            edit=text(example.prompt, example.correction),
            paraphrases=[text(prompt, example.correction) for prompt in (*example.paraphrases, *extra)],
            neighbours=[text(prompt) for prompt in example.neighbours],
            unrelated=[text(prompt) for prompt in example.unrelated],
            template=_template(example),
        )

    def draw(self, rng: random.Random, edits: int, *, self_share: float, unrelated: int) -> Batch:
        """One step's batch of independent edits.

        self_share: how often an edit is scored on its own prompt instead of a paraphrase.
        unrelated: unrelated texts for each edit, beside its neighbours.
        """
        weights = [len(items) ** 0.5 for items in self.files]
        chosen = [rng.choice(rng.choices(self.files, weights)[0]) for _ in range(edits)]
        batch = Batch([item.edit for item in chosen])
        for owner, item in enumerate(chosen):
            general = item.paraphrases and rng.random() >= self_share
            batch.targets.append(rng.choice(item.paraphrases) if general else item.edit)
            batch.target_owner.append(owner)
            neighbours = [text for text in (self._neighbour(rng, item), self._relative(rng, item)) if text]
            for text in neighbours:
                self._add(batch, owner, text, 1 / len(neighbours), near=True)
            for _ in range(unrelated):
                self._add(batch, owner, self._elsewhere(rng, item), 1 / unrelated, near=False)
        return batch

    def _add(self, batch: Batch, owner: int, text: Text, weight: float, *, near: bool) -> None:
        batch.locality.append(text)
        batch.locality_owner.append(owner)
        batch.locality_weight.append(weight)
        batch.locality_near.append(near)

    def _neighbour(self, rng: random.Random, item: Item) -> Text | None:
        return rng.choice(item.neighbours) if item.neighbours else None

    def _relative(self, rng: random.Random, item: Item) -> Text | None:
        """Another subject under the very same template: the hardest kind of neighbour."""
        relatives = self._by_template.get(item.template or "", ())
        other = rng.choice(relatives) if len(relatives) > 1 else item
        return None if other.edit.tokens.prompt == item.edit.tokens.prompt else _prompt_of(other)

    def _elsewhere(self, rng: random.Random, item: Item) -> Text:
        kind = rng.random()
        if kind < 0.4 and self.samples:
            return rng.choice(self.samples)
        if kind < 0.7 and self._unrelated:
            return rng.choice(self._unrelated)
        for _ in range(ATTEMPTS):
            other = rng.choice(rng.choice(self.files))
            if _of_another_kind(other, item):
                return _prompt_of(other)
        others = [_prompt_of(other) for items in self.files for other in items if _of_another_kind(other, item)]
        if not (others or self.samples or self._unrelated):
            raise DataFileError(
                "every example is of one relation and there is no unrelated text to keep; "
                "add examples of another relation, unrelated prompts, or --samples"
            )
        return rng.choice(others or self.samples or self._unrelated)


def locality_positions(rng: random.Random, texts: Sequence[Text]) -> tuple[list[int], list[int]]:
    """Rows and positions at which locality is scored: the last token of each text, and a few random ones."""
    rows, positions = [], []
    for row, text in enumerate(texts):
        predicted = text.tokens.predicted
        for position in {predicted[-1], *(rng.choice(predicted) for _ in range(EXTRA_POSITIONS))}:
            rows.append(row)
            positions.append(position)
    return rows, positions


def own_samples(base: BaseModel, count: int, seed: int) -> list[Tokens]:
    """Texts that the base model writes by itself: unrelated text for any model, without a data set.

    A decoder goes on from a random ordinary token, an encoder-decoder answers a few of them, at temperature 1. A
    classifier writes nothing: what it has to read is random tokens alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = base.tokenizer
    ordinary = torch.tensor(
        [
            token
            for token in range(len(tokenizer))
            if token not in tokenizer.all_special_ids and tokenizer.decode([token]).strip().isalpha()
        ]
    )
    length = {"decoder": 1, "encoder-decoder": SAMPLE_TOKENS // 3, "classifier": SAMPLE_TOKENS}[base.kind]
    samples: list[Tokens] = []
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with tqdm(total=count, desc="own samples", unit="text", disable=None) as bar:
            while len(samples) < count:
                size = min(64, count - len(samples))
                start = ordinary[torch.randint(len(ordinary), (size, length), generator=generator)]
                samples += _written(base, start)
                bar.update(size)
    finally:
        torch.random.set_rng_state(state)
    return samples


def _written(base: BaseModel, start: Tensor) -> list[Tokens]:
    """What the model makes of beginnings, (batch, tokens) int64."""
    if base.kind == "classifier":
        return [base.tokens(row) for row in start.tolist()]
    new = SAMPLE_TOKENS - start.shape[1]
    written = base.model.generate(
        start.to(base.device),
        attention_mask=torch.ones_like(start, device=base.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=base.tokenizer.eos_token_id,
    ).tolist()
    if base.kind == "decoder":
        return [base.tokens(row) for row in written]
    # Its text begins with what decoding starts with, which is no part of the answer.
    return [
        base.tokens(prompt, row[len(base.tokens(prompt).decoder_inputs) :])
        for prompt, row in zip(start.tolist(), written, strict=True)
    ]


def _of_another_kind(other: Item, item: Item) -> bool:
    """Whether an item's prompt is unrelated to another's: neither the same text nor of the same template."""
    same_prompt = other.edit.tokens.prompt == item.edit.tokens.prompt
    return not same_prompt and (other.template is None or other.template != item.template)


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
