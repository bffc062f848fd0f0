"""Random tokens in the place of text: edits, and a corpus of them. All are of one length, so that nothing is padded."""

from __future__ import annotations

import random

from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.mend.training.corpus import Batch
from editors.mend.training.hidden import HiddenStates, Text
from editors.mend.training.samples import ANSWER_TOKENS
from editors.text import Tokens
from editors.views import UpperBlocks

CORRECTION_TOKENS = 2
TEXTS = 8
"""Of a corpus; a training step draws from them with repetition."""
NEIGHBOURS = 2


class RandomTexts:
    """tokens: that the model reads for an edit, those of the correction from which something follows included."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.base = BaseModel(model, None, "random", "random", parameters)  # needs a tokenizer only for words
        self._random = random.Random(0)
        self._words = model.get_input_embeddings().num_embeddings
        # Only in a decoder does the correction follow the prompt in one text; at its last token nothing is read.
        self._prompt = tokens - (CORRECTION_TOKENS - 1 if self.base.kind == "decoder" else 0)

    def edit(self) -> Tokens:
        """A prompt with its correction."""
        if self.base.kind == "classifier":
            return self.base.tokens(
                self._draw(self._prompt), [self._random.randrange(self.base.model.config.num_labels)]
            )
        return self.base.tokens(self._draw(self._prompt), self._draw(CORRECTION_TOKENS))

    def kept(self) -> Tokens:
        """A prompt whose answer must not change; an encoder-decoder's is known and scored."""
        answer = ANSWER_TOKENS if self.base.kind == "encoder-decoder" else 0
        return self.base.tokens(self._draw(self._prompt), self._draw(answer))

    def _draw(self, count: int) -> list[int]:
        return [self._random.randrange(self._words) for _ in range(count)]


class RandomCorpus:
    """What a trainer asks of a corpus.

    Every edit has a paraphrase, two neighbours and as many unrelated texts as are asked for, as with CounterFact.
    """

    def __init__(self, upper: UpperBlocks, texts: RandomTexts) -> None:
        self.hidden = HiddenStates(upper, texts.base)
        self._edits = [self._text(texts.edit()) for _ in range(TEXTS)]
        self._kept = [self._text(texts.kept()) for _ in range(TEXTS)]
        self.prompts = {text.tokens.prompt for text in self._edits}
        self.hidden.compute()

    def _text(self, tokens: Tokens) -> Text:
        return Text(tokens, self.hidden.key(tokens.inputs))

    def choose(self, rng: random.Random, edits: int, together: int = 1) -> list[Text]:
        """Edits, repeated at will: what one costs does not depend on the others."""
        return rng.choices(self._edits, k=edits)

    def draw(
        self,
        rng: random.Random,
        chosen: list[Text],
        *,
        self_share: float,
        unrelated: int,
        near: int = NEIGHBOURS,
        together: int = 1,
    ) -> Batch:
        """The texts on which chosen edits are judged. self_share: of no effect, since all texts cost the same."""
        batch = Batch(chosen, together)
        for owner in range(len(chosen)):
            batch.targets.append(rng.choice(self._edits))
            batch.target_owner.append(owner)
            for is_near, count in ((True, near), (False, unrelated)):
                batch.locality += rng.choices(self._kept, k=count)
                batch.locality_owner += [owner] * count
                batch.locality_weight += [1 / count] * count
                batch.locality_near += [is_near] * count
        return batch
