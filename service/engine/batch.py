"""Many edits as one transaction: all are made or none, or (partial) all that can be.

    answer -> capture -> (stage -> place -> strengthen what is too weak) … -> judge -> commit -> publish

All edits begin at the editor's first scale. One that does not take beside the others is searched for the
scale that it needs alone, then raised round by round, and all are staged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from editors.errors import StateError
from editors.factors import Factors, digest
from editors.margins import smallest_margins, sure_nats
from editors.scale import SCALES, stronger
from service.engine.batch_items import BatchOutcome, Item, checks_of_all, made_batch
from service.engine.capacity import require_room
from service.engine.clock import Clock
from service.engine.conflicts import NOTABLE, Near, find_near, find_place
from service.engine.entries import applied_entry, new_id
from service.engine.errors import BatchRefused, BatchTooLarge, DuplicatePrompt, EditConflict
from service.engine.judge import Harm, checks, did_not_take, finite, too_harmful
from service.engine.requests import Terms
from service.engine.workshop import Workshop
from service.ledger import Applied, InBatch

CAPTURED = 32
"""Edits captured together."""
JUDGED = 256
"""Edits judged between two words of progress."""
ROUNDS = 6
"""Rounds in which edits that do not take are made stronger."""
MAX_BYTES = 256_000_000
"""Of all factors, which Redis takes in one command."""

Tell = Callable[[str, int, int], None]
"""Is told of progress: a step, how much of it is done, and of how much."""


class Batch:
    """What is worked out on the pristine model is kept, should another writer be first and all be judged again."""

    def __init__(self, workshop: Workshop, items: Sequence[Item], terms: Terms, tell: Tell) -> None:
        self._workshop, self._items, self._terms, self._tell = workshop, items, terms, tell
        self._weights, self._history = workshop.weights, workshop.history
        self._sure_nats = sure_nats(workshop.base.dtype)

    def make(self) -> BatchOutcome:
        """Make the edits, or find out what they would do. Raises EditRefused with every verdict, and LedgerError."""
        self._rounds, self._fewest, self._best = ROUNDS, len(self._items), []
        with Clock(self._workshop.telemetry) as self._clock:
            self._begin()
            while True:
                self._require_all()
                edits = [item for item in self._items if item.changes]
                if not edits:
                    return self._outcome({})
                self._work_out(edits)
                tried = self._try(edits)
                if isinstance(tried, BatchOutcome):
                    return tried
                self._strengthen(tried)

    def _begin(self) -> None:
        """Refuse what cannot be tried, and ask the live model what it says already."""
        self._clock.begin("before")
        first: dict[tuple[int, ...], int] = {}
        for item in self._items:
            item.refusal, item.place, item.verdict, item.searched = item.invalid, None, None, False
            item.draft = item.proposed
            if item.fits and (earlier := first.setdefault(item.tokens.prompt, item.index)) != item.index:
                item.refusal = DuplicatePrompt(
                    f"edit {item.index} has the prompt of edit {earlier} in the same batch; send one of them",
                    duplicate_of=earlier,
                )
        self._require_all()
        for part in self._parts("answer", self._fitting(), JUDGED):
            lengths = [self._workshop.answers.length(item.tokens) for item in part]
            said = self._workshop.answers.say(self._weights.live, [item.request.prompt for item in part], lengths)
            for item, before in zip(part, said, strict=True):
                item.before = before
                item.needless = self._workshop.base.says(before, item.request.correction)
                item.scale = self._workshop.proposer.first_scale
        self._clock.end()

    def _work_out(self, edits: Sequence[Item]) -> None:
        size = 0
        for part in self._parts("capture", [item for item in edits if item.draft is None], CAPTURED):
            self._clock.begin("capture")
            captured = self._workshop.proposer.capture([item.tokens for item in part])
            self._clock.begin("propose")
            for item, draft in zip(part, self._workshop.proposer.draft(captured), strict=True):
                item.proposed = item.draft = draft
                size += sum(2 * (u.numel() + delta.numel()) for u, delta in draft.rows.values())
            if size > MAX_BYTES:
                raise BatchTooLarge(
                    f"the factors of these edits take more than {MAX_BYTES} bytes; send them in several batches",
                    limit_bytes=MAX_BYTES,
                )
        for item in edits:
            if item.place is None:
                item.supersedes = self._history.with_superseded(self._history.standing_on(item.request.prompt))
        self._clock.end()

    def _try(self, edits: Sequence[Item]) -> BatchOutcome | list[Item]:
        """Stage edits together and judge them. Returns those that are too weak; none when others are to be staged."""
        self._clock.begin("stage")
        staged = self._factors(edits)
        if len(staged) < len(edits):
            return []
        superseded = {edit_id for item in edits for edit_id in item.supersedes}
        with self._weights.staged(add=staged, remove=self._leaving(superseded)):
            self._tell("stage", ROUNDS - self._rounds + 1, ROUNDS + 1)
            self._workshop.give_way()
            require_room(self._weights.state.fullness())
            if self._find_places(edits, staged):
                return []
            self._measure(edits)
            weak = [item for item in edits if not item.margin_nats > self._sure_nats] or self._judge()
            if weak:
                self._clock.end()
                return weak
            others = [edit for edit in self._history.all_active() if edit.id not in superseded]
            harm = self._workshop.judge.harm(others)
            self._clock.end()
            self._workshop.give_way()
            if not harm.tolerable(self._terms):
                raise too_harmful(harm, {"edits": [item.shown() for item in self._items]})
            return self._made(edits, [factors.to_bytes() for factors in staged], harm)

    def _factors(self, edits: Sequence[Item]) -> list[Factors]:
        """Of all edits that can be stored; the others are refused."""
        factors = []
        for item in edits:
            try:
                factors.append(item.draft.factors(item.scale))
            except StateError as error:
                item.refusal = error
        return factors

    def _find_places(self, edits: Sequence[Item], staged: Sequence[Factors]) -> bool:
        """Find what each edit overlaps with, active or in the batch. Returns whether others are to be staged."""
        self._clock.begin("place")
        before = [(item.fits, item.supersedes) for item in edits]
        mates = {digest(factors.to_bytes()): item for item, factors in zip(edits, staged, strict=True)}
        for item in edits:
            if item.place is None:
                overlaps = self._weights.state.overlaps(item.draft.rows)
                near = find_near(overlaps, self._history) + [
                    Near(mate.id, mate.request.prompt, mate.request.correction, overlap, index=mate.index)
                    for factors_digest, overlap in overlaps
                    if overlap >= NOTABLE and (mate := mates.get(factors_digest)) and mate.fits
                    and mate.index < item.index
                ]  # fmt: skip
                near.sort(key=lambda each: -each.overlap)
                try:
                    item.place = find_place(item.request, near, self._history, self._terms.on_conflict)
                    item.supersedes = item.place.supersedes
                except EditConflict as refusal:
                    item.refusal = refusal
        return before != [(item.fits, item.supersedes) for item in edits]

    def _measure(self, edits: Sequence[Item]) -> None:
        self._clock.begin("judge")
        hidden = [item.draft.hidden[0] for item in edits]
        margins = smallest_margins(self._weights.candidate.upper, [item.tokens for item in edits], hidden)
        for item, margin in zip(edits, margins, strict=True):
            item.margin_nats = margin

    def _strengthen(self, weak: Sequence[Item]) -> None:
        """Give weak edits what they need alone, then make them stronger; refuse them when that does not help."""
        weak = [item for item in weak if item.fits]
        if new := [item for item in weak if not item.searched]:
            self._search(new)
        elif self._rounds and len(weak) > self._fewest:
            # They only push others aside: back to where most held.
            self._rounds = 0
            for item, tried in zip(self._items, self._best, strict=True):
                item.needless, item.draft, item.scale = tried
        elif self._rounds and any(item.scale < stronger(item.scale) for item in weak):
            self._rounds -= 1
            self._fewest, self._best = len(weak), [(item.needless, item.draft, item.scale) for item in self._items]
            for item in weak:
                item.scale = stronger(item.scale)
        else:
            # Some are only pushed aside by others: of a partial batch the half that pushes hardest goes first.
            self._rounds = 0
            weak.sort(key=lambda item: (-item.scale, item.margin_nats))
            for item in weak[: (len(weak) + 1) // 2 if self._terms.partial else None]:
                self._refuse(item)

    def _search(self, new: Sequence[Item]) -> None:
        """The scales at which edits take without the others of their batch; those that never do are refused."""
        self._work_out(new)
        self._clock.begin("search")
        with self._weights.without(self._leaving({edit_id for item in new for edit_id in item.supersedes})) as view:
            for (item,) in self._parts("search", new, 1):
                item.draft, search = self._workshop.proposer.search(item.draft, view.upper, self._weights.state)
                item.searched, item.margin_nats = True, search.margins[search.strongest]
                order = search.order(self._workshop.margin_nats)
                if not order:
                    self._refuse(item)
                elif item.needless:
                    item.needless, item.scale = False, SCALES[order[0]]
                else:
                    item.scale = max(SCALES[order[0]], stronger(item.scale))
        self._clock.end()

    def _leaving(self, superseded: Iterable[str]) -> list[Factors]:
        return self._workshop.journal.factors(self._history.superseding(superseded).leaving)

    def _judge(self) -> list[Item]:
        """Decode what the candidate says, also to prompts without an edit, which are returned if they now need one.

        An edit whose tokens are preferred, but do not spell the correction, is refused: nothing makes them.
        """
        for part in self._parts("judge", self._fitting(), JUDGED):
            for item, verdict in zip(part, self._workshop.judge.verdicts([item.staged for item in part]), strict=True):
                item.verdict = verdict
        failing = [item for item in self._fitting() if not item.verdict.took]
        for item in failing:
            if not item.needless:
                self._refuse(item)
        return failing

    def _refuse(self, item: Item) -> None:
        item.refusal = did_not_take(item.request.correction, {"best_margin_nats": finite(item.margin_nats)})

    def _require_all(self) -> None:
        """Raises BatchRefused when an edit was refused, unless the others may go without it."""
        refused = [item for item in self._items if not item.fits]
        if refused and not (self._terms.partial and self._fitting()):
            raise BatchRefused(
                f"refused: {len(refused)} of {len(self._items)} edits cannot be made, the first of them edit "
                f"{refused[0].index} ({refused[0].refusal}); nothing was changed. Mend or leave out those, or make "
                "the others without them with partial=true",
                edits=[item.shown() for item in self._items],
            )

    def _made(self, edits: Sequence[Item], raw: Sequence[bytes], harm: Harm) -> BatchOutcome:
        before = self._weights.published.revision
        batch_id = new_id("batch")
        left_out = {item.index: item.shown() for item in self._items if not item.changes}
        entries = []
        for position, (item, own) in enumerate(zip(edits, raw, strict=True), 1):
            last = position == len(edits)
            entries.append(
                applied_entry(
                    item.request,
                    own,
                    edit_id=item.id,
                    sequence=before + position,
                    state_digest=self._weights.state.digest() if last else None,
                    scale=item.scale,
                    before=item.before,
                    after=item.verdict.after,
                    # What all of them do together is said once.
                    checks=checks(item.verdict, harm if last else replace(harm, lost=()), item.place),
                    timings_ms=self._clock.laps if last else {},
                    supersedes=item.supersedes,
                    batch=InBatch(id=batch_id, position=position, size=len(edits), left_out=left_out if last else {}),
                )
            )
        if not self._terms.dry_run:
            publish_ms = self._workshop.journal.commit(*zip(entries, raw, strict=True))
            return replace(made_batch(entries), publish_ms=publish_ms)
        return self._outcome({item.index: entry for item, entry in zip(edits, entries, strict=True)})

    def _outcome(self, foretold: dict[int, Applied]) -> BatchOutcome:
        """Of a batch that changes nothing. foretold: the entries that it would have, by index."""
        now = self._weights.published
        last = foretold[max(foretold)] if foretold else None
        return BatchOutcome(
            None,
            now.revision,
            last.state_digest if last else now.digest,
            [item.shown(foretold.get(item.index)) for item in self._items],
            checks_of_all(last) if last else {},
            self._clock.laps,
        )

    def _fitting(self) -> list[Item]:
        return [item for item in self._items if item.fits]

    def _parts(self, step: str, items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
        for start in range(0, len(items), size):
            self._workshop.give_way()
            yield items[start : start + size]
            self._tell(step, min(start + size, len(items)), len(items))
