"""Our placement on hand-made pictures: who gives the first token soonest, and what copies cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rorqual.performance import FLASH, HARDWARE, PerformanceModel, SourceSpeed, model_costs
from router.placement.cache import Decision, FleetPicture, MeasuredSpeeds, Source
from router.placement.soonest import SoonestConfig, SoonestFirstToken
from tests.unit.router.placement.pictures import a_demand, a_fleet, keys

MODEL = PerformanceModel(hardware=HARDWARE["h200"], costs=model_costs(FLASH), num_devices=8)
PLAIN = SoonestConfig(copy_share=0.0, balance_share=0.0, session_seconds=0.0)
PROMPT = keys("abc", 100)  # about 0.11 s of computing


def choose(
    fleet: FleetPicture,
    config: SoonestConfig = PLAIN,
    model: PerformanceModel = MODEL,
    **demand: object,
) -> Decision:
    policy = SoonestFirstToken(model=model, tail_bytes=3.7e6, config=config)
    return policy.choose(fleet, a_demand(PROMPT, **demand))  # pyright: ignore[reportArgumentType]


def sources(decision: Decision) -> list[tuple[Source, int, int, int]]:
    return [(span.source, span.first, span.count, span.worker) for span in decision.fetch.spans]


def test_with_nothing_cached_the_shortest_wait_is_chosen_and_all_is_computed() -> None:
    decision = choose(a_fleet(wait=[0.2, 0.1, 0.3]))
    assert decision.prefill == 1
    assert (decision.resume, sources(decision)) == (0, [(Source.COMPUTE, 0, 100, -1)])
    assert decision.predicted_seconds == pytest.approx(0.1 + float(MODEL.prefill_seconds(256 * 100 + 100)))


def test_a_cached_prefix_is_worth_its_computing_and_no_more() -> None:
    held = {2: (PROMPT, [98])}
    near, far = (choose(a_fleet(held=held, wait=[0.0, 0.0, wait]), _own()) for wait in (0.05, 0.5))
    assert (near.prefill, near.resume) == (2, 98)
    assert far.prefill == 0


def test_pages_without_a_tail_are_worth_what_a_rebuild_saves() -> None:
    decision = choose(a_fleet(held={1: (PROMPT, [])}), _own())
    assert (decision.prefill, decision.resume) == (1, 100 - 22)
    assert decision.fetch.tail_source is Source.COMPUTE
    assert choose(a_fleet(held={1: (PROMPT[:20], [])}), _own()).resume == 0


def test_a_busy_owner_is_read_from_instead_of_computing_again() -> None:
    held = {2: (PROMPT, [98]), 0: (PROMPT[:10], [])}
    decision = choose(a_fleet(2 + 1, held=held, wait=[0.0, 0.1, 0.5]))
    assert (decision.prefill, decision.resume) == (0, 98)
    assert sources(decision) == [
        (Source.OWN, 0, 10, -1),
        (Source.PEER, 10, 88, 2),
        (Source.COMPUTE, 98, 2, -1),
    ]
    assert (decision.fetch.tail_source, decision.fetch.peer, decision.fetch.num_fetched) == (
        Source.PEER,
        2,
        88,
    )


def reading(fleet: FleetPicture, rate: list[float], latency: list[float]) -> FleetPicture:
    """As these workers have measured reads from others."""
    speeds = MeasuredSpeeds(rate_W=np.array(rate), latency_W=np.array(latency))
    return dataclasses.replace(fleet, speeds={Source.PEER: speeds})


def test_whoever_reads_slowly_computes_instead_and_whoever_reads_fast_is_given_the_prompt() -> None:
    fleet = a_fleet(held={2: (PROMPT, [98])}, wait=[0.0, 0.001, 0.5])
    assert choose(reading(fleet, [1e6, 0, 0], [0, 0, 0])).prefill == 1  # 90 s: the other has measured nothing
    slow = choose(reading(fleet, [1e6, 1e6, 0], [0, 0, 0]))
    assert (slow.prefill, slow.resume, slow.fetch.peer) == (0, 0, -1)
    late = choose(reading(fleet, [1e12, 1e12, 0], [5.0, 0.0, 0]))
    assert (late.prefill, late.resume, late.fetch.peer) == (1, 98, 2)


@given(rate=st.floats(1e3, 1e12), latency=st.floats(0, 10), faster=st.floats(1, 1e3))
@example(rate=6901314.0, latency=4.0, faster=145.0)
def test_a_peer_that_is_read_faster_is_never_passed_over(rate: float, latency: float, faster: float) -> None:
    """The choice is by what a prompt adds to a busy worker; what is predicted has besides what the few tokens behind a
    read cost a worker that computes nothing else: a step, and reading the weights for it."""
    fleet = a_fleet(held={2: (PROMPT, [98])}, wait=[0.0, 0.9, 0.9])
    slow, fast = (choose(reading(fleet, [rate * by] * 3, [latency / by] * 3)) for by in (1.0, faster))
    rest, before = 2 * 256 + 100, 98 * 256
    alone = float(MODEL.prefill_seconds(rest, before) - MODEL.work_seconds(rest, before))
    assert fast.predicted_seconds <= slow.predicted_seconds + max(alone, 0.0) + 1e-9
    assert slow.fetch.peer < 0 or fast.fetch.peer == 2


def test_what_nobody_has_measured_is_as_modelled() -> None:
    fleet = a_fleet(held={2: (PROMPT, [98])}, wait=[0.0, 0.001, 0.5])
    assert choose(reading(fleet, [0, 0, 0], [9, 9, 9])) == choose(fleet)


def test_a_tail_alone_is_read_where_the_pages_are_there() -> None:
    decision = choose(a_fleet(held={0: (PROMPT, []), 1: (PROMPT, [96])}, wait=[0.0, 0.4, 0.4]))
    assert (decision.prefill, decision.resume, decision.fetch.peer) == (0, 96, 1)
    assert decision.fetch.num_fetched == 0


def test_pages_of_a_peer_serve_a_rebuild_when_no_tail_is_left() -> None:
    decision = choose(a_fleet(held={1: (PROMPT, [])}, wait=[0.0, 0.4, 0.4]))
    assert (decision.prefill, decision.resume, decision.fetch.peer) == (0, 78, 1)
    assert sources(decision)[-1] == (Source.PEER, 0, 100, 1)
    assert decision.fetch.tail_source is Source.COMPUTE


def test_without_reads_from_peers_no_plan_names_one() -> None:
    decision = choose(a_fleet(held={2: (PROMPT, [98])}, wait=[0.0, 0.0, 0.5]), _own())
    assert decision.fetch.peer == -1


def test_what_no_worker_keeps_is_read_from_the_store() -> None:
    decision = choose(a_fleet(stored=(PROMPT[:98], [40, 98]), wait=[0.2, 0.1, 0.3]))
    assert (decision.prefill, decision.resume) == (1, 98)
    assert sources(decision) == [(Source.STORE, 0, 98, -1), (Source.COMPUTE, 98, 2, -1)]
    assert (decision.fetch.tail_source, decision.fetch.peer) == (Source.STORE, -1)
    computed = float(MODEL.prefill_seconds(2 * 256 + 100, 98 * 256))
    assert decision.predicted_seconds == pytest.approx(0.1 + computed), "it is read while others are computed"


def test_a_worker_that_waits_for_nobody_waits_for_the_store() -> None:
    decision = choose(a_fleet(stored=(PROMPT, [100])))
    read = float(MODEL.store_seconds(100 * MODEL.costs.page_bytes + 3.7e6))
    assert decision.predicted_seconds == pytest.approx(read + float(MODEL.prefill_seconds(100, 100 * 256)))


def test_pages_of_the_store_serve_a_rebuild_when_its_tail_is_far() -> None:
    decision = choose(a_fleet(held={0: (PROMPT[:10], [])}, stored=(PROMPT, [50]), wait=[0.0, 0.5, 0.5]))
    assert (decision.prefill, decision.resume) == (0, 100 - 22)
    assert sources(decision) == [(Source.OWN, 0, 10, -1), (Source.STORE, 10, 90, -1)]
    assert decision.fetch.tail_source is Source.COMPUTE


def test_a_tail_alone_is_read_from_the_store_where_the_pages_are_there() -> None:
    decision = choose(a_fleet(held={0: (PROMPT, [])}, stored=(PROMPT, [96]), wait=[0.0, 0.5, 0.5]))
    assert (decision.prefill, decision.resume) == (0, 96)
    assert sources(decision) == [(Source.OWN, 0, 100, -1)]
    assert decision.fetch.tail_source is Source.STORE


def test_a_store_slower_than_computing_is_left_alone() -> None:
    slow = dataclasses.replace(MODEL, store=SourceSpeed(bytes_per_second=1e8, latency_seconds=0.002))
    decision = choose(a_fleet(stored=(PROMPT, [100])), model=slow)
    assert (decision.resume, sources(decision)) == (0, [(Source.COMPUTE, 0, 100, -1)])


def test_a_peer_that_is_faster_is_read_before_the_store() -> None:
    decision = choose(a_fleet(held={2: (PROMPT, [98])}, stored=(PROMPT, [98]), wait=[0.0, 0.1, 0.5]))
    assert (decision.prefill, decision.fetch.peer, decision.fetch.tail_source) == (0, 2, Source.PEER)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_a_copy_that_the_store_has_is_charged_no_more_than_reading_it(share: float) -> None:
    config = dataclasses.replace(PLAIN, copy_share=3.0, stored_share=share)
    computed = float(MODEL.work_seconds(MODEL.chunk_tokens)) * 256 / MODEL.chunk_tokens
    charge = 3 * 98 * (share * MODEL.costs.page_bytes / 2e9 + (1 - share) * computed)
    for wait, chosen in ((charge - 0.01, 2), (charge + 0.01, 0)):
        fleet = a_fleet(held={2: (PROMPT[:98], [98])}, stored=(PROMPT[:98], [98]), wait=[0.0, 0.0, wait])
        assert choose(fleet, config).prefill == chosen
    longer = 3 * 98 * computed - 0.01
    assert choose(a_fleet(held={2: (PROMPT[:98], [98])}, wait=[0.0, 0.0, longer]), config).prefill == 2


def test_a_copy_has_to_be_worth_the_room_it_takes() -> None:
    fleet = a_fleet(held={2: (PROMPT, [98])}, wait=[0.0, 0.0, 0.1])
    assert choose(fleet).prefill == 0
    assert choose(fleet, dataclasses.replace(PLAIN, copy_share=3.0)).prefill == 2


def test_a_short_head_that_all_share_spreads() -> None:
    fleet = a_fleet(held={2: (PROMPT[:2], [2])}, wait=[0.0, 0.0, 0.05])
    decision = choose(fleet, dataclasses.replace(PLAIN, copy_share=3.0))
    assert (decision.prefill, decision.resume, decision.fetch.peer) == (0, 2, 2)


def test_prompts_that_arrive_together_go_where_the_first_one_went() -> None:
    policy = SoonestFirstToken(model=MODEL, tail_bytes=3.7e6, config=_own())
    first = policy.choose(a_fleet(wait=[0.2, 0.0, 0.1]), a_demand(PROMPT, number=1))
    second = policy.choose(a_fleet(wait=[0.0, 0.05, 0.0]), a_demand(PROMPT, number=2))
    assert (first.prefill, second.prefill, second.resume) == (1, 1, 100)
    policy.finished(1)
    policy.finished(2)
    assert policy.choose(a_fleet(wait=[0.0, 0.05, 0.0]), a_demand(PROMPT, number=3)).prefill == 0


def test_of_workers_as_good_as_equal_the_one_that_worked_less_is_chosen() -> None:
    fleet = a_fleet(work=[9.0, 8.0, 8.5])
    assert choose(fleet, dataclasses.replace(PLAIN, balance_share=0.01)).prefill == 1


def test_a_session_is_a_bias_and_no_order() -> None:
    policy = SoonestFirstToken(
        model=MODEL, tail_bytes=3.7e6, config=dataclasses.replace(PLAIN, session_seconds=0.01)
    )
    assert policy.choose(a_fleet(wait=[0.1, 0.0, 0.1]), a_demand(session="s", number=1)).prefill == 1
    assert policy.choose(a_fleet(wait=[0.0, 0.005, 0.1]), a_demand(session="s", number=2)).prefill == 1
    assert policy.choose(a_fleet(wait=[0.0, 0.05, 0.1]), a_demand(session="s", number=3)).prefill == 0


def test_nobody_who_drains_is_chosen_and_the_least_busy_decodes() -> None:
    fleet = a_fleet(4, wait=[0.0, 0.3, 0.0, 0.0], draining=[0], decoding={2: 7, 3: 5})
    decision = choose(fleet)
    assert (decision.prefill, decision.decode) == (1, 3)


@given(st.data())
def test_no_plan_reads_what_nobody_has_or_leaves_a_page_out(data: st.DataObject) -> None:
    num_workers = data.draw(st.integers(1, 5))
    held = {}
    for worker in range(num_workers):
        count = data.draw(st.integers(0, 100))
        held[worker] = (PROMPT[:count], data.draw(st.lists(st.integers(1, max(count, 1)), max_size=3)))
    wait = data.draw(st.lists(st.floats(0, 1), min_size=num_workers, max_size=num_workers))
    num_stored = data.draw(st.integers(0, 100))
    stored_tails = data.draw(st.lists(st.integers(1, max(num_stored, 1)), max_size=2))
    fleet = a_fleet(num_workers, held=held, stored=(PROMPT[:num_stored], stored_tails), wait=wait)
    decision = choose(fleet, data.draw(st.sampled_from([PLAIN, SoonestConfig(), _own()])))
    found = fleet.caches.look_up(PROMPT)
    end = 0
    for span in decision.fetch.spans:
        assert span.first == end
        assert span.count > 0
        end += span.count
        if span.source is Source.STORE:
            assert end <= found.store_pages
        elif span.source is not Source.COMPUTE:
            holder = decision.prefill if span.source is Source.OWN else span.worker
            assert end <= found.pages_W[holder]
    assert end == len(PROMPT)
    assert decision.fetch.peer != decision.prefill
    if decision.fetch.tail_source is Source.STORE:
        assert decision.resume == found.store_tail


def _own() -> SoonestConfig:
    return dataclasses.replace(PLAIN, fetches=False)


def copying(fleet: FleetPicture, rate: float) -> FleetPicture:
    """As all workers have measured copies from their host memory."""
    speeds = MeasuredSpeeds(rate_W=np.full(fleet.num_workers, rate), latency_W=np.zeros(fleet.num_workers))
    return dataclasses.replace(fleet, speeds={Source.HOST: speeds})


def test_a_worker_with_the_prompt_in_host_memory_comes_before_one_that_computes_it() -> None:
    fleet = a_fleet(held={1: (PROMPT, [100])}, on_device={1: (0, [])}, wait=[0.0, 0.03, 0.0])
    decision = choose(fleet)
    assert (decision.prefill, decision.resume) == (1, 100)
    assert sources(decision) == [(Source.HOST, 0, 100, -1)]
    assert decision.fetch.tail_source is Source.HOST
    assert choose(copying(fleet, 1e8)).prefill == 0  # 0.94 s of copies
    assert choose(copying(fleet, 1e11)).prefill == 1


def test_pages_on_the_device_are_used_where_host_memory_is_too_slow_for_the_others() -> None:
    fleet = a_fleet(1, held={0: (PROMPT, [40, 90])}, on_device={0: (60, [40])})
    decision = choose(fleet)
    assert decision.resume == 90
    assert sources(decision) == [
        (Source.OWN, 0, 60, -1),
        (Source.HOST, 60, 30, -1),
        (Source.COMPUTE, 90, 10, -1),
    ]
    assert decision.fetch.tail_source is Source.HOST
    slow = choose(copying(fleet, 1e6))
    assert (slow.resume, slow.fetch.tail_source) == (40, Source.OWN)
    assert sources(slow) == [(Source.OWN, 0, 60, -1), (Source.COMPUTE, 60, 40, -1)]


def test_a_tail_in_host_memory_below_pages_on_the_device_costs_its_own_bytes_alone() -> None:
    fleet = a_fleet(1, held={0: (PROMPT, [100])}, on_device={0: (100, [])})
    decision = choose(copying(fleet, 3.7e8))
    assert (decision.resume, sources(decision)) == (100, [(Source.OWN, 0, 100, -1)])
    assert decision.fetch.tail_source is Source.HOST
    at_once = choose(a_fleet(1, held={0: (PROMPT, [100])})).predicted_seconds
    assert decision.predicted_seconds == pytest.approx(at_once + 0.01)


def test_peers_are_asked_only_for_what_is_on_their_devices() -> None:
    busy = [0.0, 5.0, 5.0]
    held = {1: (PROMPT, [50, 98])}
    fleet = a_fleet(held=held, wait=busy)
    assert choose(fleet).fetch.num_fetched == 98
    below = a_fleet(held=held, on_device={1: (60, [50])}, wait=busy)
    decision = choose(below)
    assert (decision.prefill, decision.fetch.peer, decision.fetch.num_fetched) == (0, 1, 50)
    assert choose(a_fleet(held=held, on_device={1: (0, [])}, wait=busy)).fetch.peer == -1


def test_what_is_promised_is_on_the_device_and_all_before_it() -> None:
    """The second of two equal prompts finds nothing to copy: the first has brought it."""
    fleet = a_fleet(1, held={0: (PROMPT, [100])}, on_device={0: (50, [])})
    policy = SoonestFirstToken(model=MODEL, tail_bytes=3.7e6, config=PLAIN)
    first = policy.choose(fleet, a_demand(PROMPT, number=1))
    second = policy.choose(fleet, a_demand(PROMPT, number=2))
    assert (Source.HOST, 50, 50, -1) in sources(first)
    assert sources(second) == [(Source.OWN, 0, 100, -1)]
    policy.finished(1)
    policy.finished(2)
    assert sources(policy.choose(fleet, a_demand(PROMPT, number=3))) == sources(first)


def test_pages_that_the_store_lacks_at_the_front_must_be_the_workers_own() -> None:
    stored = (PROMPT, [100])
    fleet = a_fleet(held={1: (PROMPT[:40], [])}, stored=stored, store_first=40)
    decision = choose(fleet)
    assert (decision.prefill, decision.resume) == (1, 100)
    assert sources(decision) == [(Source.OWN, 0, 40, -1), (Source.STORE, 40, 60, -1)]
    assert choose(a_fleet(stored=stored, store_first=40)).resume == 0
    assert choose(a_fleet(stored=stored)).resume == 100


def test_a_store_is_priced_by_what_each_worker_has_measured() -> None:
    fleet = a_fleet(stored=(PROMPT, [100]), wait=[0.0, 0.001, 0.002])
    assert choose(fleet).prefill == 0
    speeds = MeasuredSpeeds(rate_W=np.array([1e8, 0.0, 1e6]), latency_W=np.zeros(3))
    decision = choose(dataclasses.replace(fleet, speeds={Source.STORE: speeds}))
    assert (decision.prefill, decision.resume) == (1, 100)
