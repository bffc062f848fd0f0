"""Configurations of small models of all three kinds, as they stand in a config.json."""

from __future__ import annotations

from typing import Any

from editors.planning.walk import Workload
from tests.editors.families import SIZES, VOCABULARY

WORK = Workload(tokens=8, rank=4, batch=3)
FAMILIES = {"decoder": "llama", "encoder-decoder": "t5", "classifier": "bert"}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertForSequenceClassification",
}


def small_config(kind: str, **changes: object) -> dict[str, Any]:
    family = FAMILIES[kind]
    own = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": VOCABULARY, **SIZES[family]}
    return {"model_type": family, "architectures": [ARCHITECTURES[family]], **own, **changes}
