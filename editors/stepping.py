"""Texts that grow by a token at every step, several of one model at once where that is right.

Flow: prompts -> rows, with scores of each one's next token -> step(tokens) -> the next scores …
A decoder's rows run as one batch, padded on the left, and more can join between two steps. Whether that says what each
text says alone is tried out on the model itself (`rows_of`); otherwise each runs alone, and everything that is no
decoder does.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from editors.kinds import decoding_start, kind_of
from editors.targets import MLP_BY_FAMILY
from editors.text import pad
from editors.views import close

logger = logging.getLogger(__name__)

TRIED = (9, 6)
"""Lengths of the texts by which ways to decode are tried out."""


class Rows(Protocol):
    """Texts under way. joins: whether there may be several.

    scores: of what follows each, (rows, vocabulary), float32; of a classifier (1, labels), and nothing follows those.
    """

    joins: bool
    scores: Tensor

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None: ...

    def step(self, tokens: Sequence[int]) -> None:
        """Go on behind these tokens, one of each row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows. At least one is left."""


class Together:
    """Rows of a decoder in one batch, padded on the left to the longest, with one cache of whole texts.

    Where blocks look back through a window only, the mask says so; the cache holds everything all the same.
    """

    joins = True

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._accepts = model, inspect.signature(model.forward).parameters
        self._cache = DynamicCache()
        self._lengths = [len(prompt) for prompt in prompts]
        self._run(pad(prompts, device=model.device, left=True))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        self._lengths = [length + 1 for length in self._lengths]
        self._run(torch.tensor(tokens, device=self._model.device)[:, None])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        lengths = [self._lengths[row] for row in rows]
        padding, chosen = max(self._lengths) - max(lengths), torch.tensor(rows, device=self._model.device)
        self._lengths, self.scores = lengths, self.scores[chosen]
        for layer in self._cache.layers:
            layer.keys, layer.values = (states[chosen, :, padding:] for states in (layer.keys, layer.values))

    @torch.inference_mode()
    def join(self, others: Self) -> None:
        """Take the rows of `others` in, behind the own. All or nothing, whatever is raised."""
        layers = [
            (_stacked(own.keys, other.keys), _stacked(own.values, other.values))
            for own, other in zip(self._cache.layers, others._cache.layers, strict=True)
        ]
        self.scores = torch.cat([self.scores, others.scores])
        self._lengths += others._lengths
        for layer, (keys, values) in zip(self._cache.layers, layers, strict=True):
            layer.keys, layer.values = keys, values

    def _run(self, ids: Tensor) -> None:
        width = max(self._lengths)
        mask = torch.arange(width, device=ids.device) >= width - torch.tensor(self._lengths, device=ids.device)[:, None]
        told: dict[str, Any] = {"attention_mask": mask.long()}
        if "position_ids" in self._accepts:
            told["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepts:
            told["logits_to_keep"] = 1
        logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **told).logits
        self.scores = logits[:, -1].float()


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Keys or values (rows, heads, tokens, width) on each other, padded on the left to the longer."""
    tokens = max(one.shape[2], other.shape[2])
    return torch.cat([F.pad(states, (0, 0, tokens - states.shape[2], 0)) for states in (one, other)])


class Alone:
    """One text of a decoder, with whatever cache the model keeps by itself."""

    joins = False

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        (prompt,) = prompts
        self._model = model
        self._told: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._told["logits_to_keep"] = 1
        self._run("input_ids", prompt)

    def step(self, tokens: Sequence[int]) -> None:
        self._run("input_ids", tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """It is one row."""

    @torch.inference_mode()
    def _run(self, name: str, ids: Sequence[int]) -> None:
        output = self._model(**{name: torch.tensor([ids], device=self._model.device)}, **self._told)
        self._told["past_key_values"] = output.past_key_values
        self.scores = output.logits[:, -1].float()


class Anew:
    """One text of a decoder without a cache that could be used: it is read anew at every step."""

    joins = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        ((*self._ids,),) = prompts
        self._model = model
        self.step(())

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        self._ids += tokens
        ids = torch.tensor([self._ids], device=self._model.device)
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        self.scores = logits[:, -1].float()

    def keep(self, rows: Sequence[int]) -> None:
        """It is one row."""


class Answer(Alone):
    """One answer of an encoder-decoder."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        ids = torch.tensor(prompts, device=model.device)
        self._model = model
        self._told = {"encoder_outputs": model.get_encoder()(input_ids=ids), "use_cache": True}
        self._run("decoder_input_ids", decoding_start(model))

    def step(self, tokens: Sequence[int]) -> None:
        self._run("decoder_input_ids", tokens)


class Label:
    """The one label of a classifier, in the place of a token."""

    joins = False

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.scores = model(input_ids=torch.tensor(prompts, device=model.device)).logits.float()

    def step(self, tokens: Sequence[int]) -> None:
        raise AssertionError("nothing follows a label")

    def keep(self, rows: Sequence[int]) -> None:
        """It is one row."""


def rows_of(model: PreTrainedModel) -> type[Rows]:
    """How texts of a model are decoded: the first way that says what the model says of whole texts."""
    kind = kind_of(model)
    if kind != "decoder":
        return Answer if kind == "encoder-decoder" else Label
    if _is_known(model) and _agrees(model, Together):
        return Together
    logger.warning("%s: texts cannot be decoded as one batch; each is decoded alone", type(model).__name__)
    return Alone if _agrees(model, Alone) else Anew


def _is_known(model: PreTrainedModel) -> bool:
    """Whether it is one of the families that are tested, or its cache has nothing special, such as windows, which a
    short trial would not reach."""
    usual = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return usual or model.config.model_type in MLP_BY_FAMILY


def _agrees(model: PreTrainedModel, way: type[Together | Alone]) -> bool:
    """Whether texts are scored as the whole model scores them, also when one joins later and outlives the other."""
    generator, words = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    long, short = (torch.randint(words, (length,), generator=generator).tolist() for length in TRIED)

    def right(rows: Rows, *texts: Sequence[int]) -> bool:
        return close(rows.scores, torch.cat([Anew(model, [text]).scores for text in texts]))

    try:
        first, second = way(model, [long[:-2]]), way(model, [short[:-2]])
        first.step(long[-2:-1])
        good = right(first, long[:-1]) and right(second, short[:-2])
        if way.joins:
            first.join(second)
            first.step([long[-1], short[-2]])
            good = good and right(first, long, short[:-1])
            first.keep([1])
            first.step(short[-1:])
            good = good and right(first, short)
        return good
    except Exception as error:  # whatever an unknown architecture makes of it
        logger.info("%s, %s: %s", type(model).__name__, way.__name__, error)
        return False
