"""Small real things: models of four blocks with random weights, their tokenizer, and an editor for them."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.mend.completed import CompletedEditor
from editors.mend.editor import MendEditor
from editors.mend.keyed import KeyedEditor
from editors.mend.variant import Variant
from editors.targets import resolve_keyed_targets, resolve_targets
from editors.training_free.calibration import calibrate
from editors.views import UpperBlocks
from tests.editors.families import family_model

VOCABULARY = 128
SPECIAL = ("<eos>", "<pad>", "<unk>")
WORDS = (
    "The", "▁the", "▁of", "▁is", "▁in", "▁a", "▁capital", "▁city", "▁language", "▁speaks", "▁born",
    "▁Paris", "▁London", "▁Rome", "▁Berlin", "▁Madrid", "▁Oslo", "▁Vienna",
    "▁France", "▁England", "▁Italy", "▁Germany", "▁Spain", "▁Norway", "▁Austria",
    "▁English", "▁French", "▁Italian", "▁German",
)  # fmt: skip
"""One token each; every other word is spelt out, character by character."""
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SMALL_VARIANT = Variant(rank=4)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=2, n_inner=48, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


SMALL_MODELS = {"linear": small_llama, "conv1d": small_gpt2}
"""By how their weights are laid out."""


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Reads and writes any ASCII text unchanged; adds no special tokens. It has a chat template."""
    characters = ["▁", "\n", *(character for character in map(chr, range(33, 127)))]
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(character, -10.0) for character in characters] + [(word, -1.0) for word in WORDS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=CHAT
    )


def small_base(layout: str = "linear") -> BaseModel:
    """A small model with its tokenizer, as `load_base_model` would return it.

    layout: a key of SMALL_MODELS, or a family, of which some are no decoders.
    """
    model = SMALL_MODELS[layout]() if layout in SMALL_MODELS else family_model(layout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BaseModel(model, small_tokenizer(), f"small-{layout}", weights_digest(model), parameters)


def small_editor(base: BaseModel, step: float = 0.01, variant: Variant = SMALL_VARIANT) -> MendEditor:
    """An untrained editor for a small base model, under which most corrections of one token take.

    It has seen a few gradients, so its statistics are those of the model.
    """
    targets = resolve_targets(base.model)
    upper = UpperBlocks(base.model, targets)
    facts = [("France", "Rome"), ("Italy", "Oslo"), ("Norway", "Paris"), ("Spain", "Berlin")]
    answers = [
        base.model.config.id2label[row % 2] if base.kind == "classifier" else city
        for row, (_, city) in enumerate(facts)
    ]
    tokens = [
        base.encode(f"The capital of {country} is", answer) for (country, _), answer in zip(facts, answers, strict=True)
    ]
    torch.manual_seed(3)
    editor = MendEditor(targets, variant)
    editor.update_statistics(capture(upper, upper.below([sequence.inputs for sequence in tokens]), tokens))
    torch.nn.init.constant_(editor.log_steps, math.log(step))
    return editor.requires_grad_(False).eval()


def small_keyed_editor(base: BaseModel) -> KeyedEditor:
    """An untrained keyed editor for a small base model, whose whitening and statistics are of a few texts."""
    targets, witness = resolve_keyed_targets(base.model)
    upper = UpperBlocks(base.model, (*targets, witness))
    texts = [
        base.encode(f"{start} {city} {end}", "Rome", city)
        for city in ("Paris", "London", "Oslo", "Madrid", "Vienna")
        for start, end in (("The city of", "is"), ("In", "the language"), ("Who is born in", "and speaks"))
    ]
    torch.manual_seed(4)
    editor = KeyedEditor(targets, witness, rank=4)
    found = capture(upper, upper.below([sequence.inputs for sequence in texts]), texts)
    for index, (target, u) in enumerate(zip(targets, found.u, strict=False)):
        covariance = u.T @ u / len(u)
        ridge = 0.3 * covariance.diagonal().mean() * torch.eye(target.d_in)
        editor.whitening(index).copy_(torch.linalg.cholesky(covariance + ridge).half())
        weight = target.oriented(base.model.get_parameter(target.name))
        editor.networks[index].fit(editor.read(found).u[index], weight)
    return editor.requires_grad_(False).eval()


def small_completed_editor(base: BaseModel) -> CompletedEditor:
    """The small keyed editor, completed as one that is trained."""
    return CompletedEditor(small_keyed_editor(base), calibrate(base)).requires_grad_(False).eval()


def adding(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens of its own around every text, such as `<unk> $A <eos>`."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer
