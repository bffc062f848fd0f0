"""How probable a text is after a prompt, on the live model and on the base, both of one revision.

The live view is read as a generation reads it, by whole forward passes: nobody waits for anybody. Texts are scored one
after another, so that generation keeps its share of the machine.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.continuation import LEAST_LOGPROB
from editors.scoring import continue_with, target_logprobs
from editors.text import Tokens
from editors.wording import Wording
from service.engine.errors import GenerationFailed, UnknownToken
from service.engine.generator import Reading
from service.engine.requests import Published
from service.engine.texts import Texts
from service.engine.turns import MAX_READING, Places

logger = logging.getLogger("mend")


@dataclass(frozen=True)
class Likelihood:
    """Of one token. spelt: its bytes, perhaps of a part of a character. live, base: in nats, before temperature."""

    id: int
    spelt: bytes
    live: float
    base: float


@dataclass(frozen=True)
class Scores:
    """Of a continuation, token by token."""

    published: Published
    prompt_tokens: int
    tokens: tuple[Likelihood, ...]


class Scorer:
    """reading: gives the live view and its state, which stay as they are inside."""

    def __init__(self, base: BaseModel, reading: Reading, texts: Texts) -> None:
        self._base, self._reading, self._texts = base, reading, texts
        self._wording = Wording(base.model, base.tokenizer)
        self._places, self._scoring = Places("texts to be scored", MAX_READING), threading.Lock()

    def score(self, prompt: str, continuation: str) -> Scores:
        """Raises EmptyTextError, TextTooLong, UnknownToken, UnknownLabel; Busy, GenerationFailed."""
        sequence = self._encode(prompt, continuation)
        with self._places.one(), self._scoring, self._reading() as (view, published):
            live, base = (self._logprobs(model, sequence) for model in (view.model, self._base.model))
        spelt = map(self._wording.spell, sequence.target)
        tokens = tuple(Likelihood(*each) for each in zip(sequence.target, spelt, live, base, strict=True))
        return Scores(published, len(sequence.prompt), tokens)

    def _encode(self, prompt: str, continuation: str) -> Tokens:
        self._texts.check("prompt", prompt, 1)
        base = self._base
        sequence = continue_with(base.model, base.tokenizer, self._wording, prompt, continuation)
        if sequence is None:
            raise UnknownToken(
                "the model's tokenizer has no tokens that spell this continuation, character for character; use "
                "characters that it knows, and accents in one character with their letter",
                field="continuation",
            )
        self._texts.check_answer("continuation", sequence)
        self._texts.check_length("prompt", len(sequence.prompt), len(sequence.target))
        return sequence

    def _logprobs(self, model: PreTrainedModel, sequence: Tokens) -> list[float]:
        try:
            found = target_logprobs(model, sequence).tolist()
        except Exception as error:  # memory, most of all
            logger.error("a text could not be scored", exc_info=error)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise GenerationFailed(f"the model could not read this text: {reason}") from error
        if any(map(math.isnan, found)):
            raise GenerationFailed("the model could not read this text: its scores are no finite numbers")
        return [max(logprob, LEAST_LOGPROB) for logprob in found]
