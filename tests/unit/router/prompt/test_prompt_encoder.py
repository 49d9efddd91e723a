from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from rorqual.errors import ConfigError, InvalidRequest, Overloaded, StageTimedOut
from router.prompt import PromptConfig, PromptEncoder
from router.prompt.pool import EncodePool, PoolConfig
from router.prompt.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def encoder(v4_tokenizer: Tokenizer) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(tokenizer=v4_tokenizer, config=PromptConfig(inline_chars_max=64))
    yield encoder
    encoder.close()


@pytest.fixture
def textless(tmp_path: Path) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder.from_model_dir(tmp_path)
    yield encoder
    encoder.close()


def test_chat_gives_ids_text_and_whether_it_reasons(encoder: PromptEncoder) -> None:
    chat = encoder.encode_chat(HELLO)
    assert chat.ids.tolist() == [0, 128803, 33310, 128804, 128822]
    assert chat.ids.dtype == np.int32
    assert chat.text.endswith("hello<｜Assistant｜></think>")
    assert not chat.starts_in_reasoning
    thinking = encoder.encode_chat(HELLO, thinking=True)
    assert thinking.ids.tolist()[-1] == 128821
    assert thinking.starts_in_reasoning


def test_text_is_encoded_as_it_stands(encoder: PromptEncoder) -> None:
    assert encoder.encode_text("hello").tolist() == [33310]
    assert encoder.decode(np.array([0, 33310], dtype=np.int32)) == "<｜begin▁of▁sentence｜>hello"


async def test_a_long_prompt_is_the_same_from_a_thread(encoder: PromptEncoder) -> None:
    messages = [{"role": "user", "content": f"word {number} " * 50} for number in range(20)]
    assert (await encoder.aencode_chat(messages)).ids.tolist() == encoder.encode_chat(messages).ids.tolist()
    text = "some other words " * 50
    assert (await encoder.aencode_text(text)).tolist() == encoder.encode_text(text).tolist()
    many = [{"role": "user", "content": "x"}] * 2000
    assert (await encoder.aencode_chat(many)).text == encoder.encode_chat(many).text
    assert encoder.stats().pool.num_jobs == 0


async def test_bad_messages_are_refused_from_a_thread_too(encoder: PromptEncoder) -> None:
    messages = [*HELLO * 2000, {"role": "robot"}]
    with pytest.raises(InvalidRequest) as caught:
        await encoder.aencode_chat(messages)
    assert caught.value.field == "messages[2000].role"
    assert encoder.stats().pool.num_jobs == 0


async def test_the_event_loop_goes_on_while_a_long_prompt_is_encoded(encoder: PromptEncoder) -> None:
    text = " ".join(f"word{number}" for number in range(30_000))
    work = asyncio.create_task(encoder.aencode_text(text))
    num_turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert len(await work) > 30_000
    assert num_turns > 5


async def test_without_a_tokenizer_text_is_refused_and_tokens_have_names(textless: PromptEncoder) -> None:
    with pytest.raises(InvalidRequest, match=r"no tokenizer\.json.*token ids") as caught:
        textless.encode_text("hello")
    assert (caught.value.field, caught.value.status) == ("prompt", 400)
    with pytest.raises(InvalidRequest) as caught:
        await textless.aencode_chat(HELLO)
    assert caught.value.field == "messages"
    assert textless.token_text(17) == "token_id:17"
    assert textless.token_bytes(17) is None
    assert textless.decode(np.array([1, 2], dtype=np.int32)) == ""
    assert textless.stats().memo.bytes_held == 0


def test_a_model_directory_brings_tokenizer_and_texts(
    byte_level: Callable[..., tokenizers.Tokenizer], tmp_path: Path
) -> None:
    byte_level("<｜User｜>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "prompt.json").write_text(json.dumps({"REASONING_EFFORT_MAX": "Think.\n"}))
    encoder = PromptEncoder.from_model_dir(tmp_path)
    prompt = encoder.encode_chat(HELLO, thinking=True, reasoning_effort="max")
    assert prompt.text == "<｜begin▁of▁sentence｜>Think.\n<｜User｜>hello<｜Assistant｜><think>"
    assert prompt.ids.tolist().count(256) == 1
    assert encoder.token_text(256) == "<｜User｜>"
    assert encoder.decode(prompt.ids) == prompt.text
    encoder.close()


def test_a_broken_tokenizer_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        PromptEncoder.from_model_dir(tmp_path)


class Gate:
    """Work that takes until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.num_runs = 0

    def __call__(self) -> int:
        self.num_runs += 1
        assert self.open.wait(10)
        return self.num_runs


async def until(condition: object) -> None:
    assert callable(condition)
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("never came true")


async def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    pool = EncodePool(PoolConfig(num_threads=1, jobs_max=2, chars_max=100))
    gate = Gate()
    first = asyncio.create_task(pool.run(gate, num_chars=1000))  # alone, any size may go in
    await until(lambda: gate.num_runs == 1)
    with pytest.raises(Overloaded, match="1 prompts are already waiting"):
        await pool.run(gate, num_chars=1)
    gate.open.set()
    assert await first == 1
    await until(lambda: pool.stats().num_jobs == 0)
    assert await pool.run(gate, num_chars=60) == 2
    gate.open.clear()
    both = [asyncio.create_task(pool.run(gate, num_chars=0)) for _ in range(2)]
    await until(lambda: gate.num_runs == 3)
    with pytest.raises(Overloaded, match="2 prompts"):
        await pool.run(gate, num_chars=0)
    gate.open.set()
    await asyncio.gather(*both)
    await until(lambda: pool.stats().num_jobs == 0)
    assert (pool.stats().chars_inflight, pool.stats().num_refused) == (0, 2)
    pool.close()
    with pytest.raises(Overloaded, match="shutting down"):
        await pool.run(gate, num_chars=0)
    assert pool.stats().num_jobs == 0


async def test_work_given_up_before_it_began_is_not_done() -> None:
    pool = EncodePool(PoolConfig(num_threads=1))
    gate, later = Gate(), Gate()
    first = asyncio.create_task(pool.run(gate, num_chars=1))
    await until(lambda: gate.num_runs == 1)
    second = asyncio.create_task(pool.run(later, num_chars=1))
    await until(lambda: pool.stats().num_jobs == 2)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert pool.stats().num_jobs == 1
    gate.open.set()
    await first
    pool.close()
    assert later.num_runs == 0
    assert pool.stats().num_jobs == 0


async def test_closing_gives_up_what_has_not_begun() -> None:
    pool = EncodePool(PoolConfig(num_threads=1))
    gate, later = Gate(), Gate()
    first = asyncio.create_task(pool.run(gate, num_chars=1))
    await until(lambda: gate.num_runs == 1)
    second = asyncio.create_task(pool.run(later, num_chars=1))
    await until(lambda: pool.stats().num_jobs == 2)
    closing = asyncio.create_task(asyncio.to_thread(pool.close))
    await until(lambda: pool.stats().num_jobs == 1)
    gate.open.set()
    await closing
    assert await first == 1
    with pytest.raises(Overloaded, match="shutting down"):
        await second
    assert later.num_runs == 0


async def test_waiting_ends_at_the_deadline() -> None:
    pool = EncodePool(PoolConfig(num_threads=1, seconds_max=0.05))
    gate = Gate()
    started = time.monotonic()
    with pytest.raises(StageTimedOut, match=r"encoding the prompt took longer than 0\.05 s"):
        await pool.run(gate, num_chars=1)
    assert time.monotonic() - started < 2
    assert pool.stats().num_jobs == 1  # the thread is still at it, and counted
    gate.open.set()
    pool.close()
    assert pool.stats().num_jobs == 0


async def test_a_text_that_its_length_rules_out_is_refused_without_encoding(v4_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer=v4_tokenizer)
    before = encoder.stats()
    text = "never seen before " * 200_000
    with pytest.raises(InvalidRequest, match="at the very least") as caught:
        await encoder.aencode_text(text, field="prompt", num_tokens_max=100)
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(InvalidRequest) as caught:
        await encoder.aencode_chat([{"role": "user", "content": text}], num_tokens_max=100)
    assert caught.value.field == "messages"
    assert encoder.stats() == before
    assert len(await encoder.aencode_text("short", num_tokens_max=100)) == 1
    encoder.close()


async def test_the_loop_goes_on_while_the_last_prompt_is_encoded() -> None:
    pool = EncodePool(PoolConfig(num_threads=1))
    gate = Gate()
    work = asyncio.create_task(pool.run(gate, num_chars=1))
    await until(lambda: gate.num_runs == 1)
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0.05)
    assert not closing.done()
    gate.open.set()
    await closing
    assert await work == 1
