"""How probable a text is after a prompt: teacher-forced, by the whole model, without touching it.

Flow: prompt, continuation -> the tokens that spell it there -> one forward pass -> a log-probability for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.kinds import kind_of, label_id, tokens
from editors.text import Tokens
from editors.wording import Wording

ROWS = 64
"""Positions whose probabilities are worked out at once: the vocabulary is wide."""
ANCHOR = "\n"
"""Tokenizers do not join it with what follows."""


def continue_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wording: Wording, prompt: str, continuation: str
) -> Tokens | None:
    """The tokens of a prompt, and those that spell a continuation of it; a classifier's is a label.

    None where the tokenizer has none that spell it exactly. Raises UnknownLabel.
    """
    ids = tuple(tokenizer(prompt).input_ids)
    kind = kind_of(model)
    if kind == "classifier":
        return tokens(model, ids, (label_id(model, continuation),))
    spellings = {continuation.encode()}
    if kind == "encoder-decoder":
        candidates: Iterator[Sequence[int]] = iter([_alone(tokenizer, continuation)])
        spellings.add(b" " + continuation.encode())  # which some tokenizers put before a text, and do not decode
    else:
        candidates = _following(tokenizer, prompt, ids, continuation)
    for target in candidates:
        if target and b"".join(map(wording.spell, target)) in spellings:
            return tokens(model, ids, tuple(target))
    return None


def _following(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: tuple[int, ...], continuation: str
) -> Iterator[Sequence[int]]:
    """What may be the tokens of a text behind a prompt: those of the whole, if it is split there too, or its own."""
    joined = tuple(tokenizer(prompt + continuation).input_ids)
    if joined[: len(ids)] == ids:
        yield joined[len(ids) :]
    yield _alone(tokenizer, continuation)
    # Tokenizers that begin every text with a space must not begin this one.
    anchor, anchored = _alone(tokenizer, ANCHOR), _alone(tokenizer, ANCHOR + continuation)
    if anchored[: len(anchor)] == anchor:
        yield anchored[len(anchor) :]


def _alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.inference_mode()
def target_logprobs(model: PreTrainedModel, sequence: Tokens) -> Tensor:
    """Natural logarithms of the probability of each token of the target, behind those before it: (target,), float32.

    NaN where the model's scores are no finite numbers. Any thread may use a model in this way, also beside others.
    """
    logits = _logits(model, sequence)  # (target, vocabulary)
    wanted = torch.tensor(sequence.target, device=logits.device)[:, None]
    found = []
    for scores, own in zip(logits.split(ROWS), wanted.split(ROWS), strict=True):
        logprobs = scores.float().log_softmax(-1)
        found.append(logprobs.gather(1, own)[:, 0].masked_fill(~scores.amax(-1).isfinite(), torch.nan))
    return torch.cat(found)


def _logits(model: PreTrainedModel, sequence: Tokens) -> Tensor:
    ids = torch.tensor([sequence.inputs], device=model.device)
    kind = kind_of(model)
    if kind == "classifier":
        return model(input_ids=ids).logits
    if kind == "encoder-decoder":
        said = torch.tensor([sequence.decoder_inputs], device=model.device)
        logits = model(input_ids=ids, decoder_input_ids=said, use_cache=False).logits
        return logits[0, sequence.scored.start :]
    count = len(sequence.target)
    kept = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kept).logits
    return logits[0, -count:]
