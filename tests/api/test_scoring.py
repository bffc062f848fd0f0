"""POST /score: what the model thinks of a text is what it thought while it wrote it."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.turns import MAX_READING
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of, slowed, wait_until
from tests.service_fixtures import PROMPTS, Standing

PROMPT = "The capital of France is"


def generated(client, view: str, **asked: object) -> dict:
    answer = client.post("/generate", json={"max_new_tokens": 12, "logprobs": 0, "view": view, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(client, continuation: str, **asked: object) -> dict:
    answer = client.post("/score", json={"continuation": continuation, **(asked or {"prompt": PROMPT})})
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{answer.json()["revision"]}"'
    return answer.json()


def split_alike(client, said: dict) -> bool:
    """Whether the tokenizer splits a text as the model said it: a random one spells words that have a token."""
    tokenizer = engine_of(client).base.tokenizer
    return tokenizer(said["text"]).input_ids == [token["id"] for token in said["logprobs"]]


class TestScores:
    @pytest.mark.parametrize("asked", [{"prompt": prompt} for prompt in PROMPTS.values()]
                             + [{"messages": [{"role": "user", "content": "Norway"}]}])  # fmt: skip
    @pytest.mark.parametrize("view", ["live", "base"])
    def test_are_those_of_generation(self, client, bodies, asked, view):
        assert client.post("/edits", json=bodies[0]).status_code == 201
        said = next(
            found for tokens in (12, 8, 5, 3, 2, 1)
            if split_alike(client, found := generated(client, view, **asked, max_new_tokens=tokens))
        )  # fmt: skip
        found = score(client, said["text"], **asked)
        assert [each["id"] for each in found["tokens"]] == [each["id"] for each in said["logprobs"]]
        assert [each[view] for each in found["tokens"]] == pytest.approx(
            [each["logprob"] for each in said["logprobs"]], abs=1e-4
        )
        assert [(each["token"], each["bytes"]) for each in found["tokens"]] == [
            (each["token"], each["bytes"]) for each in said["logprobs"]
        ]
        assert found["revision"] == said["revision"]
        assert found["prompt_tokens"] == said["usage"]["prompt_tokens"]

    def test_add_up_and_spell_the_text(self, client):
        text = " Paris, the city of\nlights... "
        found = score(client, text)
        assert bytes(byte for each in found["tokens"] for byte in each["bytes"]).decode() == text
        for view in ("live", "base"):
            assert found[f"{view}_nats"] == pytest.approx(sum(each[view] for each in found["tokens"]))
            assert all(each[view] < 0 for each in found["tokens"])

    def test_of_both_views_differ_by_the_edits(self, client, bodies):
        before = score(client, bodies[0]["correction"], prompt=bodies[0]["prompt"])
        assert before["live_nats"] == before["base_nats"]
        made = client.post("/edits", json=bodies[0]).json()
        after = score(client, bodies[0]["correction"], prompt=bodies[0]["prompt"])
        assert after["revision"] == made["revision"]
        assert after["live_nats"] > after["base_nats"] == pytest.approx(before["base_nats"], abs=1e-5)
        client.delete(f"/edits/{made['id']}")
        assert score(client, bodies[0]["correction"], prompt=bodies[0]["prompt"])["live_nats"] == before["live_nats"]

    def test_of_every_next_token_are_one_distribution(self, client):
        tokenizer = engine_of(client).base.tokenizer
        texts = {tokenizer.decode([token]) for token in range(3, len(tokenizer))}
        probabilities = [math.exp(found["tokens"][0]["live"]) for text in texts
                         if len((found := score(client, text))["tokens"]) == 1]  # fmt: skip
        assert len(probabilities) > 100
        assert 0.5 < sum(probabilities) < 1

    def test_change_nothing(self, client):
        standing = Standing.of(engine_of(client))
        score(client, " Paris")
        assert Standing.of(engine_of(client)) == standing


class TestWhatIsRefused:
    @pytest.mark.parametrize("body", [
        {"prompt": PROMPT}, {"continuation": " Paris"}, {"prompt": PROMPT, "continuation": ""},
        {"prompt": " ", "continuation": " Paris"}, {"prompt": PROMPT, "continuation": None},
        {"prompt": PROMPT, "continuation": [5]}, {"prompt": PROMPT, "continuation": " Paris", "view": "live"},
        {"prompt": PROMPT, "messages": [{"role": "user", "content": "x"}], "continuation": " Paris"},
        {"messages": [], "continuation": " Paris"}, {"prompt": PROMPT, "continuation": "\ud800"},
        {"prompt": PROMPT, "continuation": "x" * 100_001},
    ])  # fmt: skip
    def test_is_what_is_no_such_request(self, client, body):
        answer = client.post("/score", content=json.dumps(body), headers={"content-type": "application/json"})
        assert_problem(answer, "invalid_request")

    def test_is_a_misplaced_field(self, client):
        answer = client.post("/score?view=base", json={"prompt": PROMPT, "continuation": " Paris"})
        assert_problem(answer, "invalid_request")

    def test_is_what_the_tokens_cannot_spell(self, client):
        answer = client.post("/score", json={"prompt": PROMPT, "continuation": " Zoë"})
        assert assert_problem(answer, "unknown_token")["field"] == "continuation"

    @pytest.mark.parametrize(("prompt", "continuation", "field"), [
        ("x " * 1200, " Paris", "prompt"), ("x", " x" * 600, "continuation"), ("x " * 120, "x" * 30, "prompt"),
    ])  # fmt: skip
    def test_is_what_is_too_long(self, client, prompt, continuation, field):
        answer = client.post("/score", json={"prompt": prompt, "continuation": continuation})
        assert assert_problem(answer, "text_too_long")["field"] == field

    def test_but_for_what_just_fits(self, client):
        tokenizer = engine_of(client).base.tokenizer
        prompt = "x" * (256 - 5)
        assert len(tokenizer(prompt).input_ids) == 251  # of 256 positions
        assert len(score(client, "yyyyy", prompt=prompt)["tokens"]) == 5
        answer = client.post("/score", json={"prompt": prompt, "continuation": "yyyyyy"})
        assert_problem(answer, "text_too_long")


class TestBesideOthers:
    def test_more_than_a_few_at_once_are_busy(self, client):
        engine, held = engine_of(client), threading.Event()
        body = {"prompt": PROMPT, "continuation": " Paris"}
        with ThreadPoolExecutor(MAX_READING) as pool:
            handle = engine.weights.live.model.register_forward_hook(lambda *_: held.wait(60) and None)
            try:
                waiting = [pool.submit(client.post, "/score", json=body) for _ in range(MAX_READING)]
                wait_until(lambda: not engine.scorer._places._free._value)
                assert_problem(client.post("/score", json=body), "busy")
                assert client.get("/model").status_code == 200
            finally:
                held.set()
                handle.remove()
            assert [each.result().status_code for each in waiting] == [200] * MAX_READING
        assert score(client, " Paris")

    def test_each_is_of_one_revision_while_edits_come_and_go(self, client, bodies):
        asked = {"prompt": bodies[0]["prompt"]}
        expected, engine = {}, engine_of(client)
        expected[False] = score(client, bodies[0]["correction"], **asked)["live_nats"]
        made = client.post("/edits", json=bodies[0]).json()
        expected[True] = score(client, bodies[0]["correction"], **asked)["live_nats"]
        client.delete(f"/edits/{made['id']}")
        done, found = threading.Event(), []

        def ask() -> None:
            while not done.is_set():
                found.append(score(client, bodies[0]["correction"], **asked))

        with ThreadPoolExecutor(2) as pool, slowed(engine, 0.001):
            asking = [pool.submit(ask) for _ in range(2)]
            try:
                for _ in range(4):
                    client.delete(f"/edits/{client.post('/edits', json=bodies[0]).json()['id']}")
            finally:
                done.set()
            for each in asking:
                each.result()
        assert len({each["revision"] for each in found}) > 2
        for each in found:
            edited = bool(engine.history.active_at(each["revision"]))
            assert each["live_nats"] == pytest.approx(expected[edited], abs=1e-4)
