"""The host with sessions and a rank in the same process: who hears what, and that everything comes back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from fake_link import FakeLink
from fake_rank import FakeRank
from fake_state import answer, logprob_of

from engine.plan import RankProgress
from engine.worker.host import Host, HostConfig, scheduler_config
from engine.worker.metrics import WorkerMetrics
from engine.worker.rank_link import RankLost
from engine.worker.session import Session, SessionRefused
from rorqual.errors import RorqualError
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import Cancel, ErrorCode, FinishReason, Open, Role, SequenceReport


class Worker:
    def __init__(self, host: Host, link: FakeLink) -> None:
        self.host = host
        self.link = link
        self.serving: asyncio.Task[None] = asyncio.create_task(host.run())


@asynccontextmanager
async def a_worker(*, num_pages: int = 16, num_slots: int = 4, **options: Any) -> AsyncIterator[Worker]:
    rank = FakeRank(
        num_pages=num_pages,
        num_slots=num_slots,
        prefill_tokens_max=512,
        drafts_max=4 if options.get("drafts") else 0,
    )
    link = FakeLink(rank)
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(7),
        exact=False,
        prefill_tokens_max=512,
        **options,
    )
    worker = Worker(Host(link=link, ready=rank.ready(), config=config, metrics=WorkerMetrics()), link)
    try:
        async with asyncio.timeout(20):
            yield worker
    finally:
        worker.serving.cancel()
        await asyncio.gather(worker.serving, return_exceptions=True)


def an_open(number: int, *, length: int = 5, max_tokens: int = 10, **sampling: int) -> Open:
    return Open(
        sequence_id=SequenceId(number),
        request_id=f"r{number}",
        prompt=np.arange(length, dtype=np.int32) % 90,
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=number, **sampling),
    )


def the_answer(command: Open) -> list[int]:
    return answer(command.prompt.tolist(), command.max_tokens, command.sampling, ignore_eos=True)


async def collect(session: Session, *numbers: int) -> dict[int, list[SequenceReport]]:
    """Reports until each of these sequences has ended."""
    reports: dict[int, list[SequenceReport]] = {number: [] for number in numbers}
    while not all(items and items[-1].finish_reason for items in reports.values()):
        for item in (await session.next_report()).sequences:
            reports[item.sequence_id].append(item)
    return reports


def tokens(reports: list[SequenceReport]) -> list[int]:
    return [token for report in reports for token in report.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_a_session_hears_of_its_own_sequences_only_and_in_order() -> None:
    async with a_worker() as worker:
        one, two = worker.host.connect("one"), worker.host.connect("two")
        for session, numbers in ((one, (1, 2)), (two, (2, 3))):
            for number in numbers:
                session.submit(an_open(number, length=number * 10))
        for session, numbers in ((one, (1, 2)), (two, (2, 3))):
            reports = await collect(session, *numbers)
            for number in numbers:
                assert tokens(reports[number]) == the_answer(an_open(number, length=number * 10))
                assert [report.first_index for report in reports[number]] == list(range(10))
                assert reports[number][-1].finish_reason is FinishReason.LENGTH
        await until(lambda: worker.host.is_idle)


async def test_two_plans_are_in_flight_at_most() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        for number in range(1, 6):
            session.submit(an_open(number, max_tokens=50))
        await collect(session, *range(1, 6))
        assert worker.link.num_inflight_max in (1, 2)


async def test_steps_that_a_router_has_not_read_leave_together_in_order() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        session.submit(an_open(1))
        await until(lambda: worker.host.is_idle)
        report = await session.next_report()
        assert report.number == 1
        assert tokens(list(report.sequences)) == the_answer(an_open(1))


async def test_logprobs_and_prompt_logprobs_are_reported_when_asked_for() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        command = an_open(1, logprobs=2, prompt_logprobs=0)
        session.submit(command)
        reports = (await collect(session, 1))[1]
        scores, first = reports[:2]
        assert (scores.token_ids, scores.finish_reason) == ((), None)
        assert scores.prompt_logprobs is not None
        assert len(scores.prompt_logprobs.logprobs) == 4
        assert first.logprobs == (logprob_of(first.token_ids[0], 5),)
        assert first.alternatives[0].token_ids == (0, 1)


async def test_scores_of_a_long_prompt_come_in_parts_as_it_is_computed() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        session.submit(an_open(1, length=1500, max_tokens=1, prompt_logprobs=3))
        *parts, last = (await collect(session, 1))[1]
        scores = [part.prompt_logprobs for part in parts]
        assert [item.first for item in scores] == [1, 513, 1025]
        assert [len(item.logprobs) for item in scores] == [512, 512, 475]
        assert last.token_ids


async def test_what_would_make_a_large_message_leaves_in_several_without_waiting() -> None:
    async with a_worker(message_values_max=50, heartbeat_seconds=60) as worker:
        session = worker.host.connect("r")
        commands = [an_open(number, max_tokens=30, logprobs=2) for number in (1, 2)]
        for command in commands:
            session.submit(command)
        await until(lambda: worker.host.is_idle)
        messages = [await session.next_report() for _ in range(4)]
        assert [message.number for message in messages] == [1, 2, 3, 4]
        # 3 values a report: a token and two alternatives.
        assert [len(message.sequences) for message in messages] == [16, 16, 16, 12]
        reports = [item for message in messages for item in message.sequences]
        for command in commands:
            own = [item for item in reports if item.sequence_id == command.sequence_id]
            assert tokens(own) == the_answer(command)


async def test_a_router_that_leaves_too_many_values_unread_is_cut_off() -> None:
    async with a_worker(session_values_max=100, num_pages=64) as worker:
        session = worker.host.connect("slow")
        session.submit(an_open(1, max_tokens=300, logprobs=20))
        await until(lambda: session.closed.is_set())
        assert "with 105 values" in session.closed_because
        await until(lambda: worker.host.is_idle)


async def test_a_cancel_is_answered_once_and_frees_everything() -> None:
    async with a_worker(num_pages=64) as worker:
        session = worker.host.connect("r")
        session.submit(an_open(1, max_tokens=3000))
        await session.next_report()
        session.submit(Cancel(sequence_id=SequenceId(1)))
        session.submit(Cancel(sequence_id=SequenceId(1)))
        reports = (await collect(session, 1))[1]
        assert reports[-1].finish_reason is FinishReason.CANCELLED
        await until(lambda: worker.host.is_idle)
        assert worker.link.rank.slots == {}
        assert worker.host.load().pages_free == 64


async def test_a_session_that_ends_cancels_its_sequences_and_no_others() -> None:
    async with a_worker(num_pages=64) as worker:
        leaving, staying = worker.host.connect("leaving"), worker.host.connect("staying")
        for number in (1, 2, 3, 4, 5):
            leaving.submit(an_open(number, max_tokens=3000))
        staying.submit(an_open(1, max_tokens=40))
        await leaving.next_report()
        leaving.close()
        leaving.close()
        assert tokens((await collect(staying, 1))[1]) == the_answer(an_open(1, max_tokens=40))
        await until(lambda: worker.host.is_idle)
        assert worker.host.load().slots_free == 4
        assert worker.link.rank.num_tokens_computed < 1000


async def test_what_is_submitted_after_the_end_of_a_session_is_not_opened() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        session.close()
        session.submit(an_open(1))
        await until(lambda: worker.host.is_idle)
        assert worker.link.rank.num_steps == 0


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (an_open(1, length=5000), ErrorCode.INVALID, "exceed"),
        (an_open(1, max_tokens=0), ErrorCode.INVALID, "max_tokens"),
        (an_open(1, top_k=-1), ErrorCode.INVALID, "top_k"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_and_the_session_goes_on(
    command: Open, code: ErrorCode, text: str
) -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        session.submit(command)
        (report,) = (await session.next_report()).sequences
        assert report.finish_reason is FinishReason.ERROR
        assert report.error_code is code
        assert text in report.error
        session.submit(an_open(1))
        assert tokens((await collect(session, 1))[1]) == the_answer(an_open(1))


async def test_a_full_queue_and_a_draining_worker_say_overloaded() -> None:
    async with a_worker(sequences_waiting_max=1, num_slots=1) as worker:
        worker.link.gate.clear()
        session = worker.host.connect("r")
        session.submit(an_open(1))
        await until(lambda: worker.host.load().sequences_running == 1)
        for number in (2, 3):
            session.submit(an_open(number))
        (report,) = (await session.next_report()).sequences
        assert (report.sequence_id, report.error_code) == (3, ErrorCode.OVERLOADED)
        draining = asyncio.create_task(worker.host.drain(seconds_max=10))
        assert (await session.next_report()).draining
        session.submit(an_open(4))
        (report,) = (await session.next_report()).sequences
        assert (report.sequence_id, report.error_code) == (4, ErrorCode.OVERLOADED)
        worker.link.gate.set()
        reports = await collect(session, 1, 2)
        assert tokens(reports[2]) == the_answer(an_open(2))
        assert await draining


async def test_a_drain_that_outlives_its_deadline_ends_the_rest_with_an_error() -> None:
    async with a_worker() as worker:
        worker.link.gate.clear()
        session = worker.host.connect("r")
        session.submit(an_open(1))
        await until(lambda: worker.host.load().sequences_running == 1)
        assert not await worker.host.drain(seconds_max=0.01)
        report = (await collect(session, 1))[1][-1]
        assert (report.error, report.error_code) == ("the worker is shutting down", ErrorCode.FAILED)
        worker.link.gate.set()
        await until(lambda: worker.host.is_idle)
        assert worker.host.load().pages_free == 16


@pytest.mark.parametrize("end", ["failed", "vanished", "nonsense"])
async def test_a_lost_rank_gives_every_sequence_an_error_and_ends_the_host(end: str) -> None:
    async with a_worker() as worker:
        worker.link.gate.clear()
        sessions = [worker.host.connect("a"), worker.host.connect("b")]
        for session in sessions:
            session.submit(an_open(1))
        await until(lambda: worker.host.load().sequences_running == 2)
        if end == "failed":
            worker.link.fail("out of memory")
        elif end == "vanished":
            worker.link.vanish()
        else:
            worker.link.failure = RankProgress(stage="weights", done=1, total=2, unit="GB")
        worker.link.gate.set()
        for session in sessions:
            report = (await collect(session, 1))[1][-1]
            assert report.error_code is ErrorCode.FAILED
            assert report.error.startswith("the worker failed: the rank")
        with pytest.raises(RankLost):
            await worker.serving


async def test_a_rank_that_hangs_is_lost_at_the_step_deadline_but_an_idle_one_is_not() -> None:
    async with a_worker(step_seconds_max=0.05) as worker:
        session = worker.host.connect("r")
        session.submit(an_open(1))
        await collect(session, 1)
        await asyncio.sleep(0.15)
        assert not worker.serving.done()
        worker.link.gate.clear()
        session.submit(an_open(2))
        with pytest.raises(RankLost, match="did not answer a step within"):
            await worker.serving


async def test_a_router_that_does_not_read_is_cut_off_and_its_sequences_are_cancelled() -> None:
    async with a_worker(session_reports_max=20, num_pages=64) as worker:
        slow, quick = worker.host.connect("slow"), worker.host.connect("quick")
        slow.submit(an_open(1, max_tokens=3000))
        quick.submit(an_open(1, max_tokens=200))
        assert len(tokens((await collect(quick, 1))[1])) == 200
        assert slow.closed.is_set()
        assert "unread" in slow.closed_because
        await until(lambda: worker.host.is_idle)
        assert worker.host.load().pages_free == 64


async def test_an_idle_session_hears_a_heartbeat_with_the_load() -> None:
    async with a_worker(heartbeat_seconds=0.01) as worker:
        session = worker.host.connect("r")
        first, second = await session.next_report(), await session.next_report()
        assert (first.number, second.number) == (1, 2)
        assert second.sequences == ()
        assert second.load.pages_total == 16


async def test_a_router_that_breaks_the_rules_is_refused() -> None:
    async with a_worker(sessions_max=1, session_sequences_max=2) as worker:
        session = worker.host.connect("r")
        with pytest.raises(SessionRefused, match="1 sessions already"):
            worker.host.connect("another")
        session.submit(an_open(1))
        with pytest.raises(SessionRefused, match="is open already"):
            session.submit(an_open(1))
        session.submit(an_open(2))
        with pytest.raises(SessionRefused, match="2 sequences open already"):
            session.submit(an_open(3))
        session.close()
        worker.host.connect("another")


async def test_a_broken_invariant_ends_the_host_and_is_not_an_expected_error() -> None:
    async with a_worker() as worker:
        session = worker.host.connect("r")
        worker.link.rank.num_steps = 5
        session.submit(an_open(1))
        with pytest.raises(AssertionError) as caught:
            await worker.serving
        assert not isinstance(caught.value, RorqualError)


@pytest.mark.parametrize("drafts", [1, 4, "auto"])
async def test_accepted_drafts_leave_in_one_report_with_their_logprobs(drafts: int | str) -> None:
    async with a_worker(drafts=drafts) as worker:
        session = worker.host.connect("r")
        session.submit(an_open(1, max_tokens=60, logprobs=2))
        session.submit(an_open(2, length=300, max_tokens=60))
        reports = await collect(session, 1, 2)
        await until(lambda: worker.host.is_idle)
        metrics = worker.host.metrics.registry
        proposed = metrics.get_sample_value("rorqual_worker_drafts_proposed_total")
        accepted = metrics.get_sample_value("rorqual_worker_drafts_accepted_total")
        decodes = metrics.get_sample_value("rorqual_worker_decode_tokens_count")
        decoded = metrics.get_sample_value("rorqual_worker_decode_tokens_sum")
    for number, length in ((1, 5), (2, 300)):
        assert tokens(reports[number]) == the_answer(an_open(number, length=length, max_tokens=60))
        indices = [report.first_index for report in reports[number]]
        assert indices == [sum(len(r.token_ids) for r in reports[number][:n]) for n in range(len(indices))]
        assert reports[number][-1].finish_reason is FinishReason.LENGTH
    for report in reports[1]:
        assert len(report.logprobs) == len(report.alternatives) == len(report.token_ids)
        for index, token in enumerate(report.token_ids):
            assert report.logprobs[index] == logprob_of(token, 5 + report.first_index + index)
    assert all(report.logprobs == report.alternatives == () for report in reports[2])
    assert 0 < accepted < proposed
    assert decoded == decodes + accepted
    several = [len(report.token_ids) for items in reports.values() for report in items]
    assert max(several) > 1
    assert sum(several) == 120


async def test_a_prefill_worker_plans_no_drafts_whatever_its_rank_could_do() -> None:
    rank = FakeRank(num_pages=8, num_slots=4, prefill_tokens_max=512, num_records=4, drafts_max=4)
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(7),
        exact=False,
        prefill_tokens_max=512,
        drafts="auto",
    )
    assert scheduler_config(rank.ready(), config, role=Role.PREFILL).drafts_max == 0
    assert scheduler_config(rank.ready(), config, role=Role.DECODE).drafts_max == 4
    none = dataclasses.replace(config, drafts=0)
    assert scheduler_config(rank.ready(), none, role=Role.DECODE).drafts_max == 0
