"""Small real models: two blocks, random weights, one for each layout of weights."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=128, n_embd=16, n_layer=4, n_head=2, n_inner=24, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(params=[small_llama, small_gpt2], ids=["linear", "conv1d"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model whose weights are laid out as Linear, then as Conv1D."""
    return request.param()
