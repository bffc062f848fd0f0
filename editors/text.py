"""From words to token ids, and back: the one place that knows how a prompt and its correction join.

The prompt is always tokenised on its own, because that is what the model will decode from; the correction's
tokens are what must follow. A target never carries the tokenizer's special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editors.errors import EmptyTextError, SubjectNotFound


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens followed by the tokens of what should come next (possibly none), as a decoder reads them.

    subject: position of the last token of what the prompt is about, where that is known.
    question: positions among which it is, where the prompt has more around the question, as a chat template does.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()
    subject: int | None = field(default=None, kw_only=True)
    question: range | None = field(default=None, kw_only=True)

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: everything but the last target token, which nothing is predicted from."""
        return self.prompt + self.target[:-1]

    @property
    def decoder_inputs(self) -> tuple[int, ...]:
        """What the decoder of an encoder-decoder reads; no other model has one."""
        return ()

    @property
    def scored(self) -> range:
        """Positions whose prediction is scored: one per target token (the one after the prompt, if there is none)."""
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + max(1, len(self.target)))

    @property
    def predicted(self) -> range:
        """Every position at which the model predicts something."""
        return range(len(self.inputs))

    @property
    def bare(self) -> Self:
        """The prompt alone."""
        return replace(self, target=())


@dataclass(frozen=True)
class Seq2SeqTokens(Tokens):
    """The same for an encoder-decoder: the encoder reads the prompt, the decoder the target.

    start: what decoding begins with, before the first token that the model chooses.
    """

    start: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.prompt

    @property
    def decoder_inputs(self) -> tuple[int, ...]:
        return self.start + self.target[:-1]

    @property
    def scored(self) -> range:
        return range(len(self.start) - 1, len(self.start) - 1 + max(1, len(self.target)))

    @property
    def predicted(self) -> range:
        return range(len(self.start) - 1, len(self.decoder_inputs))


@dataclass(frozen=True)
class LabelledTokens(Tokens):
    """The same for a classifier: the whole prompt is read, and one label predicted from it."""

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.prompt

    @property
    def scored(self) -> range:
        return range(1)

    @property
    def predicted(self) -> range:
        return range(1)


def scored_positions(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and position of every scored prediction of a padded batch, two int64 tensors (scored,)."""
    rows = [row for row, sequence in enumerate(sequences) for _ in sequence.scored]
    positions = [position for sequence in sequences for position in sequence.scored]
    return torch.tensor(rows, device=device), torch.tensor(positions, device=device)


def separator(prompt: str, correction: str) -> str:
    """The space between a prompt and its correction, unless either already brings its own boundary."""
    if prompt[-1:].isspace() or correction[:1].isspace() or re.search(r"[(\[{<\"'“‘/-]$", prompt):
        return ""
    return " "


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, correction: str | None = None) -> Tokens:
    """Tokenise a prompt and what should follow it in a decoder's text.

    Where the tokenizer splits the joined text at the boundary, its own split is used; otherwise the
    correction is tokenised alone, so that the prompt's tokens are always those of the bare prompt.
    Raises EmptyTextError when either has no tokens.
    """
    ids = tokenizer(prompt).input_ids
    if not ids:
        raise EmptyTextError("the prompt has no tokens", field="prompt")
    if correction is None:
        return Tokens(tuple(ids))
    continuation = separator(prompt, correction) + correction
    joined = tokenizer(prompt + continuation).input_ids
    if joined[: len(ids)] == ids:
        target = [token for token in joined[len(ids) :] if token != tokenizer.eos_token_id]
    else:
        target = tokenizer(continuation, add_special_tokens=False).input_ids
    if not target or not correction.strip():
        raise EmptyTextError("the correction has no tokens", field="correction")
    return Tokens(tuple(ids), tuple(target))


def encode_answer(tokenizer: PreTrainedTokenizerBase, correction: str) -> tuple[int, ...]:
    """Tokens of an encoder-decoder's whole answer: the correction and the token that ends it.

    Raises EmptyTextError when the correction has none.
    """
    target = tokenizer(correction.strip(), add_special_tokens=False).input_ids
    if not target:
        raise EmptyTextError("the correction has no tokens", field="correction")
    ending = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return (*target, *ending)


def subject_position(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, question: slice = slice(None)
) -> int:
    """Position of the last token of a subject among the prompt's tokens, where it stands last.

    question: characters of the prompt in which it is. Raises SubjectNotFound, also where letters differ in case.
    """
    begin = prompt.rfind(subject.strip(), question.start, question.stop) if subject.strip() else -1
    if begin < 0:
        raise SubjectNotFound(
            f"the subject {subject!r} does not occur in the prompt; give it as the prompt writes it, or leave it out",
            field="subject",
        )
    end = begin + len(subject.strip())
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    return max(position for position, (start, stop) in enumerate(offsets) if start < end and start < stop)


def question_positions(tokenizer: PreTrainedTokenizerBase, prompt: str, question: slice) -> range:
    """Positions of the tokens of some of a prompt's characters."""
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    held = [place for place, (start, stop) in enumerate(offsets) if start < question.stop and stop > question.start]
    return range(held[0], held[-1] + 1)


def begins_with(text: str, correction: str) -> bool:
    """Whether a decoded answer says the correction: it begins with it, white space before it aside."""
    return text.lstrip().startswith(correction.strip())


def pad(
    sequences: Sequence[Sequence[int]], value: int = 0, device: torch.device | None = None, *, left: bool = False
) -> Tensor:
    """Pad to one (batch, tokens) int64 tensor, on the right unless told otherwise.

    In a causal model padding on the right needs no attention mask: no real token can see it.
    """
    rows = [torch.tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
