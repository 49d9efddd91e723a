"""Writes to a store: a bounded queue, and one task that takes batches from it to the servers. No torch.

What the queue has no room for is dropped, as is what a server cannot take: nothing is tried twice. Before the bytes of
a value travel its server is asked, by renewing its time, whether it has it already: equal names have equal bytes. Where
tenants have a quota, their accounts are charged in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.store.connections import (
    WINDOW_COMMANDS,
    Command,
    ErrorReply,
    NodeName,
    Receive,
    Reply,
    ServerLost,
    window_for,
)
from kvstore.store.contract import Drop, Payload, StoreKey, TenantLabel
from kvstore.store.counts import StoreCounts
from kvstore.store.health import Health
from kvstore.store.names import account_name, value_name
from kvstore.store.quota import (
    ADDED,
    CORRECT_SECONDS,
    REFUSED,
    Entry,
    charge,
    first_to_expire,
    give_back,
    member_name,
)
from kvstore.store.servers import Servers
from kvstore.store.value import HEADER_BYTES, Form, encode_value
from rorqual.clock import Clock

DELETIONS_MAX = 1024
_TENANTS_MAX = 4096
_OUT_OF_MEMORY = "OOM"

_Values = dict[StoreKey, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingConfig:
    ttl_seconds: float
    tenant_bytes_max: int | None  # None: no quotas, and no accounts
    queue_bytes_max: int
    batch_bytes_max: int
    server_seconds_max: float  # that one round trip may take


class Writing:
    def __init__(
        self,
        servers: Servers,
        health: Health,
        form: Form,
        config: WritingConfig,
        *,
        clock: Clock,
        counts: StoreCounts,
    ) -> None:
        self._servers = servers
        self._health = health
        self._form = form
        self._config = config
        self._clock = clock
        self._counts = counts
        self._queue: OrderedDict[StoreKey, bytes] = OrderedDict()
        self._deletions: deque[StoreKey] = deque()
        self._bytes_waiting = 0
        self._bytes_written = 0  # of the batch that is being written
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._corrected: OrderedDict[TenantLabel, float] = OrderedDict()

    @property
    def bytes_queued(self) -> int:
        """Of values that are not written yet."""
        return self._bytes_waiting + self._bytes_written

    def write(self, key: StoreKey, payload: Payload) -> bool:
        if key in self._queue:
            return True
        if self.bytes_queued + HEADER_BYTES + memoryview(payload).nbytes > self._config.queue_bytes_max:
            self._dropped(Drop.QUEUE_FULL)
            return False
        value = encode_value(self._form, key.kind, key.page, payload)
        self._queue[key] = value
        self._bytes_waiting += len(value)
        self._wake()
        return True

    def delete(self, keys: Iterable[StoreKey]) -> None:
        """What waits to be written, too."""
        for key in keys:
            self._bytes_waiting -= len(self._queue.pop(key, b""))
            self.discard((key,))

    def discard(self, keys: Iterable[StoreKey]) -> None:
        """Delete what is stored; what waits to be written is better and will be."""
        for key in keys:
            if len(self._deletions) >= DELETIONS_MAX:
                self._counts.deletions_dropped += 1
            else:
                self._deletions.append(key)
        self._wake()

    async def flushed(self) -> None:
        """Until everything given so far has been written, deleted or dropped."""
        await self._is_idle.wait()

    async def run(self) -> None:
        """Until cancelled; what waits then is lost."""
        while True:
            await self._has_work.wait()
            await self._delete()
            batch = self._take_batch()
            try:
                async with asyncio.TaskGroup() as tasks:
                    for node, values in self._by_node(batch).items():
                        tasks.create_task(self._write_to(node, values))
            finally:
                self._bytes_written = 0
            if not self._queue and not self._deletions:
                self._has_work.clear()
                self._is_idle.set()

    def _wake(self) -> None:
        self._has_work.set()
        self._is_idle.clear()

    def _take_batch(self) -> _Values:
        batch: _Values = {}
        while self._queue:
            value = next(iter(self._queue.values()))
            if batch and self._bytes_written + len(value) > self._config.batch_bytes_max:
                break
            key, value = self._queue.popitem(last=False)
            batch[key] = value
            self._bytes_waiting -= len(value)
            self._bytes_written += len(value)
        return batch

    def _by_node(self, values: _Values) -> dict[NodeName, _Values]:
        """Of those whose server is known and well; the others are dropped."""
        by_node: dict[NodeName, _Values] = {}
        for key, value in values.items():
            node = self._node_of(self._name(key))
            if node is None:
                self._dropped(Drop.DOWN)
            else:
                by_node.setdefault(node, {})[key] = value
        return by_node

    async def _write_to(self, node: NodeName, values: _Values) -> None:
        if not self._health.may_write(node):
            self._dropped(Drop.OUT_OF_MEMORY, len(values))
            return
        left = dict(values)  # what nothing has become of yet
        try:
            present = await self._renewed(node, left)
            added = await self._charged(left, present)
            for key in present:
                if left.pop(key, None) is not None:
                    self._counts.values_present[key.kind] += 1
            if left:
                await self._set(node, left, added)
        except ServerLost:
            self._dropped(Drop.FAILED, len(left))
        finally:
            self._health.did_not_write(node)

    async def _renewed(self, node: NodeName, values: _Values) -> set[StoreKey]:
        """Those that the server has; they will live on as if they were written now."""
        milliseconds = int(self._config.ttl_seconds * 1000)
        keys = list(values)
        replies = await self._ask(node, [("PEXPIRE", self._name(key), milliseconds) for key in keys])
        return {key for key, reply in zip(keys, replies, strict=True) if reply == 1}

    async def _set(self, node: NodeName, left: _Values, added: dict[StoreKey, bytes]) -> None:
        """Takes from `left` as replies come, and gives back what was charged for those that were not written."""
        milliseconds = int(self._config.ttl_seconds * 1000)
        items = list(left.items())
        began = self._clock.monotonic()
        num_full = 0

        def receive(number: int, reply: Reply) -> None:
            nonlocal num_full
            key, value = items[number]
            del left[key]
            if reply == b"OK":
                self._counts.values_written[key.kind] += 1
                self._counts.bytes_written[key.kind] += len(value) - HEADER_BYTES
                added.pop(key, None)
            elif isinstance(reply, ErrorReply) and reply.code == _OUT_OF_MEMORY:
                self._dropped(Drop.OUT_OF_MEMORY)
                num_full += 1
            else:
                self._dropped(Drop.FAILED)

        commands: list[Command] = [
            ("SET", self._name(key), value, "PX", milliseconds) for key, value in items
        ]
        try:
            window = window_for(max(len(value) for _, value in items))
            await self._exchange(node, commands, receive, window=window)
        except ServerLost:
            await self._give_back(added)
            raise
        await self._give_back(added)
        if num_full:
            self._health.was_full(node, began)
        elif len(items) > len(left):
            self._health.wrote(node)

    async def _charged(self, left: _Values, present: set[StoreKey]) -> dict[StoreKey, bytes]:
        """Charges the accounts, takes from `left` what has no room, and says what was added: members by key."""
        added: dict[StoreKey, bytes] = {}
        bytes_max = self._config.tenant_bytes_max
        if bytes_max is None:
            return added
        by_tenant: dict[TenantLabel, list[StoreKey]] = {}
        for key in left:
            by_tenant.setdefault(key.tenant, []).append(key)
        for tenant, keys in by_tenant.items():
            entries = [
                Entry(name=self._name(key), num_bytes=len(left[key]), is_present=key in present)
                for key in keys
            ]
            node = self._node_of(account_name(tenant))
            answer: Reply = None
            if node is not None:
                command = charge(tenant, entries, bytes_max=bytes_max, ttl_seconds=self._config.ttl_seconds)
                (answer,) = await self._ask(node, [command])
            if node is None or not isinstance(answer, list):
                # Who cannot count does not write.
                for key in keys:
                    del left[key]
                self._dropped(Drop.FAILED, len(keys))
                continue
            for key, entry, number in zip(keys, entries, answer, strict=True):
                if number == REFUSED:
                    del left[key]
                    self._dropped(Drop.QUOTA)
                elif number == ADDED:
                    added[key] = entry.member
            if REFUSED in answer:
                await self._correct(node, tenant)
        return added

    async def _correct(self, node: NodeName, tenant: TenantLabel) -> None:
        """Look for what the account has and no server: see `kvstore.store.quota`."""
        now = self._clock.monotonic()
        if now - self._corrected.get(tenant, float("-inf")) < CORRECT_SECONDS:
            return
        self._corrected[tenant] = now
        self._corrected.move_to_end(tenant)
        if len(self._corrected) > _TENANTS_MAX:
            self._corrected.popitem(last=False)
        settled = (
            2 * self._config.server_seconds_max
        )  # what was charged that long ago was written, or given back
        command = first_to_expire(tenant, ttl_seconds=self._config.ttl_seconds, settled_seconds=settled)
        (members,) = await self._ask(node, [command])
        by_node: dict[NodeName, list[bytes]] = {}
        for member in members if isinstance(members, list) else []:
            holder = self._node_of(member_name(member))
            if holder is not None:
                by_node.setdefault(holder, []).append(member)
        gone: list[bytes] = []
        for holder, some in by_node.items():
            replies = await self._ask(holder, [("EXISTS", member_name(member)) for member in some])
            gone += [member for member, reply in zip(some, replies, strict=True) if reply == 0]
        if gone:
            await self._ask(node, [give_back(tenant, gone)])
            self._counts.accounts_corrected += len(gone)

    async def _give_back(self, added: dict[StoreKey, bytes]) -> None:
        """What was charged for nothing. Should this fail too, it stays counted until it would have expired."""
        by_tenant: dict[TenantLabel, list[bytes]] = {}
        for key, member in added.items():
            by_tenant.setdefault(key.tenant, []).append(member)
        for tenant, members in by_tenant.items():
            node = self._node_of(account_name(tenant))
            if node is not None:
                with contextlib.suppress(ServerLost):
                    await self._ask(node, [give_back(tenant, members)])

    async def _delete(self) -> None:
        by_node: dict[NodeName, list[StoreKey]] = {}
        while self._deletions:
            key = self._deletions.popleft()
            node = self._node_of(self._name(key))
            if node is None:
                self._counts.deletions_dropped += 1
            else:
                by_node.setdefault(node, []).append(key)
        for node, keys in by_node.items():
            try:
                replies = await self._ask(node, [("UNLINK", self._name(key)) for key in keys])
                self._counts.values_deleted += replies.count(1)
            except ServerLost:
                self._counts.deletions_dropped += len(keys)

    async def _ask(self, node: NodeName, commands: Sequence[Command]) -> list[Reply]:
        replies: list[Reply] = [None] * len(commands)
        await self._exchange(node, commands, replies.__setitem__)
        return replies

    async def _exchange(
        self,
        node: NodeName,
        commands: Sequence[Command],
        receive: Receive,
        *,
        window: int = WINDOW_COMMANDS,
    ) -> None:
        """One exchange, within its time. Raises ServerLost, which the server's health has been told of."""
        began = self._clock.monotonic()

        def receive_counted(number: int, reply: Reply) -> None:
            self._health.worked(node)
            if isinstance(reply, ErrorReply):
                self._counts.error_replies[reply.code] += 1
            receive(number, reply)

        try:
            async with asyncio.timeout(self._config.server_seconds_max), self._servers.turns(node):
                began = self._clock.monotonic()
                await self._servers.exchange(node, commands, receive_counted, window=window)
        except TimeoutError:
            error = ServerLost(f"{node} took too long for a write", code="timeout")
            self._health.failed(node, began, error)
            raise error from None
        except ServerLost as error:
            self._health.failed(node, began, error)
            raise

    def _node_of(self, name: bytes) -> NodeName | None:
        """None also for a server that is lost."""
        node = self._servers.node_of(name)
        return node if node is not None and self._health.is_up(node) else None

    def _name(self, key: StoreKey) -> bytes:
        return value_name(self._form.wire_id, key)

    def _dropped(self, why: Drop, count: int = 1) -> None:
        self._counts.values_dropped[why] += count
