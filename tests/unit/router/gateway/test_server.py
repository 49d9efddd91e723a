"""The gateway's life around a generation: cancellation, metrics, stopping."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from rorqual.errors import Overloaded, WorkerLost

CHAT = "/v1/chat/completions"


def chat(**fields: object) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}], **fields}


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "waited in vain"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def open_request(served, path: str, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", served.port))
    sock.sendall(b"POST %b HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(data), data))
    return sock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "num_generations"),
    [
        (CHAT, chat(max_tokens=1000), 1),
        ("/v1/completions", {"prompt": "hi", "n": 3, "max_tokens": 1000}, 1),
        ("/v1/completions", {"prompt": ["hi", "you", "all"], "max_tokens": 1000}, 3),
    ],
)
async def test_a_client_that_goes_away_closes_its_generations_at_once(
    served, path, body, num_generations, stream
):
    served.generator.step_seconds = 0.01
    sock = open_request(served, path, {**body, "stream": stream})
    await until(lambda: served.generator.num_open == num_generations and served.generator.num_tokens > 5)
    sock.close()
    assert await until(lambda: served.generator.num_open == 0) < 1.0
    assert served.generator.num_closed_early == num_generations
    await until(lambda: served.value("rorqual_router_cancelled_requests_total", route=path) == 1)
    assert served.value("rorqual_router_in_flight_requests", route=path) == 0


async def test_a_client_that_goes_away_during_prefill_closes_its_generation(served):
    served.generator.step_seconds = 60
    sock = open_request(served, CHAT, chat(stream=True))
    await until(lambda: served.generator.num_open == 1)
    sock.close()
    assert await until(lambda: served.generator.num_open == 0) < 1.0


async def test_a_client_that_stops_reading_is_ended_and_the_others_are_not(serve):
    served = await serve(limits={"write_seconds_max": 0.3})
    served.generator.tokens_per_update = 4
    body = {
        "prompt": "hi",
        "n": 16,
        "max_tokens": 4000,
        "stream": True,
        "logprobs": 20,
        "return_token_ids": True,
    }
    sock = open_request(served, "/v1/completions", body)
    await until(lambda: served.generator.num_open == 1)
    while served.generator.num_open:
        response = await served.http.post(CHAT, json=chat(max_tokens=2))
        assert response.status_code == 200
    assert served.generator.num_closed_early == 1
    assert served.generator.num_tokens < 16 * 4000
    assert served.value("rorqual_router_cut_off_connections_total", reason="write_deadline") == 1
    sock.close()


async def test_one_request_that_outlives_its_deadline_is_ended_and_says_so(serve):
    served = await serve(request_seconds_max=0.2)
    served.generator.step_seconds = 0.05
    response = await served.http.post(CHAT, json=chat(max_tokens=1000))
    assert response.status_code == 504
    response = await served.http.post(CHAT, json=chat(max_tokens=1000, stream=True))
    assert "outlived" in response.text.split("\n\n")[-2]
    assert served.generator.num_open == 0


async def test_metrics_count_requests_tokens_and_latencies(served):
    await served.http.post(CHAT, json=chat(max_tokens=5))
    await served.http.post(CHAT, json=chat(max_tokens=5, stream=True, n=2))
    await served.http.post(CHAT, json=chat(temperature=9))
    await served.http.get("/no/such/" + "x" * 50)
    await until(lambda: served.value("rorqual_router_requests_total", route="unknown", status="404") == 1)
    exposed = (await served.http.get("/metrics")).text
    assert served.value("rorqual_router_requests_total", route=CHAT, status="200") == 2
    assert served.value("rorqual_router_requests_total", route=CHAT, status="400") == 1
    assert served.value("rorqual_router_prompt_tokens_total", route=CHAT) == 4
    assert served.value("rorqual_router_completion_tokens_total", route=CHAT) == 15
    assert served.value("rorqual_router_first_token_seconds_count", route=CHAT) == 2
    assert served.value("rorqual_router_inter_token_seconds_count", route=CHAT) == 12
    assert served.value("rorqual_router_in_flight_requests", route=CHAT) == 0
    assert 'rorqual_router_requests_total{route="unknown",status="404"} 1.0' in exposed
    assert "x" * 50 not in exposed


async def test_many_requests_at_once_get_each_their_own_answer(serve):
    from fake_generator import completion_text

    served = await serve(num_choices_max=200)
    served.generator.step_seconds = 0.001

    async def ask(number: int) -> None:
        prompt = [number % 250 + 3, number % 7 + 1]
        body = {"prompt": prompt, "max_tokens": 5 + number % 5, "stream": number % 2 == 0}
        response = await served.http.post("/v1/completions", json=body)
        if number % 2:
            text = response.json()["choices"][0]["text"]
        else:
            events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
            assert events[-2:] == ["[DONE]", ""]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2])
        assert text == completion_text(prompt, 5 + number % 5)

    await asyncio.gather(*(ask(number) for number in range(100)))
    assert served.generator.num_open == 0
    assert served.generator.num_closed_early == 0


async def test_tokens_that_are_ready_together_leave_in_one_chunk(served):
    served.generator.tokens_per_update = 2
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    body = json.dumps({"prompt": [[7], [8]], "max_tokens": 2, "stream": True}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    answer = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
    chunks = answer.split(b"\r\n\r\n", 1)[1].split(b"\r\n")
    assert chunks[1].count(b'"text"') == 2  # both prompts' first tokens
    writer.close()


async def test_stopping_lets_a_stream_finish_and_refuses_new_requests(served):
    served.generator.step_seconds = 0.02
    async with served.http.stream("POST", CHAT, json=chat(max_tokens=10, stream=True)) as response:
        stop = asyncio.create_task(served.gateway.stop())
        text = "".join([part async for part in response.aiter_text()])
        assert text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(stop, 5)
    with pytest.raises(httpx.ConnectError):
        await served.http.get("/health")


async def test_a_stream_that_stopping_cuts_short_ends_with_an_error_event(serve):
    served = await serve(drain_seconds_max=0.1)
    served.generator.step_seconds = 0.02
    whole = asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=1000)))
    async with served.http.stream("POST", CHAT, json=chat(max_tokens=1000, stream=True)) as response:
        await until(lambda: served.generator.num_open == 2)
        await asyncio.sleep(0.05)
        stop = asyncio.create_task(served.gateway.stop())
        text = "".join([part async for part in response.aiter_text()])
        await asyncio.wait_for(stop, 5)
    last = json.loads(text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))
    assert "stopping" in last["error"]["message"]
    assert (await whole).status_code == 503
    assert served.generator.num_open == 0
    assert served.value("rorqual_router_requests_total", route=CHAT, status="503") == 2
    assert served.value("rorqual_router_cancelled_requests_total", route=CHAT) == 0


async def test_a_stream_that_fails_half_way_counts_and_is_told_as_a_failure(served, caplog):
    served.generator.fail_with, served.generator.fail_at = WorkerLost("the worker is gone"), 2
    response = await served.http.post(CHAT, json=chat(max_tokens=5, stream=True))
    assert response.status_code == 200  # which it was when it began
    await until(lambda: served.value("rorqual_router_in_flight_requests", route=CHAT) == 0)
    assert served.value("rorqual_router_requests_total", route=CHAT, status="502") == 1
    assert served.value("rorqual_router_requests_total", route=CHAT, status="200") == 0
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert f"request={response.headers['x-request-id']}" in told[0]
    assert 'error="the worker is gone"' in told[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_told_with_the_id_its_client_got(served, caplog, stream):
    served.generator.fail_with = Overloaded("every worker is full")
    response = await served.http.post(CHAT, json=chat(stream=stream))
    assert response.status_code == 503
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert f"request={response.headers['x-request-id']} status=503" in told[0]


async def test_a_cancelled_stream_is_told_with_its_id_and_counts_as_cancelled(served, caplog):
    caplog.set_level("INFO")
    served.generator.step_seconds = 0.01
    async with served.http.stream("POST", CHAT, json=chat(max_tokens=1000, stream=True)) as response:
        request_id = response.headers["x-request-id"]
    counted = {"route": CHAT, "status": "cancelled"}
    await until(lambda: served.value("rorqual_router_requests_total", **counted) == 1)
    told = [record.getMessage() for record in caplog.records if "cancelled a request" in record.getMessage()]
    assert len(told) == 1
    assert f"request={request_id}" in told[0]


async def test_without_a_key_no_body_is_received(serve):
    served = await serve(api_keys=("alpha",))
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\ncontent-length: 15000000\r\n\r\n" % CHAT.encode())
        sock.sendall(b"x" * 200_000)
        sock.setblocking(False)
        answer = b""
        async with asyncio.timeout(5):
            while b"\r\n\r\n" not in answer:
                answer += await asyncio.get_running_loop().sock_recv(sock, 10_000)
        assert answer.startswith(b"HTTP/1.1 401")
        assert served.value("rorqual_router_in_flight_body_bytes") == 0


async def test_a_running_stream_does_not_hold_on_to_its_body(served):
    served.generator.step_seconds = 0.02
    body = {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 20, "stream": True}
    async with served.http.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        assert served.value("rorqual_router_in_flight_body_bytes") == 0


async def test_a_million_token_prompt_fits_through_the_default_limit(served):
    served.generator.connected = True
    ids = "[" + ", ".join(["129279"] * 1_048_576) + "]"
    response = await served.http.post("/v1/completions", content='{"prompt": ' + ids + "}")
    assert response.status_code == 400  # this vocabulary is smaller, which was found by reading it all
    assert "prompt[0] is 129279" in response.json()["error"]["message"]


async def test_the_real_encoder_serves_chats_and_names_bad_messages(serve, v4_tokenizer):
    from router.prompt import PromptEncoder

    served = await serve(prompts=PromptEncoder(tokenizer=v4_tokenizer))
    body = {"messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {"thinking": True}}
    answer = (await served.http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == [0, 128803, 33310, 128804, 128821]
    body["messages"].append({"role": "user", "content": [{"type": "image_url"}]})
    response = await served.http.post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages[1].content")


async def test_cached_tokens_are_those_that_no_choice_had_to_have_computed(serve):
    served = await serve()
    served.generator.cached_tokens = 3
    body = {"prompt": [[5, 6, 7, 8, 9], [5, 6, 7, 8]], "max_tokens": 2, "n": 2}
    answer = (await served.http.post("/v1/completions", json=body)).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    assert served.value("rorqual_router_cached_tokens_total", route="/v1/completions") == 6


async def test_clients_share_what_is_kept_by_their_keys_or_as_the_deployment_says(serve):
    async def salts(**settings) -> list[str]:
        served = await serve(**settings)
        for key in ("alpha", "alpha", "beta"):
            body = {"prompt": [5, 6], "max_tokens": 1}
            await served.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return [generation.cache_salt for generation in served.generator.seen]

    first, second, third = await salts(api_keys=("alpha", "beta"))
    assert first == second != third
    assert "alpha" not in first
    assert await salts(api_keys=("alpha", "beta"), shared_cache_salt="public") == ["public"] * 3
    assert await salts() == [""] * 3
