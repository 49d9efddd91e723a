"""Whatever a client sends gets a fitting 4xx in OpenAI's error form, and the server lives on."""

from __future__ import annotations

import asyncio
import gc
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.errors import Overloaded, StageTimedOut, WorkerLost
from router.gateway.schema import ChatBody, CompletionBody, Unserved
from router.prompt import PromptEncoder

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


def chat(**fields: object) -> dict:
    return {"model": "fake", "messages": [USER], "max_tokens": 2, **fields}


def text(**fields: object) -> dict:
    return {"model": "fake", "prompt": "hi", "max_tokens": 2, **fields}


def error_of(response) -> dict:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000
    return error


BAD_FIELDS = [
    (CHAT, chat(model="other"), 404, "model"),
    (CHAT, chat(model=3), 400, "model"),
    (CHAT, {"model": "fake"}, 400, "messages"),
    (CHAT, chat(messages=None), 400, "messages"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="hi"), 400, "messages"),
    (CHAT, chat(messages=["hi"]), 400, "messages[0]"),
    (CHAT, chat(messages=[USER, {"role": "robot", "content": "hi"}]), 400, "messages[1].role"),
    (CHAT, chat(messages=[{"content": "hi"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user", "content": 7}]), 400, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 5000}]), 400, "messages"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    (CHAT, chat(max_tokens="2"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens"),
    (CHAT, chat(max_tokens=True), 400, "max_tokens"),
    (CHAT, chat(max_tokens=5000), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens"),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    # One prompt alone would be fine: the bound is on the whole answer.
    (TEXT, text(prompt=[[5] * 1000] * 16, echo=True, logprobs=20), 400, "logprobs"),
    (CHAT, chat(temperature=-0.1), 400, "temperature"),
    (CHAT, chat(temperature=2.1), 400, "temperature"),
    (CHAT, chat(temperature="warm"), 400, "temperature"),
    (CHAT, chat(temperature=[1]), 400, "temperature"),
    (CHAT, chat(top_p=1.5), 400, "top_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(min_p=-1), 400, "min_p"),
    (CHAT, chat(presence_penalty=3), 400, "presence_penalty"),
    (CHAT, chat(frequency_penalty=-3), 400, "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
    (CHAT, chat(seed=-1), 400, "seed"),
    (CHAT, chat(seed=2**63), 400, "seed"),
    (CHAT, chat(seed=10**400), 400, "seed"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=17), 400, "n"),
    (CHAT, chat(n="1"), 400, "n"),
    (CHAT, chat(stop=""), 400, "stop"),
    (CHAT, chat(stop=["a", ""]), 400, "stop"),
    (CHAT, chat(stop=["a"] * 17), 400, "stop"),
    (CHAT, chat(stop=["a", 5]), 400, "stop[1]"),
    (CHAT, chat(stop="a" * 5000), 400, "stop"),
    (CHAT, chat(stop={"a": 1}), 400, "stop"),
    (CHAT, chat(logit_bias={"a": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"256": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"²": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"1": "2"}), 400, "logit_bias[...]"),
    (CHAT, chat(logit_bias=[1]), 400, "logit_bias"),
    (CHAT, chat(logit_bias={str(i): 0 for i in range(1100)}), 400, "logit_bias"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(stream=True, stream_options={"include_usage": 1}), 400, "stream_options.include_usage"),
    (CHAT, chat(logprobs=1), 400, "logprobs"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs"),
    (CHAT, chat(reasoning_effort="extreme"), 400, "reasoning_effort"),
    (CHAT, chat(chat_template_kwargs={"thinking": "yes"}), 400, "chat_template_kwargs.thinking"),
    (CHAT, chat(chat_template_kwargs={"no_such": 1}), 400, "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs={"two\nlines": 1}), 400, "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs={"x" * 9000: 1}), 400, "chat_template_kwargs"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
    (CHAT, chat(functions=[{"name": "f"}]), 400, "functions"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities"),
    (CHAT, chat(min_tokens=True), 400, "min_tokens"),
    (CHAT, chat(enable_thinking=True), 400, "enable_thinking"),
    (CHAT, chat(reasoning={"effort": "high"}), 400, "reasoning"),
    (CHAT, chat(include_reasoning=False), 400, "include_reasoning"),
    (CHAT, chat(verbosity="low"), 400, "verbosity"),
    (CHAT, chat(prompt_logprobs=0), 400, "prompt_logprobs"),
    (CHAT, chat(skip_special_tokens=False), 400, "skip_special_tokens"),
    (CHAT, chat(add_special_tokens=True), 400, "add_special_tokens"),
    (CHAT, chat(typical_p=0.9), 400, "typical_p"),
    (CHAT, chat(echo=True), 400, "echo"),
    (CHAT, chat(best_of=2), 400, "best_of"),
    (CHAT, chat(best_of=2, n=3), 400, "best_of"),
    (CHAT, chat(best_of=True), 400, "best_of"),
    (CHAT, chat(thinking=True), 400, "thinking"),
    (CHAT, chat(thinking={}), 400, "thinking"),
    (CHAT, chat(thinking={"type": "auto"}), 400, "thinking.type"),
    (CHAT, chat(thinking={"type": "enabled", "budget_tokens": 5}), 400, "thinking"),
    (
        CHAT,
        chat(thinking={"type": "enabled"}, chat_template_kwargs={"thinking": False}),
        400,
        "thinking",
    ),
    (
        CHAT,
        chat(messages=[USER, {"role": "developer", "content": "d"}, USER], thinking={"type": "enabled"}),
        400,
        "messages[1].role",
    ),
    (TEXT, {"model": "fake"}, 400, "prompt"),
    (TEXT, text(prompt=None), 400, "prompt"),
    (TEXT, text(prompt=""), 400, "prompt"),
    (TEXT, text(prompt=[]), 400, "prompt"),
    (TEXT, text(prompt=[[]]), 400, "prompt"),
    (TEXT, text(prompt=[[1], []]), 400, "prompt"),
    (TEXT, text(prompt=7), 400, "prompt"),
    (TEXT, text(prompt={"a": 1}), 400, "prompt"),
    (TEXT, text(prompt=[1, "a"]), 400, "prompt"),
    (TEXT, text(prompt=["a", 1]), 400, "prompt"),
    (TEXT, text(prompt=[1, 256]), 400, "prompt"),
    (TEXT, text(prompt=[-1]), 400, "prompt"),
    (TEXT, text(prompt=[[1], [300]]), 400, "prompt[1]"),
    (TEXT, text(prompt=[1.5]), 400, "prompt"),
    (TEXT, text(prompt=[10**30]), 400, "prompt"),
    (TEXT, text(prompt=[True]), 400, "prompt"),
    (TEXT, text(prompt=[1] * 4096), 400, "prompt"),
    (TEXT, text(prompt=["a"] * 129), 400, "prompt"),
    (TEXT, text(prompt=["a"] * 9, n=16), 400, "prompt"),
    (TEXT, text(max_tokens=0), 400, "max_tokens"),
    (TEXT, text(max_tokens=5000), 400, "max_tokens"),
    (TEXT, text(logprobs=21), 400, "logprobs"),
    (TEXT, text(logprobs=-1), 400, "logprobs"),
    (TEXT, text(logprobs=True), 400, "logprobs"),
    (TEXT, text(echo="no"), 400, "echo"),
    (TEXT, text(suffix="end"), 400, "suffix"),
    (TEXT, text(best_of=3), 400, "best_of"),
    ("/tokenize", {}, 400, "text"),
    ("/tokenize", {"text": "a", "messages": [USER]}, 400, "text"),
    ("/tokenize", {"text": 5}, 400, "text"),
    ("/tokenize", {"text": "a", "model": "other"}, 404, "model"),
]


async def test_every_wrong_field_is_refused_and_named(served):
    for path, body, status, field in BAD_FIELDS:
        response = await served.http.post(path, json=body)
        assert (response.status_code, error_of(response)["param"]) == (status, field), (body, response.text)
        if error_of(response)["code"] is None:  # the text alone must say where to look
            assert field.split("[")[0].split(".")[0] in error_of(response)["message"], response.text
    assert served.generator.seen == []
    assert served.generator.num_open == 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "other"}, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context_length_exceeded"),
        ({"max_tokens": 4096}, "context_length_exceeded"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter"),
    ],
)
async def test_the_failures_that_programs_ask_about_have_openai_codes(served, fields, code):
    response = await served.http.post(CHAT, json=chat(**fields))
    assert error_of(response)["code"] == code


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"hi"',
        b"{'model': 'fake'}",
        b'{"model":"fake",}',
        b'{"model":"fake"} trailing',
        b'{"messages":NaN}',
        b"\xff\xfe{}",
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"messages":[{"role":"user","content":' + b"[" * 100_000,
        b'{"messages":[{"role":"user","content":' + b'{"a":' * 100_000,
    ],
)
async def test_what_is_not_a_json_object_is_refused(served, body):
    for path in (CHAT, TEXT, "/tokenize"):
        response = await served.http.post(path, content=body)
        assert response.status_code == 400
        error_of(response)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"tools": None, "stop": None, "temperature": None, "stream": None, "logit_bias": None, "n": None},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "no_such_field": [1, {"x": None}]},
        {"model": None},
        {"stop": ["a"] * 16, "n": 16},
        {"best_of": 1, "modalities": ["text"], "min_tokens": 0},
        {"temperature": 0, "top_p": 1, "seed": 2**63 - 1},
        {"tool_choice": "auto", "top_logprobs": 0, "verbosity": "medium", "reasoning": {}, "echo": False},
        {"best_of": 3, "n": 3},
        {"enable_thinking": False, "skip_special_tokens": True, "add_special_tokens": False, "typical_p": 1},
        {"reasoning_effort": "minimal"},
        {"reasoning_effort": "medium"},
    ],
)
async def test_what_asks_for_nothing_special_is_served(served, fields):
    response = await served.http.post(CHAT, json=chat(**fields))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"messages":[' + b"{}," * 65_536 + b"{}]}", "over 65536 objects and lists"),
        (b'{"messages":[{"a":[' + b"[]," * 65_536 + b'"["]}]}', "over 65536 objects and lists"),
        (b'{"messages":[{"a":[' + b'"",' * 262_144 + b'""]}]}', "over 262144 strings"),
        (b'{"messages":[{' + b",".join(b'"%d":1' % n for n in range(262_144)) + b"}]}", "strings"),
    ],
)
async def test_a_body_of_too_many_values_is_refused_before_they_are_built(served, content, words):
    started = time.monotonic()
    response = await served.http.post(CHAT, content=content)
    assert time.monotonic() - started < 1.0
    assert response.status_code == 400
    assert words in error_of(response)["message"]


@pytest.mark.parametrize("text", ["if (a[0]) { b }\n", '\\"{[', '"}, {"', "\\\\{"])
async def test_braces_and_quotes_inside_a_text_are_no_values(served, text):
    content = text * 140_000
    response = await served.http.post("/tokenize", json={"text": content})
    assert response.status_code == 200, response.text
    assert response.json()["count"] == len(content)


async def test_the_collector_runs_again_after_every_body(served):
    for content in (b"{", b"{}", json.dumps(chat()).encode()):
        await served.http.post(CHAT, content=content)
        assert gc.isenabled()


async def test_of_a_repeated_field_the_last_counts_and_the_content_type_does_not_matter(served):
    body = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":9,"max_tokens":2}'
    response = await served.http.post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models/fake", 405),
        ("OPTIONS", TEXT, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/" + "x" * 3000, 404),
        ("GET", "/v1/%ff", 404),
        ("BREW", "/health", 400),
    ],
)
async def test_unknown_routes_and_methods_are_refused(served, method, path, status):
    response = await served.http.request(method, path)
    assert response.status_code == status
    if method != "HEAD":
        error_of(response)
    if status == 405:
        assert response.headers["allow"]


async def test_a_compressed_body_is_refused_as_such(served):
    response = await served.http.post(CHAT, content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 415


async def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not(serve):
    served = await serve(limits={"body_bytes_max": 2000})
    at_limit = json.dumps(chat()).encode().ljust(2000)
    assert (await served.http.post(CHAT, content=at_limit)).status_code == 200
    for content in (at_limit + b" ", b"x" * 3_000_000):
        response = await served.http.post(CHAT, content=content)
        assert response.status_code == 413
        assert "2000" in error_of(response)["message"]

    async def chunks():
        for _ in range(100):
            yield b"x" * 100

    assert (await served.http.post(CHAT, content=chunks())).status_code == 413


async def test_an_api_key_is_needed_where_keys_are_set(serve):
    served = await serve(api_keys=("alpha", "beta"))
    for headers in (
        {},
        {"authorization": "Bearer gamma"},
        {"authorization": "alpha"},
        {"authorization": "Bearer"},
    ):
        response = await served.http.post(CHAT, json=chat(), headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    for key in ("alpha", "beta"):
        response = await served.http.post(CHAT, json=chat(), headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200
    assert (await served.http.get("/v1/models")).status_code == 401
    assert (await served.http.get("/no/such")).status_code == 401
    assert [(await served.http.get(path)).status_code for path in ("/health", "/ready", "/metrics")] == [
        200
    ] * 3


async def test_a_request_counts_as_its_choices_and_one_that_never_fits_is_told_so(serve):
    served = await serve(num_choices_max=5)
    served.generator.step_seconds = 0.05
    running = asyncio.create_task(served.http.post(TEXT, json=text(prompt=["a", "b"], n=2, max_tokens=8)))
    while served.generator.num_open < 2:
        await asyncio.sleep(0.01)
    assert (await served.http.post(CHAT, json=chat(n=2))).status_code == 429
    assert (await served.http.post(CHAT, json=chat(n=1))).status_code == 200
    response = await served.http.post(CHAT, json=chat(n=6))
    assert (response.status_code, error_of(response)["param"]) == (400, "n")
    assert (await running).status_code == 200
    assert (await served.http.post(CHAT, json=chat(n=5))).status_code == 200


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, (False, None)),
        ({"thinking": {"type": "enabled"}}, (True, None)),
        ({"thinking": {"type": "disabled"}}, (False, None)),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, (False, "high")),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, (True, None)),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": True}}, (True, None)),
        ({"reasoning_effort": "minimal"}, (True, "low")),
        ({"reasoning_effort": "medium"}, (True, "low")),
        ({"reasoning_effort": "max"}, (True, "max")),
        ({"chat_template_kwargs": {"reasoning_effort": "high", "thinking": False}}, (False, "high")),
    ],
)
async def test_there_are_several_ways_to_ask_for_thinking(served, fields, asked):
    assert (await served.http.post(CHAT, json=chat(**fields))).status_code == 200
    assert (await served.http.post("/tokenize", json={"messages": [USER], **fields})).status_code == 200
    assert served.prompts.asked == [asked, asked]


async def test_beyond_the_bound_on_requests_a_client_is_told_to_come_back(serve):
    served = await serve(num_choices_max=2)
    served.generator.step_seconds = 0.05
    running = [asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=8))) for _ in range(2)]
    while served.generator.num_open < 2:
        await asyncio.sleep(0.01)
    response = await served.http.post(TEXT, json=text())
    assert response.status_code == 429
    assert error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    assert [(await task).status_code for task in running] == [200, 200]
    assert (await served.http.post(TEXT, json=text())).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [(Overloaded("full"), 503), (WorkerLost("gone"), 502), (StageTimedOut("prefill took too long"), 504)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status_even_of_a_stream(
    served, error, status, stream
):
    served.generator.fail_with = error
    response = await served.http.post(CHAT, json=chat(stream=stream))
    assert response.status_code == status
    assert error_of(response)["message"] == str(error)


async def test_a_failure_after_the_first_token_ends_the_stream_with_an_error_event(served):
    served.generator.fail_with, served.generator.fail_at = WorkerLost("gone"), 1
    response = await served.http.post(CHAT, json=chat(max_tokens=5, stream=True))
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert response.status_code == 200
    assert len(events) == 2
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "gone"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_our_own_is_a_500_that_is_counted_and_ends_nothing(served, stream, caplog):
    served.generator.fail_with = ValueError("a bug")
    response = await served.http.post(CHAT, json=chat(stream=stream))
    assert response.status_code == 500
    assert "a bug" not in response.text
    assert served.value("rorqual_router_internal_errors_total", route=CHAT) == 1
    served.generator.fail_with = None
    assert (await served.http.post(CHAT, json=chat())).status_code == 200


async def test_until_a_worker_is_connected_nothing_is_ready(served):
    served.generator.connected = False
    assert (await served.http.get("/health")).status_code == 200
    assert (await served.http.get("/ready")).status_code == 503
    assert (await served.http.get("/v1/models")).json()["data"] == []
    response = await served.http.post(CHAT, json=chat())
    assert response.status_code == 503
    assert response.headers["retry-after"]
    served.generator.connected = True
    assert (await served.http.get("/ready")).json() == {"status": "ready", "model": "fake"}


async def test_without_a_tokenizer_ids_work_and_text_is_refused_by_name(serve):
    served = await serve(prompts=PromptEncoder(tokenizer=None))
    refused = [
        (await served.http.post(CHAT, json=chat()), "messages"),
        (await served.http.post(TEXT, json=text()), "prompt"),
        (await served.http.post("/tokenize", json={"text": "hi"}), "text"),
    ]
    for response, field in refused:
        assert response.status_code == 400
        assert error_of(response)["param"] == field
        assert "tokenizer.json" in response.text
    body = text(prompt=[5, 6], logprobs=1, echo=True)
    choice = (await served.http.post(TEXT, json=body)).json()["choices"][0]
    assert choice["logprobs"]["tokens"][:2] == ["token_id:5", "token_id:6"]


async def test_tokenize_counts_text_and_messages(served):
    answer = (await served.http.post("/tokenize", json={"text": "hello"})).json()
    assert answer == {"tokens": list(b"hello"), "count": 5, "max_model_len": 4096}
    answer = (await served.http.post("/tokenize", json={"messages": [USER]})).json()
    assert answer["tokens"] == list(b"hi")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=6), values, max_size=4),
    max_leaves=8,
)
KNOWN = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
FIELDS = sorted((KNOWN - {*Unserved.__struct_fields__}) | {"tools", "text"})
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "reasoning_content"]), JSON_VALUES)
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]), "content": JSON_VALUES}
    ),
    max_size=3,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6).flatmap(
    lambda body: st.fixed_dictionaries(
        {}, optional={"messages": MESSAGES, "prompt": st.text(max_size=5)}
    ).map(lambda known: {**body, **known})
)


@pytest.mark.slow
async def test_no_json_body_makes_the_server_fail_or_end(served):
    served.generator.tokens_per_update = 5000
    answered: list[int] = []

    @settings(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(bodies=st.lists(st.tuples(st.sampled_from([CHAT, TEXT, "/tokenize"]), BODIES), max_size=2))
    async def send(bodies) -> None:
        for path, body in bodies:
            response = await served.http.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"))
            answered.append(response.status_code)
            assert response.status_code < 500, (path, body, response.text)
            if response.status_code >= 400:
                error_of(response)

    # Hypothesis drives synchronously: run it beside the loop that serves.
    loop = asyncio.get_running_loop()
    inner = send.hypothesis.inner_test
    send.hypothesis.inner_test = lambda bodies: asyncio.run_coroutine_threadsafe(inner(bodies), loop).result(
        10
    )
    await asyncio.to_thread(send)
    assert 200 in answered
    assert 400 in answered
    assert served.generator.num_open == 0


@pytest.mark.slow
async def test_no_bytes_on_the_socket_make_the_server_end(served):
    fragments = st.sampled_from(
        [
            *(
                b"GET ",
                b"POST ",
                b"/health",
                b" HTTP/1.1\r\n",
                b"host: a\r\n",
                b"\r\n",
                b"content-length: 5\r\n",
            ),
            *(
                b"transfer-encoding: chunked\r\n",
                b"5\r\n",
                b"0\r\n\r\n",
                b"\x00",
                b"{}",
                b"connection: upgrade\r\n",
            ),
            *(
                b"upgrade: websocket\r\n",
                b"expect: 100-continue\r\n",
                b"content-length: -1\r\n",
                b" HTTP/9.9\r\n",
            ),
        ]
    )

    async def send(pieces: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"".join(pieces))
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()

    loop = asyncio.get_running_loop()

    @settings(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(pieces=st.lists(fragments | st.binary(max_size=20), max_size=10))
    def drive(pieces: list[bytes]) -> None:
        asyncio.run_coroutine_threadsafe(send(pieces), loop).result(10)

    await asyncio.to_thread(drive)
    assert (await served.http.get("/health")).status_code == 200
