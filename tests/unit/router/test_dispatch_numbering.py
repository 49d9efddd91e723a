"""Reports that break a rule: tokens twice or left out, parts out of turn. The worker is a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rorqual.errors import WorkerLost
from rorqual.ids import SequenceId
from rorqual.session import (
    Alternatives,
    Cancel,
    FinishReason,
    Hello,
    Open,
    PromptLogprobs,
    SequenceReport,
    StepReport,
    Welcome,
)
from router.sequences import without_first
from tests.harness.cluster import (
    Cluster,
    a_cluster,
    a_generation,
    collect,
    until,
)


class ScriptedTransport:
    """A worker that says exactly what the test wants it to."""

    def __init__(self, welcome: Welcome) -> None:
        self.reports: asyncio.Queue[Welcome | StepReport] = asyncio.Queue()
        self.reports.put_nowait(welcome)
        self.opened: asyncio.Queue[Open] = asyncio.Queue()
        self.cancelled: list[SequenceId] = []
        self.load = welcome.load
        self.takes_commands = asyncio.Event()
        self.takes_commands.set()

    async def connect(self, address: str) -> ScriptedTransport:
        return self

    async def send(self, command: object) -> None:
        if not isinstance(command, Hello):
            await self.takes_commands.wait()
        if isinstance(command, Open):
            self.opened.put_nowait(command)
        elif isinstance(command, Cancel):
            self.cancelled.append(command.sequence_id)

    async def receive(self) -> Welcome | StepReport:
        return await self.reports.get()

    async def close(self) -> None:
        pass

    def say(self, number: int, *reports: SequenceReport) -> None:
        self.reports.put_nowait(StepReport(number=number, sequences=reports, load=self.load, draining=False))


@asynccontextmanager
async def a_script(**stages: float) -> AsyncIterator[tuple[Cluster, ScriptedTransport]]:
    async with a_cluster("a", **stages) as cluster:
        script = ScriptedTransport(cluster.transport.hosts["a"].welcome())
        cluster.fleet.transport = script
        cluster.transport.channels[0].cut()
        await until(lambda: cluster.count("sessions_opened_total", worker="a") == 2)
        yield cluster, script


def tokens_from(index: int, *token_ids: int, finish: FinishReason | None = None) -> SequenceReport:
    return SequenceReport(
        sequence_id=SequenceId(1), first_index=index, token_ids=token_ids, finish_reason=finish
    )


async def test_tokens_that_come_twice_are_delivered_once() -> None:
    async with a_script() as (cluster, script):
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await script.opened.get()
        script.say(1, tokens_from(0, 10, 11), tokens_from(1, 11, 12), tokens_from(0, 10))
        script.say(2, tokens_from(3, 13, finish=FinishReason.LENGTH))
        (got,) = await asking
        assert got.tokens == [10, 11, 12, 13]
        assert cluster.count("tokens_duplicate_total") == 2


async def test_a_token_left_out_ends_the_sequence_here_and_on_the_worker() -> None:
    async with a_script() as (cluster, script):
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await script.opened.get()
        script.say(1, tokens_from(0, 10))
        script.say(2, tokens_from(2, 12))
        with pytest.raises(WorkerLost, match=r"left out tokens 1\.\.1"):
            await asking
        await until(lambda: script.cancelled == [1])


async def test_scores_left_out_end_the_sequence() -> None:
    def scores_from(first: int, count: int) -> SequenceReport:
        none = Alternatives(token_ids=(), logprobs=())
        return SequenceReport(
            sequence_id=SequenceId(1),
            first_index=0,
            prompt_logprobs=PromptLogprobs(
                first=first, logprobs=(-1.0,) * count, alternatives=(none,) * count
            ),
        )

    for number, reports in enumerate(
        [(scores_from(1, 2), scores_from(4, 1)), (scores_from(1, 3), tokens_from(0, 7))]
    ):
        async with a_script(place_seconds_max=0.05) as (cluster, script):
            asking = asyncio.create_task(collect(cluster, a_generation(prompt_logprobs=0)))
            await script.opened.get()
            script.say(1, *reports)
            text = ["between 3 and 4", "of which 3 came for 4"][number]
            with pytest.raises(WorkerLost, match=f"left out logprobs of the prompt.* {text}"):
                await asking


async def test_a_report_out_of_turn_ends_the_session() -> None:
    async with a_script() as (cluster, script):
        script.say(1)
        script.say(3)
        await until(lambda: cluster.fleet.view() == [])
        assert "report 3 as number 2" in cluster.fleet.failures()[0]


async def test_commands_of_a_lost_session_are_not_sent_on_the_next_one() -> None:
    async with a_script() as (cluster, script):
        script.takes_commands.clear()
        asking = [asyncio.create_task(collect(cluster, a_generation(number))) for number in (1, 2)]
        await until(lambda: cluster.fleet.view()[0].sequences_outstanding == 2)
        await asyncio.sleep(0)
        script.say(7)  # out of turn: the session ends
        await until(lambda: cluster.fleet.view() == [])
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        script.takes_commands.set()
        script.reports.put_nowait(cluster.transport.hosts["a"].welcome())
        await cluster.connected(1)
        another = asyncio.create_task(collect(cluster, a_generation(3)))
        opened = await script.opened.get()
        assert opened.request_id == "r3"
        another.cancel()
        await asyncio.gather(another, return_exceptions=True)


def test_the_part_of_a_report_that_is_new_keeps_its_logprobs() -> None:
    report = SequenceReport(
        sequence_id=SequenceId(1), first_index=4, token_ids=(7, 8, 9), logprobs=(-1.0, -2.0, -3.0)
    )
    trimmed = without_first(report, 2)
    assert (trimmed.first_index, trimmed.token_ids, trimmed.logprobs) == (6, (9,), (-3.0,))
    assert without_first(report, 5).token_ids == ()
