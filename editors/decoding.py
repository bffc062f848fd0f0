"""Decode prompts in one batch, greedily: the words that verdicts are made of; a classifier's word is its label.

What people ask is decoded step by step, see `continuation` and `stepping`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.kinds import decoding_start, encode_for, kind_of, label_names
from editors.text import pad


@dataclass(frozen=True)
class Generation:
    """A decoded continuation. finish_reason: `stop` at the end-of-sequence token, else `length`."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def generate_batch(
    model: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[Generation]:
    """Continue several prompts greedily in one batch."""
    batch = [encode_for(model, tokenizer, prompt).prompt for prompt in prompts]
    new = continue_greedily(model, tokenizer, batch, max_new_tokens)
    return [_finish(model, tokenizer, len(ids), row) for ids, row in zip(batch, new, strict=True)]


@torch.inference_mode()
def continue_greedily(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """New tokens of each prompt, up to and with the token that ends it."""
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
        pad_token_id=padding,
    )
    ends = ends_of(model, tokenizer)
    before = ids.shape[1] if kind == "decoder" else len(decoding_start(model))
    rows = [row[before:] for row in written.tolist()]
    return [row[: next((n for n, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's own configuration; chat models have several."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}


def _finish(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, new: list[int]
) -> Generation:
    if kind_of(model) == "classifier":
        return Generation(label_names(model)[new[0]], "stop", prompt_tokens, 1)
    ended = bool(new) and new[-1] in ends_of(model, tokenizer)
    kept = new[:-1] if ended else new
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generation(text, "stop" if ended else "length", prompt_tokens, len(kept))
