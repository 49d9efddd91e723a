"""The worker as a process: ready, drained, failing and dying, with nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_state import VOCAB_SIZE, answer
from prometheus_client import CollectorRegistry

from rorqual.errors import RorqualError, WorkerLost
from rorqual.ids import RequestId
from rorqual.sampling import SamplingParams
from router.dispatch import DispatchConfig, Dispatcher
from router.fleet import Fleet, FleetConfig
from router.fleet_metrics import FleetMetrics
from router.generation import Generation
from router.placement import LeastPredictedWait
from router.session_client import GrpcTransport
from router.text import ChoiceText, StopStrings


@asynccontextmanager
async def a_dispatcher(*addresses: str) -> AsyncIterator[tuple[Dispatcher, Fleet]]:
    metrics = FleetMetrics(CollectorRegistry())
    fleet = Fleet(
        addresses=addresses,
        transport=GrpcTransport(silence_seconds_max=20.0),
        config=FleetConfig(),
        metrics=metrics,
        router_id="test",
        randomness=random.Random(1),
    )
    dispatcher = Dispatcher(
        fleet=fleet,
        placement=LeastPredictedWait(),
        make_texts=lambda generation: [
            ChoiceText(tokenizer=None, stops=StopStrings()) for _ in range(generation.num_choices)
        ],
        config=DispatchConfig(served_name="fake", created=1),
        metrics=metrics,
    )
    running = asyncio.create_task(fleet.run())
    try:
        await until(lambda: len(fleet.welcomes()) == len(addresses))
        yield dispatcher, fleet
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for yet does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"


def a_generation(number: int, *, length: int = 5, max_tokens: int = 20, num_choices: int = 1) -> Generation:
    return Generation(
        request_id=RequestId(f"r{number}"),
        prompt=np.arange(number, number + length, dtype=np.int32) % VOCAB_SIZE,
        max_tokens=max_tokens,
        num_choices=num_choices,
        sampling=SamplingParams(seed=number),
        ignore_eos=True,
    )


def the_answer(generation: Generation, choice: int = 0) -> list[int]:
    sampling = SamplingParams(seed=generation.sampling.seed, choice=choice)
    return answer(generation.prompt.tolist(), generation.max_tokens, sampling, ignore_eos=True)


async def collect(
    dispatcher: Dispatcher, generation: Generation, *, leave_after: int | None = None
) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in range(generation.num_choices)]
    async with aclosing(dispatcher.generate(generation)) as updates:
        async for update in updates:
            got[update.choice] += [token.token_id for token in update.tokens]
            if leave_after is not None and len(got[0]) >= leave_after:
                break
    return got


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@pytest.mark.slow
async def test_two_hundred_requests_with_random_cancellations_leave_every_count_at_zero(
    start_worker: Any,
) -> None:
    rng = random.Random(11)
    ready = await (await start_worker("--pages", "6", "--slots", "8")).ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, fleet):

        async def one(number: int) -> bool:
            generation = a_generation(
                number,
                length=rng.randint(1, 500),
                max_tokens=rng.randint(1, 300),
                num_choices=rng.choice([1, 1, 2]),
            )
            leave_after = rng.randint(0, 30) if rng.random() < 0.3 else None
            await asyncio.sleep(rng.random() * 0.3)
            got = await collect(dispatcher, generation, leave_after=leave_after)
            for choice, tokens in enumerate(got):
                expected = the_answer(generation, choice)
                assert tokens == (expected if leave_after is None else expected[: len(tokens)])
            return leave_after is None

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(number)) for number in range(200)]
        assert 100 < sum(task.result() for task in running) < 200
        for _ in range(100):
            metrics = await asyncio.to_thread(scrape, ready["metrics"])
            if (
                metrics["rorqual_worker_sequences_running"]
                == metrics["rorqual_worker_sequences_waiting"]
                == 0
            ):
                break
            await asyncio.sleep(0.02)
        for kind in ("pages", "slots"):
            assert metrics[f"rorqual_worker_{kind}_free"] == metrics[f"rorqual_worker_{kind}_total"]
        assert metrics["rorqual_worker_tokens_waiting"] == 0
        assert metrics["rorqual_worker_preemptions"] > 0
        opened = metrics["rorqual_worker_sequences_opened_total"]
        ended = sum(
            value
            for name, value in metrics.items()
            if name.startswith("rorqual_worker_sequences_ended_total")
        )
        assert opened == ended
        (view,) = fleet.view()
        assert (view.sequences_outstanding, view.tokens_outstanding) == (0, 0)


async def test_a_drained_worker_finishes_what_runs_and_exits_with_zero(start_worker: Any) -> None:
    worker = await start_worker(fake=("--step-ms", "2"))
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, fleet):
        asking = asyncio.create_task(collect(dispatcher, a_generation(1, max_tokens=200)))
        await until(lambda: fleet.view()[0].load.sequences_running == 1)
        worker.signal(signal.SIGTERM)
        await until(lambda: fleet.view()[0].draining)
        assert not asking.done()
        assert await asking == [the_answer(a_generation(1, max_tokens=200))]
        status, output = await worker.ended()
    assert status == 0, output
    assert "Traceback" not in output
    assert not any(is_alive(pid) for pid in ready["processes"])
    assert not worker.ready_file.exists()


async def test_the_start_says_what_was_chosen_and_what_the_model_lacks_in_a_line_each(
    start_worker: Any,
) -> None:
    worker = await start_worker()
    await worker.ready()
    worker.signal(signal.SIGTERM)
    _, output = await worker.ended()
    lines = output.splitlines()
    assert [line.split("chose kernels ")[1] for line in lines if "kernel" in line] == [
        "attention=fake argmax=torch"
    ]
    assert sum("no MTP weights: served without drafts" in line for line in lines) == 1


async def test_a_worker_that_drafts_says_so_and_answers_the_same(start_worker: Any) -> None:
    worker = await start_worker("--drafts", "auto")
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, _):
        generation = a_generation(1, length=300, max_tokens=400, num_choices=2)
        got = await collect(dispatcher, generation)
        metrics = await asyncio.to_thread(scrape, ready["metrics"])
        worker.signal(signal.SIGTERM)
        _, output = await worker.ended()
    assert got == [the_answer(generation, choice) for choice in range(2)]
    assert (
        0 < metrics["rorqual_worker_drafts_accepted_total"] < metrics["rorqual_worker_drafts_proposed_total"]
    )
    assert "mtp=True drafts_max=4" in output


async def test_drafts_that_the_checkpoint_cannot_give_are_one_clear_line(start_worker: Any) -> None:
    worker = await start_worker("--drafts", "2", fake=("--no-mtp",))
    status, output = await worker.ended()
    assert status == 1
    assert "rorqual: --drafts 2: " in output.splitlines()[-1]
    assert "has no MTP block" in output.splitlines()[-1]
    assert "Traceback" not in output


async def test_drafting_where_it_can_is_serving_without_where_it_cannot(start_worker: Any) -> None:
    worker = await start_worker("--drafts", "auto", fake=("--no-mtp",))
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, _):
        assert await collect(dispatcher, a_generation(1)) == [the_answer(a_generation(1))]
        worker.signal(signal.SIGTERM)
        status, output = await worker.ended()
    assert status == 0
    assert sum("serves without drafts" in line for line in output.splitlines()) == 1


async def test_a_second_signal_cuts_the_drain_short(start_worker: Any) -> None:
    worker = await start_worker(fake=("--step-ms", "20"))
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, fleet):
        asking = asyncio.create_task(collect(dispatcher, a_generation(1, max_tokens=2000)))
        await until(lambda: fleet.view()[0].load.sequences_running == 1)
        worker.signal(signal.SIGINT)
        await until(lambda: fleet.view()[0].draining)
        worker.signal(signal.SIGINT)
        with pytest.raises(RorqualError):
            await asking
        status, output = await worker.ended()
    assert status == 0, output


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        ("at-step", "rorqual: the rank failed: out of memory"),
        ("exit-at-step", "ended: exit status 3"),
        ("hang-at-step", "rorqual: the rank did not answer a step within 0.3 s"),
    ],
)
async def test_a_lost_rank_fails_its_sequences_and_the_worker_with_one_clear_line(
    start_worker: Any, fail: str, text: str
) -> None:
    worker = await start_worker(fail=fail, fake=("--step-seconds-max", "0.3"))
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, _):
        # With nowhere else to go the first failure is what is told.
        generating = asyncio.create_task(collect(dispatcher, a_generation(1)))
        status, output = await worker.ended()
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)
    assert status == 1
    assert text in output.splitlines()[-1]
    assert "Traceback" not in output
    assert not any(is_alive(pid) for pid in ready["processes"])


async def test_the_rank_dies_with_a_host_that_is_killed(start_worker: Any) -> None:
    worker = await start_worker(fail="hang-at-step")
    ready = await worker.ready()
    async with a_dispatcher(ready["address"]) as (dispatcher, fleet):
        generating = asyncio.create_task(collect(dispatcher, a_generation(1)))
        await until(lambda: fleet.view()[0].sequences_outstanding == 1)
        os.kill(ready["processes"][0], signal.SIGKILL)
        await until(lambda: not any(is_alive(pid) for pid in ready["processes"]))
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)


async def test_a_rank_that_will_not_stop_is_killed(start_worker: Any) -> None:
    worker = await start_worker(fail="ignore-shutdown")
    ready = await worker.ready()
    worker.signal(signal.SIGTERM)
    status, _ = await worker.ended()
    assert status == 0
    assert not any(is_alive(pid) for pid in ready["processes"])


async def test_what_cannot_be_loaded_is_one_clear_line_and_no_process(start_worker: Any) -> None:
    worker = await start_worker(fail="at-load")
    status, output = await worker.ended()
    assert status == 1
    assert output.splitlines()[-1].endswith("config.json: no such file")
    assert "Traceback" not in output


async def test_a_port_in_use_is_one_clear_line(start_worker: Any) -> None:
    first = await start_worker()
    ready = await first.ready()
    for option, address in (
        ("--listen", ready["address"]),
        ("--metrics-port", ready["metrics"].split(":")[2].split("/")[0]),
    ):
        status, output = await (await start_worker(option, address)).ended()
        assert status == 1
        assert f"rorqual: {option}: cannot listen on" in output.splitlines()[-1]
        assert "Traceback" not in output


async def test_a_worker_that_is_gone_loses_its_streams_with_worker_lost(start_worker: Any) -> None:
    worker = await start_worker(fake=("--step-ms", "5"))
    ready = await worker.ready()
    async with (
        a_dispatcher(ready["address"]) as (dispatcher, _),
        aclosing(dispatcher.generate(a_generation(1, max_tokens=2000))) as updates,
    ):
        await anext(updates)
        os.kill(ready["processes"][0], signal.SIGKILL)
        with pytest.raises(WorkerLost, match="was lost"):
            async for _ in updates:
                pass
