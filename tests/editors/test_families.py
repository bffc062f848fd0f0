"""Every family that has a preset really works: its blocks can be cut, and its gradients are its own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from editors.capture import capture
from editors.decoding import continue_greedily
from editors.targets import EDITED_BLOCKS, MLP_BY_FAMILY, find_blocks, resolve_targets
from editors.text import Tokens, pad
from editors.views import UpperBlocks, edited, view
from tests.editors.dense import changed, gradients, logits
from tests.small import small_tokenizer

BLOCKS = 4
SEQUENCES = (Tokens(tuple(range(5, 16)), (40, 41)), Tokens((9, 8), (7,)))
GPT2_NAMES = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 2, "n_inner": 48, "n_positions": 64}
NAMES = {
    "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**NAMES, "num_key_value_heads": 1, "head_dim": 16}
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
}  # fmt: skip
"""The windows are shorter than the texts, so that a block with the wrong kind of attention is found out."""


@pytest.fixture(params=MLP_BY_FAMILY)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=128, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        **SIZES[request.param],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_preset_finds_the_mlps_of_the_last_blocks(model):
    stack, blocks = find_blocks(model)
    targets = resolve_targets(model)
    assert len(blocks) == BLOCKS
    assert {int(target.name.removeprefix(f"{stack}.").split(".")[0]) for target in targets} == {1, 2, 3}
    assert len(targets) in (2 * EDITED_BLOCKS, 3 * EDITED_BLOCKS)
    assert {target.shape for target in targets} == {(32, 48), (48, 32)}


def test_upper_blocks_give_what_the_whole_model_gives(model):
    upper = UpperBlocks(view(model), resolve_targets(model))
    hidden = upper.below(pad([tokens.inputs for tokens in SEQUENCES]))
    for row, tokens in enumerate(SEQUENCES):
        places = torch.arange(len(tokens.inputs))
        got = upper.logits(hidden, (torch.full_like(places, row), places))
        torch.testing.assert_close(got, logits(model, tokens.inputs), rtol=1e-5, atol=1e-5)


def test_captured_rows_are_the_gradient(model):
    targets = resolve_targets(model)
    upper = UpperBlocks(model, targets)
    rows = capture(upper, upper.below(pad([tokens.inputs for tokens in SEQUENCES])), SEQUENCES)
    for example, tokens in enumerate(SEQUENCES):
        mine = rows.example[0] == example
        for u, delta, expected in zip(rows.u, rows.delta, gradients(model, targets, tokens), strict=True):
            torch.testing.assert_close(delta[mine].T @ u[mine], expected, rtol=1e-3, atol=1e-5)


def test_every_row_runs_under_an_edit_of_its_own(model):
    targets, generator = resolve_targets(model), torch.Generator().manual_seed(1)
    edits = {t.name: tuple(0.3 * torch.randn(2, 3, width, generator=generator) for width in t.shape) for t in targets}
    ids = SEQUENCES[0].inputs
    with edited(model, targets, edits), torch.no_grad():
        got = model(input_ids=torch.tensor([ids, ids]), use_cache=False).logits
    for row in range(2):
        rows = {name: (u[row], delta[row]) for name, (u, delta) in edits.items()}
        torch.testing.assert_close(got[row], logits(changed(model, targets, rows), ids), rtol=1e-3, atol=1e-4)


def test_a_padded_batch_decodes_as_each_alone(model):
    prompts = [tokens.prompt for tokens in SEQUENCES]
    together = continue_greedily(model, small_tokenizer(), prompts, 6)
    assert together == [continue_greedily(model, small_tokenizer(), [prompt], 6)[0] for prompt in prompts]
