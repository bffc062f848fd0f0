"""Small base models of each kind, with an editor and examples that all of their figures can be measured on."""

from __future__ import annotations

import dataclasses
import math

import torch

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.data import Example, Probe
from editors.mend.editor import MendEditor
from editors.targets import resolve_targets
from editors.views import UpperBlocks
from tests.editors.families import family_model
from tests.editors.mend.examples import CITIES, capitals
from tests.small import SMALL_VARIANT, adding, small_base, small_tokenizer

KINDS = {"decoder": "llama", "encoder-decoder": "t5", "classifier": "bert"}


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    """A random model of four blocks, and a tokenizer that it can read."""
    if kind == "decoder":
        base = small_base()
        return dataclasses.replace(base, model=base.model.to(dtype))
    model = family_model(KINDS[kind], dtype)
    tokenizer = adding(small_tokenizer(), "$A <eos>")
    return BaseModel(model, tokenizer, f"small-{kind}", weights_digest(model), 0)


def examples_of(base: BaseModel) -> list[Example]:
    """Examples with every kind of prompt, of which all but the unrelated have known answers."""
    classifier = base.kind == "classifier"
    found = []
    for index, example in enumerate(capitals(2)):
        new, true = ("LABEL_1", "LABEL_0") if classifier else (example.correction, CITIES[index - 3])
        if base.kind == "encoder-decoder":
            new, true = new[0], true[0]  # an answer begins without a space, so that words are spelt out
        found.append(
            dataclasses.replace(
                example,
                correction=("SUPPORTS" if classifier and index % 2 else new),
                answer=true,
                neighbour_answers=(true,),
                unrelated=(f"In {CITIES[index]} he speaks",),
                portability=(
                    Probe(f"Born in {example.subject}, he speaks", "French" if base.kind == "decoder" else true),
                ),
            )
        )
    return found


def editor_of(base: BaseModel, step: float = 0.01) -> MendEditor:
    """An untrained editor whose statistics are those of the model."""
    targets = resolve_targets(base.model)
    upper = UpperBlocks(base.model, targets)
    tokens = [base.encode(example.prompt, example.correction) for example in examples_of(base)]
    torch.manual_seed(3)
    editor = MendEditor(targets, SMALL_VARIANT)
    editor.update_statistics(capture(upper, upper.below([sequence.inputs for sequence in tokens]), tokens))
    torch.nn.init.constant_(editor.log_steps, math.log(step))
    return editor.requires_grad_(False).eval()
