"""Several views of one model in the memory of one.

A view is a module tree of its own that shares every parameter with the base model but those it is told to own.
The service holds three (pristine, live, candidate); hooks placed on one never fire in another.

UpperBlocks is the view that makes editing cheap: below the first edited block nothing ever changes, so what
comes out there is computed once per text, and only the blocks above run again.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from editors.errors import TargetsError
from editors.kinds import kind_of, tokens
from editors.targets import Target, first_edited_block
from editors.text import Tokens, pad, scored_positions

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (7, 4)


def view(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """A second module tree over the same parameters.

    own: names of the parameters that the view holds as copies of its own.
    Buffers are copied, since some models write to them while they run.
    """
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    for name in own:
        parameter = model.get_parameter(name)
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return copy.deepcopy(model, memo)


Factored = Mapping[str, tuple[Tensor, Tensor]]
"""Per target: ũ (batch, rank, d_in) and δ̃ (batch, rank, d_out); row b of a batch runs with ΔW = Σ δ̃_b ũ_bᵀ.
Where there is only one, all rows run with it."""


@contextmanager
def edited(model: nn.Module, targets: Sequence[Target], factored: Factored) -> Iterator[None]:
    """Run every row of a batch under an edit of its own, without forming any ΔW."""

    def add(u: Tensor, delta: Tensor) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].to(u.dtype)  # (batch, tokens, d_in)
            if len(u) == 1:
                change = (x @ u[0].T) @ delta[0]
            else:
                if x.dim() == 2:  # some architectures (OPT) flatten batch and tokens before their MLP
                    x = x.unflatten(0, (len(u), -1))
                change = (x @ u.mT) @ delta  # (batch, tokens, d_out)
            return output + change.reshape(output.shape).to(output.dtype)

        return hook

    handles = [
        model.get_submodule(target.module).register_forward_hook(add(*factored[target.name])) for target in targets
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class UpperBlocks:
    """The blocks from the first edited one upwards, fed from the hidden states below them.

    Of an encoder-decoder these are the upper blocks of the encoder and the whole decoder. `module` is a view cut
    down to them; its parameters are the base model's own. Whether the cut model says what the whole one says is tried
    out at once. Where it does not, nothing is cut: `cached` is False, `why_not` tells the reason, and what `below`
    returns are the texts themselves. Not thread-safe: whoever makes one uses it alone.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        self.kind = kind_of(model)
        self._full = view(model)
        self._padding = getattr(model.config, "pad_token_id", None) or 0
        self._hidden: Tensor | None = None
        self._where: tuple[Tensor, Tensor] | None = None
        first, stack = first_edited_block(model, targets)
        self._stack = stack
        self.cached, self.why_not = False, ""
        self._use(self._full, targets)
        calls: dict[str, list[Any]] = {target.name: [] for target in targets}
        handles = [
            self._full.get_submodule(target.module).register_forward_hook(_note(calls[target.name]))
            for target in targets
        ]
        expected = self._probe()
        for handle in handles:
            handle.remove()
        self._reads = [_reads(target, calls[target.name], self._probes()) for target in targets]
        self.first = first
        self._lower_exit = self._full.get_submodule(f"{stack}.{first}")
        try:
            cut, renamed = self._cut(model, stack, targets)
            self.cached = True
            self._use(cut, renamed)
            agrees = close(self._probe(), expected)
            self.why_not = "" if agrees else "cut down to its upper blocks, it says something else"
        except Exception as error:  # whatever an unknown architecture makes of being cut
            self.why_not = f"it cannot be cut down to its upper blocks ({error})"
        if self.why_not:
            logger.warning("%s: %s; every text passes through the whole model", type(model).__name__, self.why_not)
            self.cached, self.first = False, 0
            self._use(self._full, targets)

    @torch.no_grad()
    def below(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What enters the first edited block for texts given as `Tokens.inputs`, padded on the right.

        Returns hidden states (batch, tokens, width); without the cut, the token ids (batch, tokens) themselves.
        """
        ids = pad(texts, self._padding, device=self._device)
        if not self.cached:
            return ids
        caught: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self._lower_exit.register_forward_pre_hook(stop, with_kwargs=True)
        lower = self._full.get_encoder() if self.kind == "encoder-decoder" else self._full
        try:
            lower(ids, **self._settings([len(text) for text in texts], ids.shape[1]))
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught[0]

    def batch(self, states: Sequence[Tensor]) -> Tensor:
        """Rows of earlier `below`s as one batch, padding aside: (tokens, width) each -> (batch, tokens, width)."""
        padding = 0 if self.cached else self._padding
        padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True, padding_value=padding)
        return padded.to(self._device)

    def logits(self, hidden: Tensor, sequences: Sequence[Tokens], where: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits of what is predicted at chosen positions.

        hidden: from `below`, for the sequences' inputs. where: row and position of each wanted prediction, two int64
        tensors (wanted,); those that the sequences score, without it.
        Returns (wanted, vocabulary), or (wanted, labels).
        """
        self._where = where or scored_positions(sequences, hidden.device)
        self._hidden = hidden if self.cached else None
        # The cut model's embeddings run on something, and what they give is replaced.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device) if self.cached else hidden
        inputs = self._settings([len(sequence.inputs) for sequence in sequences], hidden.shape[1])
        if self.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = pad([s.decoder_inputs for s in sequences], self._padding, self._device)
            inputs["use_cache"] = False
        try:
            logits = self.module(input_ids=ids, **inputs).logits
            return logits[self._where[0]] if self.kind == "classifier" else logits[0]
        finally:
            self._hidden = self._where = None

    @contextmanager
    def copied(self, count: int, names: Collection[str]) -> Iterator[None]:
        """Inside, a batch of one text becomes so many copies where it enters the lowest block of these targets.

        names: of targets in `self.targets`, of a decoder. What is below runs once for all copies.
        """
        blocks = [match for name in names if (match := re.match(rf"{re.escape(self._stack)}\.(\d+)", name))]
        lowest = min(blocks, key=lambda match: int(match[1]))[0]

        def copy(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (args[0].expand(count, *args[0].shape[1:]), *args[1:]), kwargs
            hidden = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": hidden.expand(count, *hidden.shape[1:])}

        handle = self.module.get_submodule(lowest).register_forward_pre_hook(copy, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def rows_seen(self, target: Target, sequences: Sequence[Tokens]) -> list[int]:
        """At how many positions of each sequence a target of `self.targets` is used, padding aside."""
        reads = self._reads[self.targets.index(target)]
        return [len(getattr(sequence, reads)) for sequence in sequences]

    def _settings(self, lengths: Sequence[int], width: int) -> dict[str, Any]:
        """What the model is told beside the tokens. Only those that look ahead need to know what is padding."""
        if self.kind == "decoder":
            return {"use_cache": False}
        mask = torch.arange(width, device=self._device) < torch.tensor(lengths, device=self._device)[:, None]
        return {"attention_mask": mask.long()}

    def _use(self, module: nn.Module, targets: Sequence[Target]) -> None:
        self.module, self.targets = module, tuple(targets)
        """The targets under the names they have in `module`, in the order in which they were given."""
        if self.kind != "classifier" and not module.get_output_embeddings()._forward_pre_hooks:
            module.get_output_embeddings().register_forward_pre_hook(self._gather)

    def _cut(self, model: nn.Module, stack: str, targets: Sequence[Target]) -> tuple[nn.Module, list[Target]]:
        cut = view(model)
        blocks = cut.get_submodule(stack)
        _keep_position_bias(blocks[0], blocks[self.first])
        cut.set_submodule(stack, blocks[self.first :])
        _shorten_configs(cut, len(blocks), self.first)
        entry = cut.get_submodule(f"{stack}.0")
        entry.register_forward_pre_hook(self._enter, with_kwargs=True)
        return cut, [_renamed(target, stack, self.first) for target in targets]

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}

    def _gather(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        rows, positions = self._where
        return (args[0][rows, positions][None],)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Logits of a few texts of different lengths."""
        sequences = self._probes()
        return self.logits(self.below([sequence.inputs for sequence in sequences]), sequences)

    def _probes(self) -> list[Tokens]:
        generator = torch.Generator().manual_seed(0)
        words = self._full.get_input_embeddings().num_embeddings
        texts = [tuple(torch.randint(words, (length,), generator=generator).tolist()) for length in PROBE_LENGTHS]
        return [tokens(self._full, text, text[:2]) for text in texts]

    @property
    def _device(self) -> torch.device:
        return next(self._full.parameters()).device


def _note(calls: list[Any]) -> Callable:
    return lambda _module, args, output: calls.append((args[0].numel(), isinstance(output, Tensor)))


def _reads(target: Target, calls: list[Any], probes: Sequence[Tokens]) -> str:
    """Which tokens a target sees once each: `inputs` or `decoder_inputs`. Raises TargetsError for any other use."""
    for reads in ("inputs", "decoder_inputs"):
        rows = len(probes) * max(len(getattr(probe, reads)) for probe in probes)
        if calls == [(rows * target.d_in, True)]:
            return reads
    raise TargetsError(
        f"{target.module} is not used exactly once on every token (it runs {len(calls)} times in a pass, "
        "or on some of the tokens); that cannot be edited",
        layer=target.module,
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Equal up to what rounding may do. Wrong positions or masks change logits by far more."""
    tolerance = torch.finfo(other.dtype).eps ** 0.5 * other.abs().max()
    return torch.equal(one.isfinite(), other.isfinite()) and bool(((one - other).abs() <= tolerance).all())


def _keep_position_bias(lowest: nn.Module, entry: nn.Module) -> None:
    """T5 keeps a stack's position bias in its lowest block: the block that becomes the lowest inherits it."""
    for name, module in lowest.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            heir = entry.get_submodule(name)
            heir.has_relative_attention_bias = True
            heir.relative_attention_bias = module.relative_attention_bias


def _shorten_configs(cut: nn.Module, depth: int, first: int) -> None:
    for module in cut.modules():
        config = getattr(module, "config", None)
        if getattr(config, "num_hidden_layers", None) == depth:
            config.num_hidden_layers = depth - first
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[first:]


class _Stop(Exception):
    """Ends a forward pass at the first edited block."""


def _renamed(target: Target, stack: str, first: int) -> Target:
    match = re.match(re.escape(stack) + r"\.(\d+)\.", target.name)
    if match is None:
        return target
    return replace(target, name=f"{stack}.{int(match[1]) - first}.{target.name[match.end() :]}")
