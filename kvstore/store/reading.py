"""Reads from a store: each key once at a time, in few round trips, within a budget. No torch.

Keys are grouped by server into batches, one round trip each; a key that is on its way already is not asked for again,
whoever wants it. Values are checked and counted as they come, so that at the end of its budget a read has what has come
by then. A batch that nobody waits for any more is given up, and its connection with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.store.connections import Command, ErrorReply, NodeName, Reply, ServerLost, window_for
from kvstore.store.contract import Kind, Miss, StoreKey
from kvstore.store.counts import Observe, StoreCounts
from kvstore.store.gate import ByteGate
from kvstore.store.health import Health
from kvstore.store.names import value_name
from kvstore.store.presence import ask_presence
from kvstore.store.servers import Servers
from kvstore.store.value import HEADER_BYTES, Flaw, Form, decode_value
from rorqual.clock import Clock

_Result = memoryview | Miss


@dataclass(eq=False, slots=True, kw_only=True)
class _Batch:
    node: NodeName
    results: dict[StoreKey, asyncio.Future[_Result]]
    num_bytes: int  # that its values may have together
    num_waiting: int = 0  # reads that want something of it
    began: float | None = None  # when its server was asked
    task: asyncio.Task[None] | None = field(default=None)


class Reading:
    def __init__(
        self,
        servers: Servers,
        health: Health,
        form: Form,
        *,
        payload_bytes: dict[Kind, int],
        bytes_max: int,
        clock: Clock,
        counts: StoreCounts,
        discard: Callable[[Sequence[StoreKey]], None],
        observe: Observe,
    ) -> None:
        """`payload_bytes` are the most that a payload of each kind has; values on their way take `bytes_max` at most.
        `discard` is told of values that are no use."""
        self._servers = servers
        self._health = health
        self._form = form
        self._value_bytes = {kind: HEADER_BYTES + num_bytes for kind, num_bytes in payload_bytes.items()}
        self._gate = ByteGate(max(bytes_max, *self._value_bytes.values()))
        self._clock = clock
        self._counts = counts
        self._discard = discard
        self._observe = observe
        self._batches: dict[StoreKey, _Batch] = {}  # of keys that are on their way
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def bytes_in_flight(self) -> int:
        return self._gate.num_bytes

    async def run(self) -> None:
        """Own the batches. Until cancelled, which ends them all."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.Event().wait()
            finally:
                self._tasks = None

    async def read(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[memoryview | None]:
        began = self._clock.monotonic()
        wanted, misses = self._start(keys)
        batches = {id(batch): batch for batch, _ in wanted.values()}.values()
        for batch in batches:
            batch.num_waiting += 1
        try:
            pending = {future for _, future in wanted.values() if not future.done()}
            if pending:
                await asyncio.wait(pending, timeout=budget_seconds)
            is_overdue = any(not future.done() for future in pending)
            if is_overdue:
                self._counts.reads_overdue += 1
                self._blame(batches)
        finally:
            for batch in batches:
                self._leave(batch)
        results = misses | {
            key: future.result() if future.done() and not future.cancelled() else Miss.OVERDUE
            for key, (_, future) in wanted.items()
        }
        self._observe(self._clock.monotonic() - began)
        return [self._counted(key, results[key]) for key in keys]

    async def contains(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[bool]:
        if self._tasks is None:
            return [False for _ in keys]
        known = await ask_presence(
            [self._name(key) for key in keys],
            servers=self._servers,
            health=self._health,
            clock=self._clock,
            counts=self._counts,
            budget_seconds=budget_seconds,
        )
        return [known.get(self._name(key), False) for key in keys]

    def _start(
        self, keys: Sequence[StoreKey]
    ) -> tuple[dict[StoreKey, tuple[_Batch, asyncio.Future[_Result]]], dict[StoreKey, _Result]]:
        """Where each key will come from; and those that will not."""
        found: dict[StoreKey, tuple[_Batch, asyncio.Future[_Result]]] = {}
        new: dict[StoreKey, None] = {}
        for key in keys:
            batch = self._batches.get(key)
            if batch is None:
                new[key] = None
            elif key not in found:
                found[key] = batch, batch.results[key]
                self._counts.values_shared += 1
        groups, misses = self._grouped(new)
        for node, group in groups.items():
            for batch in self._batched(node, group):
                found |= {key: (batch, future) for key, future in batch.results.items()}
        return found, dict[StoreKey, _Result](misses)

    def _grouped(
        self, keys: dict[StoreKey, None]
    ) -> tuple[dict[NodeName, list[StoreKey]], dict[StoreKey, Miss]]:
        groups: dict[NodeName, list[StoreKey]] = {}
        misses: dict[StoreKey, Miss] = {}
        for key in keys:
            node = self._servers.node_of(self._name(key))
            if node is None or self._tasks is None or not self._health.is_up(node):
                misses[key] = Miss.DOWN
            else:
                groups.setdefault(node, []).append(key)
        return groups, misses

    def _batched(self, node: NodeName, keys: list[StoreKey]) -> list[_Batch]:
        """Started. Each has a quarter of what may be on its way at most, so that several reads go on at once."""
        loop = asyncio.get_running_loop()
        batches: list[_Batch] = []
        bytes_max = self._gate.capacity // 4
        for key in keys:
            num_bytes = self._value_bytes[key.kind]
            if not batches or batches[-1].num_bytes + num_bytes > bytes_max:
                batches.append(_Batch(node=node, results={}, num_bytes=0))
            batches[-1].results[key] = loop.create_future()
            batches[-1].num_bytes += num_bytes
            self._batches[key] = batches[-1]
        assert self._tasks is not None
        for batch in batches:
            batch.task = self._tasks.create_task(self._fetch(batch))
        return batches

    async def _fetch(self, batch: _Batch) -> None:
        """Sets all its results; sooner or later, as replies come."""
        keys = list(batch.results)
        node = batch.node
        broken: list[StoreKey] = []

        def receive(number: int, reply: Reply) -> None:
            self._health.worked(node)
            result = self._checked(keys[number], reply)
            if isinstance(result, Miss) and result in _USELESS:
                broken.append(keys[number])
            batch.results[keys[number]].set_result(result)

        try:
            async with self._gate.taken(batch.num_bytes), self._servers.turns(node):
                batch.began = self._clock.monotonic()
                try:
                    commands: list[Command] = [("GET", self._name(key)) for key in keys]
                    window = window_for(batch.num_bytes // len(keys))
                    await self._servers.exchange(node, commands, receive, window=window)
                except ServerLost as error:
                    self._health.failed(node, batch.began, error)
        finally:
            self._forget(batch)
            for future in batch.results.values():
                if not future.done():
                    future.set_result(Miss.FAILED)
            if broken:
                self._discard(broken)

    def _checked(self, key: StoreKey, reply: Reply) -> _Result:
        if reply is None:
            return Miss.ABSENT
        if not isinstance(reply, bytes):
            code = reply.code if isinstance(reply, ErrorReply) else "other"
            self._counts.error_replies[code] += 1
            return Miss.FOREIGN if code == "WRONGTYPE" else Miss.FAILED
        payload = decode_value(self._form, key.kind, key.page, reply)
        return payload.value if isinstance(payload, Flaw) else payload

    def _blame(self, batches: Iterable[_Batch]) -> None:
        """Those servers that were asked and have not answered all."""
        for batch in batches:
            if batch.began is not None and not all(future.done() for future in batch.results.values()):
                self._health.overdue(batch.node, batch.began)

    def _leave(self, batch: _Batch) -> None:
        """A read wants nothing of it any more."""
        batch.num_waiting -= 1
        if batch.num_waiting == 0 and batch.task is not None and not batch.task.done():
            # At once: who asks for these keys from now on must not join what is ending.
            self._forget(batch)
            batch.task.cancel()

    def _forget(self, batch: _Batch) -> None:
        for key in batch.results:
            if self._batches.get(key) is batch:
                del self._batches[key]

    def _name(self, key: StoreKey) -> bytes:
        return value_name(self._form.wire_id, key)

    def _counted(self, key: StoreKey, result: _Result) -> memoryview | None:
        if isinstance(result, Miss):
            self._counts.values_missed[result] += 1
            return None
        self._counts.values_read[key.kind] += 1
        self._counts.bytes_read[key.kind] += len(result)
        return result


_USELESS = (Miss.FOREIGN, Miss.VERSION, Miss.TRUNCATED, Miss.CORRUPT)
