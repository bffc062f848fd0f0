"""Hidden states below the edited blocks, computed once per text.

The lower blocks never change, so a text passes through them a single time. Texts of one length are grouped
without padding and in a fixed order, so that the cached values do not depend on which batch asked first, nor on how
many processes share the work: that is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.mend.training.cache import cached
from editors.mend.training.processes import ALONE, Processes
from editors.text import Tokens
from editors.views import UpperBlocks

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Text:
    """A sequence whose hidden states are cached under `key`, which may be longer than what is read of it."""

    tokens: Tokens
    key: int


class HiddenStates:
    """Hidden states that enter the first edited block, for a growing set of texts.

    cache: a folder that keeps them between runs, by the digest of the base model and the texts.
    """

    def __init__(
        self, upper: UpperBlocks, base: BaseModel, cache: Path | None = None, processes: Processes = ALONE
    ) -> None:
        self._upper = upper
        self._cache = cache
        self._processes = processes
        self._identity = f"{base.digest} {base.dtype} {upper.first}"
        self._keys: dict[tuple[int, ...], int] = {}
        self._states: list[Tensor] = []

    def key(self, ids: tuple[int, ...]) -> int:
        return self._keys.setdefault(ids, len(self._keys))

    def compute(self) -> None:
        """Run the lower blocks over every text; each process takes its share of the batches."""
        texts = list(self._keys)
        key = ("hidden states", self._identity, texts)
        flat = cached(self._cache, key, lambda: self._computed(texts), self._processes)  # (tokens of all texts, width)
        self._states = list(flat.split([len(text) for text in texts]))

    def _computed(self, texts: list[tuple[int, ...]]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda key: (len(texts[key]), key))
        chunks = list(_equal_lengths(order, texts))
        share = [chunks[index] for index in self._processes.share(len(chunks))]
        one = self._upper.below(texts[:1])[0].cpu()  # (tokens, width)
        flat = one.new_zeros(sum(len(text) for text in texts), *one.shape[1:])
        states = flat.split([len(text) for text in texts])
        hidden = None if self._processes.is_main else True
        with tqdm(total=sum(map(len, share)), desc="hidden states", unit="text", disable=hidden) as bar:
            for chunk in share:
                for key, state in zip(chunk, self._upper.below([texts[key] for key in chunk]).cpu(), strict=True):
                    states[key].copy_(state)
                bar.update(len(chunk))
        return self._processes.unite(flat)

    def batch(self, texts: Sequence[Text]) -> Tensor:
        """What `UpperBlocks.logits` takes, (batch, tokens, width), padded on the right."""
        return self._upper.batch([self._states[text.key][: len(text.tokens.inputs)] for text in texts])


def _equal_lengths(keys: Iterable[int], texts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    chunk: list[int] = []
    for key in keys:
        length = len(texts[key])
        if chunk and (length != len(texts[chunk[0]]) or (len(chunk) + 1) * length > TOKENS_PER_PASS):
            yield chunk
            chunk = []
        chunk.append(key)
    if chunk:
        yield chunk
