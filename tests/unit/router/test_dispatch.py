"""The dispatcher and its fleet against real hosts in the same process: answers, failures, and nothing left open."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from fake_link import FakeLink
from fake_rank import EOS, VOCAB_SIZE, FakeRank, answer, logprob_of
from fake_transport import FakeTransport
from prometheus_client import CollectorRegistry

from engine.host import Host, HostConfig
from engine.metrics import WorkerMetrics
from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut, WorkerLost
from rorqual.ids import Incarnation, RequestId, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
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
from router.dispatch import ChoiceTextLike, DispatchConfig, Dispatcher
from router.fleet import Fleet, FleetConfig, without_first
from router.fleet_metrics import FleetMetrics
from router.generation import ChoiceUpdate, Generation
from router.placement import LeastOutstandingTokens
from router.text import ChoiceText, StopStrings


class Letters:
    """A tokenizer of one letter a token, as far as `ChoiceText` looks at one."""

    def special_ids_and(self, texts: Iterable[str]) -> frozenset[int]:
        return frozenset({EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("A") + token_id % 26])


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token % 26) for token in tokens if token != EOS)


def make_texts(generation: Generation) -> list[ChoiceTextLike]:
    stops = StopStrings(generation.stop)
    return [ChoiceText(tokenizer=Letters(), stops=stops) for _ in range(generation.num_choices)]


@dataclass
class Cluster:
    dispatcher: Dispatcher
    fleet: Fleet
    transport: FakeTransport
    registry: CollectorRegistry
    links: dict[str, FakeLink] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start_worker(
        self, address: str, *, num_pages: int = 16, num_slots: int = 4, **options: float
    ) -> Host:
        rank = FakeRank(num_pages=num_pages, num_slots=num_slots, prefill_tokens_max=512)
        self.links[address] = FakeLink(rank)
        config = HostConfig(
            worker_id=WorkerId(address),
            incarnation=Incarnation(1),
            numerics="float32",
            exact=False,
            prefill_tokens_max=512,
            heartbeat_seconds=0.02,
            **options,
        )
        host = Host(link=self.links[address], ready=rank.ready(), config=config, metrics=WorkerMetrics())
        self.tasks.append(asyncio.create_task(host.run()))
        self.transport.hosts[address] = host
        return host

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"rorqual_router_{name}", labels) or 0.0

    async def connected(self, number: int) -> None:
        await until(lambda: len(self.fleet.welcomes()) == number)

    async def empty(self) -> None:
        """Every count has returned to zero, on both sides."""
        await until(lambda: all(host.is_idle for host in self.transport.hosts.values()))
        for host in self.transport.hosts.values():
            load = host.load()
            assert (load.pages_free, load.slots_free) == (load.pages_total, load.slots_total)
        for view in self.fleet.view():
            assert (view.sequences_outstanding, view.tokens_outstanding) == (0, 0)


@asynccontextmanager
async def a_cluster(
    *addresses: str,
    start: bool = True,
    fleet: FleetConfig | None = None,
    **stages: float,
) -> AsyncIterator[Cluster]:
    registry = CollectorRegistry()
    metrics = FleetMetrics(registry)
    transport = FakeTransport({})
    the_fleet = Fleet(
        addresses=addresses,
        transport=transport,
        config=fleet or FleetConfig(backoff_seconds_min=0.005, backoff_seconds_max=0.02),
        metrics=metrics,
        router_id="router",
        randomness=random.Random(1),
    )
    dispatcher = Dispatcher(
        fleet=the_fleet,
        placement=LeastOutstandingTokens(),
        make_texts=make_texts,
        config=DispatchConfig(served_name="fake", created=5, **stages),
        metrics=metrics,
    )
    cluster = Cluster(dispatcher, the_fleet, transport, registry)
    cluster.tasks.append(asyncio.create_task(the_fleet.run()))
    try:
        async with asyncio.timeout(30):
            if start:
                for address in addresses:
                    cluster.start_worker(address)
                await cluster.connected(len(addresses))
            yield cluster
    finally:
        for task in cluster.tasks:
            task.cancel()
        await asyncio.gather(*cluster.tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def a_generation(
    number: int = 1, *, length: int = 5, max_tokens: int = 20, num_choices: int = 1, **options: object
) -> Generation:
    sampling = {
        name: options.pop(name) for name in ("logprobs", "prompt_logprobs", "top_k") if name in options
    }
    return Generation(
        request_id=RequestId(f"r{number}"),
        prompt=np.arange(number, number + length, dtype=np.int32) % VOCAB_SIZE,
        max_tokens=max_tokens,
        num_choices=num_choices,
        sampling=SamplingParams(seed=number, **sampling),
        **{"ignore_eos": True, **options},
    )


def the_answer(generation: Generation, choice: int = 0) -> list[int]:
    sampling = SamplingParams(seed=generation.sampling.seed, choice=choice)
    return answer(
        generation.prompt.tolist(), generation.max_tokens, sampling, ignore_eos=generation.ignore_eos
    )


@dataclass
class Got:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    updates: list[ChoiceUpdate] = field(default_factory=list)


async def collect(cluster: Cluster, generation: Generation) -> list[Got]:
    got = [Got() for _ in range(generation.num_choices)]
    async with aclosing(cluster.dispatcher.generate(generation)) as updates:
        async for update in updates:
            choice = got[update.choice]
            assert choice.finish_reason is None
            assert update.first_index == len(choice.tokens)
            choice.tokens += [token.token_id for token in update.tokens]
            choice.text += update.text
            choice.finish_reason = update.finish_reason
            choice.updates.append(update)
    return got


async def test_choices_get_their_own_answers_as_numbered_tokens_and_text() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(num_choices=5)
        for choice, got in enumerate(await collect(cluster, generation)):
            assert got.tokens == the_answer(generation, choice)
            assert got.text == letters(got.tokens)
            assert got.finish_reason is FinishReason.LENGTH
        await cluster.empty()


async def test_the_end_token_finishes_a_choice_and_is_no_text() -> None:
    seed = next(s for s in range(999) if 2 < len(the_answer(a_generation(s, ignore_eos=False))) < 15)
    async with a_cluster("a") as cluster:
        (got,) = await collect(cluster, a_generation(seed, ignore_eos=False))
        assert got.tokens[-1] == EOS
        assert got.finish_reason is FinishReason.STOP
        assert got.text == letters(got.tokens)


async def test_logprobs_come_with_their_tokens_and_prompt_logprobs_with_the_first() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(logprobs=2, prompt_logprobs=0)
        (got,) = await collect(cluster, generation)
        first = got.updates[0]
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs.logprobs) == 4
        assert first.tokens[0].logprob == logprob_of(first.tokens[0].token_id, 5)
        assert first.tokens[0].alternatives == ((0, 0.0), (1, -1.0))


async def test_a_stop_string_ends_the_choice_and_cancels_the_sequence_at_once() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(max_tokens=3000)
        expected = letters(the_answer(generation))
        stop = expected[7:10]
        cut = expected.index(stop)
        (got,) = await collect(cluster, a_generation(max_tokens=3000, stop=(stop,)))
        assert got.text == expected[:cut]
        assert got.finish_reason is FinishReason.STOP
        assert got.tokens == the_answer(generation)[: cut + 3]
        await cluster.empty()
        assert cluster.links["a"].rank.num_tokens_computed < 200
        assert cluster.count("sequences_cancelled_total") == 1


async def test_a_stopped_choice_is_cancelled_while_others_go_on() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(max_tokens=1000, num_choices=2)
        texts = [letters(the_answer(generation, choice)) for choice in range(2)]
        stop = next(texts[0][i : i + 4] for i in range(50) if texts[0][i : i + 4] not in texts[1])
        generation = a_generation(max_tokens=1000, num_choices=2, stop=(stop,))
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            async for update in updates:
                if update.finish_reason is FinishReason.STOP:
                    assert update.choice == 0
                    assert cluster.count("sequences_outstanding", worker="a") == 1
                elif update.finish_reason is not None:
                    assert update.choice == 1
        assert cluster.count("sequences_cancelled_total") == 1


async def test_closing_the_generator_early_cancels_every_choice() -> None:
    async with a_cluster("a", "b") as cluster:
        generation = a_generation(max_tokens=3000, num_choices=4)
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            await anext(updates)
        await cluster.empty()
        assert cluster.count("sequences_cancelled_total") == 4
        assert sum(link.rank.num_tokens_computed for link in cluster.links.values()) < 400


async def test_sequences_spread_over_workers_by_outstanding_tokens() -> None:
    async with a_cluster("a", "b") as cluster:
        await collect(cluster, a_generation(num_choices=8))
        opened = [cluster.count("sequences_opened_total", worker=address) for address in ("a", "b")]
        assert opened == [4, 4]


async def test_the_model_is_what_every_connected_worker_can_serve() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        assert cluster.dispatcher.model() is None
        cluster.start_worker("a", num_pages=16)
        cluster.start_worker("b", num_pages=4)
        await cluster.connected(2)
        model = cluster.dispatcher.model()
        assert model is not None
        assert (model.name, model.created, model.vocab_size) == ("fake", 5, VOCAB_SIZE)
        assert model.sequence_tokens_max == 1024
        assert model.eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        (a_generation(length=0), "prompt"),
        (a_generation(length=5000), "prompt"),
        (a_generation(max_tokens=0), "max_tokens"),
        (a_generation(max_tokens=4095), "max_tokens"),
        (a_generation(num_choices=0), "n"),
        (a_generation(top_k=-1), "top_k"),
        (a_generation(length=4000, prompt_logprobs=20, num_choices=4), "logprobs"),
        (a_generation(stop=("",)), "stop"),
    ],
)
async def test_a_request_nobody_can_serve_is_refused_by_field_before_it_is_sent(
    generation: Generation, field: str
) -> None:
    async with a_cluster("a") as cluster:
        with pytest.raises(InvalidRequest) as caught:
            await collect(cluster, generation)
        assert caught.value.field == field
        assert cluster.count("sequences_opened_total", worker="a") == 0


async def test_a_request_waits_a_while_for_a_worker_to_connect() -> None:
    async with a_cluster("a", start=False, place_seconds_max=10) as cluster:
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await asyncio.sleep(0.02)
        cluster.start_worker("a")
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_the_place_deadline_is_over_once_a_worker_has_been_found() -> None:
    async with a_cluster("a", start=False, place_seconds_max=0.2) as cluster:
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await asyncio.sleep(0.02)
        cluster.start_worker("a")
        cluster.links["a"].gate.clear()
        await asyncio.sleep(0.3)
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_without_any_worker_the_place_deadline_says_so() -> None:
    async with a_cluster("a", start=False, place_seconds_max=0.02) as cluster:
        with pytest.raises(Overloaded, match="no worker is connected"):
            await collect(cluster, a_generation())
        assert cluster.count("stages_overdue_total", stage="place") == 1


async def test_when_every_worker_is_full_the_request_is_refused_at_once() -> None:
    config = FleetConfig(sequences_per_worker_max=2)
    async with a_cluster("a", fleet=config) as cluster:
        with pytest.raises(Overloaded, match="every worker is full"):
            await collect(cluster, a_generation(num_choices=3))
        assert cluster.count("requests_overloaded_total") == 1
        await cluster.empty()


async def test_a_worker_that_says_it_is_full_is_believed_at_once_where_there_is_no_other() -> None:
    async with a_cluster("a", start=False, place_seconds_max=60) as cluster:
        cluster.start_worker("a", num_slots=1, sequences_waiting_max=1)
        await cluster.connected(1)
        cluster.links["a"].gate.clear()
        with pytest.raises(Overloaded, match="are waiting already"):
            await collect(cluster, a_generation(num_choices=4))
        assert cluster.count("requests_overloaded_total") == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_a_worker_that_says_it_is_full_costs_a_retry_where_there_is_another() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        cluster.start_worker("a", num_slots=1, sequences_waiting_max=1)
        cluster.start_worker("b")
        await cluster.connected(2)
        for link in cluster.links.values():
            link.gate.clear()
        asking: list[tuple[Generation, asyncio.Task[list[Got]]]] = []
        # The long one keeps b the busier of the two: the short ones all go to a first.
        for number, max_tokens in ((1, 20), (2, 3000), (3, 20), (4, 20)):
            generation = a_generation(number, max_tokens=max_tokens)
            asking.append((generation, asyncio.create_task(collect(cluster, generation))))
            await asyncio.sleep(0.01)
        assert cluster.count("sequences_opened_total", worker="a") == 3
        assert cluster.count("sequences_retried_total") == 1
        for link in cluster.links.values():
            link.gate.set()
        for generation, task in asking:
            (got,) = await task
            assert got.tokens == the_answer(generation)


async def test_other_choices_go_on_while_one_waits_for_a_worker_to_come_back() -> None:
    async with a_cluster("a", "b", place_seconds_max=60) as cluster:
        cluster.links["b"].gate.clear()
        generation = a_generation(max_tokens=100, num_choices=2)
        numbers: list[tuple[int, int]] = []
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            await until(lambda: len(cluster.transport.channels) == 2)
            async for update in updates:
                numbers += [(update.choice, token.token_id) for token in update.tokens]
                if len(numbers) == 1:
                    # The other choice's worker is gone, and this one has no room for it.
                    view = next(view for view in cluster.fleet.view() if view.address == "a")
                    assert view.sequences_outstanding == 1
                    host = cluster.transport.hosts.pop("b")
                    draining = asyncio.create_task(cluster.transport.hosts["a"].drain(seconds_max=30))
                    await until(lambda: any(view.draining for view in cluster.fleet.view()))
                    cluster.transport.channels[1].cut()
                if update.choice == 0 and update.finish_reason is not None:
                    break
            assert [token for choice, token in numbers if choice == 0] == the_answer(generation, 0)
            assert await draining
            cluster.links["b"].gate.set()
            cluster.transport.hosts["b"] = host
            async for update in updates:
                numbers += [(update.choice, token.token_id) for token in update.tokens]
        assert [token for choice, token in numbers if choice == 1] == the_answer(generation, 1)
        assert cluster.count("sequences_retried_total") == 1


async def test_a_client_that_reads_too_slowly_ends_its_own_request_and_no_other() -> None:
    async with a_cluster("a", values_unread_max=500) as cluster:
        slow = a_generation(1, max_tokens=3000, num_choices=2, logprobs=20)
        async with aclosing(cluster.dispatcher.generate(slow)) as updates:
            await anext(updates)
            (got,) = await collect(cluster, a_generation(2, max_tokens=200))
            assert got.tokens == the_answer(a_generation(2, max_tokens=200))
            # Both of its sequences are gone from the worker though nobody asks for their tokens.
            await cluster.empty()
            assert cluster.count("sequences_unread_total") == 2
            with pytest.raises(StageTimedOut, match="reads too slowly"):
                async for _ in updates:
                    pass
        assert cluster.links["a"].rank.num_tokens_computed < 600


async def test_scores_of_a_long_prompt_do_not_count_against_a_slow_client() -> None:
    async with a_cluster("a", values_unread_max=20) as cluster:
        generation = a_generation(length=3000, max_tokens=5, prompt_logprobs=3)
        (got,) = await collect(cluster, generation)
        scores = got.updates[0].prompt_logprobs
        assert scores is not None
        prompt = generation.prompt.tolist()
        assert scores.logprobs == tuple(logprob_of(prompt[index], index) for index in range(1, 3000))
        assert len(scores.alternatives) == 2999
        assert [update.prompt_logprobs for update in got.updates[1:]] == [None] * (len(got.updates) - 1)


async def test_scores_of_a_lost_attempt_do_not_mix_with_those_of_the_next() -> None:
    async with a_cluster("a", "b") as cluster:
        link = cluster.links["a"]
        generation = a_generation(length=2000, max_tokens=3, prompt_logprobs=0)
        step = link.rank.step

        def step_once(plan: object) -> object:
            link.gate.clear()
            return step(plan)

        link.rank.step = step_once
        asking = asyncio.create_task(collect(cluster, generation))
        await until(lambda: link.rank.num_steps == 1)
        await asyncio.sleep(0.02)
        cluster.transport.channels[0].cut()
        (got,) = await asking
        scores = got.updates[0].prompt_logprobs
        assert scores is not None
        prompt = generation.prompt.tolist()
        assert scores.logprobs == tuple(logprob_of(prompt[index], index) for index in range(1, 2000))
        assert cluster.count("sequences_retried_total") == 1


@pytest.mark.parametrize(("stage", "num_tokens"), [("first_token", 0), ("next_token", 1)])
async def test_a_stage_that_outlives_its_deadline_ends_the_request_and_is_counted(
    stage: str, num_tokens: int
) -> None:
    stages = {"first_token_seconds_max": 60.0, "next_token_seconds_max": 60.0, f"{stage}_seconds_max": 0.05}
    async with a_cluster("a", **stages) as cluster:
        if not num_tokens:
            cluster.links["a"].gate.clear()
        async with aclosing(cluster.dispatcher.generate(a_generation(max_tokens=3000))) as updates:
            if num_tokens:
                await anext(updates)
                cluster.links["a"].gate.clear()
            with pytest.raises(StageTimedOut, match="did not come in time"):
                async for _ in updates:
                    pass
        assert cluster.count("stages_overdue_total", stage=stage) == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_a_sequence_lost_before_its_first_token_is_answered_by_another_worker() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await until(lambda: cluster.count("sequences_opened_total", worker="a") == 1)
        cluster.transport.channels[0].cut()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())
        assert cluster.count("sequences_opened_total", worker="b") == 1
        assert cluster.count("sequences_retried_total") == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_a_failed_rank_is_retried_elsewhere_though_its_session_still_stands() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await until(lambda: cluster.transport.hosts["a"].load().sequences_running == 1)
        cluster.links["a"].fail("out of memory")
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_a_sequence_is_retried_once_and_then_fails() -> None:
    async with a_cluster("a", "b", "c") as cluster:
        for link in cluster.links.values():
            link.gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        for address in ("a", "b"):
            await until(lambda address=address: cluster.count("sequences_opened_total", worker=address) == 1)
            cluster.transport.channels["abc".index(address)].cut()
        with pytest.raises(WorkerLost, match="worker b was lost: the network failed"):
            await asking
        assert cluster.count("sequences_opened_total", worker="c") == 0
        assert cluster.count("sequences_lost_total") == 1


async def test_a_worker_lost_after_the_first_token_ends_the_request() -> None:
    async with a_cluster("a", "b") as cluster:
        async with aclosing(cluster.dispatcher.generate(a_generation(max_tokens=3000))) as updates:
            await anext(updates)
            cluster.transport.channels[0].cut()
            with pytest.raises(WorkerLost, match="worker a was lost"):
                async for _ in updates:
                    pass
        assert cluster.count("sequences_retried_total") == 0
        await cluster.empty()


async def test_a_lost_worker_is_reached_again_and_serves() -> None:
    async with a_cluster("a") as cluster:
        for _ in range(3):
            cluster.transport.channels[-1].cut()
            num_channels = len(cluster.transport.channels)
            await until(lambda num=num_channels: len(cluster.transport.channels) > num)
            await cluster.connected(1)
            (got,) = await collect(cluster, a_generation())
            assert got.tokens == the_answer(a_generation())
        assert cluster.count("sessions_opened_total", worker="a") == 4


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation(max_tokens=200)))
        await until(lambda: cluster.transport.hosts["a"].load().sequences_running == 1)
        draining = asyncio.create_task(cluster.transport.hosts["a"].drain(seconds_max=10))
        await until(lambda: any(view.draining for view in cluster.fleet.view()))
        await collect(cluster, a_generation(num_choices=4))
        assert cluster.count("sequences_opened_total", worker="b") == 4
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation(max_tokens=200))
        assert await draining


async def test_a_worker_with_another_model_is_kept_out() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        cluster.start_worker("a")
        await cluster.connected(1)
        other = cluster.start_worker("b")
        other.config = HostConfig(
            worker_id=WorkerId("b"),
            incarnation=Incarnation(1),
            numerics="served",
            exact=False,
            prefill_tokens_max=512,
        )
        await until(lambda: bool(cluster.fleet.failures()) and "served" in cluster.fleet.failures()[0])
        assert [view.address for view in cluster.fleet.view()] == ["a"]


async def test_a_worker_that_falls_silent_is_given_up() -> None:
    config = FleetConfig(silence_seconds_max=0.1, backoff_seconds_min=0.005, backoff_seconds_max=0.02)
    async with a_cluster("a", fleet=config, place_seconds_max=0.01) as cluster:
        del cluster.transport.hosts["a"]
        cluster.transport.channels[0].is_mute = True
        with pytest.raises(RorqualError):
            await collect(cluster, a_generation())
        assert cluster.count("stages_overdue_total", stage="report") == 1
        assert cluster.fleet.view() == []


async def test_attempts_back_off_up_to_the_cap() -> None:
    config = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.05)
    async with a_cluster("a", start=False, fleet=config) as cluster:
        await asyncio.sleep(0.3)
        # 1, 2, 4, ... 50 ms, halved at most: without backoff it would be hundreds.
        assert 5 <= cluster.transport.num_attempts <= 20
        assert "connection refused" in cluster.fleet.failures()[0]


async def test_a_worker_that_welcomes_and_dies_is_left_alone_like_one_that_cannot_be_reached() -> None:
    config = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.05)
    async with a_cluster("a", fleet=config) as cluster:

        async def cut_each() -> None:
            while True:
                cluster.transport.channels[-1].cut()
                await asyncio.sleep(0.001)

        cutting = asyncio.create_task(cut_each())
        await asyncio.sleep(0.3)
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)
        assert 5 <= cluster.count("sessions_opened_total", worker="a") <= 20


async def test_two_hundred_mixed_requests_with_random_closes_leave_nothing_behind() -> None:
    rng = random.Random(5)
    async with a_cluster("a", "b", start=False) as cluster:
        for address in ("a", "b"):
            cluster.start_worker(address, num_pages=8, num_slots=4)
        await cluster.connected(2)

        async def one(number: int) -> None:
            generation = a_generation(
                number,
                length=rng.randint(1, 600),
                max_tokens=rng.randint(1, 150),
                num_choices=rng.choice([1, 1, 3]),
                ignore_eos=rng.random() < 0.5,
            )
            leaves_after = rng.randint(0, 20) if rng.random() < 0.3 else None
            got = [[] for _ in range(generation.num_choices)]
            async with aclosing(cluster.dispatcher.generate(generation)) as updates:
                async for update in updates:
                    got[update.choice] += [token.token_id for token in update.tokens]
                    if leaves_after is not None and len(got[0]) >= leaves_after:
                        return
            assert got == [the_answer(generation, choice) for choice in range(generation.num_choices)]

        async with asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(one(number))
        await cluster.empty()


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
