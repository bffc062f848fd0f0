"""The real `openai` client against `/v1`, over a real socket."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from service.engine import Sampling
from tests.api.conftest import slowed, wait_until

MODEL = "base"
"""The folder of the small model is called so."""
PROMPT = "The capital of France is"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which city?"}]
PARTS = [{"type": "text", "text": "Which"}, {"type": "text", "text": " city?"}]
PICTURE = [{"type": "image_url", "image_url": {"url": "x"}}]
TEMPLATED = "system: Be brief.<eos>\nuser: Which city?<eos>\nassistant:"
CHAT = {"model": MODEL, "messages": MESSAGES}
LONG = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "temperature": 2.0, "seed": 1}


@pytest.fixture
def url(listening):
    return listening[0]


@pytest.fixture
def engine(listening):
    return listening[1].state.service.ready_engine()


@pytest.fixture(scope="session")
def client(listening):
    with openai.OpenAI(base_url=f"{listening[0]}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def said(engine, prompt: str, tokens: int, **sampling) -> str:
    return engine.generate(prompt, tokens, sampling=Sampling(**sampling))[0].text


class TestModels:
    def test_are_the_live_one_and_the_base(self, client):
        models = client.models.list().data
        assert [model.id for model in models] == [MODEL, f"{MODEL}@base"]
        for model in models:
            assert client.models.retrieve(model.id) == model
            assert model.object == "model"

    def test_of_other_names_are_not_found(self, client):
        for ask in (
            lambda: client.models.retrieve("gpt-4o"),
            lambda: client.completions.create(model="gpt-4o", prompt=PROMPT),
            lambda: client.chat.completions.create(model=f"{MODEL}@other", messages=MESSAGES),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                ask()
            assert (error.value.code, error.value.param) == ("model_not_found", "model")

    def test_are_told_apart_by_an_edit(self, client, url, bodies):
        def ask(model: str) -> openai.types.Completion:
            return client.completions.create(model=model, prompt=bodies[0]["prompt"], temperature=0, max_tokens=4)

        before = ask(MODEL)
        made = httpx.post(f"{url}/edits", json=bodies[0]).json()
        try:
            live, base = ask(MODEL), ask(f"{MODEL}@base")
        finally:
            httpx.delete(f"{url}/edits/{made['id']}").raise_for_status()
        assert live.choices[0].text.strip().startswith(bodies[0]["correction"].strip())
        assert base.choices == before.choices != live.choices
        digest = made["digest"].removeprefix("sha256:")[:12]
        assert live.system_fingerprint == f"mend-{made['revision']}-{digest}" != before.system_fingerprint


class TestCompletions:
    def test_say_what_generate_says(self, client, engine):
        answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (said(engine, PROMPT, 16), "length", None)
        assert (answer.object, answer.model) == ("text_completion", MODEL)
        usage = answer.usage
        assert usage.prompt_tokens == len(engine.base.tokenizer(PROMPT).input_ids)
        assert (usage.completion_tokens, usage.total_tokens) == (16, usage.prompt_tokens + 16)

    def test_name_the_revision(self, client, engine):
        raw = client.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=1)
        revision, digest = engine.published.revision, engine.published.digest.removeprefix("sha256:")[:12]
        assert raw.headers["etag"] == f'"{revision}"'
        assert raw.parse().system_fingerprint == f"mend-{revision}-{digest}"

    def test_of_several_prompts_have_several_choices_each(self, client, engine):
        prompts = [PROMPT, "Germany speaks the"]
        answer = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=5, max_tokens=6, echo=True)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == [
            prompt + said(engine, prompt, 6, temperature=1.0, seed=5 + number)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(2))
        ]
        assert answer.usage.prompt_tokens == sum(len(engine.base.tokenizer(each).input_ids) for each in prompts)

    def test_of_tokens_say_what_their_text_says(self, client, engine):
        ids = engine.base.tokenizer(PROMPT).input_ids
        for prompt in (ids, [ids]):
            answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, echo=True)
            assert answer.choices[0].text == PROMPT + said(engine, PROMPT, 16)

    def test_without_a_seed_are_random_and_with_one_are_not(self, client):
        def ask(**more) -> str:
            return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, **more).choices[0].text

        assert len({ask() for _ in range(4)}) > 1
        assert ask(seed=-3) == ask(seed=-3)
        assert ask(temperature=0) == ask(top_p=0) == ask(extra_body={"top_k": 1})

    def test_stop_before_a_stop_string(self, client, engine):
        whole = said(engine, PROMPT, 30)
        answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=30, stop=whole[6:8])
        assert answer.choices[0].text == whole[: whole.index(whole[6:8])]
        assert answer.choices[0].finish_reason == "stop"

    def test_tell_logprobs_in_the_old_form(self, client):
        answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=5, logprobs=2)
        (choice,) = answer.choices
        assert "".join(choice.logprobs.tokens) == choice.text
        for token, logprob, top, offset in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs,
            choice.logprobs.text_offset, strict=True,
        ):  # fmt: skip
            assert choice.text[offset:].startswith(token)
            assert top[token] == logprob == max(top.values())
            assert len(top) == 2

    def test_stream_the_same_in_pieces(self, client):
        asked = {"model": MODEL, "prompt": [PROMPT, "Germany"], "n": 2, "seed": 3, "echo": True, "max_tokens": 8}
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        *pieces, last = chunks
        assert (last.choices, last.usage) == ([], whole.usage)
        assert {chunk.usage for chunk in pieces} == {None}
        assert {(chunk.id, chunk.system_fingerprint) for chunk in chunks} == {(last.id, whole.system_fingerprint)}
        for choice in whole.choices:
            own = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
            assert "".join(each.text for each in own) == choice.text
            assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]


class TestChat:
    def test_says_what_the_templated_prompt_says(self, client, engine):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", said(engine, TEMPLATED, 12))
        assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
        assert answer.usage.prompt_tokens == len(engine.base.tokenizer(TEMPLATED).input_ids)

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Which city?", "name": "Ann"}],
            [MESSAGES[0], {"role": "user", "content": PARTS}],
        ],
    )  # fmt: skip
    def test_reads_messages_in_all_their_forms(self, client, engine, messages):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=12, user="u", metadata={"a": "b"},
            store=True, service_tier="auto", response_format={"type": "text"}, tools=[], logit_bias={},
            parallel_tool_calls=True, frequency_penalty=0, presence_penalty=0,
        )  # fmt: skip
        assert answer.choices[0].message.content == said(engine, TEMPLATED, 12)

    def test_without_a_limit_goes_on_as_far_as_it_may(self, client, engine):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=2, seed=1)
        room = engine.base.model.config.max_position_embeddings - answer.usage.prompt_tokens
        (choice,) = answer.choices
        assert choice.finish_reason == "stop" or answer.usage.completion_tokens == min(room, engine.limits.new_tokens)

    def test_tells_logprobs(self, client):
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, n=2
        )
        for choice in answer.choices:
            assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
            for token in choice.logprobs.content:
                assert bytes(token.bytes).decode() == token.token
                assert len(token.top_logprobs) == 3
                assert token.top_logprobs[0].logprob == token.logprob

    def test_streams_the_same_in_pieces(self, client):
        asked = {"model": MODEL, "messages": MESSAGES, "n": 2, "seed": 3, "max_tokens": 8, "logprobs": True}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        *pieces, last = chunks
        assert (last.choices, last.usage) == ([], whole.usage)
        for choice in whole.choices:
            own = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
            assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
            assert "".join(each.delta.content or "" for each in own) == choice.message.content
            tokens = [token for each in own if each.logprobs for token in each.logprobs.content]
            assert tokens == choice.logprobs.content
            assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]

    def test_of_the_asynchronous_client_is_the_same(self, url, client):
        asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}

        async def both() -> tuple[str, str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                whole = await client.chat.completions.create(**asked)
                stream = await client.chat.completions.create(**asked, stream=True)
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                return whole.choices[0].message.content, "".join(pieces)

        expected = client.chat.completions.create(**asked).choices[0].message.content
        assert asyncio.run(both()) == (expected, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({"temperature": 3}, "temperature"),
            ({"n": 0}, "n"),
            ({"max_tokens": 10**6}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
            ({"messages": [{"role": "user", "content": PICTURE}]}, "messages"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"audio": {"voice": "x", "format": "wav"}, "modalities": ["audio"]}, "modalities"),
            ({"presence_penalty": 1}, "presence_penalty"),
            ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"extra_body": {"max_token": 5}}, "max_token"),
            ({"top_logprobs": 2}, None),
        ],
    )  # fmt: skip
    def test_of_what_is_not_served_are_bad_requests(self, client, asked, param):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**{**CHAT, **asked})
        assert error.value.param == param
        assert error.value.code in ("invalid_request", "text_too_long")
        assert error.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        ("asked", "code"),
        [
            ({"suffix": "x"}, "invalid_request"),
            ({"extra_body": {"repetition_penalty": 1e-300}}, "invalid_request"),
            ({"model": "m" * 257}, "invalid_request"),
            ({"best_of": 3}, "invalid_request"),
            ({"echo": True, "logprobs": 1}, "invalid_request"),
            ({"prompt": ""}, "empty_text"),
            ({"prompt": [10**9]}, "unknown_token"),
            ({"prompt": [-1], "echo": True}, "unknown_token"),
            ({"prompt": []}, "invalid_request"),
            ({"prompt": [True]}, "invalid_request"),
            ({"prompt": PROMPT * 1000}, "text_too_long"),
            ({"prompt": [5] * 300}, "text_too_long"),
        ],
    )
    def test_of_completions_too(self, client, asked, code):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                client.completions.create(**{"model": MODEL, "prompt": PROMPT, "stream": stream, **asked})
            assert error.value.code == code

    def test_of_more_than_can_ever_be_served_are_no_reason_to_try_again(self, client):
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(model=MODEL, prompt=PROMPT, n=10)
        assert (error.value.status_code, error.value.code) == (413, "batch_too_large")

    def test_of_a_body_that_is_none_and_of_paths_that_are_none_have_the_shape_too(self, url):
        for answer, status, code in (
            (httpx.post(f"{url}/v1/completions", content="{", headers={"content-type": "application/json"}), 400,
             "malformed_body"),
            (httpx.post(f"{url}/v1/chat/completions", content=b"x" * 3_000_000), 413, "body_too_large"),
            (httpx.get(f"{url}/v1/embeddings"), 404, "not_found"),
            (httpx.get(f"{url}/v1/completions"), 405, "method_not_allowed"),
            (httpx.get(f"{url}/v1/models?x=%ff"), 400, "invalid_utf8"),
        ):  # fmt: skip
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert answer.json()["error"]["code"] == code

    def test_without_a_template_are_bad_requests(self, client, engine, monkeypatch):
        monkeypatch.setattr(engine.base.tokenizer, "chat_template", None)
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**CHAT)
        assert error.value.code == "no_chat_template"

    def test_of_a_full_queue_are_rate_limits(self, client, engine):
        with slowed(engine):
            streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(**LONG, n=3)
            for stream in streams:
                stream.close()
            wait_until(lambda: not engine._generator._strands, within_s=5)
        assert error.value.code == "busy"
        assert int(error.value.response.headers["retry-after"]) > 0

    def test_that_come_late_are_told_in_the_stream(self, client, engine):
        passes = []

        def fail(_module, _args, _output):
            passes.append(1)
            if len(passes) > 3:
                raise RuntimeError("worn out")

        handle = engine.weights.live.model.register_forward_hook(fail)
        try:
            stream = client.completions.create(**LONG, stream=True)
            with pytest.raises(openai.APIError, match="RuntimeError, an error on our side") as error:
                list(stream)
            assert error.value.code == "generation_failed"
            with pytest.raises(openai.InternalServerError):
                client.completions.create(**LONG)
        finally:
            handle.remove()


def test_a_stream_that_is_closed_ends_the_decoding(client, engine):
    with slowed(engine) as rows:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        stream.close()
        left_at = len(rows)
        wait_until(lambda: not engine._generator._strands, within_s=2)
        assert len(rows) <= left_at + 3
