"""Decode from a model: the words that people see, and that verdicts are made of; a classifier's word is its label.

Greedy unless asked otherwise. Sampling draws from a generator of its own (Gumbel-max over transformers' own
temperature and top-p), so that a seed gives the same text whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from editors.kinds import decoding_start, encode_for, kind_of, label_names
from editors.text import pad


@dataclass(frozen=True)
class Generation:
    """A decoded continuation. finish_reason: `stop` at the end-of-sequence token, else `length`."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Sampling:
    """temperature > 0, 0 < top_p <= 1; equal seeds give equal texts."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0


class _GumbelNoise(LogitsProcessor):
    """Turns the arg max that follows into a sample of the softmax."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator)
        return scores - exponential.log().to(scores.device)


def generate(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Generation:
    """Continue one prompt; a classifier says its label. Raises EmptyTextError when the prompt has no tokens."""
    processors = LogitsProcessorList()
    if sampling:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(sampling.seed))
    ids = encode_for(model, tokenizer, prompt).prompt
    (new,) = _continue(model, tokenizer, [ids], max_new_tokens, processors)
    return _finish(model, tokenizer, len(ids), new)


def generate_batch(
    model: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[Generation]:
    """Continue several prompts greedily in one batch."""
    batch = [encode_for(model, tokenizer, prompt).prompt for prompt in prompts]
    new = _continue(model, tokenizer, batch, max_new_tokens, LogitsProcessorList())
    return [_finish(model, tokenizer, len(ids), row) for ids, row in zip(batch, new, strict=True)]


def continue_greedily(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """New tokens of each prompt, up to and with the token that ends it."""
    return _continue(model, tokenizer, prompts, max_new_tokens, LogitsProcessorList())


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Sequence[int]],
    max_new_tokens: int,
    processors: LogitsProcessorList,
) -> list[list[int]]:
    kind = kind_of(model)
    # Some classifiers find the end of a text by their own padding.
    padding = model.config.pad_token_id if kind == "classifier" else tokenizer.pad_token_id
    # A decoder goes on from its last column; everything else reads from the first.
    ids = pad(batch, padding, device=model.device, left=kind == "decoder")
    mask = pad([[1] * len(row) for row in batch], 0, device=model.device, left=kind == "decoder")
    if kind == "classifier":
        return [[label] for label in model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()]
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens + (len(decoding_start(model)) - 1 if kind == "encoder-decoder" else 0),
        do_sample=False,
        num_beams=1,
        logits_processor=processors,
        pad_token_id=padding,
    )
    ends = _ends(model, tokenizer)
    before = ids.shape[1] if kind == "decoder" else len(decoding_start(model))
    rows = [row[before:] for row in written.tolist()]
    return [row[: next((n for n, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's own configuration; chat models have several."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}


def _finish(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, new: list[int]
) -> Generation:
    if kind_of(model) == "classifier":
        return Generation(label_names(model)[new[0]], "stop", prompt_tokens, 1)
    ended = bool(new) and new[-1] in _ends(model, tokenizer)
    kept = new[:-1] if ended else new
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generation(text, "stop" if ended else "length", prompt_tokens, len(kept))
