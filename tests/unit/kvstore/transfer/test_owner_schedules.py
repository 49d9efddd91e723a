"""Any schedule of fetches, ends of reads and time: what a host may count on."""

from __future__ import annotations

from fake_transfer import FakeTransfer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.transfer.contract import PeerId, ReadId, Run
from kvstore.transfer.owner import POST_BYTES_MAX, Disconnect, Event, Fetch, Fetched, Overdue, OwnerLoop
from rorqual.clock import ManualClock

PEERS = st.sampled_from([PeerId(-1), PeerId(1), PeerId(2)])  # what is posted to the first fails


class Schedules(RuleBasedStateMachine):
    """Each fetch reads from a region that is called like it, so that its reads are known."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeTransfer()
        self.clock = ManualClock(50.0)
        self.loop = OwnerLoop(self.engine, self.on_event, self.clock)
        self.fetches: dict[int, Fetch] = {}
        self.deadlines: dict[int, float] = {}
        self.overdue: set[int] = set()
        self.verified: set[int] = set()
        self.answered: set[int] = set()

    def on_event(self, event: Event) -> None:
        if isinstance(event, Overdue):
            assert event.fetch not in self.overdue | self.answered
            assert self.clock.now > self.deadlines[event.fetch]
            self.overdue.add(event.fetch)
        else:
            assert isinstance(event, Fetched)
            assert event.fetch not in self.answered, "answered twice"
            self.answered.add(event.fetch)
            fetch = self.fetches[event.fetch]
            assert not self.open_reads(event.fetch), "answered while a read may write into its targets"
            if not event.error:
                assert event.num_bytes == sum(run.num_bytes for run in fetch.runs)
                assert event.fetch in self.verified
            assert (event.fetch in self.verified) <= (event.fetch not in self.overdue)

    def open_reads(self, fetch: int) -> set[ReadId]:
        return {read for read in self.engine.open if self.engine.runs[read][0].region == str(fetch)}

    def verify(self, fetch: int) -> str:
        assert not self.open_reads(fetch)
        self.verified.add(fetch)
        return ""

    @rule(peer=PEERS, parts=st.integers(0, 3), seconds=st.floats(0, 3), queued=st.floats(0, 1))
    def submit(self, peer: PeerId, parts: int, seconds: float, queued: float) -> None:
        number = len(self.fetches) + 1
        runs = [Run(region=str(number), source=0, target=0, num_bytes=POST_BYTES_MAX) for _ in range(parts)]
        fetch = Fetch(fetch=number, peer=peer, runs=runs, seconds=seconds, verify=lambda: self.verify(number))
        self.fetches[number] = fetch
        self.deadlines[number] = self.clock.now - queued + seconds
        self.loop.take(fetch, submitted_at=self.clock.now - queued)

    @rule(seconds=st.floats(0, 2))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(times=st.integers(1, 5))
    def look(self, times: int) -> None:
        for _ in range(times):
            assert 0 <= self.loop.look() <= 0.05

    @precondition(lambda self: self.engine.open - self.engine.done - self.engine.failed)
    @rule(data=st.data(), is_done=st.booleans())
    def end_a_read(self, data: st.DataObject, is_done: bool) -> None:
        waiting = sorted(self.engine.open - self.engine.done - self.engine.failed)
        (self.engine.done if is_done else self.engine.failed).add(data.draw(st.sampled_from(waiting)))

    @rule(peer=PEERS)
    def leave(self, peer: PeerId) -> None:
        if all(fetch.peer != peer for number, fetch in self.fetches.items() if number not in self.answered):
            self.loop.take(Disconnect(peer=peer), submitted_at=self.clock.now)

    @invariant()
    def one_read_of_a_fetch_at_a_time(self) -> None:
        for number in self.fetches.keys() - self.answered:
            assert len(self.open_reads(number)) <= 1

    def teardown(self) -> None:
        """Once every read has ended, every fetch is answered: within three looks for each part and turn."""
        for _ in range(10 * len(self.fetches) + 10):
            self.engine.done |= self.engine.open - self.engine.failed
            self.loop.look()
        assert self.answered == self.fetches.keys()
        assert not self.engine.open


Schedules.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSchedules = Schedules.TestCase
