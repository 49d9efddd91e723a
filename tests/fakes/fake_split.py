"""Prefill and decode workers with computable answers, without ranks, memory or sockets: what a router sees of them.

They hold the router to the contract of `rorqual.session`: what it may not send is an assertion, kept in `failures`
since nobody awaits it. A prefill worker lends under leases that end by the loop's clock; a decode worker checks,
renews and releases them through `FakeLenders`, which stands for the Lending service. Each stage has a gate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from fake_state import EOS, PAGE_TOKENS, POSITIONS_MAX, VOCAB_SIZE, answer, logprob_of

from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.session import (
    Alternatives,
    Cancel,
    Command,
    Credit,
    ErrorCode,
    FinishReason,
    Load,
    Offer,
    Open,
    PromptLogprobs,
    RecordOffer,
    Renew,
    Role,
    SequenceReport,
    StepReport,
    Take,
    Welcome,
)

WIRE_ID = "fake-wire"
PAGES_PER_STEP = 2
RECORD_BYTES = 64


class Gates:
    """Named stages, all open until one is shut."""

    def __init__(self, *names: str) -> None:
        self._gates = {name: asyncio.Event() for name in names}
        self.reached = dict.fromkeys(names, 0)  # how many have come to each, ever
        for gate in self._gates.values():
            gate.set()

    def shut(self, name: str) -> None:
        self._gates[name].clear()

    def open(self, name: str) -> None:
        self._gates[name].set()

    async def wait(self, name: str) -> None:
        self.reached[name] += 1
        await self._gates[name].wait()


class FakeSession:
    """One router's stream, as `engine.worker.session.Session`."""

    def __init__(self, worker: FakeSplitWorker) -> None:
        self.tasks: dict[SequenceId, asyncio.Task[None]] = {}
        self.is_closed = False
        self._worker = worker
        self._outbox: list[SequenceReport] = []
        self._news = asyncio.Event()
        self._number = 0

    def submit(self, command: Command) -> None:
        self._worker.inbox.append((self, command))
        self._worker.take_commands()

    def push(self, report: SequenceReport) -> None:
        self._outbox.append(report)
        self._news.set()

    def announce(self) -> None:
        self._news.set()

    async def next_report(self) -> StepReport:
        try:
            async with asyncio.timeout(self._worker.heartbeat_seconds):
                await self._news.wait()
        except TimeoutError:
            pass
        await self._worker.runs.wait()
        self._news.clear()
        self._number += 1
        reports, self._outbox = self._outbox, []
        return StepReport(
            number=self._number,
            sequences=tuple(reports),
            load=self._worker.load(),
            draining=self._worker.draining,
            credit=self._worker.credit,
        )

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._worker.forget(self)


class FakeSplitWorker:
    role: Role

    def __init__(self, name: str, *, wire_id: str = WIRE_ID, credit: Credit | None = None) -> None:
        self.name = name
        self.wire_id = wire_id
        self.credit = credit
        self.incarnation = Incarnation(1)
        self.draining = False
        self.rate = 0.0  # prompt tokens a second, as it says
        self.heartbeat_seconds = 0.02
        self.runs = asyncio.Event()  # cleared: stopped, as by SIGSTOP; the session stands
        self.runs.set()
        self.inbox: deque[tuple[FakeSession, Command]] = deque()
        self.opened: list[Open] = []
        self.cancelled: list[SequenceId] = []
        self.refuses: tuple[ErrorCode, str] | None = None
        self.failures: list[BaseException] = []
        self.sessions: list[FakeSession] = []
        self.gates = Gates()

    def connect(self, router_id: str) -> FakeSession:
        session = FakeSession(self)
        self.sessions.append(session)
        return session

    def welcome(self) -> Welcome:
        return Welcome(
            worker_id=WorkerId(self.name),
            incarnation=self.incarnation,
            model_fingerprint="fake",
            numerics="float32",
            exact=False,
            vocab_size=VOCAB_SIZE,
            sequence_tokens_max=POSITIONS_MAX,
            eos_token_ids=(EOS,),
            sequences_max=4,
            load=self.load(),
            role=self.role,
            wire_id=self.wire_id,
            credit=self.credit,
        )

    def load(self) -> Load:
        return Load(
            sequences_running=sum(len(session.tasks) for session in self.sessions),
            sequences_waiting=0,
            tokens_waiting=0,
            pages_free=16,
            pages_total=16,
            slots_free=4,
            slots_total=4,
            step_ms=1.0,
            prefill_tokens_per_second=self.rate,
        )

    @property
    def is_idle(self) -> bool:
        assert not self.failures, self.failures
        return not self.inbox and not any(session.tasks for session in self.sessions)

    def stop(self) -> None:
        self.runs.clear()

    def resume(self) -> None:
        self.runs.set()
        self.take_commands()

    def set_draining(self) -> None:
        self.draining = True
        self.announce()

    def set_credit(self, credit: Credit) -> None:
        self.credit = credit
        self.announce()

    def announce(self) -> None:
        for session in self.sessions:
            session.announce()

    def take_commands(self) -> None:
        while self.inbox and self.runs.is_set():
            session, command = self.inbox.popleft()
            match command:
                case Open():
                    self._open(session, command)
                case Cancel():
                    self.cancelled.append(command.sequence_id)
                    self._end(session, command.sequence_id)
                case Renew() | Take():
                    self.take(session, command)

    def take(self, session: FakeSession, command: Renew | Take) -> None:
        raise AssertionError(f"{self.role.value} worker got {command}")

    def forget(self, session: FakeSession) -> None:
        for sequence_id in list(session.tasks):
            self._end(session, sequence_id)
        if session in self.sessions:
            self.sessions.remove(session)

    def fail(self, session: FakeSession, sequence_id: SequenceId, code: ErrorCode, text: str) -> None:
        """Ends it on this side too."""
        self._end(session, sequence_id)
        session.push(
            SequenceReport(
                sequence_id=sequence_id,
                first_index=0,
                finish_reason=FinishReason.ERROR,
                error=text,
                error_code=code,
            )
        )

    def fail_all(self, text: str, code: ErrorCode = ErrorCode.FAILED) -> None:
        for session in self.sessions:
            for sequence_id in list(session.tasks):
                self.fail(session, sequence_id, code, text)

    def ended(self, session: FakeSession, sequence_id: SequenceId) -> None:
        """A sequence is over, however it ended."""

    async def serve(self, session: FakeSession, command: Open) -> None:
        raise NotImplementedError

    async def stage(self, name: str) -> None:
        await self.gates.wait(name)
        await self.runs.wait()

    def _open(self, session: FakeSession, command: Open) -> None:
        self.opened.append(command)
        if self.refuses is not None:
            code, text = self.refuses
            self.fail(session, command.sequence_id, code, text)
            return
        task = asyncio.create_task(self._serve(session, command))
        session.tasks[command.sequence_id] = task

    async def _serve(self, session: FakeSession, command: Open) -> None:
        try:
            await self.serve(session, command)
        except AssertionError as error:
            self.failures.append(error)
        if session.tasks.get(command.sequence_id) is asyncio.current_task():
            del session.tasks[command.sequence_id]
            self.ended(session, command.sequence_id)

    def _end(self, session: FakeSession, sequence_id: SequenceId) -> None:
        task = session.tasks.pop(sequence_id, None)
        if task is not None:
            task.cancel()
            self.ended(session, sequence_id)


@dataclass
class Lent:
    name: LeaseName
    ends_at: float
    prompt: list[int]
    pages: list[int] = field(default_factory=list)
    is_read: bool = False
    renewed: asyncio.Event = field(default_factory=asyncio.Event)


class FakePrefill(FakeSplitWorker):
    """Stages: "prompt" before the first offer, "token", "record", and "handed_over" after a release."""

    role = Role.PREFILL

    def __init__(self, name: str, *, wire_id: str = WIRE_ID, lease_seconds: float = 5.0) -> None:
        super().__init__(name, wire_id=wire_id)
        self.gates = Gates("prompt", "token", "record", "handed_over")
        self.lease_seconds = lease_seconds
        self.leases: dict[tuple[FakeSession, SequenceId], Lent] = {}
        self.hears_renewals = True
        self.renewals: list[tuple[SequenceId, ...]] = []  # by routers
        self._next_generation = 1

    @property
    def is_idle(self) -> bool:
        return super().is_idle and not self.leases

    def take(self, session: FakeSession, command: Renew | Take) -> None:
        assert isinstance(command, Renew), f"prefill worker got {command}"
        self.renewals.append(command.sequence_ids)
        for sequence_id in command.sequence_ids:
            lent = self.leases.get((session, sequence_id))
            if lent is not None:
                self.renew(lent.name)

    def renew(self, name: LeaseName) -> bool:
        lent = self.lent(name)
        if lent is None:
            return False
        if not self.hears_renewals:
            return True
        lent.ends_at = asyncio.get_running_loop().time() + self.lease_seconds
        lent.renewed.set()
        return True

    def release(self, name: LeaseName) -> bool:
        lent = self.lent(name)
        if lent is None:
            return False
        lent.is_read = True
        lent.renewed.set()
        return True

    def lent(self, name: LeaseName) -> Lent | None:
        now = asyncio.get_running_loop().time()
        return next((item for item in self.leases.values() if item.name == name and item.ends_at > now), None)

    def ended(self, session: FakeSession, sequence_id: SequenceId) -> None:
        self.leases.pop((session, sequence_id), None)

    async def serve(self, session: FakeSession, command: Open) -> None:
        assert command.source is None
        prompt = command.prompt.tolist()
        first = answer(prompt, 1, command.sampling, ignore_eos=command.ignore_eos)[0]
        await self.stage("prompt")
        num_full = len(prompt) // PAGE_TOKENS
        for page in range(0, num_full, PAGES_PER_STEP):
            pages = tuple(100 + number for number in range(page, min(page + PAGES_PER_STEP, num_full)))
            self._offer(session, command, prompt, first_page=page, pages=pages)
            await asyncio.sleep(0)
        scores = _scores(command)
        if scores is not None:
            session.push(scores)
        await self.stage("token")
        is_last = command.max_tokens == 1 or (first == EOS and not command.ignore_eos)
        finish = FinishReason.LENGTH if command.max_tokens == 1 else FinishReason.STOP
        session.push(_tokens(command, 0, [first], finish=finish if is_last else None))
        if is_last:
            return
        await self.stage("record")
        record = RecordOffer(
            record=7, num_tokens=len(prompt), num_bytes=RECORD_BYTES, digest=digest_of(prompt)
        )
        lent = self._offer(session, command, prompt, first_page=num_full, pages=(), record=record)
        await self._lend(session, command.sequence_id, lent)

    async def _lend(self, session: FakeSession, sequence_id: SequenceId, lent: Lent) -> None:
        """Until it has been read, or nobody has renewed it for too long."""
        now = asyncio.get_running_loop().time
        while not lent.is_read:
            lent.renewed.clear()
            try:
                async with asyncio.timeout_at(lent.ends_at):
                    await lent.renewed.wait()
            except TimeoutError:
                if now() >= lent.ends_at:
                    self.fail(session, sequence_id, ErrorCode.FAILED, "the lease of the state expired")
                    return
        await self.stage("handed_over")
        session.push(
            SequenceReport(sequence_id=sequence_id, first_index=0, finish_reason=FinishReason.HANDED_OVER)
        )

    def _offer(
        self,
        session: FakeSession,
        command: Open,
        prompt: list[int],
        *,
        first_page: int,
        pages: tuple[int, ...],
        record: RecordOffer | None = None,
    ) -> Lent:
        key = (session, command.sequence_id)
        if key not in self.leases:
            name = LeaseName(
                worker_id=WorkerId(self.name),
                incarnation=self.incarnation,
                lease_id=7,
                generation=self._next_generation,
            )
            self._next_generation += 1
            ends_at = asyncio.get_running_loop().time() + self.lease_seconds
            self.leases[key] = Lent(name=name, ends_at=ends_at, prompt=prompt)
        lent = self.leases[key]
        assert first_page == len(lent.pages)
        lent.pages += pages
        offer = Offer(
            lease=lent.name,
            wire_id=self.wire_id,
            lease_seconds=self.lease_seconds,
            transfer_seconds=self.lease_seconds / 2,
            first_page=first_page,
            pages=pages,
            digests=tuple(digest_of(page_of(prompt, page - 100)) for page in pages),
            record=record,
        )
        session.push(SequenceReport(sequence_id=command.sequence_id, first_index=0, offer=offer))
        return lent


class FakeLenders:
    """Addresses to prefill workers, as decode workers reach them."""

    def __init__(self) -> None:
        self.workers: dict[str, FakePrefill] = {}

    def renew(self, address: str, name: LeaseName) -> str:
        """Why the lease cannot be renewed; empty when it was."""
        worker = self.workers.get(address)
        if worker is None or not worker.runs.is_set():
            return f"{address} does not answer"
        return "" if worker.renew(name) else f"the lease at {address} has ended"


class FakeDecode(FakeSplitWorker):
    """Stages: "room" before it is bound, "read" before it confirms, "first" before its first token, "more" after."""

    role = Role.DECODE

    def __init__(
        self,
        name: str,
        lenders: FakeLenders,
        *,
        wire_id: str = WIRE_ID,
        credit: Credit | None = None,
    ) -> None:
        super().__init__(name, wire_id=wire_id, credit=credit or Credit(sequences=8, pages=64))
        self.gates = Gates("room", "read", "first", "more")
        self.num_read = 0
        self._lenders = lenders
        self._takes: dict[tuple[FakeSession, SequenceId], asyncio.Queue[Take]] = {}

    def take(self, session: FakeSession, command: Renew | Take) -> None:
        assert isinstance(command, Take), f"decode worker got {command}"
        queue = self._takes.get((session, command.sequence_id))
        if queue is not None:
            queue.put_nowait(command)

    def _open(self, session: FakeSession, command: Open) -> None:
        self._takes[session, command.sequence_id] = asyncio.Queue()
        super()._open(session, command)

    def ended(self, session: FakeSession, sequence_id: SequenceId) -> None:
        self._takes.pop((session, sequence_id), None)

    async def serve(self, session: FakeSession, command: Open) -> None:
        source = command.source
        assert source is not None
        assert command.sampling.prompt_logprobs is None, "the prompt's logprobs are the prefill worker's"
        assert command.max_tokens >= 2
        if source.wire_id != self.wire_id:
            self.fail(session, command.sequence_id, ErrorCode.INVALID, f"state has wire id {source.wire_id}")
            return
        await self.stage("room")
        if not self._renewed(session, command):
            return
        session.push(SequenceReport(sequence_id=command.sequence_id, first_index=0, bound=True))
        token_ids = await self._read(self._takes[session, command.sequence_id], command)
        await self.stage("read")
        if not self._renewed(session, command):
            return
        self.num_read += 1
        prompt = command.prompt.tolist()
        tokens = answer(prompt, command.max_tokens, command.sampling, ignore_eos=command.ignore_eos)
        assert list(token_ids) == tokens[:1], f"the first token is {tokens[0]}, not {token_ids}"
        await self.stage("first")
        for index in range(1, len(tokens)):
            finish = FinishReason.LENGTH if len(tokens) == command.max_tokens else FinishReason.STOP
            is_last = index == len(tokens) - 1
            session.push(
                _tokens(command, index, tokens[index : index + 1], finish=finish if is_last else None)
            )
            if index == 1:
                self._lenders.workers[source.address].release(source.lease)
            await asyncio.sleep(0)
            await self.stage("more")

    def _renewed(self, session: FakeSession, command: Open) -> bool:
        assert command.source is not None
        why = self._lenders.renew(command.source.address, command.source.lease)
        if why:
            self.fail(session, command.sequence_id, ErrorCode.FAILED, why)
        return not why

    async def _read(self, takes: asyncio.Queue[Take], command: Open) -> tuple[int, ...]:
        prompt = command.prompt.tolist()
        num_pages = 0
        while True:
            take = await takes.get()
            offer = take.offer
            assert command.source is not None
            assert (offer.lease, offer.wire_id) == (command.source.lease, command.source.wire_id)
            assert offer.first_page == num_pages
            for page, digest in zip(offer.pages, offer.digests, strict=True):
                assert page == 100 + num_pages
                assert digest == digest_of(page_of(prompt, num_pages)), f"page {num_pages} is another's"
                num_pages += 1
            if offer.record is not None:
                assert num_pages == len(prompt) // PAGE_TOKENS
                assert offer.record.digest == digest_of(prompt)
                return take.token_ids
            assert not take.token_ids


def digest_of(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 2**64


def page_of(prompt: list[int], number: int) -> list[int]:
    return prompt[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]


def _tokens(command: Open, index: int, tokens: list[int], *, finish: FinishReason | None) -> SequenceReport:
    wants = command.sampling.logprobs is not None
    start = len(command.prompt) + index
    none = Alternatives(token_ids=(), logprobs=())
    return SequenceReport(
        sequence_id=command.sequence_id,
        first_index=index,
        token_ids=tuple(tokens),
        logprobs=tuple(logprob_of(token, start + number) for number, token in enumerate(tokens))
        if wants
        else (),
        alternatives=(none,) * len(tokens) if wants else (),
        finish_reason=finish,
    )


def _scores(command: Open) -> SequenceReport | None:
    if command.sampling.prompt_logprobs is None:
        return None
    prompt = command.prompt.tolist()
    none = Alternatives(token_ids=(), logprobs=())
    return SequenceReport(
        sequence_id=command.sequence_id,
        first_index=0,
        prompt_logprobs=PromptLogprobs(
            logprobs=tuple(logprob_of(prompt[index], index) for index in range(1, len(prompt))),
            alternatives=(none,) * (len(prompt) - 1),
        ),
    )
