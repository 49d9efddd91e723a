"""The official OpenAI client, and a gRPC client made from the `.proto` alone, against a real system with text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from rorqual.demo import find_tokenizer
from tests.harness.system import SECONDS_MAX, System

pytestmark = pytest.mark.slow

PROTO = Path(__file__).parents[2] / "proto" / "rorqual" / "v1" / "generate.proto"
MESSAGES: Any = [
    {"role": "system", "content": "You are a whale."},
    {"role": "user", "content": "Où vont les baleines en hiver? 🐋"},
]
TEXT = "The largest animals that have ever lived"
IGNORE_EOS = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def client(text_system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{text_system.http}/v1", api_key="none", max_retries=0, timeout=SECONDS_MAX
    ) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(find_tokenizer()))


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    extra = IGNORE_EOS | fields.pop("extra_body", {})
    fields = {"model": "orca", "messages": MESSAGES, "max_completion_tokens": 24, "seed": 1} | fields
    return client.chat.completions.create(extra_body=extra, **fields)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    extra = IGNORE_EOS | fields.pop("extra_body", {})
    fields = {"model": "orca", "prompt": TEXT, "max_tokens": 24, "seed": 1} | fields
    return client.completions.create(extra_body=extra, **fields)


def token_ids(answer: Any) -> list[list[int]]:
    return [choice.token_ids for choice in answer.choices]


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "orca"
    assert client.models.retrieve("orca").id == "orca"


def test_a_chat_is_the_decoded_tokens_with_their_usage(
    client: openai.OpenAI, tokenizer: Tokenizer, text_system: System
) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert len(choice.token_ids) == 24
    assert choice.message.content == tokenizer.decode(choice.token_ids, skip_special_tokens=True)
    with text_system.client() as http:
        count = http.post("/tokenize", json={"messages": MESSAGES}).json()["count"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count, 24)
    assert answer.usage.total_tokens == count + 24
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat_says_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    whole = chat(client, n=2)
    texts, ids, reasons = ["", ""], [[], []], [None, None]
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ids[choice.index] += choice.token_ids
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ids == token_ids(whole)
    assert ids[0] != ids[1]
    assert reasons == ["length", "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 48


def test_a_streamed_completion_says_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    whole = complete(client, echo=True, logprobs=2)
    text, ids, offsets = "", [], []
    for chunk in complete(client, echo=True, logprobs=2, stream=True):
        (choice,) = chunk.choices
        text += choice.text
        ids += choice.token_ids
        offsets += choice.logprobs.text_offset if choice.logprobs else []
    assert text == whole.choices[0].text
    assert text.startswith(TEXT)
    assert [ids] == token_ids(whole)
    assert offsets == whole.choices[0].logprobs.text_offset


def test_a_seed_repeats_its_answer_and_another_one_does_not(client: openai.OpenAI) -> None:
    first, again, other = (token_ids(complete(client, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert token_ids(complete(client, seed=5, n=3))[0] == first[0]
    assert token_ids(complete(client, temperature=0, seed=5)) == token_ids(
        complete(client, temperature=0, seed=6)
    )
    assert token_ids(complete(client, seed=openai.NOT_GIVEN)) != token_ids(
        complete(client, seed=openai.NOT_GIVEN)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    text = complete(client, temperature=0).choices[0].text
    # In the middle, across a border between tokens most likely; the other one never comes.
    stop = text[len(text) // 2 :][:5]
    fields = {"temperature": 0, "stop": ["\0never\0", stop], "stream": stream}
    answer = complete(client, **fields)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        got, reason = "".join(choice.text for choice in choices), choices[-1].finish_reason
    else:
        got, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert got == text[: text.index(stop)]
    assert reason == "stop"


def test_chat_logprobs_name_the_sampled_token_among_the_likeliest(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=5, temperature=0).choices
    assert len(choice.logprobs.content) == len(choice.token_ids) == 24
    for entry in choice.logprobs.content:
        logprobs = [other.logprob for other in entry.top_logprobs]
        assert len(logprobs) == 5
        assert logprobs == sorted(logprobs, reverse=True)
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == logprobs[0] < 0
    said = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert said.decode("utf-8", "replace") == choice.message.content


@pytest.mark.parametrize(
    "thinking",
    [{"extra_body": {"chat_template_kwargs": {"thinking": True}}}, {"reasoning_effort": "high"}],
    ids=["by template argument", "by effort"],
)
def test_an_unfinished_thought_is_all_reasoning(client: openai.OpenAI, thinking: dict[str, Any]) -> None:
    message = chat(client, **thinking).choices[0].message
    assert message.content == ""
    assert message.reasoning_content
    deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True, **thinking)]
    assert (
        "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        == message.reasoning_content
    )
    assert "".join(delta.content or "" for delta in deltas) == ""


def test_no_thinking_is_the_default_and_has_no_reasoning(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message
    assert getattr(plain, "reasoning_content", None) is None
    assert chat(client, reasoning_effort="none").choices[0].message.content == plain.content


def test_a_banned_token_is_not_said_and_a_pushed_one_is(client: openai.OpenAI) -> None:
    first = token_ids(complete(client, temperature=0, max_tokens=1))[0][0]
    (banned,) = token_ids(complete(client, temperature=0, logit_bias={str(first): -100}))
    assert first not in banned
    (pushed,) = token_ids(complete(client, temperature=0, logit_bias={"777": 100}))
    assert pushed == [777] * 24


GRPC_CLIENT = """
import json, sys
import grpc, generate_pb2 as pb, generate_pb2_grpc as services

def ask(**fields):
    tokens, text, reasons, usage = {}, {}, {}, None
    for response in stub.Generate(pb.GenerateRequest(**fields), timeout=60):
        indices = [token.index for token in response.tokens]
        known = tokens.setdefault(response.choice, [])
        assert indices == list(range(len(known), len(known) + len(indices)))
        known += [token.token_id for token in response.tokens]
        text[response.choice] = text.get(response.choice, "") + response.text
        if response.finish_reason:
            reasons[response.choice] = response.finish_reason
        if response.HasField("usage"):
            usage = [response.usage.prompt_tokens, response.usage.completion_tokens]
    return {"tokens": tokens, "text": text, "reasons": reasons, "usage": usage, "seed": response.seed}

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = services.GenerationStub(channel)
    sampling = pb.Sampling(seed=1)
    print(json.dumps(ask(text=sys.argv[2], max_tokens=24, ignore_eos=True, sampling=sampling, n=2)))
    ids = pb.TokenIds(ids=[5, 6, 7])
    print(json.dumps(ask(token_ids=ids, max_tokens=6, ignore_eos=True, sampling=pb.Sampling(temperature=0))))
    call = stub.Generate(pb.GenerateRequest(token_ids=ids, max_tokens=1500, ignore_eos=True), timeout=60)
    next(call)
    call.cancel()
    try:
        ask(token_ids=ids, sampling=pb.Sampling(temperature=9))
    except grpc.RpcError as error:
        print(json.dumps([error.code().name, error.details()]))
"""


def test_a_grpc_client_made_from_the_proto_alone_gets_the_same_tokens(
    client: openai.OpenAI, text_system: System, tmp_path: Path
) -> None:
    shutil.copy(PROTO, tmp_path)
    (tmp_path / "client.py").write_text(GRPC_CLIENT, encoding="utf-8")
    generate = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=."]
    subprocess.run([*generate, PROTO.name], cwd=tmp_path, check=True, timeout=SECONDS_MAX)
    # From its own folder, which holds nothing else: our packages are not in reach.
    done = subprocess.run(
        [sys.executable, "client.py", text_system.grpc, TEXT],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
        timeout=SECONDS_MAX,
    )
    text, greedy, error = (json.loads(line) for line in done.stdout.splitlines())
    whole = complete(client, n=2)
    assert text["tokens"] == {"0": whole.choices[0].token_ids, "1": whole.choices[1].token_ids}
    assert text["text"] == {"0": whole.choices[0].text, "1": whole.choices[1].text}
    assert text["reasons"] == {"0": "length", "1": "length"}
    assert text["usage"] == [whole.usage.prompt_tokens, 48]
    assert text["seed"] == 1
    whole = complete(client, prompt=[5, 6, 7], temperature=0, max_tokens=6)
    assert greedy["tokens"] == {"0": whole.choices[0].token_ids}
    assert error == ["INVALID_ARGUMENT", "sampling.temperature: temperature must be between 0 and 2, got 9.0"]
    text_system.wait_until_idle()
