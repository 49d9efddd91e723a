"""What a worker tells sessions that observe it: every prompt and stream once, in bounded samples."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from fake_link import FakeLink
from fake_rank import FakeRank

from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.session import Session, SessionRefused
from engine.worker.usage import UsageLedger, UsageMeter
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason, Open, SequenceReport
from rorqual.usage import SAMPLES_MAX, PromptSample, StreamSample, Usage


def an_open(number: int, *, length: int = 5, max_tokens: int = 10) -> Open:
    return Open(
        sequence_id=SequenceId(number),
        request_id=f"r{number}",
        prompt=np.arange(length, dtype=np.int32) % 90,
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=number),
    )


def a_report(number: int, first: int, *, tokens: int, finish: FinishReason | None = None, cached: int = 0):
    return SequenceReport(
        sequence_id=SequenceId(number),
        first_index=first,
        token_ids=tuple(range(tokens)),
        finish_reason=finish,
        cached_tokens=cached,
    )


@asynccontextmanager
async def a_host() -> AsyncIterator[Host]:
    rank = FakeRank(num_pages=16, num_slots=4, prefill_tokens_max=512)
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(7),
        exact=False,
        prefill_tokens_max=512,
        heartbeat_seconds=0.05,
    )
    host = Host(link=FakeLink(rank), ready=rank.ready(), config=config, metrics=WorkerMetrics())
    serving = asyncio.create_task(host.run())
    try:
        async with asyncio.timeout(20):
            yield host
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def finish(session: Session, *numbers: int) -> None:
    left = set(numbers)
    while left:
        for item in (await session.next_report()).sequences:
            if item.finish_reason is not None:
                left.discard(item.sequence_id)


async def test_two_observers_both_hear_of_everything_once_and_routers_of_nothing() -> None:
    async with a_host() as host:
        router = host.connect("router")
        observers = [host.connect(name, observes=True) for name in ("a", "b")]
        router.submit(an_open(1, length=7, max_tokens=4))
        router.submit(an_open(2, length=9, max_tokens=1))
        await finish(router, 1, 2)
        assert (await router.next_report()).usage is None
        for observer in observers:
            report = await observer.next_report()
            assert report.sequences == ()
            usage = report.usage
            assert usage is not None
            assert (usage.num_prompts, usage.num_streams) == (2, 2)
            assert sorted((item.prompt_tokens, item.computed_tokens) for item in usage.prompts) == [
                (7, 7),
                (9, 9),
            ]
            assert sorted((item.context_tokens, item.generated_tokens) for item in usage.streams) == [
                (10, 1),
                (11, 4),
            ]
            assert {item.generated_tokens: item.itl_seconds is None for item in usage.streams} == {
                1: True,
                4: False,
            }
            assert (await observer.next_report()).usage == Usage()


async def test_an_observer_opens_nothing() -> None:
    async with a_host() as host:
        observer = host.connect("a", observes=True)
        with pytest.raises(SessionRefused, match="observes"):
            observer.submit(an_open(1))


async def test_steps_of_other_sessions_wake_no_observer() -> None:
    """It hears a worker as often as its heart beats, however fast the worker steps."""
    async with a_host() as host:
        router, observer = host.connect("router"), host.connect("a", observes=True)
        start = asyncio.get_running_loop().time()
        hearing = asyncio.create_task(observer.next_report())
        router.submit(an_open(1, max_tokens=30))
        await finish(router, 1)
        await hearing
        assert asyncio.get_running_loop().time() - start >= 0.045


async def test_an_observer_that_has_gone_is_kept_nothing_for() -> None:
    async with a_host() as host:
        observer = host.connect("a", observes=True)
        observer.close()
        assert host.usage.num_cursors == 0


def test_times_are_of_this_worker_and_tokens_of_all() -> None:
    ledger = UsageLedger()
    cursor, meter = ledger.follow(), UsageMeter(ledger)
    meter.opened(an_open(1, length=100), now=10.0)
    meter.saw([a_report(1, 0, tokens=1, cached=64)], now=10.5)
    meter.saw([a_report(1, 1, tokens=3)], now=11.0)
    meter.saw([a_report(1, 4, tokens=1, finish=FinishReason.STOP)], now=12.5)
    # Its first token came from another worker: no prompt of this one.
    meter.opened(an_open(2, length=50), now=10.0)
    meter.saw([a_report(2, 1, tokens=1)], now=11.0)
    meter.saw([a_report(2, 2, tokens=2, finish=FinishReason.LENGTH)], now=12.0)
    assert cursor.take() == Usage(
        num_prompts=1,
        prompts=(PromptSample(prompt_tokens=100, computed_tokens=36, ttft_seconds=0.5),),
        num_streams=2,
        streams=(
            StreamSample(context_tokens=105, generated_tokens=5, itl_seconds=0.5),
            StreamSample(context_tokens=54, generated_tokens=4, itl_seconds=0.5),
        ),
    )


def test_what_was_handed_over_or_never_began_is_no_stream() -> None:
    ledger = UsageLedger()
    cursor, meter = ledger.follow(), UsageMeter(ledger)
    for number in (1, 2):
        meter.opened(an_open(number), now=0.0)
    meter.saw([a_report(1, 0, tokens=1)], now=1.0)
    meter.saw([a_report(1, 0, tokens=0, finish=FinishReason.HANDED_OVER)], now=2.0)
    meter.saw([a_report(2, 0, tokens=0, finish=FinishReason.CANCELLED)], now=2.0)
    usage = cursor.take()
    assert (usage.num_prompts, usage.num_streams) == (1, 0)


def test_too_many_samples_leave_a_fair_part_and_the_whole_count() -> None:
    ledger = UsageLedger(randomness=random.Random(3))
    cursor = ledger.follow()
    for number in range(20 * SAMPLES_MAX):
        ledger.note_prompt(PromptSample(prompt_tokens=number, computed_tokens=0, ttft_seconds=0.0))
    usage = cursor.take()
    assert (usage.num_prompts, len(usage.prompts)) == (20 * SAMPLES_MAX, SAMPLES_MAX)
    mean = sum(item.prompt_tokens for item in usage.prompts) / SAMPLES_MAX
    # Uniform over 0..5119: the mean of 256 has a standard deviation of 92.
    assert abs(mean - 10 * SAMPLES_MAX) < 400
