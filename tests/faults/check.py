"""Whether anything was lost: what was answered, against the ledger, an independent replay of it, and the service.

The replay shares nothing with the service but the arithmetic of factors. It reads Redis with a plain client, follows
the hash chain, and finds the active edits by their definition: those that stand and that nothing which stands
supersedes.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis

from editors.base_model import BaseModel, load_base_model
from editors.checkpoint import Checkpoint, load_checkpoint
from editors.factors import Factors
from editors.views import view
from service.engine.weights import weights_digest
from tests.faults.clients import REFUSALS, Ask, Record
from tests.faults.processes import Scene
from tests.service_fixtures import Folders, save_completed_editor
from tests.small import small_base

SETTLED_WITHIN_S = 30.0
Fields = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A base model and its editor: as a service is pointed at them, and as the replay uses them."""

    folders: Folders
    base: BaseModel
    checkpoint: Checkpoint

    @classmethod
    def write(cls, folder: Path, *, keyed: bool = False) -> Model:
        """keyed: edits are joined by least squares, not summed."""
        folders = Folders.write(folder)
        if keyed:
            folders = Folders(folders.base_model, folder / "keyed-editor", folders.guard_prompts)
            save_completed_editor(folders.editor, small_base())
        base = load_base_model(str(folders.base_model), device="cpu")
        return cls(folders, base, load_checkpoint(folders.editor, base))

    def environment(self) -> dict[str, str]:
        """What points a service at them; where its data are is not said."""
        settings = self.folders.settings(Path())
        return {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}

    def digests(self, factors: Sequence[bytes]) -> tuple[str, str]:
        """Of the state that these edits make, and of the edited weights."""
        state = self.checkpoint.editor.new_state(self.base.device)
        state.add(*map(Factors.from_bytes, factors))
        edited = view(self.base.model, state.targets)
        state.write(self.base.model, edited)
        return state.digest(), weights_digest({name: edited.get_parameter(name).detach() for name in state.targets})


@dataclass(frozen=True)
class Replay:
    """What a ledger says, read without any code of the service. problems: where it contradicts itself."""

    entries: list[Fields]
    factors: dict[int, bytes]
    problems: list[str]

    @classmethod
    def of(cls, client: redis.Redis) -> Replay:
        namespaces = {key.rpartition(b":")[0] for key in client.scan_iter("mend:{*}:*")}
        if not namespaces:
            return cls([], {}, [])
        if len(namespaces) > 1:
            return cls([], {}, [f"more than one ledger: {sorted(namespaces)}"])
        (namespace,) = namespaces
        with client.pipeline(transaction=True) as at_once:  # it may be compacted at any moment
            at_once.get(namespace + b":snapshot").xrange(namespace + b":entries").hgetall(namespace + b":factors")
            snapshot, stream, factors = at_once.execute()
        stored = dict(enumerate(_unpacked(snapshot) if snapshot else (), 1))
        problems = []
        for entry_id, fields in stream:
            sequence, own = int(entry_id.split(b"-")[0]), (fields[b"entry"], fields[b"chain"])
            if stored.setdefault(sequence, own) != own:
                problems.append(f"entry {sequence} is another one in the snapshot than in the stream")
        link = _sha256(b"mend-service ledger 1")
        for expected, (sequence, (raw, chain)) in enumerate(sorted(stored.items()), 1):
            link = _sha256(link.encode() + b"\n" + raw)
            if (sequence, chain.decode(), json.loads(raw)["sequence"]) != (expected, link, expected):
                problems.append(f"the chain breaks at entry {expected}")
                break
        return cls(
            [json.loads(raw) for _, (raw, _) in sorted(stored.items())],
            {int(sequence): raw for sequence, raw in factors.items()},
            problems,
        )

    @property
    def statuses(self) -> dict[str, str]:
        """Of every edit, by its id."""
        stood: list[set[str]] = [set()]
        for entry in self.entries:
            match entry["kind"]:
                case "applied":
                    stood.append(stood[-1] | {entry["edit_id"]})
                case "rolled_back":
                    stood.append(stood[-1] - {entry["edit_id"]})
                case "restored":
                    stood.append(stood[entry["revision"]])
        applied = [entry for entry in self.entries if entry["kind"] == "applied"]
        standing = [entry for entry in applied if entry["edit_id"] in stood[-1]]
        superseded = {older for entry in standing for older in entry["supersedes"]}
        return {
            each["edit_id"]: "rolled_back" if each["edit_id"] not in stood[-1]
            else "superseded" if each["edit_id"] in superseded else "applied"
            for each in applied
        }  # fmt: skip

    def active_factors(self) -> list[bytes]:
        """Raises KeyError where they are gone."""
        statuses = self.statuses
        active = [each for each in self.entries if each["kind"] == "applied" and statuses[each["edit_id"]] == "applied"]
        return [self.factors[entry["sequence"]] for entry in active]


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _unpacked(packed: bytes) -> Iterator[tuple[bytes, bytes]]:
    _, _, body = packed.partition(b"\n")
    for line in zlib.decompress(body).splitlines():
        chain, _, raw = line.partition(b" ")
        yield raw, chain


def find_losses(scene: Scene, record: Record, model: Model) -> list[str]:
    """Everything that is not as it was promised, a sentence each. Nobody may be asking meanwhile."""
    if trouble := scene.recover():
        return [f"the service does not come back: {trouble}"]
    found = [problem for ask in record.asks if (problem := _settle(scene.services[-1].http, ask))]
    with scene.client() as client:
        replay = Replay.of(client)
    found += [*replay.problems, *_recorded(record, replay)]
    for service in scene.services:
        found += _served(service.http, replay, model)
    found += [f"a mistake is told of in {log}" for log in scene.folder.glob("*.log") if "Traceback" in log.read_text()]
    return found


def _settle(http: httpx.Client, ask: Ask) -> str | None:
    """Learn an outcome that is unknown, and hear of one that is known again; what is wrong with it."""
    if ask.verdict in ("unknown", "made"):
        known, deadline = len(ask.answers), time.monotonic() + SETTLED_WITHIN_S
        while len(ask.answers) == known:
            if time.monotonic() > deadline:
                return f"{ask.kind} {ask.key} is still not answered"
            if ask.send(http) is None:
                time.sleep(0.1)
    if "internal_error" in ask.unknown:
        return f"{ask.kind} {ask.key} was answered with an error on the side of the service: {ask.unknown}"
    if ask.contradictions:
        return f"{ask.kind} {ask.key} was answered {ask.answers[0]}, then {ask.contradictions[0]}"
    last = ask.answers[-1]
    if ask.verdict == "refused" and last.body["code"] not in REFUSALS:
        return f"{ask.kind} {ask.key} was refused for no good reason: {last.body}"
    return None


def _recorded(record: Record, replay: Replay) -> Iterator[str]:
    """The ledger must hold what was acknowledged, once, and nothing else; and all that was ever seen live."""
    stored: dict[str, list[tuple[str, str | None]]] = {ask.key: [] for ask in record.asks}
    for entry in replay.entries:
        stored.setdefault(entry["idempotency_key"], []).append((entry["kind"], entry.get("edit_id")))
    acknowledged = {ask.key: ask for ask in record.asks}
    for key, entries in stored.items():
        ask = acknowledged.get(key)
        if ask is None:
            yield f"nobody asked for {entries}, with the key {key}"
        elif entries != ask.entries:
            yield f"{ask.kind} {key} ({ask.verdict}) was answered with {ask.entries}, but the ledger holds {entries}"
    for revision, digest in record.seen:
        if revision and (revision > len(replay.entries) or replay.entries[revision - 1]["state_digest"] != digest):
            yield f"revision {revision} was live with the state {digest}, which the ledger does not have"


def _served(http: httpx.Client, replay: Replay, model: Model) -> Iterator[str]:
    """The service must show the state of the ledger, and have its weights."""
    try:
        state, weights = model.digests(replay.active_factors())
    except KeyError as error:
        yield f"the factors of entry {error} are gone, although its edit is active"
        return
    revision = http.get("/revision", params={"verify": True})
    page = http.get("/edits", params={"limit": 500}).json()
    edits = page["items"]
    while page["next_cursor"]:
        page = http.get("/edits", params={"limit": 500, "cursor": page["next_cursor"]}).json()
        edits += page["items"]
    head = len(replay.entries)
    expected = {"revision": head, "digest": state, "head": head, "lag": 0, "weights_digest": weights}
    if revision.status_code != 200 or revision.json() != expected:
        yield f"GET /revision should be {expected}, but is {revision.text}"
    if replay.entries and replay.entries[-1]["state_digest"] != state:
        yield f"the last entry says {replay.entries[-1]['state_digest']}, but its replay gives {state}"
    statuses = replay.statuses
    wanted = {
        (each["edit_id"], statuses[each["edit_id"]], each["prompt"], each["correction"], each["reason"])
        for each in replay.entries
        if each["kind"] == "applied"
    }
    shown = [tuple(edit[name] for name in ("id", "status", "prompt", "correction", "reason")) for edit in edits]
    if set(shown) != wanted or len(shown) != len(wanted):
        yield f"GET /edits differs from the ledger by {sorted(wanted.symmetric_difference(shown))}"
