"""`mend bench --generations N`: concurrent generations by three ways to decode them, side by side in one run.

- a thread each: every request is decoded by `generate` in a thread of its own
- transformers: its own continuous batching, over a paged cache
- mend: what the service does, one thread that newcomers join between two steps
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine import Engine

SUBJECTS = ("France", "Nokia", "Marie Curie", "the Eiffel Tower", "Brazil", "water", "gravity", "music")
WORDS = ("the", "city", "of", "is", "known", "for", "a", "river", "and", "people", "who", "live", "there")
LENGTHS, ANSWERS = (0, 4, 20, 60), (8, 16, 32, 48)
"""Words after the subject, and tokens of an answer."""
LONGEST = 128
"""Tokens of a prompt."""
FEWEST = 8
"""Requests of one round."""
PAGED_TOKENS, PAGED_BATCH = 16_384, 512
"""Of transformers' paged cache, which would take most of the memory of a machine without a GPU."""


@dataclass(frozen=True)
class Job:
    ids: tuple[int, ...]
    new_tokens: int


Decode = Callable[[Job], tuple[str, int]]
"""Blocks until a job is done; returns its text and how many tokens that has."""


@dataclass
class Measured:
    """Of one way with so many requests at once. same: texts that are those of the first way."""

    way: str
    at_once: int
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    same: int = 0
    taken_s: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds


def levels(most: int) -> list[int]:
    """1, 4, 16, … requests at once."""
    counts = [1]
    while counts[-1] * 4 <= most:
        counts.append(counts[-1] * 4)
    return counts


def measure_generations(engine: Engine, most: int, rounds: int) -> tuple[str, list[Measured]]:
    """A table, and its figures. The ways take turns, since other work on the machine comes and goes."""
    engine.catch_up()
    texts: dict[Job, str] = {}
    with ExitStack() as opened:
        ways = {name: opened.enter_context(way(engine)) for name, way in WAYS.items()}
        figures = {(number, name): Measured(name, number) for number in levels(most) for name in ways}
        for decode in ways.values():
            decode(_jobs(engine, 1)[0])  # what is slow the first time only
        for _ in range(rounds):
            for (number, name), measured in figures.items():
                _run(ways[name], _jobs(engine, max(FEWEST, 2 * number)), texts, measured)
    rows = list(figures.values())
    alone = rows[0].throughput
    lines = [
        "| at once | way | throughput | a request, median | longest | same text |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.at_once} | {row.way} | {row.throughput / alone:.2f} | {statistics.median(row.taken_s):.2f} s "
            f"| {max(row.taken_s):.2f} s | {row.same} of {row.requests} |"
            for row in rows
        ),
        "",
        f"throughput: tokens per second, as a ratio to those of one request after another in a thread ({alone:.1f})",
    ]
    return "\n".join(lines), rows


def _jobs(engine: Engine, count: int) -> list[Job]:
    """Prompts of mixed lengths, the same in every run."""
    drawn = random.Random(0)
    jobs = []
    for number in range(count):
        rest = " ".join(drawn.choice(WORDS) for _ in range(drawn.choice(LENGTHS)))
        prompt = f"Write about {SUBJECTS[number % len(SUBJECTS)]}. {rest}".strip()
        jobs.append(Job(engine.base.encode(prompt).prompt[:LONGEST], drawn.choice(ANSWERS)))
    return jobs


def _run(decode: Decode, jobs: Sequence[Job], texts: dict[Job, str], measured: Measured) -> None:
    """texts: of every job, as it was answered first."""

    def one(job: Job) -> tuple[str, int]:
        start = time.perf_counter()
        said = decode(job)
        measured.taken_s.append(time.perf_counter() - start)
        return said

    start = time.perf_counter()
    with ThreadPoolExecutor(measured.at_once) as clients:
        said = list(clients.map(one, jobs))
    measured.seconds += time.perf_counter() - start
    measured.requests += len(jobs)
    measured.tokens += sum(tokens for _, tokens in said)
    measured.same += sum(texts.setdefault(job, text) == text for job, (text, _) in zip(jobs, said, strict=True))


@contextmanager
def _threads(engine: Engine) -> Iterator[Decode]:
    from editors.decoding import continue_greedily

    with engine.weights.reading() as (live, _):

        def decode(job: Job) -> tuple[str, int]:
            (said,) = continue_greedily(live.model, engine.base.tokenizer, [job.ids], job.new_tokens)
            return _text(engine, said)

        yield decode


@contextmanager
def _transformers(engine: Engine) -> Iterator[Decode]:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    ends = _ends(engine)
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=engine.base.tokenizer.pad_token_id,
        max_new_tokens=max(ANSWERS),
    )
    # On a GPU it finds its own sizes.
    paged = {} if torch.cuda.is_available() else {"num_blocks": PAGED_TOKENS // 256, "max_batch_tokens": PAGED_BATCH}
    with engine.weights.reading() as (live, _):
        manager = live.model.init_continuous_batching(config, ContinuousBatchingConfig(**paged))
        manager.start()
        answers: defaultdict[str, SimpleQueue] = defaultdict(SimpleQueue)
        numbers, done = count(), threading.Event()

        def route() -> None:
            while not done.is_set():
                if (result := manager.get_result(timeout=0.1)) is not None:
                    answers[result.request_id].put(result)

        def decode(job: Job) -> tuple[str, int]:
            name = str(next(numbers))
            manager.add_request(list(job.ids), name, max_new_tokens=job.new_tokens, eos_token_id=sorted(ends))
            return _text(engine, answers[name].get().generated_tokens)

        router = threading.Thread(target=route)
        router.start()
        try:
            yield decode
        finally:
            done.set()
            router.join()
            manager.stop()


@contextmanager
def _mend(engine: Engine) -> Iterator[Decode]:
    from service.engine import Ask, Ended, Said, Wish

    def decode(job: Job) -> tuple[str, int]:
        events: SimpleQueue = SimpleQueue()
        engine.begin([Ask(job.ids, Wish(job.new_tokens))], events.put)
        text = ""
        while not isinstance(event := events.get(), Ended):
            if not isinstance(event, Said):
                raise event
            text += event.piece.text
        return text, event.completion_tokens

    yield decode


def _text(engine: Engine, said: Sequence[int]) -> tuple[str, int]:
    kept = [token for token in said if token not in _ends(engine)]
    return engine.base.tokenizer.decode(kept, skip_special_tokens=True), len(kept)


def _ends(engine: Engine) -> set[int]:
    from editors.decoding import ends_of

    return ends_of(engine.base.model, engine.base.tokenizer)


WAYS: dict[str, Callable[[Engine], AbstractContextManager[Decode]]] = {
    "a thread each": _threads,
    "transformers": _transformers,
    "mend": _mend,
}
