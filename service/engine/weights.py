"""The exact state, and the three views of one model that show it: pristine, live and candidate.

Every change is staged first, in the state and in the candidate. To publish is to exchange two references: the
candidate becomes the live view, whole and at once. Nobody waits: generations that run finish on the view that they
began with, and it is staged into again when the last of them has left it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
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
from service.engine.requests import Published

logger = logging.getLogger("mend")


@dataclass(frozen=True, eq=False)
class View:
    """One view of the model. upper: its upper blocks, which one thread alone may use."""

    model: PreTrainedModel
    upper: UpperBlocks


@dataclass(frozen=True)
class Proof:
    """That the weights in memory are those that they should be.

    weights_digest: of the live edited weights. holds: they are what the state makes of the base.
    """

    published: Published
    weights_digest: str
    holds: bool


class Weights:
    """Used by the one writer alone, but for `reading` and `edited` under it, `another_view`, `copy_live` and `wait`."""

    def __init__(self, base: BaseModel, checkpoint: Checkpoint) -> None:
        self._base, self._targets, self._editor = base, checkpoint.editor.targets, checkpoint.editor
        self._own = [target.name for target in self._targets]
        self.state: State = self._editor.new_state(base.device)
        self.pristine = View(base.model, UpperBlocks(base.model, checkpoint.editor.captured))
        self.live, self.candidate = self.another_view(), self.another_view()
        self._retired: list[View] = []
        """Views that were live and may still be read, the oldest first."""
        self._readers: Counter[View] = Counter()
        self._exchanged = threading.Condition()
        self._settled = False
        self.published = self.as_published(0, self.state.digest())

    def another_view(self) -> View:
        """A view with edited weights of its own, which begin as the base's."""
        model = view(self._base.model, self._own)
        return View(model, UpperBlocks(model, self._targets))

    @contextmanager
    def reading(self) -> Iterator[tuple[View, Published]]:
        """The live view and its state; its weights stay as they are, inside."""
        with self._exchanged:
            view, published = self.live, self.published
            self._readers[view] += 1
        try:
            yield view, published
        finally:
            with self._exchanged:
                self._readers[view] -= 1
                if not self._readers[view]:
                    del self._readers[view]

    def wait(self, revision: int, within_s: float) -> bool:
        """Whether a revision, or a later one, is live or becomes so within some seconds."""
        with self._exchanged:
            return self._exchanged.wait_for(lambda: self.published.revision >= revision, within_s)

    def edited(self, view: View) -> dict[str, Tensor]:
        """Copies of the edited weights of a view that is read, on the CPU, by name."""
        return {name: view.model.get_parameter(name).detach().to("cpu", copy=True) for name in self._own}

    def copy_live(self, view: View) -> Published:
        """Make another view show what is live. Returns which state that is."""
        with self.reading() as (live, published):
            self._copy(live, view)
            return published

    def proof(self) -> Proof:
        """Work out anew what is live, in the candidate, and compare. For the one writer alone."""
        self.write_candidate()
        own, expected = weights_digest(self.edited(self.live)), weights_digest(self.edited(self.candidate))
        return Proof(self.published, own, own == expected and self.state.digest() == self.published.digest)

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
    def staged_anew(self, factors: Sequence[Factors]) -> Iterator[None]:
        """The same with these edits alone, whatever was there before."""
        self._settled, before = False, self.state
        self.rebuild(factors)
        try:
            self.write_candidate()
            yield
        finally:
            if not self._settled:
                self.state = before

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

    def rebuild(self, factors: Sequence[Factors]) -> None:
        """Make the state anew, of these edits alone. Raises StateError with everything as it was."""
        state = self._editor.new_state(self._base.device)
        state.add(*factors)
        self.state = state

    def write_candidate(self) -> None:
        """Make the candidate show the state. What went live is no candidate any more: another view takes its place."""
        if self.candidate is self.live:
            self.candidate = self._unread()
        self.state.write(self._base.model, self.candidate.model)

    def as_published(self, revision: int, digest: str) -> Published:
        """What is staged, as it will be told of when it is live. digest: of the state."""
        return Published(revision, digest, self.state.edits, self.state.fullness())

    def settle(self) -> None:
        """The ledger holds what is staged: the state keeps it, whatever happens on the way to the live weights."""
        self._settled = True

    def publish(self, published: Published) -> None:
        """Make the candidate live."""
        with self._exchanged:
            before = self.published
            self._retired.append(self.live)
            self.live, self.published = self.candidate, published
            self._exchanged.notify_all()
        warning = Capacity(published.fullness).warning
        if warning and not Capacity(before.fullness).warning:
            logger.warning("revision %d: %s", published.revision, warning)

    def _unread(self) -> View:
        """A view to stage into: one that was live and is read no more, or a new one while all still are.

        Of those that nobody reads, one is enough.
        """
        with self._exchanged:
            unread = [view for view in self._retired if view not in self._readers]
            self._retired = [view for view in self._retired if view in self._readers]
        return unread[0] if unread else self.another_view()

    @torch.no_grad()
    def _copy(self, source: View, destination: View) -> None:
        for name in self._own:
            destination.model.get_parameter(name).copy_(source.model.get_parameter(name))


def weights_digest(weights: dict[str, Tensor]) -> str:
    """`sha256:…` of weights on the CPU, by name: of their bits, so that it depends on their dtype."""
    sha = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        sha.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        sha.update(weight.contiguous().view(torch.uint8).numpy())
    return f"sha256:{sha.hexdigest()}"
