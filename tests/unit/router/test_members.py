"""What connected workers have in common is what a look at all of them says; and their rows follow their reports."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rorqual.ids import Incarnation, WorkerId
from rorqual.session import Load, Role, Welcome
from router.members import Members
from router.placement import missing_roles
from router.placement.columns import NO_LOAD
from router.prompt_keys import Root
from tests.harness.cluster import a_cluster, a_generation, check_table, collect, until

ADDRESSES = "abcde"


def a_welcome(role: Role, wire_id: str, tokens_max: int, version: str) -> Welcome:
    return Welcome(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(1),
        model_fingerprint="model",
        numerics="served",
        exact=False,
        vocab_size=9,
        sequence_tokens_max=tokens_max,
        sequences_max=4,
        eos_token_ids=(1,),
        load=NO_LOAD,
        role=role,
        wire_id=wire_id,
        version=version,
    )


welcomes = st.builds(
    a_welcome,
    st.sampled_from(Role),
    st.sampled_from(["x", "y"]),
    st.sampled_from([8, 9]),
    st.sampled_from(["", "0.1.0", "0.2.0"]),
)


@given(st.lists(st.tuples(st.sampled_from(ADDRESSES), st.none() | welcomes)))
def test_members_are_those_that_have_joined_and_not_left(changes: list[tuple[str, Welcome | None]]) -> None:
    members = Members()
    there: dict[str, Welcome] = {}
    for address, welcome in changes:
        members.leave(address)
        there.pop(address, None)
        if welcome is not None:
            members.join(address, welcome)
            there[address] = welcome
        assert list(members.welcomes) == list(there.values())
        assert len(members) == len(there)
        assert members.first == next(iter(there.values()), None)
        apart = [item for item in there.values() if item.role is not Role.BOTH]
        assert members.first_to_hand_over == next(iter(apart), None)
        assert set(members.roots) == {Root("model", "served", item.wire_id) for item in there.values()}
        assert members.versions == Counter(item.version for item in there.values())
        assert members.missing() == missing_roles(item.role for item in there.values())
        if there:
            assert members.sequence_tokens_max == min(item.sequence_tokens_max for item in there.values())


async def test_the_row_of_a_worker_has_the_load_of_its_latest_report() -> None:
    async with a_cluster("a") as cluster:

        def is_told() -> bool:
            load: Load = cluster.transport.hosts["a"].load()
            (row,) = cluster.fleet.columns.row_of.values()
            columns = cluster.fleet.columns
            told = columns.tokens_waiting_W[row], columns.pages_free_W[row], columns.step_ms_W[row]
            is_row = told == (load.tokens_waiting, load.pages_free, load.step_ms)
            return is_row and columns.prefill_rate_W[row] == load.prefill_tokens_per_second > 0

        await collect(cluster, a_generation(length=600))
        await until(is_told)
        cluster.links["a"].gate.clear()
        asking = [asyncio.create_task(collect(cluster, a_generation(number))) for number in (1, 2)]
        await until(lambda: cluster.fleet.view()[0].sequences_outstanding == 2)
        await until(is_told)
        check_table(cluster.fleet)
        cluster.lose("a")
        await until(lambda: not cluster.fleet.columns.connected_W.any())
        check_table(cluster.fleet)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
