"""Random texts for a model that has no tokenizer: a text is written as the numbers of its tokens.

All are of one length, so that nothing is padded.
"""

from __future__ import annotations

import random
import re

from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.data import DataSet, Example
from editors.text import Tokens

CORRECTION_TOKENS = 2
EXAMPLES = 4
"""Of each of two relations; a training step draws from them with repetition."""


class _NumberReader(BaseModel):
    """A base model that reads each number in a text as a token."""

    def encode(self, prompt: str, correction: str | None = None) -> Tokens:
        return self.tokens(
            *([int(number) for number in re.findall(r"\d+", text or "")] for text in (prompt, correction))
        )


class RandomTexts:
    """tokens: how many the model reads for an edit, those of the correction from which something follows included."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.base: BaseModel = _NumberReader(model, None, "random", "random", parameters)
        self._random = random.Random(0)
        classifier = self.base.kind == "classifier"
        self._answer = (1, model.config.num_labels) if classifier else (CORRECTION_TOKENS, self._words)
        # Only in a decoder does the correction follow the prompt in one text; at its last token nothing is read.
        self._length = tokens - (CORRECTION_TOKENS - 1 if self.base.kind == "decoder" else 0)
        self._templates = [self._numbers(self._length - 1, self._words) for _ in range(3)]

    def edit(self) -> Tokens:
        """A prompt with its correction."""
        example = self._example(0)
        return self.base.encode(example.prompt, example.correction)

    def unrelated(self) -> Tokens:
        """A text without a correction, of no relation that the data set knows."""
        return self.base.encode(self._about(self._subject(), 2))

    def data_set(self) -> DataSet:
        """Two relations, each example with a paraphrase, a neighbour and an unrelated text, as in CounterFact."""
        examples = tuple(self._example(relation) for relation in (0, 1) for _ in range(EXAMPLES))
        return DataSet("random", "random", "random", examples, skipped=0)

    def _example(self, relation: int) -> Example:
        subject = self._subject()
        return Example(
            prompt=self._about(subject, relation),
            correction=self._numbers(*self._answer),
            subject=subject,
            paraphrases=(self._about(subject, 2),),
            neighbours=(self._about(self._subject(), relation),),
            unrelated=(self._about(self._subject(), 2),),
        )

    def _subject(self) -> str:
        return f"<{self._numbers(1, self._words)}>"

    def _about(self, subject: str, relation: int) -> str:
        return f"{subject} {self._templates[relation]}"

    def _numbers(self, count: int, below: int) -> str:
        return " ".join(str(self._random.randrange(below)) for _ in range(count))

    @property
    def _words(self) -> int:
        return self.base.model.get_input_embeddings().num_embeddings
