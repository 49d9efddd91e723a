"""The official client against the gateway: what applications see."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from fake_generator import alternatives_of, completion_ids, completion_text, logprob_of

from rorqual.errors import WorkerLost

HELLO = list(b"hello")
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        openai.DefaultAsyncHttpxClient(verify=False) as http,  # reading certificates takes 0.1 s a test
        openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client,
    ):
        yield client


async def test_a_chat_is_answered_whole(client, served):
    answer = await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=6, seed=5)
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == completion_text(HELLO, 6)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        6,
        11,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert served.generator.seen[0].sampling.seed == 5


async def test_a_chat_streams_its_text_in_order_and_then_its_usage(client):
    stream = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == completion_text(HELLO, 6)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


async def test_without_include_usage_a_stream_has_none(client):
    stream = await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2, stream=True)
    assert [chunk.usage async for chunk in stream] == [None, None]


async def test_text_that_is_held_back_arrives_at_the_end_and_the_role_at_once(client, served):
    served.generator.held_back = True
    stream = await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=4, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", completion_text(HELLO, 4)]
    assert chunks[0].choices[0].delta.role == "assistant"


async def test_several_choices_stream_interleaved_and_apart(client):
    stream = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=4, n=3, stream=True
    )
    texts = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {choice: completion_text(HELLO, 4, choice) for choice in range(3)}


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_comes_back_apart_from_content(client, stream):
    answer = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=8, reasoning_effort="high", stream=stream
    )
    text = completion_text(HELLO, 8)
    if stream:
        deltas = [chunk.choices[0].delta async for chunk in answer]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        reasoning = answer.choices[0].message.reasoning_content
        content = answer.choices[0].message.content
    assert (reasoning, content) == (text[:3], text[3:])


@pytest.mark.parametrize(
    ("asked", "thinking", "effort"),
    [
        ({}, False, None),
        ({"reasoning_effort": "max"}, True, "max"),
        ({"reasoning_effort": "none"}, False, None),
        ({"chat_template_kwargs": {"thinking": True}}, True, None),
        ({"chat_template_kwargs": {"thinking": True, "reasoning_effort": "max"}}, True, "max"),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, True, "high"),
    ],
)
async def test_thinking_is_chosen_by_template_arguments_or_by_effort(client, served, asked, thinking, effort):
    await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1, extra_body=asked)
    assert served.prompts.asked == [(thinking, effort)]
    assert served.generator.seen[0].split_reasoning is thinking


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_list_every_token_with_its_alternatives(client, stream):
    answer = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, stream=stream
    )
    if stream:
        entries = [entry async for chunk in answer for entry in chunk.choices[0].logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    ids = completion_ids(HELLO, 3)
    assert [entry.token for entry in entries] == [chr(token_id) for token_id in ids]
    assert [entry.logprob for entry in entries] == [logprob_of(token_id) for token_id in ids]
    assert [entry.bytes for entry in entries] == [[token_id] for token_id in ids]
    assert [[(ord(top.token), top.logprob) for top in entry.top_logprobs] for entry in entries] == [
        list(alternatives_of(token_id, 2)) for token_id in ids
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_returned_when_asked_for(client, served, stream):
    served.generator.held_back = True
    answer = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=5, stream=stream, extra_body={"return_token_ids": True}
    )
    if stream:
        ids = [token_id async for chunk in answer for token_id in chunk.choices[0].token_ids]
    else:
        ids = answer.choices[0].token_ids
    assert ids == completion_ids(HELLO, 5)


async def test_a_stop_string_ends_a_choice_and_is_not_part_of_it(client):
    text = completion_text(HELLO, 20)
    answer = await client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=20, stop=[text[4:6]]
    )
    assert answer.choices[0].message.content == text[: text.index(text[4:6])]
    assert answer.choices[0].finish_reason == "stop"


async def test_a_chat_without_a_budget_may_use_all_that_the_model_holds(client, served):
    served.generator.tokens_per_update = 5000
    await client.chat.completions.create(model="fake", messages=MESSAGES)
    assert served.generator.seen[0].max_tokens == 4096 - 5


async def test_sampling_fields_reach_the_generation_unchanged(client, served):
    await client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_completion_tokens=2,
        max_tokens=1,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": 5, "3": -100},
        extra_body={"top_k": -1, "min_p": 0.125, "repetition_penalty": 1.5, "ignore_eos": True},
    )
    generation = served.generator.seen[0]
    sampling = generation.sampling
    assert generation.max_tokens == 2
    assert generation.ignore_eos
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 0, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, ((3, -100.0), (7, 5.0)))


async def test_a_request_without_a_seed_gets_one_drawn(client, served):
    for _ in range(2):
        await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1)
    first, second = (generation.sampling.seed for generation in served.generator.seen)
    assert first != second


async def test_a_completion_takes_text(client, served):
    answer = await client.completions.create(model="fake", prompt="hello")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == completion_text(HELLO, 16)
    assert served.generator.seen[0].prompt.tolist() == HELLO
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_of_ids_with_several_choices_are_numbered_prompt_by_prompt(client, stream):
    prompts = [[10, 20], [30], [40, 50, 60]]
    answer = await client.completions.create(
        model="fake",
        prompt=prompts,
        n=2,
        max_tokens=4,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    texts: dict[int, str] = {}
    if stream:
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
            usage = chunk.usage
    else:
        texts = {choice.index: choice.text for choice in answer.choices}
        usage = answer.usage
    assert texts == {
        2 * number + choice: completion_text(prompt, 4, choice)
        for number, prompt in enumerate(prompts)
        for choice in range(2)
    }
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 24)


async def test_a_list_of_texts_is_a_list_of_prompts(client):
    answer = await client.completions.create(model="fake", prompt=["hello", "you"], max_tokens=3)
    assert [choice.text for choice in answer.choices] == [
        completion_text(HELLO, 3),
        completion_text(list(b"you"), 3),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_and_its_logprobs_first(client, stream):
    answer = await client.completions.create(
        model="fake", prompt="hé", max_tokens=2, echo=True, logprobs=1, stream=stream
    )
    chunks = [chunk async for chunk in answer] if stream else [answer]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    lists = {
        name: [value for piece in pieces for value in getattr(piece, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    prompt = list("hé".encode())
    ids = completion_ids(prompt, 2)
    assert text == "hé" + bytes(ids).decode()
    assert lists["tokens"] == ["h", "\\xc3", "\\xa9", *map(chr, ids)]
    assert lists["token_logprobs"] == [
        None,
        *(logprob_of(token_id) for token_id in [*prompt[1:], *ids]),
    ]
    # The second byte of "é" ends the character: what follows stands at offset 2, not 3.
    assert lists["text_offset"] == [0, 1, 1, 2, 3]
    tops = lists["top_logprobs"]
    assert tops[0] is None
    assert tops[-1] == {chr(ids[-1] + 1): logprob_of(ids[-1] + 1), chr(ids[-1]): logprob_of(ids[-1])}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_can_be_scored_without_generating(client, stream):
    answer = await client.completions.create(
        model="fake", prompt=HELLO, max_tokens=0, echo=True, logprobs=0, stream=stream
    )
    choice = [chunk async for chunk in answer][-1].choices[0] if stream else answer.choices[0]
    assert choice.text == "hello"
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == list("hello")
    assert choice.logprobs.top_logprobs[1] == {"e": logprob_of(ord("e"))}
    if not stream:
        assert answer.usage.completion_tokens == 0


async def test_models_are_listed_and_found_by_name(client):
    models = await client.models.list()
    assert [model.id for model in models.data] == ["fake"]
    assert (await client.models.retrieve("fake")).owned_by == "rorqual"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_a_failure_in_mid_stream_reaches_the_client_as_an_error(client, served):
    served.generator.fail_with, served.generator.fail_at = WorkerLost("the worker is gone"), 2
    stream = await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9, stream=True)
    chunks = [await anext(stream), await anext(stream)]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == completion_text(HELLO, 2)
    with pytest.raises(openai.APIError, match="the worker is gone"):
        await anext(stream)
