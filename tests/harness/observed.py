"""Workers that somebody looks at: a real host and session server over a fake rank, and a looker with its sessions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
from fake_link import FakeLink
from fake_rank import FakeRank

from autoscaler.looking.looker import Looker
from autoscaler.looking.worker_session import WorkerChannels
from autoscaler.setup import PoolSetup, Setup
from autoscaler.targets.contract import PoolReading
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.session_server import SessionServer
from rorqual.discovery import parse_source
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import Open, Role
from rorqual.tls import TlsFiles

READINGS = {"pool": PoolReading(replicas=1)}


class Worker:
    """A real host and door over a fake rank."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        rank = FakeRank(num_pages=16, num_slots=4, prefill_tokens_max=512)
        config = HostConfig(
            worker_id=WorkerId("w"),
            incarnation=Incarnation(7),
            exact=False,
            prefill_tokens_max=512,
            heartbeat_seconds=0.05,
        )
        self.host = Host(link=FakeLink(rank), ready=rank.ready(), config=config, metrics=WorkerMetrics())
        self.server = SessionServer(tls=tls)

    async def start(self, port: int = 0) -> str:
        address = await self.server.start(host="127.0.0.1", port=port)
        await self.server.attach(self.host)
        self.serving = asyncio.create_task(self.host.run())
        return address

    async def stop(self) -> None:
        await self.server.stop()
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)

    async def serve(self, number: int, *, length: int, max_tokens: int) -> None:
        session = self.host.connect("router")
        session.submit(
            Open(
                sequence_id=SequenceId(number),
                request_id="r",
                prompt=np.arange(length, dtype=np.int32) % 90,
                max_tokens=max_tokens,
                ignore_eos=True,
                sampling=SamplingParams(seed=number),
            )
        )
        ended = False
        while not ended:
            ended = any(item.finish_reason for item in (await session.next_report()).sequences)
        session.close()


@asynccontextmanager
async def looking(
    *addresses: str,
    source: str = "",
    role: Role = Role.BOTH,
    routers: tuple[str, ...] = (),
    tls: TlsFiles | None = None,
) -> AsyncIterator[Looker]:
    """At `addresses`, or at those that `source` names."""
    workers = parse_source(source or f"static:{','.join(addresses)}", option="x")
    setup = Setup(
        interval_seconds=0.1,
        pools=(PoolSetup(name="pool", role=role, workers=workers),),
        routers=tuple(parse_source(text, option="x") for text in routers),
    )
    async with aiohttp.ClientSession() as http:
        looker = Looker(
            setup,
            observer_id="me",
            channels=WorkerChannels(tls),
            http=http,
            randomness=random.Random(1),
        )
        running = asyncio.create_task(looker.run())
        try:
            async with asyncio.timeout(30):
                yield looker
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)
