"""What the failure tests have in common: one set of processes to do harm to, and how to bring a request to the stage
at which harm is done.

Called by `tests/integration/test_failures_*.py`, which share two prefill and two decode workers with room for two
sequences each; every file starts the router anew, with the deadlines it is about. Reads go over tcp, where one makes
progress only while the owner's rank runs: a rank that stands still holds a read up. Workers' deadlines are short:
whatever was lent returns `RETURN_SECONDS_MAX` after its request has ended.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.transfer.contract import Endpoint
from tests.harness.asking import Asking, Door, ask
from tests.harness.pools import Pools, Role
from tests.harness.raw_session import attach, raw_session
from tests.harness.system import IDS_CONFIG, SECONDS_MAX, wait_until

LEASE_SECONDS = 4.0
TRANSFER_SECONDS = 1.0
CALL_SECONDS = 0.8
RETURN_SECONDS_MAX = LEASE_SECONDS + TRANSFER_SECONDS + 5.0
"""And a few for a busy machine."""

SLACK_SECONDS = 10.0
"""For a busy machine, on top of a deadline."""

NUM_SLOTS = 2
PROMPT = [3 + 7 * i % (IDS_CONFIG["vocab_size"] - 3) for i in range(300)]  # a full page and a partial one
NUM_TOKENS = 200  # takes about a second
NUM_TOKENS_LONG = 1700  # never ends before the harm is done

PATIENT = (
    *("--silence-seconds", "60", "--place-seconds", "60", "--credit-seconds", "60"),
    *("--first-token-seconds", "60", "--hand-over-seconds", "60", "--next-token-seconds", "60"),
)
"""A router that leaves every deadline to the workers."""


def start_two_of_each(model: Path, folder: Path) -> Pools:
    pools = Pools(
        model,
        folder,
        *("--exact", "--pages", "16", "--slots", str(NUM_SLOTS), "--transfer-seconds", str(TRANSFER_SECONDS)),
        transfer="nixl",
        ucx_tls="tcp",
    )
    try:
        members = pools.add("prefill", 2, "--lease-seconds", str(LEASE_SECONDS))
        members += pools.add("decode", 2, "--call-seconds", str(CALL_SECONDS))
        for member in members:
            member.start()
        for member in members:
            member.wait_until_ready()
        pools.start_router()
    except BaseException:
        pools.close()
        raise
    return pools


def check_serving(pools: Pools, expected: list[int]) -> None:
    """Nothing is left on survivors, and a fresh request is answered."""
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)
    assert ask(pools, PROMPT, max_tokens=NUM_TOKENS).result() == expected
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)


def living(pools: Pools, role: Role) -> list[str]:
    """Names of those that neither died nor stand still."""
    return [member.name for member in pools.survivors() if member.role == role]


def computing(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS) -> tuple[Asking, str]:
    """A request whose prompt a prefill worker has begun to compute, and that worker. The ranks of all prefill workers
    are left standing still."""
    before = num_opened(pools, "prefill")
    pools.stop(*before, part="rank")
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    return asking, opened_by(pools, "prefill", before)


def unread(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS) -> tuple[Asking, str]:
    """A request whose client has its first token, and whose state is lent and has not been read, and the worker that
    lends. All decode workers are left standing still, hosts and ranks."""
    before = num_opened(pools, "prefill")
    pools.stop(*living(pools, "decode"))
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    asking.wait_for_tokens(1)
    return asking, opened_by(pools, "prefill", before)


def reading(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS) -> tuple[Asking, str, str]:
    """A request whose state is being read, the worker that lends, whose rank is left standing still and so holds the
    read up, and the one that reads."""
    decoders = living(pools, "decode")
    asking, lender = unread(pools, door=door, max_tokens=max_tokens)
    pools.stop(lender, part="rank")
    pools.resume(*decoders)
    wait_until(lambda: any(is_reading(pools, name) for name in decoders), seconds_max=SECONDS_MAX)
    (reader,) = [name for name in decoders if is_reading(pools, name)]
    return asking, lender, reader


def is_reading(pools: Pools, name: str) -> bool:
    return pools[name].metrics()["rorqual_worker_fetches_open"] > 0


def streaming(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS_LONG) -> tuple[Asking, str]:
    """A request that is being decoded, and the worker that does. What was lent for it has been given back."""
    before = num_opened(pools, "decode")
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    asking.wait_for_tokens(3)
    wait_until(
        lambda: not any(pools[name].held() for name in living(pools, "prefill")), seconds_max=SECONDS_MAX
    )
    return asking, opened_by(pools, "decode", before)


def num_opened(pools: Pools, role: Role) -> dict[str, float]:
    """Sequences by worker, of those that live."""
    return {
        name: pools[name].metrics()["rorqual_worker_sequences_opened_total"] for name in living(pools, role)
    }


def opened_by(pools: Pools, role: Role, before: dict[str, float]) -> str:
    """The one worker that has opened a sequence since."""
    found: list[str] = []

    def has_opened() -> bool:
        found[:] = [name for name, count in num_opened(pools, role).items() if count > before[name]]
        return bool(found)

    wait_until(has_opened, seconds_max=SECONDS_MAX)
    (name,) = found
    return name


def num_ended(pools: Pools, name: str, reason: str) -> float:
    """Sequences that a worker counts as ended so."""
    return pools[name].by_label("rorqual_worker_sequences_ended_total", "reason").get(reason, 0)


def endpoint_of(pools: Pools, name: str) -> Endpoint:
    address = pools[name].address
    with raw_session(address) as session:
        welcome = session.welcome
    return attach(address, incarnation=welcome.incarnation, wire_id=welcome.wire_id)


def spoil(pid: int, endpoint: Endpoint, region_name: str, *, at: int) -> None:
    """Flip one bit of every unit of a region, where it lies in the memory of its owner's rank."""
    (region,) = [region for region in endpoint.regions if region.name == region_name]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    try:
        for unit in range(region.num_units):
            address = region.address + unit * region.unit_bytes + at
            (byte,) = os.pread(memory, 1, address)
            assert os.pwrite(memory, bytes((byte ^ 4,)), address) == 1
    finally:
        os.close(memory)
