"""What a keyed editor knows before it is trained: how its inputs vary, and where subjects end.

One pass over the data's texts and the model's own gives the covariance of what each edited weight reads; one more over
the prompts gives the rows on which the gate learns to tell a subject's last token from the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.errors import DataFileError
from editors.mend.keyed import KeyedEditor
from editors.mend.training.corpus import Corpus
from editors.mend.training.hidden import Text
from editors.views import UpperBlocks

TEXTS = 12000
"""Read for the covariance, at most; a third of them for the gate."""
BATCH = 64
GATE_STEPS, GATE_RATE, GATE_PROMPTS = 1200, 3e-3, 64


@torch.no_grad()
def fit(editor: KeyedEditor, base: BaseModel, upper: UpperBlocks, corpus: Corpus, seed: int) -> float:
    """Set the editor's whitening and statistics, and train its gate.

    upper: of the weights that the editor captures. Returns how often the gate finds the subject of a prompt that it was
    not trained on; NaN where no prompt names its subject. Raises DataFileError where there are no texts.
    """
    rng = random.Random(f"{seed}-fit")
    plain = [*corpus.samples, *(text for items in corpus.files for item in items for text in item.neighbours)]
    prompts = [item.edit for items in corpus.files for item in items]
    rng.shuffle(plain)
    rng.shuffle(prompts)
    texts = [*prompts[: TEXTS // 3], *plain[: TEXTS * 2 // 3]]
    if not texts:
        raise DataFileError("there is no text to learn the model's inputs from; give --samples or more data")
    moments = [torch.zeros(t.d_in, t.d_in, dtype=torch.float64, device=base.device) for t in editor.targets]
    rows = 0
    keyed: list[list[Tensor]] = [[] for _ in editor.targets]
    candidates = []
    for batch, inputs in _inputs(editor, upper, corpus, texts):
        lengths = torch.tensor([len(text.tokens.inputs) for text in batch], device=base.device)
        real = torch.arange(inputs[0].shape[1], device=base.device) < lengths[:, None]
        rows += int(lengths.sum())
        for moment, u, keys in zip(moments, inputs, keyed, strict=True):
            moment += u[real].double().T @ u[real].double()
            keys += [u[row, _key(text)].float() for row, text in enumerate(batch)]
        for row, text in enumerate(batch):
            if text.tokens.subject is not None:
                candidates.append((inputs[0][row, : len(text.tokens.prompt)].float(), text.tokens.subject))
    for index, (target, moment) in enumerate(zip(editor.targets, moments, strict=True)):
        editor.set_covariance(index, moment / rows)
        weight = target.oriented(base.model.get_parameter(target.name)).float()
        editor.networks[index].fit(torch.stack(keyed[index]), weight)
    return _train_gate(editor, candidates, rng)


def _key(text: Text) -> int:
    """The end of a text's subject, or of its prompt."""
    return len(text.tokens.prompt) - 1 if text.tokens.subject is None else text.tokens.subject


def _inputs(
    editor: KeyedEditor, upper: UpperBlocks, corpus: Corpus, texts: Sequence[Text]
) -> Iterator[tuple[list[Text], list[Tensor]]]:
    """What the edited weights read, (batch, tokens, d_in) each, of texts of about the same length together."""
    ordered = sorted(texts, key=lambda text: len(text.tokens.inputs))
    held: dict[str, Tensor] = {}

    def note(name: str):  # noqa: ANN202 - a hook
        return lambda _module, args: held.__setitem__(name, args[0].detach())

    def stop(*_: object) -> None:
        raise _Enough

    targets = upper.targets[: len(editor.targets)]
    handles = [upper.module.get_submodule(t.module).register_forward_pre_hook(note(t.name)) for t in targets]
    handles.append(upper.module.get_submodule(targets[-1].module).register_forward_pre_hook(stop))
    try:
        for start in tqdm(range(0, len(ordered), BATCH), desc="covariance", unit="batch", disable=None):
            batch = ordered[start : start + BATCH]
            hidden = corpus.hidden.batch(batch)
            with suppress(_Enough):
                upper.logits(hidden, [text.tokens for text in batch])
            yield batch, [held[t.name].reshape(len(batch), -1, t.d_in) for t in targets]
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """What is above is not needed."""


def _train_gate(editor: KeyedEditor, candidates: Sequence[tuple[Tensor, int]], rng: random.Random) -> float:
    """candidates: per prompt, its rows (tokens, d_in) and which of them ends the subject. A tenth is held out."""
    normalise = editor.networks[0].normalise
    rng.shuffle(shuffled := list(candidates))
    held_out = shuffled[len(shuffled) * 9 // 10 :]
    shuffled = shuffled[: len(shuffled) * 9 // 10]
    if not shuffled:
        return float("nan")
    editor.gate.requires_grad_(True)
    optimiser = torch.optim.Adam(editor.gate.parameters(), lr=GATE_RATE)
    with torch.enable_grad():
        for _ in range(GATE_STEPS):
            drawn = rng.choices(shuffled, k=GATE_PROMPTS)
            scores = editor.gate(normalise(torch.cat([u for u, _ in drawn]))).split([len(u) for u, _ in drawn])
            padded = torch.nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=float("-inf"))
            loss = F.cross_entropy(padded, torch.tensor([place for _, place in drawn], device=padded.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    editor.gate.requires_grad_(False)
    found = [editor.gate(normalise(u)).argmax().item() == place for u, place in held_out]
    return sum(found) / len(found) if found else float("nan")
