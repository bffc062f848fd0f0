"""A text behind a prompt is scored as the model scores it while it writes, by tokens that spell it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editors.continuation import Wish
from editors.errors import UnknownLabel
from editors.kinds import tokens
from editors.scoring import continue_with, target_logprobs
from editors.text import Tokens
from editors.wording import Wording
from tests.editors.families import SIZES, family_model
from tests.editors.saying import continued
from tests.small import small_llama, small_tokenizer

PROMPT = "The capital of France is"


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, of which some merge, also across the end of a prompt."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "s"), ("o", "n"), ("is", "on"), ("Ġ", "a"), ("ã", "ģ")]
    vocabulary = ["<eos>", *characters, *dict.fromkeys(one + other for one, other in merges)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a space before every text, and takes it away again, as those of Llama 2 and T5."""
    pieces = ["<eos>", "▁", "\n", *map(chr, range(33, 127)), "is", "▁is", "▁Paris", "▁The"]
    tokenizer = Tokenizer(Unigram([(piece, -10.0 / len(piece)) for piece in pieces], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def spelt(tokenizer: PreTrainedTokenizerFast, prompt: str, continuation: str, model=None) -> list[bytes] | None:
    model = model or small_llama()
    wording = Wording(model, tokenizer)
    found = continue_with(model, tokenizer, wording, prompt, continuation)
    if found is not None:
        assert list(found.prompt) == tokenizer(prompt).input_ids
    return found and [wording.spell(token) for token in found.target]


class TestAContinuation:
    @pytest.mark.parametrize("text", [" a", "a", " a a", "is", "on", "ison", ", and", "\n", " ", "  a", "東京は ☃🙂 é",
                                      "は", "\N{REPLACEMENT CHARACTER}"])  # fmt: skip
    @pytest.mark.parametrize("prompt", ["The isle is", "The isle is ", "It", "東京は", "is\n"])
    def test_is_spelt_whatever_the_prompt_ends_with(self, prompt, text):
        assert b"".join(spelt(merging_tokenizer(), prompt, text)) == text.encode()

    def test_keeps_the_tokens_of_the_prompt_where_the_tokenizer_would_join_both(self):
        tokenizer = merging_tokenizer()
        assert tokenizer("ison").input_ids != tokenizer("is").input_ids + tokenizer("on").input_ids
        assert spelt(tokenizer, "is", "on") == [b"on"]

    @pytest.mark.parametrize(("prompt", "text", "expected"), [
        ("The", " Paris", [b" Paris"]), ("The is", "is", [b"is"]), ("The ", "is", [b"is"]), ("The x", " is", [b" is"]),
    ])  # fmt: skip
    def test_begins_with_a_space_only_if_it_is_given_one(self, prompt, text, expected):
        assert spelt(spacing_tokenizer(), prompt, text) == expected

    def test_of_an_encoder_decoder_is_a_text_of_its_own(self):
        for text in ("Paris", " Paris"):
            assert spelt(spacing_tokenizer(), PROMPT, text, family_model("t5")) == [b" Paris"]

    @pytest.mark.parametrize("text", ["é", " Paris ☃", "日本"])
    def test_that_the_tokens_cannot_spell_is_none(self, text):
        assert spelt(small_tokenizer(), PROMPT, text) is None

    def test_of_a_classifier_is_a_label(self):
        model, tokenizer = family_model("bert"), small_tokenizer()
        wording = Wording(model, tokenizer)
        assert continue_with(model, tokenizer, wording, PROMPT, "label_1").target == (1,)
        with pytest.raises(UnknownLabel):
            continue_with(model, tokenizer, wording, PROMPT, " Paris")


@pytest.mark.parametrize("family", SIZES)
def test_scores_are_those_of_the_text_while_it_is_written(family):
    model, tokenizer = family_model(family), small_tokenizer()
    text, pieces = continued(model, tokenizer, tokenizer(PROMPT).input_ids, Wish(9, logprobs=0))
    said = [token for piece in pieces for token in piece.tokens]
    assert said
    sequence = tokens(model, tuple(text.prompt), tuple(text.said))  # which need not be how a tokenizer splits it
    found = target_logprobs(model, sequence)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([each.logprob for each in said], abs=1e-4)


def test_scores_of_many_tokens_are_those_of_the_whole_model():
    model = small_llama()
    sequence = Tokens((5, 6, 7), tuple(torch.randint(128, (150,), generator=torch.Generator().manual_seed(1)).tolist()))
    ids = torch.tensor([[*sequence.prompt, *sequence.target]])
    expected = model(ids).logits[0, 2:-1].log_softmax(-1).gather(1, torch.tensor(sequence.target)[:, None])[:, 0]
    assert target_logprobs(model, sequence).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_scores_that_are_no_numbers_are_none_of_any_token():
    model = small_llama()
    model.lm_head.weight = torch.nn.Parameter(torch.full_like(model.lm_head.weight, torch.nan), requires_grad=False)
    assert target_logprobs(model, Tokens((5, 6), (7, 8))).isnan().all()


def test_characters_of_several_tokens_are_scored_token_by_token():
    torch.manual_seed(5)
    tokenizer = merging_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sequence = continue_with(model, tokenizer, Wording(model, tokenizer), "東京", "は🙂 a")
    assert len(sequence.target) == len("は🙂 a".encode()) - 2  # " a" and the first two bytes of は are one token each
    ids = torch.tensor([[*sequence.prompt, *sequence.target]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(sequence.prompt) - 1 : -1].log_softmax(-1)
    expected = [row[token].item() for row, token in zip(rows, sequence.target, strict=True)]
    assert target_logprobs(model, sequence).tolist() == pytest.approx(expected, abs=1e-4)
