"""The exact state, and the three views of one model that show it: pristine, live and candidate.

Every change is staged first, in the state and in the candidate. Only publishing touches what is live, in the one
moment in which generation waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from editors.factors import Factors
from editors.state import State
from editors.views import UpperBlocks, view
from service.engine.capacity import Capacity
from service.engine.gate import Gate
from service.engine.requests import Published

logger = logging.getLogger("mend")


@dataclass(frozen=True)
class View:
    """One view of the model. upper: its upper blocks, which one thread alone may use."""

    model: PreTrainedModel
    upper: UpperBlocks


class Weights:
    """Used by the one writer alone, but for `reading` and what is read under it, `another_view` and `copy_live`."""

    def __init__(self, base: BaseModel, checkpoint: Checkpoint) -> None:
        self._base, self._targets = base, checkpoint.editor.targets
        self._own = [target.name for target in self._targets]
        self.state: State = checkpoint.editor.new_state(base.device)
        self.pristine = View(base.model, UpperBlocks(base.model, checkpoint.editor.captured))
        self.live, self.candidate = self.another_view(), self.another_view()
        self._gate = Gate()
        self._settled = False
        self.published = self.as_published(0, self.state.digest())

    def another_view(self) -> View:
        """A view with edited weights of its own, which begin as the base's."""
        model = view(self._base.model, self._own)
        return View(model, UpperBlocks(model, self._targets))

    @contextmanager
    def reading(self) -> Iterator[Published]:
        """The live weights stay those of what is given, inside."""
        with self._gate.reading():
            yield self.published

    def live_weights(self) -> dict[str, Tensor]:
        """Copies of the edited weights on the CPU, by name. To be called under `reading`."""
        return {name: self.live.model.get_parameter(name).detach().to("cpu", copy=True) for name in self._own}

    def copy_live(self, view: View) -> Published:
        """Make another view show what is live. Returns which state that is."""
        with self._gate.reading(), torch.no_grad():
            for name in self._own:
                view.model.get_parameter(name).copy_(self.live.model.get_parameter(name))
            return self.published

    @contextmanager
    def staged(self, *, add: Sequence[Factors] = (), remove: Sequence[Factors] = ()) -> Iterator[None]:
        """The state and the candidate with these changes; the state keeps them only if they are settled inside.

        Raises StateError with everything as it was.
        """
        self._settled = False
        self.move(add=add, remove=remove)
        try:
            self.write_candidate()
            yield
        finally:
            if not self._settled:
                self.move(add=remove, remove=add)

    @contextmanager
    def without(self, factors: Sequence[Factors]) -> Iterator[View]:
        """A view of what would be live without these edits, on which others may be staged inside."""
        if not factors:
            yield self.live
            return
        with self.staged(remove=factors):
            yield self.candidate

    def move(self, *, add: Sequence[Factors] = (), remove: Sequence[Factors] = ()) -> None:
        """Change the state alone, all or nothing. Raises StateError."""
        self.state.remove(*remove)
        try:
            self.state.add(*add)
        except BaseException:
            self.state.add(*remove)
            raise

    def write_candidate(self) -> None:
        self.state.write(self._base.model, self.candidate.model)

    def as_published(self, revision: int, digest: str) -> Published:
        """What is staged, as it will be told of when it is live. digest: of the state."""
        return Published(revision, digest, self.state.edits, self.state.fullness())

    def settle(self) -> None:
        """The ledger holds what is staged: the state keeps it, whatever happens on the way to the live weights."""
        self._settled = True

    def publish(self, published: Published) -> None:
        """Copy the candidate over the live weights: the only exclusive section."""
        with self._gate.publishing(), torch.no_grad():
            for name in self._own:
                self.live.model.get_parameter(name).copy_(self.candidate.model.get_parameter(name))
            before, self.published = self.published, published
        warning = Capacity(published.fullness).warning
        if warning and not Capacity(before.fullness).warning:
            logger.warning("revision %d: %s", published.revision, warning)
