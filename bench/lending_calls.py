"""What the calls of one hand-over take: two renewals and a release, over gRPC to another process.

`seconds()` is for `bench.transfer`'s column; `python -m bench.lending_calls own` is the owner: a real door with a real
ledger behind it, and as many leases as will be asked for. The endpoint is asked for once per owner, not per hand-over.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from engine.plan import ToTransfer
from engine.worker.events import LentEvent, SequenceKey
from engine.worker.scheduler import Scheduler
from engine.worker.session_server import SessionServer
from engine.worker.sharing.exposure import Exposure
from engine.worker.sharing.key_lending import KeyLender, KeyLenderConfig, KeyLendingMetrics
from engine.worker.sharing.lending_client import GrpcLenders
from engine.worker.sharing.lending_server import LendingServer
from kvstore.transfer.contract import Endpoint
from prefill_worker.lending import Lender, LenderConfig
from prefill_worker.metrics import LendingMetrics
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError
from rorqual.ids import Incarnation, LeaseName, RecordId, WorkerId
from rorqual.session import ErrorCode, Source

OWNER = WorkerId("bench-owner")
INCARNATION = Incarnation(7)
WIRE_ID = "0" * 16
NUM_LEASES = 300
NUM_WARM = 50
SECONDS_MAX = 60.0


def seconds() -> float:
    """The median over some hundred hand-overs."""
    command = [sys.executable, "-m", "bench.lending_calls", "own"]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        if not address:
            raise RorqualError("the owner of the leases did not start")
        return asyncio.run(_measure(address))
    finally:
        assert owner.stdin is not None
        owner.stdin.close()
        owner.wait(timeout=SECONDS_MAX)


async def _measure(address: str) -> float:
    lenders = GrpcLenders()
    loop = asyncio.get_running_loop()
    times: list[float] = []
    for lease_id in range(NUM_LEASES):
        name = LeaseName(worker_id=OWNER, incarnation=INCARNATION, lease_id=lease_id, generation=1)
        source = Source(address=address, lease=name, wire_id=WIRE_ID)
        started = loop.time()
        before = await lenders.renew(source, seconds_max=SECONDS_MAX)
        after = await lenders.renew(source, seconds_max=SECONDS_MAX)
        was_live = await lenders.release(source, seconds_max=SECONDS_MAX)
        times.append(loop.time() - started)
        if before is None or after is None or not was_live:
            raise RorqualError(f"lease {lease_id} was not live")
    await lenders.close()
    return statistics.median(times[NUM_WARM:])


class _NoHost:
    """A host whose sequences are none of the measurement's business: what it is told is dropped."""

    @property
    def scheduler(self) -> Scheduler:
        raise AssertionError("nothing is scheduled here")

    def send(self, message: ToTransfer) -> None:
        pass

    def enqueue(self, effect: Callable[[], None]) -> None:
        pass

    def tell_bound(self, key: SequenceKey) -> None:
        pass

    def hand_over(self, key: SequenceKey) -> None:
        pass

    def fail(self, key: SequenceKey, code: ErrorCode, text: str) -> None:
        pass


async def _own() -> None:
    metrics = LendingMetrics(CollectorRegistry())
    config = LenderConfig(
        worker_id=OWNER,
        incarnation=INCARNATION,
        wire_id=WIRE_ID,
        num_records=NUM_LEASES,
        lease_seconds=10 * SECONDS_MAX,
    )
    lender = Lender(config, clock=SystemClock(), metrics=metrics)
    lender.attach(_NoHost())
    for record in range(NUM_LEASES):
        lender.lend(
            LentEvent(
                key=SequenceKey(record),
                record=RecordId(record),
                num_tokens=1,
                record_bytes=4,
                record_digest=0,
            )
        )
    keys = KeyLender(
        KeyLenderConfig(worker_id=OWNER, incarnation=INCARNATION, wire_id=WIRE_ID),
        clock=SystemClock(),
        metrics=KeyLendingMetrics(CollectorRegistry()),
        exposure=Exposure(),
    )
    keys.attach(_NoHost())
    lending = LendingServer()
    lending.attach(
        keys,
        others=(lender,),
        endpoint=Endpoint(backend="shm", agent="bench", metadata=b"", regions=()),
        endpoints_sent=metrics.endpoints_sent,
    )
    server = SessionServer(services=(lending.handler(),))
    print(await server.start(host="127.0.0.1", port=0), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(_own())
