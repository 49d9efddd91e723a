"""What the failure tests have in common: one set of processes to do harm to, and how to bring a request to the stage
at which harm is done.

Called by `tests/integration/test_failures_*.py`, which share two prefill and two decode workers with room for two
sequences each; every file starts the router anew, with the deadlines it is about. Reads go over tcp, where one makes
progress only while the owner's rank runs: a rank that stands still holds a read up. Workers' deadlines are short:
whatever was lent returns `RETURN_SECONDS_MAX` after its request has ended.
"""

from __future__ import annotations

from pathlib import Path

from tests.harness.asking import Asking, Door, ask
from tests.harness.pools import Pools, Role
from tests.harness.system import IDS_CONFIG, SECONDS_MAX, wait_until

LEASE_SECONDS = 5.0
TRANSFER_SECONDS = 1.5
CALL_SECONDS = 1.0
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


def holder(pools: Pools, role: Role) -> str:
    """The one worker of a role with whom there is something of a request."""
    (name,) = [name for name in living(pools, role) if pools[name].held()]
    return name


def computing(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS) -> tuple[Asking, str]:
    """A request whose prompt a prefill worker has begun to compute, and that worker. The ranks of all prefill workers
    are left standing still."""
    pools.stop(*living(pools, "prefill"), part="rank")
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    wait_until(lambda: any(pools[name].held() for name in living(pools, "prefill")), seconds_max=SECONDS_MAX)
    return asking, holder(pools, "prefill")


def unread(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS) -> tuple[Asking, str]:
    """A request whose client has its first token, and whose state is lent and has not been read, and the worker that
    lends. All decode workers are left standing still, hosts and ranks."""
    pools.stop(*living(pools, "decode"))
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    asking.wait_for_tokens(1)
    return asking, holder(pools, "prefill")


def reading(pools: Pools, *, max_tokens: int = NUM_TOKENS) -> tuple[Asking, str, str]:
    """A request whose state is being read, the worker that lends, whose rank is left standing still and so holds the
    read up, and the one that reads."""
    decoders = living(pools, "decode")
    asking, lender = unread(pools, max_tokens=max_tokens)
    pools.stop(lender, part="rank")
    pools.resume(*decoders)
    wait_until(lambda: any(is_reading(pools, name) for name in decoders), seconds_max=SECONDS_MAX)
    (reader,) = [name for name in decoders if is_reading(pools, name)]
    return asking, lender, reader


def is_reading(pools: Pools, name: str) -> bool:
    return pools[name].metrics()["rorqual_worker_fetches_open"] > 0


def streaming(pools: Pools, *, door: Door = "http", max_tokens: int = NUM_TOKENS_LONG) -> tuple[Asking, str]:
    """A request that is being decoded, and the worker that does."""
    asking = ask(pools, PROMPT, max_tokens=max_tokens, door=door)
    asking.wait_for_tokens(3)
    return asking, holder(pools, "decode")
