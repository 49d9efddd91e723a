"""The rank's transfer without processes: two sets of pools in this one, and engines over shared memory between them."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.frames import HEADER, FrameWriter, decode_from_rank, encode_frame, payload_bytes
from engine.kernels.digest import page_digest_torch
from engine.kernels.registry import choose
from engine.plan import (
    Expose,
    Fetch,
    Fetched,
    FetchOverdue,
    FromTransfer,
    Lent,
    PeerClose,
    PeerOpen,
    PeerOpened,
    RankSettings,
    RecordFetch,
    Restore,
    Segment,
    Shutdown,
    SlotOpen,
    StepPlan,
    StepResult,
)
from engine.rank import Rank
from engine.rank_transfer import PlanQueue, RankTransfer, StateDigests, ThreadFailed, read_host
from engine.runner import RECORDS, Runner
from engine.sampler import Sampler
from kvstore.handover import record_bytes_max
from kvstore.layout import Component, Numerics, StateLayout, build_layout
from kvstore.pools import Pools
from kvstore.transfer.contract import Endpoint, ReadId, ReadState, Transfer
from kvstore.transfer.opening import open_transfer
from rorqual.clock import SystemClock
from rorqual.sampling import SamplingParams
from tests.harness.models import SWA, build_model, config_of, random_tokens, raw_config, real_ratios
from tests.reference.weights import random_tensors

torch.set_num_threads(1)

NUM_PAGES = 6
NUM_RECORDS = 2
LAYOUT = build_layout(config_of(real_ratios()), Numerics.SERVED)
WINDOW_ONLY = build_layout(config_of(raw_config((SWA, SWA), num_hash=0)), Numerics.SERVED)
COMPONENTS = (Component.C4, Component.C4_INDEX, Component.C128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """State of random bytes with what a rank has beside it, and what it tells its host."""

    pools: Pools
    records: torch.Tensor
    digests: StateDigests
    transfer: RankTransfer
    endpoint: Endpoint
    told: queue.Queue[FromTransfer]
    failures: queue.Queue[BaseException]
    hold: threading.Event

    def fetch(self, command: Fetch) -> Fetched:
        self.transfer.submit(command)
        fetched = self.told.get(timeout=10)
        assert isinstance(fetched, Fetched)
        assert fetched.fetch == command.fetch
        return fetched


class HeldBack:
    """An engine whose reads are not over until `hold` is set."""

    def __init__(self, engine: Transfer, hold: threading.Event) -> None:
        self._engine = engine
        self._hold = hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def poll(self, read: ReadId) -> ReadState:
        return self._engine.poll(read) if self._hold.is_set() else ReadState.PENDING


OPEN = threading.Event()
OPEN.set()


@contextmanager
def a_side(
    agent: str,
    layout: StateLayout,
    *,
    tell: Callable[[FromTransfer], None] | None = None,
    hold: threading.Event = OPEN,
) -> Iterator[Side]:
    builder = open_transfer("shm", agent=agent)
    pools = Pools(layout, num_pages=NUM_PAGES, num_slots=1, allocate=builder.allocate)
    size = record_bytes_max(layout, drafts=False)
    records = torch.from_numpy(builder.allocate(RECORDS, size, NUM_RECORDS)).view(NUM_RECORDS, size)
    generator = torch.Generator().manual_seed(len(agent))
    for component in COMPONENTS:
        if layout.find(component):
            pools[component].bytes_ulb.random_(0, 256, generator=generator)
    records.random_(0, 256, generator=generator)
    digests = StateDigests(pools, records, page_digest=choose("cpu", {})["page_digest"].function)
    told: queue.Queue[FromTransfer] = queue.Queue()
    failures: queue.Queue[BaseException] = queue.Queue()
    engine = HeldBack(builder.start(), hold)
    transfer = RankTransfer(
        engine,
        digests,
        record_bytes=lambda num_tokens: num_tokens,
        tell=tell or told.put,
        fail=failures.put,
        clock=SystemClock(),
    )
    try:
        yield Side(
            pools=pools,
            records=records,
            digests=digests,
            transfer=transfer,
            endpoint=engine.endpoint,
            told=told,
            failures=failures,
            hold=hold,
        )
    finally:
        transfer.stop()


@contextmanager
def two_sides(layout: StateLayout = LAYOUT) -> Iterator[tuple[Side, Side]]:
    """An owner, and a reader that knows it as peer 1."""
    with a_side("owner", layout) as owner, a_side("a reader", layout) as reader:
        owner.transfer.submit(Expose(active=True))
        reader.transfer.submit(PeerOpen(peer=1, endpoint=owner.endpoint))
        assert reader.told.get(timeout=10) == PeerOpened(peer=1)
        yield owner, reader


def a_fetch(owner: Side, **changed: Any) -> Fetch:
    """Pages 4, 0, 3 of the owner into 2, 1, 5, and the first 1000 bytes of record 0 into record 1."""
    pages = (4, 0, 3)
    record = RecordFetch(
        source=0, target=1, num_tokens=1000, num_bytes=1000, digest=owner.digests.of_record(0, 1000)
    )
    values = {
        "fetch": 7,
        "peer": 1,
        "seconds": 10.0,
        "source_pages": pages,
        "target_pages": (2, 1, 5),
        "digests": tuple(owner.digests.of_pages(pages)),
        "record": record,
    }
    return Fetch(**(values | changed))


def test_digests_of_pages_come_page_by_page_and_in_layout_order() -> None:
    with a_side("owner", LAYOUT) as side:
        assert side.digests.components == ("c4", "c4_index", "c128")
        found = side.digests.of_pages([5, 2])
        for place, page in enumerate((5, 2)):
            for column, component in enumerate(COMPONENTS):
                rows = side.pools[component].bytes_ulb[page].reshape(1, -1)
                [wanted] = page_digest_torch(rows, torch.tensor([0])).tolist()
                assert found[3 * place + column] == wanted % 2**64
        assert side.digests.of_pages([]) == []


def test_a_fetch_moves_what_it_names_and_nothing_else() -> None:
    with two_sides() as (owner, reader):
        before = {component: reader.pools[component].bytes_ulb.clone() for component in COMPONENTS}
        record = reader.records.clone()
        fetched = reader.fetch(a_fetch(owner))
        assert fetched.error == ""
        assert fetched.num_bytes == 3 * LAYOUT.page_bytes + 1000
        for component in COMPONENTS:
            wanted = before[component]
            wanted[[2, 1, 5]] = owner.pools[component].bytes_ulb[[4, 0, 3]]
            assert torch.equal(reader.pools[component].bytes_ulb, wanted)
        record[1, :1000] = owner.records[0, :1000]
        assert torch.equal(reader.records, record)


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_flipped_bit_of_a_page_is_told_by_page_and_component(component: Component) -> None:
    with two_sides() as (owner, reader):
        fetch = a_fetch(owner)
        owner.pools[component].bytes_ulb[3, -1, -1] ^= 16
        assert reader.fetch(fetch).error == f"page 3 of {component.value}: digest differs"


def test_one_flipped_bit_of_a_record_is_told() -> None:
    with two_sides() as (owner, reader):
        fetch = a_fetch(owner)
        owner.records[0, 999] ^= 1
        assert reader.fetch(fetch).error == "record 0: digest differs"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"digests": (1, 2, 3, 4, 5, 6, 7, 8)}, "3 pages have 9 digests, not 8"),
        (
            {"record": RecordFetch(source=0, target=0, num_tokens=1 << 30, num_bytes=1 << 30, digest=0)},
            "a record of 1073741824 bytes does not fit",
        ),
        (
            {"record": RecordFetch(source=0, target=0, num_tokens=1001, num_bytes=1000, digest=0)},
            "a record of 1001 tokens has 1001 bytes, not 1000",
        ),
        ({"source_pages": (4, 0, NUM_PAGES)}, "are not in region"),
        ({"peer": 2}, "peer 2 is not connected"),
    ],
)
def test_what_a_peer_cannot_have_meant_is_an_error_of_one_fetch(
    changed: dict[str, Any], complaint: str
) -> None:
    with two_sides() as (owner, reader):
        fetched = reader.fetch(a_fetch(owner, **changed))
        assert complaint in fetched.error
        assert fetched.num_bytes == 0
        assert reader.fetch(a_fetch(owner)).error == ""


def test_a_fetch_beyond_its_deadline_is_told_at_once_and_answered_when_it_is_over() -> None:
    with a_side("owner", LAYOUT) as owner, a_side("a reader", LAYOUT, hold=threading.Event()) as reader:
        reader.transfer.submit(PeerOpen(peer=1, endpoint=owner.endpoint))
        assert reader.told.get(timeout=10) == PeerOpened(peer=1)
        reader.transfer.submit(a_fetch(owner, seconds=0.01))
        assert reader.told.get(timeout=10) == FetchOverdue(fetch=7)
        assert reader.told.empty()
        reader.hold.set()
        fetched = reader.told.get(timeout=10)
        assert isinstance(fetched, Fetched)
        assert "longer than 0.01 s" in fetched.error


def test_an_owner_of_another_layout_is_refused() -> None:
    with a_side("owner", WINDOW_ONLY) as owner, a_side("a reader", LAYOUT) as reader:
        reader.transfer.submit(PeerOpen(peer=1, endpoint=owner.endpoint))
        opened = reader.told.get(timeout=10)
        assert isinstance(opened, PeerOpened)
        assert "region" in opened.error


def test_a_peer_that_was_closed_is_unknown() -> None:
    with two_sides() as (owner, reader):
        reader.transfer.submit(PeerClose(peer=1))
        assert reader.fetch(a_fetch(owner)).error == "peer 1 is not connected"


def test_pages_of_a_model_without_paged_state_are_fetched_by_reading_nothing() -> None:
    with two_sides(WINDOW_ONLY) as (owner, reader):
        fetched = reader.fetch(a_fetch(owner, record=None))
        assert (fetched.error, fetched.num_bytes) == ("", 0)


# --- threads ---


def test_frames_of_several_threads_do_not_mix() -> None:
    host, rank = socket.socketpair()
    host.settimeout(10)
    with host, rank:
        writer = FrameWriter(rank)

        def write(fetch: int) -> None:
            for _ in range(20):
                # Longer than what a socket holds, so that a thread is interrupted within a frame.
                writer.write(Fetched(fetch, "x" * 500_000, num_bytes=0, transfer_ms=0.0, verify_ms=0.0))

        threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        reader = host.makefile("rb")
        found = [decode_from_rank(reader.read(payload_bytes(reader.read(HEADER.size)))) for _ in range(60)]
        for thread in threads:
            thread.join()
        reader.close()
    assert sorted(message.fetch for message in found) == sorted(list(range(3)) * 20)


class Commands:
    """Stands where a RankTransfer does, and holds what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def submit(self, command: Any) -> None:
        self.given.append(command)


def a_plan(number: int) -> StepPlan:
    return StepPlan(number=number, closes=(), opens=(), segments=())


@contextmanager
def a_reading_thread(plans: PlanQueue, commands: Commands) -> Iterator[socket.socket]:
    host, rank = socket.socketpair()
    with host, rank:
        reader = threading.Thread(target=read_host, args=(rank, plans, commands))
        reader.start()
        yield host
        host.close()
        reader.join(10)
        assert not reader.is_alive()


def test_plans_wait_in_order_while_commands_pass_them_by() -> None:
    plans, commands = PlanQueue(), Commands()
    with a_reading_thread(plans, commands) as host:
        for message in (a_plan(1), Expose(active=True), a_plan(2), PeerClose(peer=3), Shutdown()):
            host.sendall(encode_frame(message))
        assert [plans.next(), plans.next(), plans.next()] == [a_plan(1), a_plan(2), None]
        assert commands.given == [Expose(active=True), PeerClose(peer=3)]


def test_the_end_of_the_host_is_the_end_of_its_plans() -> None:
    plans = PlanQueue()
    with a_reading_thread(plans, Commands()) as host:
        host.sendall(encode_frame(a_plan(1)) + encode_frame(a_plan(2))[:-1])
        host.close()
        assert [plans.next(), plans.next()] == [a_plan(1), None]


@pytest.mark.parametrize(
    "data", [b"\x01\0\0\0\xc1", encode_frame(RankSettings("", "", False, 1, 1, 1, 1, 1, {}))]
)
def test_what_a_host_never_sends_ends_the_compute_thread_with_a_reason(data: bytes) -> None:
    plans = PlanQueue()
    with a_reading_thread(plans, Commands()) as host:
        host.sendall(encode_frame(a_plan(1)))
        assert plans.next() == a_plan(1)
        host.sendall(data)
        with pytest.raises(ThreadFailed, match=r"does not decode|settings come once"):
            plans.next()


def test_a_failed_thread_is_heard_before_plans_that_wait() -> None:
    plans = PlanQueue()
    for number in range(16):
        plans.put(a_plan(number))
    plans.fail(ValueError("of the transfer's thread"))
    with pytest.raises(ThreadFailed, match="of the transfer's thread"):
        plans.next()


def test_a_broken_invariant_on_the_transfer_thread_is_told() -> None:
    with two_sides() as (owner, reader):
        reader.transfer.submit(PeerOpen(peer=1, endpoint=owner.endpoint))
        assert "peer 1 is connected" in str(reader.failures.get(timeout=10))


def test_a_host_that_is_gone_stops_no_transfer_thread() -> None:
    tried: queue.Queue[FromTransfer] = queue.Queue()

    def tell(message: FromTransfer) -> None:
        tried.put(message)
        raise BrokenPipeError

    with a_side("owner", LAYOUT) as owner, a_side("a reader", LAYOUT, tell=tell) as reader:
        reader.transfer.submit(PeerOpen(peer=1, endpoint=owner.endpoint))
        assert tried.get(timeout=10) == PeerOpened(peer=1)
        reader.transfer.submit(a_fetch(owner))
        assert isinstance(tried.get(timeout=10), Fetched)
        assert reader.failures.empty()


# --- what a step lends, and what a slot begins with ---


class SmallRank:
    def __init__(self, *, exact: bool = True) -> None:
        config = config_of(real_ratios())
        model = build_model(config, random_tensors(config, seed=5), numerics=Numerics.SERVED, exact=exact)
        self.runner = Runner(model, num_pages=NUM_PAGES, num_slots=2, num_records=NUM_RECORDS)
        kernels = choose("cpu", {})
        sampler = Sampler(vocab_size=config.vocab_size, device=torch.device("cpu"), kernels=kernels)
        self.rank = Rank(self.runner, sampler=sampler, page_digest=kernels["page_digest"].function)
        self.tokens = random_tokens(config, 600, seed=9)
        self._num_plans = 0

    def open(self, slot: int, num_tokens: int, *, restore: Restore | None = None) -> SlotOpen:
        return SlotOpen(
            slot=slot,
            tokens=self.tokens[:num_tokens].numpy().astype("<i4").tobytes(),
            num_prompt=num_tokens,
            sampling=SamplingParams(seed=4),
            restore=restore,
        )

    def step(self, *segments: Segment, opens: tuple[SlotOpen, ...] = ()) -> StepResult:
        self._num_plans += 1
        return self.rank.step(StepPlan(number=self._num_plans, closes=(), opens=opens, segments=segments))

    def page_digests(self, *pages: int) -> tuple[int, ...]:
        return tuple(self.rank.digests.of_pages(pages))


def test_a_step_lends_the_pages_that_its_segments_complete() -> None:
    small = SmallRank()
    lent = [
        small.step(
            Segment(slot=1, start=0, count=255, pages=(4,), sample=False, lend=True),
            opens=(small.open(1, 600),),
        ),
        small.step(Segment(slot=1, start=255, count=1, pages=(), sample=False, lend=True)),
        small.step(Segment(slot=1, start=256, count=255, pages=(2,), sample=False, lend=True)),
        small.step(
            Segment(slot=1, start=511, count=10, pages=(0,), sample=False, lend=True),
            Segment(slot=0, start=0, count=512, pages=(1, 5), sample=False, lend=True),
            opens=(small.open(0, 600),),
        ),
    ]
    nothing = Lent(slot=1, page_digests=())
    assert lent[0].lent == (nothing,)
    assert lent[1].lent == (Lent(slot=1, page_digests=small.page_digests(4)),)
    assert lent[2].lent == (nothing,)
    assert lent[3].lent == (
        Lent(slot=1, page_digests=small.page_digests(2)),
        Lent(slot=0, page_digests=small.page_digests(1, 5)),
    )


def test_a_segment_that_is_not_lent_is_not_digested() -> None:
    small = SmallRank()
    result = small.step(
        Segment(slot=0, start=0, count=256, pages=(0,), sample=False), opens=(small.open(0, 256),)
    )
    assert result.lent == ()


def test_a_restored_slot_goes_on_as_the_slot_it_was_packed_from() -> None:
    one, other = SmallRank(), SmallRank()
    other.runner.pools.fill(0xFF)
    num_tokens = 300
    result = one.step(
        Segment(slot=0, start=0, count=num_tokens, pages=(3, 1), sample=True, lend=True, record=1),
        opens=(one.open(0, num_tokens),),
    )
    [lent] = result.lent
    assert lent.page_digests == one.page_digests(3)
    assert lent.record_digest == one.rank.digests.of_record(1, lent.record_bytes)
    for component in COMPONENTS:
        other.runner.pools[component].bytes_ulb[5] = one.runner.pools[component].bytes_ulb[3]
    other.runner.records[0, : lent.record_bytes] = one.runner.records[1, : lent.record_bytes]
    [first] = result.sampled
    tokens = torch.cat((one.tokens[:num_tokens], torch.tensor([first.token_id])))
    opened = SlotOpen(
        slot=1,
        tokens=tokens.numpy().astype("<i4").tobytes(),
        num_prompt=num_tokens,
        sampling=SamplingParams(seed=4),
        restore=Restore(num_computed=num_tokens, pages=(5, 0), record=0),
    )
    other.step(opens=(opened,))
    for position in range(num_tokens, num_tokens + 30):
        segments = [Segment(slot=slot, start=position, count=1, pages=(), sample=True) for slot in (0, 1)]
        [mine] = one.step(segments[0]).sampled
        [theirs] = other.step(segments[1]).sampled
        assert mine.token_id == theirs.token_id
