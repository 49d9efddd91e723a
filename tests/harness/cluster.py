"""A dispatcher over a fleet, all in one process: over real hosts with strict fake ranks, or over fake prefill and
decode workers; and what requests answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
from fake_link import FakeLink
from fake_rank import FakeRank
from fake_split import FakeDecode, FakeLenders, FakePrefill
from fake_state import EOS, VOCAB_SIZE, answer
from fake_transport import FakeTransport
from prometheus_client import CollectorRegistry

from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from rorqual.ids import Incarnation, RequestId, WorkerId
from rorqual.performance import FLASH, model_costs
from rorqual.sampling import SamplingParams
from rorqual.session import (
    FinishReason,
)
from router.dispatch import ChoiceTextLike, DispatchConfig, Dispatcher
from router.fleet import Fleet, FleetConfig
from router.fleet_metrics import FleetMetrics
from router.generation import ChoiceUpdate, Generation
from router.placement import (
    Demand,
    FleetColumns,
    Placement,
    Predicted,
    Split,
    Whole,
    missing_roles,
)
from router.placement.columns import Bools
from router.placement.policies import WorkerModel, make_placement
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
    lenders: FakeLenders = field(default_factory=FakeLenders)
    prefills: dict[str, FakePrefill] = field(default_factory=dict)
    decodes: dict[str, FakeDecode] = field(default_factory=dict)

    def start_prefill(self, address: str, **options: float) -> FakePrefill:
        worker = FakePrefill(address, **options)
        self.prefills[address] = self.lenders.workers[address] = self.transport.hosts[address] = worker
        return worker

    def start_decode(self, address: str, **options: object) -> FakeDecode:
        worker = FakeDecode(address, self.lenders, **options)
        self.decodes[address] = self.transport.hosts[address] = worker
        return worker

    def lose(self, address: str) -> None:
        """The worker dies, and nothing answers at its address any more."""
        del self.transport.hosts[address]
        self.lenders.workers.pop(address, None)
        self.transport.latest[address].cut()

    def start_worker(
        self,
        address: str,
        *,
        num_pages: int = 16,
        num_slots: int = 4,
        num_records: int = 0,
        numerics: str = "float32",
        incarnation: int = 1,
        **options: float,
    ) -> Host:
        rank = FakeRank(
            num_pages=num_pages, num_slots=num_slots, prefill_tokens_max=512, num_records=num_records
        )
        self.links[address] = FakeLink(rank)
        config = HostConfig(
            worker_id=WorkerId(address),
            incarnation=Incarnation(incarnation),
            exact=False,
            prefill_tokens_max=512,
            heartbeat_seconds=0.02,
            **options,
        )
        ready = msgspec.structs.replace(rank.ready(), numerics=numerics)
        host = Host(link=self.links[address], ready=ready, config=config, metrics=WorkerMetrics())
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
        await until(lambda: all(view.sequences_outstanding == 0 for view in self.fleet.view()))
        for view in self.fleet.view():
            assert (view.tokens_outstanding, view.prompt_tokens_outstanding) == (0, 0)
        check_table(self.fleet)
        assert self.fleet.credit.num_waiting == self.count("credit_waiting") == 0
        for address in self.decodes:
            use = self.fleet.credit.use_of(address)
            assert use is None or (use.sequences, use.pages) == (0, 0)
            assert self.count("credit_sequences", worker=address) == 0
            assert self.count("credit_pages", worker=address) == 0


@dataclass
class Checked:
    """A placement that finds the fleet's table as links and ledger have it, whenever it is asked."""

    placement: Placement
    fleet: Fleet

    @property
    def uses_keys(self) -> bool:
        return self.placement.uses_keys

    def choose(self, fleet: FleetColumns, able_W: Bools, demand: Demand) -> Whole | Split | None:
        assert fleet is self.fleet.columns
        check_table(self.fleet)
        return self.placement.choose(fleet, able_W, demand)

    def finished(self, predicted: Predicted) -> None:
        self.placement.finished(predicted)


def check_table(fleet: Fleet) -> None:
    """Every row says what its link and the ledger of credit say, and members are the links that are connected."""
    views = {view.address: view for view in fleet.view()}
    links = {address: fleet.link(address) for address in fleet.columns.addresses if address}
    connected = {address: link for address, link in links.items() if link.welcome is not None}
    assert views.keys() == connected.keys()
    for address, link in connected.items():
        view, sequences = views[address], link._sequences.values()
        assert (view.session_number, view.index) == (link.session_number, link.feed.index)
        assert (view.role, view.draining) == (link.welcome.role, link._draining)
        assert view.sequences_outstanding == len(sequences)
        assert view.tokens_outstanding == sum(item.tokens_outstanding for item in sequences)
        assert view.prompt_tokens_outstanding == sum(item.prompt_tokens_outstanding for item in sequences)
        assert view.prompt_tokens_sent == sum(item.prompt_tokens_sent for item in sequences)
        assert view.pages_cached == link.feed.reader.num_entries
        assert view.credit == fleet.credit.use_of(address)
    members, welcomes = fleet.members, [link.welcome for link in connected.values()]
    assert len(members) == len(welcomes)
    assert members.missing() == missing_roles(welcome.role for welcome in welcomes)
    assert {root.wire_id for root in members.roots} == {welcome.wire_id for welcome in welcomes}
    if welcomes:
        assert members.sequence_tokens_max == min(welcome.sequence_tokens_max for welcome in welcomes)


@asynccontextmanager
async def a_cluster(
    *addresses: str,
    prefills: Sequence[str] = (),
    decodes: Sequence[str] = (),
    start: bool = True,
    seconds_max: float = 30.0,
    fleet: FleetConfig | None = None,
    placement: str = "least_wait",
    **stages: float,
) -> AsyncIterator[Cluster]:
    registry = CollectorRegistry()
    metrics = FleetMetrics(registry)
    transport = FakeTransport({})
    the_fleet = Fleet(
        addresses=(*addresses, *prefills, *decodes),
        transport=transport,
        config=fleet or FleetConfig(backoff_seconds_min=0.005, backoff_seconds_max=0.02),
        metrics=metrics,
        router_id="router",
        randomness=random.Random(1),
    )
    policy = make_placement(
        placement, caches=the_fleet.picture, workers=WorkerModel(costs=model_costs(FLASH))
    )
    dispatcher = Dispatcher(
        fleet=the_fleet,
        placement=Checked(policy, the_fleet),
        make_texts=make_texts,
        config=DispatchConfig(served_name="fake", created=5, **stages),
        metrics=metrics,
    )
    cluster = Cluster(dispatcher, the_fleet, transport, registry)
    cluster.tasks.append(asyncio.create_task(the_fleet.run()))
    try:
        async with asyncio.timeout(seconds_max):
            if start:
                for address in addresses:
                    cluster.start_worker(address)
                for address in prefills:
                    cluster.start_prefill(address)
                for address in decodes:
                    cluster.start_decode(address)
                await cluster.connected(len(addresses) + len(prefills) + len(decodes))
            yield cluster
    finally:
        for task in cluster.tasks:
            task.cancel()
        await asyncio.gather(*cluster.tasks, return_exceptions=True)


async def settle() -> None:
    """Let everything happen that waits for no time to pass."""
    for _ in range(60):
        await asyncio.sleep(0)


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
