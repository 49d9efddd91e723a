"""Everything wrong that a client may send, against real systems: a clear 4xx, and the next request is answered."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rorqual.v1 import generate_pb2 as pb
from tests.harness.system import SECONDS_MAX, TEXT_CONFIG, System

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
VOCAB_SIZE = TEXT_CONFIG["vocab_size"]
TOKENS_MAX = 2048
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _still_serves(text_system: System) -> Iterator[None]:
    """After all of these tests the same processes give the same answer, and hold nothing."""
    yield
    assert_serves(text_system, model="orca")


def assert_serves(system: System, *, model: str) -> None:
    answer = system.complete([5, 6, 7], max_tokens=3, model=model)
    assert len(answer["choices"][0]["token_ids"]) == 3
    system.wait_until_idle()
    assert system.is_whole()


def assert_refused(answer: httpx.Response, *, text: str, param: str | None = None, status: int = 400) -> None:
    """An error body as OpenAI writes it, whose message says `text`."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert text in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert error["param"] == param


def post(system: System, route: str, body: bytes | str | dict[str, Any], **headers: str) -> httpx.Response:
    content = json.dumps(body) if isinstance(body, dict) else body
    with system.client() as client:
        return client.post(route, content=content, headers={"content-type": "application/json", **headers})


NOT_JSON = {
    "nothing": (b"", "the body is not JSON"),
    "half an object": (b'{"prompt": [1, 2', "the body is not JSON"),
    "two objects": (b"{} {}", "the body is not JSON"),
    "a list": (b"[1, 2, 3]", "the body: Expected 'object', got 'array'"),
    "a number": (b"17", "the body: Expected 'object', got 'int'"),
    "null": (b"null", "the body: Expected 'object', got 'null'"),
    "not a number": (b'{"prompt": [1], "temperature": NaN}', "the body is not JSON"),
    "infinity": (b'{"prompt": [1], "temperature": Infinity}', "the body is not JSON"),
    "minus infinity": (b'{"prompt": [1], "temperature": -Infinity}', "the body is not JSON"),
    "invalid utf-8": (b'{"prompt": "\xff\xfe"}', "not"),
    "a raw control character": (b'{"prompt": "a\x00b"}', "the body is not JSON"),
    "utf-16": ('{"prompt": [1]}'.encode("utf-16"), "the body is not JSON"),
    "a thousand garbage bytes": (random.Random(1).randbytes(1000), "the body is not JSON"),
    "deep nesting": (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    "too many objects": (b'{"messages": [' + b"{}," * 70_000 + b"{}]}", "65536 objects"),
    "deep nesting of what is ignored": (b'{"user": ' + b"[" * 50_000, ""),
    "a high surrogate alone": (b'{"prompt": "a \\ud83d b"}', "the body is not JSON"),
    "a low surrogate alone": (b'{"prompt": "\\udc33"}', "surrogate"),
}


@pytest.mark.parametrize(("body", "text"), NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, TOKENIZE])
def test_a_body_that_is_not_our_json_is_refused(
    text_system: System, route: str, body: bytes, text: str
) -> None:
    answer = post(text_system, route, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    if route == COMPLETIONS:
        assert text.lower() in error["message"].lower()


# Field by field: what to send, and the field that the answer must name where it is not that one.
COMPLETION_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [1, None]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [5, VOCAB_SIZE]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": [2**63]}, "prompt"),
    ({"prompt": [10**400]}, "prompt"),
    ({"prompt": [1] * TOKENS_MAX}, "prompt"),
    ({"prompt": "whale " * 3000}, "prompt"),
    ({"prompt": [[1]] * 200}, "prompt"),
    ({"prompt": [1] * (TOKENS_MAX - 5), "max_tokens": 6}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "7"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": TOKENS_MAX + 1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "2"}, "n"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 100_000}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1.5": 1}}, "logit_bias"),
    ({"logit_bias": {" 1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias[...]"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"echo": 1}, "echo"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(
    ("changed", "param"),
    COMPLETION_FIELDS,
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_completion_field_that_is_wrong_is_named(
    text_system: System, changed: dict[str, Any], param: str
) -> None:
    body = {"prompt": [1, 2], "max_tokens": 2} | changed
    answer = post(text_system, COMPLETIONS, body)
    assert answer.status_code == 400, answer.text
    named = answer.json()["error"]["param"]
    assert named == param or named.startswith(f"{param}["), answer.text
    assert_refused(answer, text=param.split("[")[0], param=named)


def a_user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "whale", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
    ({"messages": [a_user("a"), {"role": "USER", "content": "a"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [a_user(5)]}, "messages[0].content"),
    ({"messages": [a_user(["a"])]}, "messages[0].content[0]"),
    (
        {"messages": [a_user([{"type": "image_url", "image_url": {"url": "x"}}])]},
        "messages[0].content[0].type",
    ),
    ({"messages": [a_user([{"type": "text"}])]}, "messages[0].content[0].text"),
    ({"messages": [a_user("whale " * 3000)]}, "messages"),
    ({"max_tokens": TOKENS_MAX}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"n": 1000}, "n"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking": "yes"}}, "chat_template_kwargs.thinking"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(
    ("changed", "param"),
    CHAT_FIELDS,
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_chat_field_that_is_wrong_is_named(
    text_system: System, changed: dict[str, Any], param: str
) -> None:
    answer = post(text_system, CHAT, {"messages": [a_user("hello")], "max_tokens": 2} | changed)
    assert_refused(answer, text=param if len(str(changed)) < 1000 else "2048", param=param)


def test_a_body_over_the_limit_is_not_read_to_its_end(text_system: System) -> None:
    answer = post(text_system, COMPLETIONS, b'{"prompt": "' + b"a" * (17 * MIB) + b'"}')
    assert_refused(answer, text="at most 16777216", status=413)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/another", 404),
        ("GET", "/" + "a" * 3000, 404),
        ("GET", CHAT, 405),
        ("DELETE", COMPLETIONS, 405),
        ("POST", "/metrics", 405),
        ("GET", "/%ff%00", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_a_route_that_is_not_there_is_a_4xx(text_system: System, method: str, path: str, status: int) -> None:
    with text_system.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.json()["error"]["message"]) < 500


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, TOKENIZE])
def test_an_unknown_model_is_a_404(text_system: System, route: str) -> None:
    prompt = {"messages": [a_user("a")]} if route == CHAT else {"prompt": "a"}
    answer = post(text_system, route, {"model": "gpt-9"} | prompt)
    assert_refused(answer, text="the model 'gpt-9' does not exist", param="model", status=404)


GARBAGE = {
    "a megabyte of noise": random.Random(2).randbytes(MIB),
    "an endless request line": b"GET /" + b"a" * MIB,
    "endless headers": b"GET / HTTP/1.1\r\n" + b"X-Header: value\r\n" * 60_000,
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(1000),
    "a body length that is no number": b"POST /v1/completions HTTP/1.1\r\nContent-Length: ten\r\n\r\n{}",
    "two body lengths": b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a chunk that is no chunk": b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    "a negative body length": b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    "a body length of many digits": b"POST /v1/completions HTTP/1.1\r\nContent-Length: "
    + b"9" * 30
    + b"\r\n\r\n{}",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_the_socket_is_answered_with_a_4xx_or_cut_off(text_system: System, data: bytes) -> None:
    host, port = text_system.http.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while received := connection.recv(65536):
                answer += received
        except (BrokenPipeError, ConnectionResetError):
            pass  # cut off in the middle of sending
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]


def test_garbage_on_the_grpc_port_harms_nobody(text_system: System) -> None:
    host, port = text_system.grpc.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(random.Random(3).randbytes(MIB))
    for message in (b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe", random.Random(4).randbytes(1000)):
        error = refusal(text_system, message)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "the message is no GenerateRequest"


GRPC_FIELDS: list[tuple[pb.GenerateRequest, str]] = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(text=""), "text"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[VOCAB_SIZE])), "token_ids.ids[0]"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "token_ids.ids[0]"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * TOKENS_MAX)), "token_ids"),
    (pb.GenerateRequest(text="a", max_tokens=0), "max_tokens"),
    (pb.GenerateRequest(text="a", max_tokens=2**32 - 1), "max_tokens"),
    (pb.GenerateRequest(text="a", n=17), "n "),
    (pb.GenerateRequest(text="a", stop=[""]), "stop"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=float("nan"))), "sampling.temperature"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=float("inf"))), "sampling.temperature"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(top_p=-1)), "sampling.top_p"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(seed=2**64 - 1)), "sampling.seed"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(logprobs=21)), "sampling.logprobs"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(logit_bias={VOCAB_SIZE: 1})), "sampling.logit_bias"),
    (pb.GenerateRequest(text="a", sampling=pb.Sampling(logit_bias={5: float("nan")})), "sampling.logit_bias"),
]


@pytest.mark.parametrize(("request_", "text"), GRPC_FIELDS, ids=[text for _, text in GRPC_FIELDS])
def test_a_grpc_field_that_is_wrong_is_named(
    text_system: System, request_: pb.GenerateRequest, text: str
) -> None:
    error = refusal(text_system, request_.SerializeToString())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in error.details()


def test_an_unknown_model_is_not_found_over_grpc(text_system: System) -> None:
    error = refusal(text_system, pb.GenerateRequest(model="gpt-9", text="a").SerializeToString())
    assert error.code() is grpc.StatusCode.NOT_FOUND


def refusal(system: System, message: bytes) -> Any:
    with grpc.insecure_channel(system.grpc) as channel:
        call = channel.unary_stream("/rorqual.v1.Generation/Generate", None, None)(
            message, timeout=SECONDS_MAX
        )
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    return raised.value


def test_text_without_a_tokenizer_is_refused_and_ids_are_served(ids_model: Path, start_system: Any) -> None:
    system = start_system(ids_model, "--both", "1", "--pages", "4")
    for route, body, param in (
        (CHAT, {"messages": [a_user("hello")]}, "messages"),
        (COMPLETIONS, {"prompt": "hello"}, "prompt"),
        (COMPLETIONS, {"prompt": ["hello", "you"]}, "prompt[0]"),
        (TOKENIZE, {"text": "hello"}, "text"),
    ):
        assert_refused(post(system, route, body), text="tokenizer", param=param)
    error = refusal(system, pb.GenerateRequest(text="hello").SerializeToString())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "tokenizer" in error.details()
    # The pools hold fewer tokens than the model could read.
    answer = post(system, COMPLETIONS, {"prompt": [1] * 1024, "max_tokens": 1})
    assert_refused(answer, text="1024", param="prompt")
    (choice,) = system.complete([1, 2, 3], logprobs=1)["choices"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert_serves(system, model="whale")
