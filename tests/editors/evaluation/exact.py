"""The obvious way to measure: one edit in the weights of the whole model, one prompt at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch.nn import functional as F
from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.data import Example
from editors.decoding import continue_greedily, generate_batch
from editors.evaluation.marks import Values
from editors.kinds import label_id, label_names
from editors.text import begins_with
from tests.editors.dense import loss, predictions


def measure(
    base: BaseModel, live: PreTrainedModel, example: Example, unrelated: Sequence[str], *, edited: bool = True
) -> Values:
    """Every value of one example under the weights of `live`."""
    found: dict[str, list[float]] = defaultdict(list)

    def score(model: PreTrainedModel, prompt: str, answer: str) -> float:
        return -loss(model, base.encode(prompt, answer)).item()

    def right(model: PreTrainedModel, prompt: str, answer: str) -> list[bool]:
        tokens = base.encode(prompt, answer)
        best = predictions(model, tokens)[-len(tokens.target) :].argmax(-1)
        return [token == wanted for token, wanted in zip(best.tolist(), tokens.target, strict=True)]

    asked = [("efficacy", example.prompt, example.correction)]
    asked += [("paraphrase", prompt, example.correction) for prompt in example.paraphrases]
    asked += [("portability", probe.prompt, probe.answer) for probe in example.portability]
    for kind, prompt, wanted in asked:
        tokens = right(live, prompt, wanted)
        found[f"{kind}, token"].append(sum(tokens) / len(tokens))
        found[f"{kind}, sequence"].append(float(all(tokens)))
        said = generate_batch(live, base.tokenizer, [prompt], len(tokens) + 2)[0].text
        label = base.kind == "classifier" and label_names(base.model)[label_id(base.model, wanted)]
        found[f"{kind}, greedy"].append(float(said == label if label else begins_with(said, wanted)))
        if kind != "portability" and example.answer:
            found["ES" if kind == "efficacy" else "PS"].append(
                float(score(live, prompt, wanted) > score(live, prompt, example.answer))
            )
    kept = [("neighbour", *pair) for pair in zip(example.neighbours, example.neighbour_answers, strict=True)]
    kept += [("unrelated", prompt, None) for prompt in unrelated]
    for kind, prompt, answer in kept:
        if answer:
            found["NS"].append(float(score(live, prompt, answer) > score(live, prompt, example.correction)))
        if not edited:
            continue
        tokens = base.encode(prompt)
        base_said, said = (
            continue_greedily(model, base.tokenizer, [tokens.prompt], 8)[0] for model in (base.model, live)
        )
        found[f"{kind}, next token"].append(float(base_said[0] == said[0]))
        found[f"{kind}, 8 tokens"].append(float(base_said == said))
        before, after = (predictions(model, tokens)[-1].log_softmax(-1) for model in (base.model, live))
        found[f"{kind}, KL"].append(F.kl_div(after, before, log_target=True, reduction="sum").item())
        if answer:
            was, is_ = (float(all(right(model, prompt, answer))) for model in (base.model, live))
            found["drawdown"].append(was - is_)
    return dict(found)
