"""Texts that grow together: each says what it says alone, whoever joins and leaves."""

from __future__ import annotations

import random

import pytest
import torch

from editors.decoding import continue_greedily
from editors.stepping import Alone, Anew, Answer, Label, Together, rows_of
from tests.editors.families import KINDS, SIZES, family_model
from tests.small import SMALL_MODELS, small_llama, small_tokenizer

DECODERS = [family for family in SIZES if family not in KINDS]
NEW = 12


def texts(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Prompts, of which some are longer than every window, and how many tokens are to follow."""
    drawn = random.Random(seed)
    return [([drawn.randrange(3, 128) for _ in range(drawn.choice((1, 2, 5, 14, 30)))], drawn.randint(1, NEW))
            for _ in range(count)]  # fmt: skip


def alone(model, ids: list[int], new: int) -> list[int]:
    return continue_greedily(model, small_tokenizer(), [ids], new)[0]


def together(model, asked: list[tuple[list[int], int]], seed: int) -> list[list[int]]:
    """Greedy texts of all, who come in twos and threes while others are under way."""
    drawn, waiting = random.Random(seed), list(range(len(asked)))
    said: list[list[int]] = [[] for _ in asked]
    rows, going = None, []
    while waiting or going:
        come = [waiting.pop(0) for _ in range(min(len(waiting), drawn.choice((0, 2, 3)) if going else 2))]
        if come:
            newcomers = Together(model, [asked[each][0] for each in come])
            if rows is None:
                rows = newcomers
            else:
                rows.join(newcomers)
            going += come
        for each, token in zip(going, rows.scores.argmax(-1).tolist(), strict=True):
            said[each].append(token)
        kept = [row for row, each in enumerate(going) if len(said[each]) < asked[each][1] and said[each][-1] != 0]
        going = [going[row] for row in kept]
        if not kept:
            rows = None
            continue
        rows.keep(kept)
        rows.step([said[each][-1] for each in going])
    return said


@pytest.mark.parametrize("family", [*DECODERS, *SMALL_MODELS])
def test_each_says_what_it_says_alone_whoever_joins_and_leaves(family):
    model = SMALL_MODELS[family]() if family in SMALL_MODELS else family_model(family)
    assert rows_of(model) is Together
    asked = texts(9, seed=1)
    assert together(model, asked, seed=2) == [alone(model, ids, new) for ids, new in asked]


@pytest.mark.parametrize("way", [Alone, Anew])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "opt"])
def test_the_other_ways_say_the_same(way, family):
    model = family_model(family)
    for ids, new in texts(3, seed=3):
        rows, said = way(model, [ids]), []
        while len(said) < new and said[-1:] != [0]:
            if said:
                rows.step(said[-1:])
            said.append(int(rows.scores[0].argmax()))
        assert said == alone(model, ids, new)


def test_what_is_no_decoder_runs_alone():
    assert rows_of(family_model("t5")) is rows_of(family_model("bart")) is Answer
    assert rows_of(family_model("bert")) is Label


def test_a_model_that_does_not_know_of_padding_decodes_alone(caplog):
    model = small_llama()
    forward = type(model).forward

    class Deaf(type(model)):
        def forward(self, *args, attention_mask=None, **told):
            return forward(self, *args, **told)

    model.__class__ = Deaf
    assert rows_of(model) is Alone
    assert "each is decoded alone" in caplog.text


def test_a_model_without_a_cache_is_read_anew():
    model = small_llama()
    forward = type(model).forward

    class Forgetful(type(model)):
        def forward(self, input_ids, **told):
            return forward(self, input_ids, use_cache=False)

    model.__class__ = Forgetful
    assert rows_of(model) is Anew


def test_a_window_of_a_family_that_is_not_tested_decodes_alone():
    model = family_model("mistral")
    assert rows_of(model) is Together
    model.config.model_type = "another"
    assert rows_of(model) is Alone


def test_a_join_that_fails_leaves_both_as_they_were(monkeypatch):
    model = small_llama()
    rows, other = Together(model, [[5, 6, 7]]), Together(model, [[9, 10]])
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "pad", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.join(other)
    rows.join(other)
    rows.step([11, 12])
    expected = [Anew(model, [ids]).scores for ids in ([5, 6, 7, 11], [9, 10, 12])]
    torch.testing.assert_close(rows.scores, torch.cat(expected), atol=1e-5, rtol=1e-4)
