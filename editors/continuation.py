"""One text while a model writes it: each next token is chosen, and what is sure of its words is told in pieces.

Flow: scores of the next token -> choice -> tokens -> words -> pieces, until the text ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from torch import Tensor

from editors.sampling import Choice, Sampling
from editors.wording import UNSURE, Wording, Words

FinishReason = Literal["stop", "length", "timeout"]
"""stop: at a stop string or at a token that ends texts; timeout: it took too long."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""
LATER_BYTES = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))
"""Of a character in UTF-8, behind its first."""


@dataclass(frozen=True)
class Wish:
    """How a prompt is to be continued. stop: strings before the first of which the text ends.

    max_new_tokens: None for as many as there is room for.
    logprobs: how many of the most probable tokens are told at each place, beside the one that was said; None for none.
    """

    max_new_tokens: int | None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Scored:
    """A token that was or could have been said. spelt: its bytes, perhaps of a part of a character.

    logprob: of the model itself, before temperature and the like, in nats. offset: where in the text it begins, or the
    character does that it goes on with.
    """

    id: int
    spelt: bytes
    logprob: float
    offset: int = 0
    top: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some more of a text. tokens: those that it is made of, where their probabilities were asked for."""

    text: str
    tokens: tuple[Scored, ...] = ()


class Continuation:
    """said: the tokens so far, without the one that ended the text. finish_reason: None while it goes on."""

    def __init__(self, wording: Wording, prompt: Sequence[int], wish: Wish) -> None:
        self._wording, self._wish = wording, wish
        self.prompt, self.said = tuple(prompt), []
        self.finish_reason: FinishReason | None = None
        self._choice = Choice(Sampling() if wording.one_word else wish.sampling)
        self._words = Words(wish.stop)
        self._scored: list[Scored] = []
        self._ends: list[int] = []
        """Where in the text the first of these end, as far as their last character is complete."""
        self._text, self._whole, self._told = "", 0, 0

    def take(self, scores: Tensor, best: int) -> Piece | None:
        """Say one token more. scores (tokens,), float32; best: their arg max. Returns what that makes sure, if any."""
        token = self._choice.of(scores, best, (*self.prompt, *self.said))
        if token in self._wording.ends:
            return self.end("stop")
        self.said.append(token)
        if self._wish.logprobs is not None:
            self._scored.append(self._score(scores, token))
        if self._wording.one_word:
            return self.end("stop")
        if len(self.said) == self._wish.max_new_tokens:
            return self.end("length")
        return self._read()

    def end(self, reason: FinishReason) -> Piece | None:
        """Say no more. Returns what was held back, if anything."""
        self.finish_reason = reason
        return self._read(last=True)

    def _read(self, *, last: bool = False) -> Piece | None:
        text = self._text = self._wording.text(self.said)
        new = self._words.read(text, last=last)
        if not text.endswith(UNSURE):
            self._whole = len(text)
            self._ends += [self._whole] * (len(self._scored) - len(self._ends))
        if self._words.stopped:
            self.finish_reason = "stop"
        settled = self._settled()
        self._told += len(settled)
        return Piece(new, settled) if new or settled else None

    def _settled(self) -> tuple[Scored, ...]:
        """Tokens that are newly a part of what is sure."""
        untold, sure = self._scored[self._told :], len(self._words.sure)
        if self._words.stopped:
            return tuple(takewhile(lambda token: token.offset < sure, untold))
        if self.finish_reason:
            return tuple(untold)
        known = sum(1 for _ in takewhile(lambda end: end <= sure, self._ends[self._told :]))
        return tuple(untold[:known])

    def _score(self, scores: Tensor, token: int) -> Scored:
        logprobs = scores.log_softmax(-1)
        values, ids = logprobs.topk(min(self._wish.logprobs, len(logprobs)))
        top = tuple(self._named(*each) for each in zip(ids.tolist(), values.tolist(), strict=True))
        said = self._named(token, float(logprobs[token]))
        # Some tokenizers cannot read the characters before those bytes either, as long as one of theirs is missing.
        goes_on = said.spelt[:1] in LATER_BYTES
        offset = max(self._whole, len(self._text.rstrip(UNSURE))) if goes_on else len(self._text)
        return Scored(token, said.spelt, said.logprob, offset, top)

    def _named(self, token: int, logprob: float) -> Scored:
        return Scored(token, self._wording.spell(token), logprob if math.isfinite(logprob) else LEAST_LOGPROB)
