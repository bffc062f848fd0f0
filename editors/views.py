"""Several views of one model in the memory of one.

A view is a module tree of its own that shares every parameter with the base model but those it is told to own.
The service holds three (pristine, live, candidate); hooks placed on one never fire in another.

UpperBlocks is the view that makes editing cheap: below the first edited block nothing ever changes, so what
comes out there is computed once per text, and only the blocks above run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from editors.targets import Target, block_index, find_blocks


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
"""Per target: ũ (batch, rank, d_in) and δ̃ (batch, rank, d_out); row b of a batch runs with ΔW = Σ δ̃_b ũ_bᵀ."""


@contextmanager
def edited(model: nn.Module, targets: Sequence[Target], factored: Factored) -> Iterator[None]:
    """Run every row of a batch under an edit of its own, without forming any ΔW."""

    def add(u: Tensor, delta: Tensor) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].to(u.dtype)  # (batch, tokens, d_in)
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

    `module` is a view cut down to those blocks; its parameters are the base model's own. Not thread-safe:
    whoever makes one uses it alone.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        stack, blocks = find_blocks(model)
        self.first = block_index(targets, stack)
        self._full = view(model)
        self._lower_exit = self._full.get_submodule(f"{stack}.{self.first}")
        self.module = view(model)
        self.module.set_submodule(stack, self.module.get_submodule(stack)[self.first :])
        self._shorten_config(len(blocks))
        self.targets = tuple(
            Target(
                name=target.name.replace(
                    f"{stack}.{_index(target.name, stack)}.", f"{stack}.{_index(target.name, stack) - self.first}."
                ),
                d_in=target.d_in,
                d_out=target.d_out,
                transposed=target.transposed,
            )
            for target in targets
        )
        """The same targets under the names they have in `module`, in the same order."""
        self._hidden: Tensor | None = None
        self._where: tuple[Tensor, Tensor] | None = None
        entry = self.module.get_submodule(f"{stack}.0")
        entry.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.module.get_output_embeddings().register_forward_pre_hook(self._gather)

    @torch.no_grad()
    def below(self, input_ids: Tensor) -> Tensor:
        """Hidden states that enter the first edited block: (batch, tokens) int64 -> (batch, tokens, width)."""
        caught: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self._lower_exit.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._full(input_ids=input_ids, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught[0]

    def logits(self, hidden: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        """Next-token logits at chosen positions.

        hidden: (batch, tokens, width), from `below`, padded on the right.
        where: row and position of each wanted prediction, two int64 tensors (wanted,).
        Returns (wanted, vocabulary).
        """
        self._hidden, self._where = hidden, where
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        try:
            return self.module(input_ids=placeholder, use_cache=False).logits[0]
        finally:
            self._hidden = self._where = None

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}

    def _gather(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        rows, positions = self._where
        return (args[0][rows, positions][None],)

    def _shorten_config(self, depth: int) -> None:
        for module in self.module.modules():
            config = getattr(module, "config", None)
            if getattr(config, "num_hidden_layers", None) == depth:
                config.num_hidden_layers = depth - self.first
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[self.first :]


class _Stop(Exception):
    """Ends a forward pass at the first edited block."""


def _index(name: str, stack: str) -> int:
    return int(name.removeprefix(f"{stack}.").split(".", 1)[0])
