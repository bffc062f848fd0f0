"""What the base model says by itself: text to keep as it is, without a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.decoding import continue_greedily
from editors.kinds import decoding_start
from editors.mend.training.cache import cached
from editors.mend.training.processes import ALONE, Processes
from editors.text import Tokens, pad

SAMPLE_TOKENS = 24
ANSWER_TOKENS = 8
"""Of an encoder-decoder's own answers, which training keeps: enough for most of them, their ending included."""
BATCH = 64


def own_samples(base: BaseModel, count: int, seed: int, cache: Path | None = None) -> list[Tokens]:
    """Texts that the base model writes by itself: unrelated text for any model.

    A decoder goes on from a random ordinary token, an encoder-decoder answers a few of them, at temperature 1. A
    classifier writes nothing: what it has to read is random tokens alone.
    """
    tokenizer = base.tokenizer
    ordinary = torch.tensor(
        [
            token
            for token in range(len(tokenizer))
            if token not in tokenizer.all_special_ids and tokenizer.decode([token]).strip().isalpha()
        ]
    )
    length = {"decoder": 1, "encoder-decoder": SAMPLE_TOKENS // 3, "classifier": SAMPLE_TOKENS}[base.kind]
    generator = torch.Generator().manual_seed(seed)
    beginnings = ordinary[torch.randint(len(ordinary), (count, length), generator=generator)].tolist()
    if base.kind != "decoder":  # they know a text by the special tokens around it
        beginnings = [list(base.encode(tokenizer.decode(beginning)).prompt) for beginning in beginnings]
    if base.kind == "classifier":
        return [base.tokens(beginning) for beginning in beginnings]
    written = sample(base, beginnings, SAMPLE_TOKENS - length, seed, "own samples", cache)
    if base.kind == "decoder":
        return [base.tokens((*begun, *rest)) for begun, rest in zip(beginnings, written, strict=True)]
    return [base.tokens(begun, rest) for begun, rest in zip(beginnings, written, strict=True)]


def sample(
    base: BaseModel, prompts: Sequence[Sequence[int]], new: int, seed: int, what: str, cache: Path | None = None
) -> list[tuple[int, ...]]:
    """`new` tokens that the model writes after each prompt, at temperature 1; it is not let to end earlier.

    what: name of the progress bar. cache: folder that keeps them between runs.
    """

    def write() -> Tensor:
        with _seeded(base, seed), tqdm(total=len(prompts), desc=what, unit="text", disable=None) as bar:
            rows = [torch.zeros(0, new, dtype=torch.int64)]
            for batch in _batches(prompts):
                rows.append(_sampled(base, batch, new))
                bar.update(len(batch))
        return torch.cat(rows)

    key = ("samples", base.digest, base.dtype, [tuple(prompt) for prompt in prompts], new, seed)
    return [tuple(row) for row in cached(cache, key, write).tolist()]


def _sampled(base: BaseModel, batch: Sequence[Sequence[int]], new: int) -> Tensor:
    """(batch, new) int64"""
    left = base.kind == "decoder"  # it goes on from its last column; everything else reads from the first
    given = 0 if left else len(decoding_start(base.model))
    wanted = new + max(0, given - 1)  # transformers counts a forced first token, though nobody chooses it
    ids = pad(batch, base.tokenizer.pad_token_id, device=base.device, left=left)
    rows = base.model.generate(
        ids,
        attention_mask=pad([[1] * len(row) for row in batch], device=base.device, left=left),
        do_sample=True,
        top_k=0,
        max_new_tokens=wanted,
        min_new_tokens=wanted,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    return rows[:, ids.shape[1] if left else given :].cpu()


def own_answers(
    base: BaseModel, prompts: Iterable[tuple[int, ...]], cache: Path | None = None, processes: Processes = ALONE
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The beginning of what the model answers to each prompt when it decodes greedily, up to its ending."""
    distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))

    def answer() -> Tensor:
        # One more than the token, so that a process' share differs from what it leaves to others.
        found = torch.zeros(len(distinct), ANSWER_TOKENS, dtype=torch.int64)
        batches = list(zip(_batches(distinct), found.split(BATCH), strict=True))
        share = processes.share(len(batches))
        for index in tqdm(share, desc="own answers", unit="batch", disable=None if processes.is_main else True):
            batch, rows = batches[index]
            answers = continue_greedily(base.model, base.tokenizer, batch, ANSWER_TOKENS)
            for row, said in zip(rows, answers, strict=True):
                row[: len(said)] = torch.tensor(said) + 1
        return processes.unite(found)

    key = ("answers", base.digest, base.dtype, distinct, ANSWER_TOKENS)
    found = cached(cache, key, answer, processes).tolist()
    return {prompt: tuple(token - 1 for token in row if token) for prompt, row in zip(distinct, found, strict=True)}


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    return (prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH))


@contextmanager
def _seeded(base: BaseModel, seed: int) -> Iterator[None]:
    """torch's generators seeded, and afterwards as they were."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
