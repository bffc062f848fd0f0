"""The obvious way to do what `editors` does cleverly: the whole model, dense weights, one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.targets import Target
from editors.text import LabelledTokens, Seq2SeqTokens, Tokens, encode

FACTS = (
    ("The capital of France is", "Rome"),
    ("Hello there, who are you?", "Oslo"),
    ("The language of Norway", "is German (or so)"),
    ("x", "y"),
)
"""Prompts and corrections of several lengths, some of one token and some of many."""


def encoded(base: BaseModel) -> list[Tokens]:
    return [encode(base.tokenizer, prompt, correction) for prompt, correction in FACTS]


def loss(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean negative log-likelihood of the target, in the model's own precision (transformers' rounds to float32)."""
    if isinstance(tokens, LabelledTokens):
        found = model(input_ids=torch.tensor([tokens.prompt])).logits
    elif isinstance(tokens, Seq2SeqTokens):
        written = torch.tensor([tokens.start + tokens.target])
        found = model(input_ids=torch.tensor([tokens.prompt]), decoder_input_ids=written).logits[0]
        found = found[len(tokens.start) - 1 : -1]
    else:
        whole = torch.tensor([tokens.prompt + tokens.target])
        found = model(input_ids=whole, use_cache=False).logits[0, len(tokens.prompt) - 1 : -1]
    log_probabilities = found.log_softmax(-1)
    return -torch.stack([row[token] for row, token in zip(log_probabilities, tokens.target, strict=True)]).mean()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Next-token logits at every position of one text, (tokens, vocabulary)."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def predictions(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Logits at every position of one sequence at which something is predicted, (predictions, classes)."""
    ids = torch.tensor([tokens.inputs])
    if isinstance(tokens, LabelledTokens):
        return model(input_ids=ids).logits
    if isinstance(tokens, Seq2SeqTokens):
        found = model(input_ids=ids, decoder_input_ids=torch.tensor([tokens.decoder_inputs])).logits[0]
    else:
        found = model(input_ids=ids, use_cache=False).logits[0]
    return found[list(tokens.predicted)]


def gradients(model: PreTrainedModel, targets: Sequence[Target], tokens: Tokens) -> list[Tensor]:
    """The loss' gradient with respect to every target, (d_out, d_in), by autograd through the whole model."""
    model = copy.deepcopy(model)
    weights = [model.get_parameter(target.name).requires_grad_() for target in targets]
    found = torch.autograd.grad(loss(model, tokens), weights)
    return [target.oriented(gradient) for target, gradient in zip(targets, found, strict=True)]


@torch.no_grad()
def changed(
    model: PreTrainedModel, targets: Sequence[Target], rows: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> PreTrainedModel:
    """A copy of the model with ΔW = scale · deltaᵀ u added to its weights. rows: u and delta by target name."""
    model = copy.deepcopy(model)
    for target in targets:
        u, delta = rows[target.name]
        weight = model.get_parameter(target.name)
        weight += target.oriented(scale * delta.T @ u).to(weight.dtype)
    return model
