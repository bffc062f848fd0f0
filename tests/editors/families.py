"""A small random model of every family that has a preset."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedModel

from editors.kinds import AUTO_CLASSES, Kind, tokens
from editors.text import Tokens

BLOCKS = 4
VOCABULARY = 128
GPT2_NAMES = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 2, "n_inner": 48, "n_positions": 64}
NAMES = {
    "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**NAMES, "num_key_value_heads": 1, "head_dim": 16}
T5_NAMES = {
    "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": BLOCKS, "num_decoder_layers": BLOCKS,
    "decoder_start_token_id": 1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
}  # fmt: skip
SIZES: dict[str, dict[str, object]] = {
    "gpt2": GPT2_NAMES,
    "gptj": {**GPT2_NAMES, "rotary_dim": 8},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": BLOCKS, "num_heads": 2, "intermediate_size": 48, "window_size": 3,
        "max_position_embeddings": 64, "attention_types": [[["global", "local"], BLOCKS // 2]],
    },
    "gpt_neox": NAMES,
    "opt": {
        "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "ffn_dim": 48,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "phi": NAMES,
    "phi3": {**NAMES, "num_key_value_heads": 1, "sliding_window": 4},
    "t5": T5_NAMES,
    "mt5": T5_NAMES,
    "bart": {
        "d_model": 32, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 0, "dropout": 0.0,
    },
    "bert": {**NAMES, "type_vocab_size": 2, "num_labels": 2},
}  # fmt: skip
"""The windows are shorter than the texts, so that a block with the wrong kind of attention is found out."""
KINDS: dict[str, Kind] = {
    "t5": "encoder-decoder", "mt5": "encoder-decoder", "bart": "encoder-decoder", "bert": "classifier",
}  # fmt: skip
"""All others are decoders."""


def family_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen model of four blocks (an encoder-decoder has four in each half)."""
    torch.manual_seed(0)
    scale = "initializer_factor" if family in ("t5", "mt5") else "init_std" if family == "bart" else "initializer_range"
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        **{scale: 1.0 if scale == "initializer_factor" else 0.1, **SIZES[family]},
    )  # fmt: skip
    model = AUTO_CLASSES[KINDS.get(family, "decoder")].from_config(config)
    if family == "bart":  # its published checkpoints force the first token that is written
        model.generation_config.update(forced_bos_token_id=2, forced_eos_token_id=None)
    return model.eval().requires_grad_(False).to(dtype)


def family_sequences(model: PreTrainedModel) -> list[Tokens]:
    """A long text and a short one, each with something to follow it."""
    labelled = model.config.model_type == "bert"
    return [
        tokens(model, tuple(range(5, 16)), (1,) if labelled else (40, 41)),
        tokens(model, (9, 8, 13), (0,) if labelled else (7,)),
    ]
