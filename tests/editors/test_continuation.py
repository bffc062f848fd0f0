"""Pieces of a text: never a part of a stop string or of a character; with the model's own log-probabilities."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from editors.continuation import Continuation, Wish
from editors.sampling import Choice, Sampling
from editors.text import encode
from editors.wording import Wording, Words
from tests.editors.dense import logits
from tests.editors.saying import continued, say
from tests.small import small_base, small_llama

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def linear():
    return small_base()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, as GPT-2's tokenizer has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({"<eos>": 0} | {character: n for n, character in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Few characters have tokens; all others are spelt by bytes, as by the tokenizers of Llama 2, Mistral and Gemma."""
    pieces = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "日", "é"]
    tokenizer = Tokenizer(BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def written(tokenizer, text: str, wish: Wish) -> tuple[Continuation, list]:
    """A model that says exactly this text, and then ends."""
    return saying(tokenizer, tokenizer(text).input_ids, wish)


def saying(tokenizer, tokens: list[int], wish: Wish) -> tuple[Continuation, list]:
    """A model that says exactly these tokens, and then ends."""
    said = Continuation(Wording(small_llama(), tokenizer), [5], wish)
    pieces = []
    for token in [*tokens, 0]:
        scores = torch.full((300,), -1.0)
        scores[token] = 5.0
        pieces.append(said.take(scores, token))
        if said.finish_reason:
            break
    return said, [piece for piece in pieces if piece]


class TestWords:
    @pytest.mark.parametrize("seed", range(200))
    def test_are_the_text_before_the_first_stop_and_show_nothing_of_it(self, seed):
        drawn = random.Random(seed)
        text = "".join(drawn.choice("ab") for _ in range(drawn.randint(1, 40)))
        stop = ["".join(drawn.choice("ab") for _ in range(drawn.randint(1, 6))) for _ in range(drawn.randint(0, 4))]
        found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
        expected = text[: min(found)[1]] if found else text
        words, read, told = Words(stop), 0, ""
        while read < len(text) and not words.stopped:
            read = min(len(text), read + drawn.randint(1, 3))
            told += words.read(text[:read])
            assert expected.startswith(told)
            assert len(text[:read]) - len(told) < max(map(len, stop), default=1) or words.stopped
        told += "" if words.stopped else words.read(text, last=True)
        assert told == words.sure == expected
        assert words.stopped == bool(found)

    def test_without_stop_strings_are_told_at_once(self):
        words = Words(())
        assert [words.read("a"), words.read("a b"), words.read("a b c", last=True)] == ["a", " b", " c"]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), fallback_tokenizer()], ids=["bytes", "fallback"])
class TestCharacters:
    TEXT = "日本 ☃🙂 é"

    def test_are_told_whole(self, tokenizer):
        said, pieces = written(tokenizer, self.TEXT, Wish(100))
        assert [piece.text for piece in pieces] == list(self.TEXT)
        assert (said.finish_reason, len(said.said)) == ("stop", len(tokenizer(self.TEXT).input_ids))

    def test_that_are_cut_short_are_told_at_the_end(self, tokenizer):
        _, pieces = written(tokenizer, "a☃", Wish(3))
        told = "".join(piece.text for piece in pieces)
        assert (told[0], set(told[1:])) == ("a", {"\N{REPLACEMENT CHARACTER}"})

    def test_are_made_of_tokens_whose_bytes_join(self, tokenizer):
        _, pieces = written(tokenizer, self.TEXT, Wish(100, logprobs=0))
        assert [b"".join(token.spelt for token in piece.tokens).decode() for piece in pieces] == list(self.TEXT)

    @pytest.mark.parametrize("text", ["a🙂b", "🙂🙂", "a☃é 日本b", "☃", "a\N{REPLACEMENT CHARACTER}b"])
    def test_begin_where_the_text_has_them(self, tokenizer, text):
        said, pieces = written(tokenizer, text, Wish(100, logprobs=0))
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == said.said
        whole, read = "".join(piece.text for piece in pieces), b""
        assert whole == text
        for token in tokens:
            begun = read.decode(errors="ignore")  # without what the character under way has said of itself
            assert token.offset == len(begun)
            read += token.spelt
        assert read.decode() == text

    def test_that_never_come_to_an_end_take_a_place_of_their_own(self, tokenizer):
        first = tokenizer("🙂").input_ids[0]
        a, b = tokenizer("a").input_ids + tokenizer("b").input_ids
        _, pieces = saying(tokenizer, [a, first, b, a], Wish(100, logprobs=0))
        tokens = [token for piece in pieces for token in piece.tokens]
        assert "".join(piece.text for piece in pieces) == "a\N{REPLACEMENT CHARACTER}ba"
        assert [(token.id, token.offset) for token in tokens] == [(a, 0), (first, 1), (b, 2), (a, 3)]

    def test_that_are_no_characters_take_nothing_of_what_follows_them(self, tokenizer):
        ids = [*tokenizer("☃").input_ids, tokenizer("🙂").input_ids[0], *tokenizer("bab").input_ids]
        _, pieces = saying(tokenizer, ids, Wish(100, logprobs=0))
        told = "".join(piece.text for piece in pieces)
        assert (told[0], told[-3:]) == ("☃", "bab")
        assert [token.id for piece in pieces for token in piece.tokens] == ids

    @pytest.mark.parametrize(
        ("stop", "expected"), [("☃🙂", "日本 "), ("🙂", "日本 ☃"), ("本", "日"), (" é", "日本 ☃🙂"), ("é", "日本 ☃🙂 ")]
    )
    def test_of_a_stop_string_cross_tokens(self, tokenizer, stop, expected):
        said, pieces = written(tokenizer, self.TEXT, Wish(100, stop=(stop,), logprobs=0))
        assert "".join(piece.text for piece in pieces) == expected
        assert b"".join(token.spelt for piece in pieces for token in piece.tokens).decode() == expected
        assert said.finish_reason == "stop"

    def test_that_are_held_back_before_a_stop_string_are_not_lost(self, tokenizer):
        """The stop string's first character is the last that is said, so that it waits for the next."""
        _, pieces = written(tokenizer, "aé☃b", Wish(100, stop=("é☃☃", "☃b"), logprobs=0))
        assert b"".join(token.spelt for piece in pieces for token in piece.tokens).decode() == "aé"


class TestStop:
    def test_ends_the_text_before_it(self, linear):
        whole = say(*parts(linear), PROMPT, 20).text
        for stop in (whole[3:6], whole[-1], whole[0]):
            ids = encode(linear.tokenizer, PROMPT).prompt
            text, pieces = continued(*parts(linear), ids, Wish(20, stop=("not there", stop)))
            assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
            assert text.finish_reason == "stop"

    def test_at_the_very_end_is_stop_and_not_length(self, linear):
        whole = say(*parts(linear), PROMPT, 8).text
        text, _ = continued(*parts(linear), encode(linear.tokenizer, PROMPT).prompt, Wish(8, stop=(whole[-2:],)))
        assert text.finish_reason == "stop"


class TestLogprobs:
    def test_are_those_of_the_model_whatever_the_sampling(self, linear):
        ids = encode(linear.tokenizer, PROMPT).prompt
        wish = Wish(8, Sampling(1.5, top_p=0.9, top_k=50, repetition_penalty=1.3, seed=3), logprobs=3)
        text, pieces = continued(*parts(linear), ids, wish)
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == text.said
        whole = "".join(piece.text for piece in pieces)
        assert "".join(token.spelt.decode() for token in tokens) == whole
        expected = logits(linear.model, [*ids, *text.said])[len(ids) - 1 : -1].log_softmax(-1)
        for token, row in zip(tokens, expected, strict=True):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
            assert [each.id for each in token.top] == row.topk(3).indices.tolist()
            assert [each.logprob for each in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert whole[token.offset :].startswith(token.spelt.decode())

    def test_of_a_classifier_are_those_of_its_labels(self):
        base = small_base("bert")
        ids = base.encode(PROMPT).prompt
        text, (piece,) = continued(*parts(base), ids, Wish(8, Sampling(1.5), logprobs=2))
        assert (piece.text, text.finish_reason) == (say(*parts(base), PROMPT, 1).text, "stop")
        expected = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        (token,) = piece.tokens
        assert token.logprob == pytest.approx(expected.max().item())
        assert {each.spelt: each.logprob for each in token.top} == {
            b"LABEL_0": pytest.approx(expected[0].item()), b"LABEL_1": pytest.approx(expected[1].item()),
        }  # fmt: skip

    def test_have_no_infinity(self):
        scores = torch.full((300,), float("-inf"))
        scores[7] = 0.0
        said = Continuation(Wording(small_llama(), byte_tokenizer()), [5], Wish(1, logprobs=2))
        (token,) = said.take(scores, 7).tokens
        assert [each.logprob for each in token.top] == [0.0, -9999.0]


class TestSampling:
    @pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1, seed=3), Sampling(0.0, top_k=5, seed=9)])
    def test_without_room_is_greedy(self, linear, sampling):
        assert say(*parts(linear), PROMPT, 8, sampling) == say(*parts(linear), PROMPT, 8)

    def test_of_few_is_one_of_the_best(self, linear):
        ids = encode(linear.tokenizer, PROMPT).prompt
        for seed in range(5):
            _, pieces = continued(*parts(linear), ids, Wish(6, Sampling(5.0, top_k=3, seed=seed), logprobs=3))
            assert all(token.id in {each.id for each in token.top} for piece in pieces for token in piece.tokens)

    @pytest.mark.parametrize("penalty", [0.01, 10.0])
    @pytest.mark.parametrize("temperature", [1e-6, 1.0, 10.0])
    def test_at_the_ends_of_what_may_be_asked_draws_from_finite_scores(self, penalty, temperature):
        scores = torch.linspace(-80.0, 80.0, 50)
        choice = Choice(Sampling(temperature, 1.0, 0, penalty, seed=3))
        assert choice._processors(torch.arange(50)[None], scores[None].clone()).isfinite().all()
        assert 0 <= choice.of(scores, 49, range(50)) < 50

    def test_with_a_penalty_repeats_less(self, linear):
        ids = encode(linear.tokenizer, PROMPT).prompt
        plain, _ = continued(*parts(linear), ids, Wish(30))
        varied, _ = continued(*parts(linear), ids, Wish(30, Sampling(repetition_penalty=5.0)))
        assert len(set(varied.said)) > len(set(plain.said))


def parts(base):
    return base.model, base.tokenizer
