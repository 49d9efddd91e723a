"""Checks of `rorqual doctor` that need this package: the store, and one-sided reads. No torch.

`rorqual.doctor.process` finds them as text ("kvstore.checks:look_at_store"), since the ground knows nothing above it.
The store is asked over the same connections that workers use; what is written there is one small value under a name of
its own, which is removed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.store.address import parse_address
from kvstore.store.connections import Command, ErrorReply, NodeName, Reply, ServerLost
from kvstore.store.servers import Servers, make_servers
from rorqual.doctor.finding import Finding, fail, ok, warn
from rorqual.errors import ConfigError

ANSWER_SECONDS_MAX = 5.0
PROBE_SECONDS_MAX = 20.0
CLOCK_SECONDS_MAX = 1.0
PINGS = 5
VALUE_SECONDS = 60
"""After which the value goes by itself, should this process be killed in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    node: str
    info: Mapping[str, str]
    ping_seconds: float
    offset_seconds: float | None  # the server's clock against ours
    write_error: str = ""


def judge_store(facts: StoreFacts) -> list[Finding]:
    check, info = f"store {facts.node}", facts.info
    version = info.get("valkey_version") or info.get("redis_version", "?")
    text = f"{info.get('server_name', 'redis')} {version} answers in {facts.ping_seconds * 1e3:.2f} ms"
    found = [ok(check, text)]
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy", "?")
    if most == 0:
        cure = "set maxmemory, and maxmemory-policy allkeys-lru"
        found.append(warn(check, "has no limit of memory: it grows until its machine has none left", cure))
    elif policy == "noeviction":
        cure = "set maxmemory-policy allkeys-lru"
        found.append(warn(check, "gives nothing up when it is full (noeviction): writes then fail", cure))
    else:
        found.append(ok(check, f"{used / 1e6:.0f} of {most / 1e6:.0f} MB used, {policy}"))
    if facts.offset_seconds is not None and abs(facts.offset_seconds) > CLOCK_SECONDS_MAX:
        side = "ahead of" if facts.offset_seconds > 0 else "behind"
        text = f"its clock is {abs(facts.offset_seconds):.1f} s {side} ours"
        found.append(warn(check, text, "run chrony or ntpd on both"))
    if facts.write_error:
        cure = "give its user +@read +@write on all names; a replica cannot be the store"
        found.append(fail(check, f"a value cannot be written and read: {facts.write_error}", cure))
    else:
        found.append(ok(check, "a value was written, read and removed"))
    return found


async def look_at_store(url: str) -> list[Finding]:
    try:
        address = parse_address(url)
    except ConfigError as error:
        return [fail("store", str(error), "mend --store or RORQUAL_STORE")]
    servers = make_servers(address, connections_max=1, seconds_max=ANSWER_SECONDS_MAX)
    try:
        async with asyncio.timeout(2 * ANSWER_SECONDS_MAX):
            await servers.refresh()
            parts = [judge_store(await _facts(servers, node)) for node in servers.nodes]
        return [finding for part in parts for finding in part]
    except TimeoutError:
        cure = "the server stands still or the network drops packets; workers go on without it meanwhile"
        return [fail(f"store {address.shown}", f"no answer within {ANSWER_SECONDS_MAX:g} s", cure)]
    except ServerLost as error:
        return [fail(f"store {address.shown}", str(error), _CURES.get(error.code, _CURES["connection"]))]
    finally:
        await servers.aclose()


_CURES = {
    "authentication": "mend user and password in RORQUAL_STORE",
    "timeout": "the server stands still, or the network drops packets",
    "connection": "is it running, is the address right, and does it speak TLS where the URL says rediss?",
}


async def _facts(servers: Servers, node: NodeName) -> StoreFacts:
    pings: list[float] = []
    for _ in range(PINGS):
        began = time.perf_counter()
        (reply,) = await _ask(servers, node, [("PING",)])
        pings.append(time.perf_counter() - began)
        if isinstance(reply, ErrorReply):
            code = (
                "authentication"
                if "NOAUTH" in str(reply.error) or "Auth" in str(reply.error)
                else "connection"
            )
            raise ServerLost(f"{node} refuses us: {reply.error}", code=code)
    asked = time.time()
    told, text = await _ask(servers, node, [("TIME",), ("INFO",)])
    offset = None
    if isinstance(told, list) and len(told) == 2:
        offset = int(told[0]) + int(told[1]) / 1e6 - (asked + time.time()) / 2
    lines = text.decode(errors="replace").splitlines() if isinstance(text, bytes) else []
    return StoreFacts(
        node=node,
        info=dict(line.split(":", 1) for line in lines if ":" in line),
        ping_seconds=sorted(pings)[PINGS // 2],
        offset_seconds=offset,
        write_error=await _try_value(servers, node),
    )


async def _try_value(servers: Servers, node: NodeName) -> str:
    """What went wrong, or "". In a Cluster only the server that owns the name is asked."""
    name, value = f"rorqual-doctor:{secrets.token_hex(8)}".encode(), secrets.token_bytes(1024)
    if servers.node_of(name) != node:
        return ""
    commands: list[Command] = [("SET", name, value, "EX", VALUE_SECONDS), ("GET", name), ("DEL", name)]
    written, read, _ = await _ask(servers, node, commands)
    if isinstance(written, ErrorReply):
        return str(written.error)
    if isinstance(read, ErrorReply):
        return str(read.error)
    return "" if read == value else "it came back changed"


async def _ask(servers: Servers, node: NodeName, commands: Sequence[Command]) -> list[Reply]:
    replies: list[Reply] = [None] * len(commands)
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        await servers.exchange(node, commands, replies.__setitem__)
    return replies


async def look_at_transfer(kind: str) -> list[Finding]:
    """Bounded by PROBE_SECONDS_MAX: then the process that reads is killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvstore.probing", kind),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS_MAX):
            output, _ = await process.communicate()
    except TimeoutError:
        return judge_transfer(None, environment=os.environ)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = output.decode(errors="replace").splitlines()
    try:
        told = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        told = {}
    return judge_transfer(
        told or {"error": f"it ended with status {process.returncode}"}, environment=os.environ
    )


def judge_transfer(told: Mapping[str, object] | None, *, environment: Mapping[str, str]) -> list[Finding]:
    """`told`: what `kvstore.probing` printed; None: nothing in time."""
    ucx = " ".join(f"{name}={environment[name]}" for name in sorted(environment) if name.startswith("UCX_"))
    cure = f"try UCX_TLS=tcp, or --transfer shm on one host (now: {ucx or 'no UCX_ variables'})"
    if told is None:
        return [fail("transfer", f"a read was not done within {PROBE_SECONDS_MAX:g} s", cure)]
    if "error" in told:
        return [fail("transfer", f"a one-sided read failed: {told['error']}", cure)]
    rate = told["bytes_per_second"]
    assert isinstance(rate, float)
    text = f"{told['kind']}: reads {rate / 1e9:.2f} GB/s within this machine; {ucx or 'no UCX_ variables'}"
    if told["kind"] == "shm" and "since" in str(told["reason"]):
        return [warn("transfer", f"{text}; {told['reason']}", "install nixl to read between hosts")]
    return [ok("transfer", text)]
