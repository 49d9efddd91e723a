"""A cache policy behind the dispatcher's question: who may be chosen, credit's rules, corrections, promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.keys import PageKey
from rorqual.performance import FLASH, model_costs
from rorqual.session import Credit, Load, Role
from router.credit import CreditUse
from router.placement import Demand, Placement, Split, Whole, WorkerView
from router.placement.least_wait import Stored
from router.placement.policies import NAMES, WorkerModel, make_placement
from router.placement.predictions import RATIO_MAX_UNKNOWN, Predictions, unknown_hardware_model
from tests.unit.router.placement.fleets import able_of, fleet_of
from tests.unit.router.placement.pictures import Caches, keys

COSTS = model_costs(FLASH)
RATE = 2000.0

Held = Mapping[int, tuple[tuple[PageKey, ...], Sequence[int]]]


def a_view(
    index: int, *, role: Role = Role.BOTH, ahead: int = 0, rate: float = RATE, **options: object
) -> WorkerView:
    view = WorkerView(
        address=f"w{index}",
        session_number=index + 1,
        role=role,
        draining=False,
        sequences_outstanding=0,
        tokens_outstanding=ahead,
        prompt_tokens_outstanding=ahead,
        prompt_tokens_sent=ahead,
        sequences_max=8,
        load=Load(
            sequences_running=0,
            sequences_waiting=0,
            tokens_waiting=0,
            pages_free=100,
            pages_total=100,
            slots_free=8,
            slots_total=8,
            step_ms=1.0,
            prefill_tokens_per_second=rate,
        ),
        credit=CreditUse(limit=Credit(sequences=8, pages=100)) if role is Role.DECODE else None,
        index=index,
    )
    return replace(view, **options)


def a_demand(prompt: tuple[PageKey, ...], *, extra: int = 10, **options: object) -> Demand:
    tokens = 256 * len(prompt) + extra
    return Demand(prompt_tokens=tokens, tokens_max=20, **{"keys": {"wire": prompt}, **options})


def placement_of(name: str = "rorqual", *, held: Held | None = None, workers: int = 3) -> Placement:
    return make_placement(name, caches=Caches(workers, held or {}), workers=WorkerModel(costs=COSTS))


def choose(
    placement: Placement, views: Sequence[WorkerView], demand: Demand, *, workers: int = 3
) -> Whole | Split | None:
    fleet = fleet_of(views, rows=workers)
    return placement.choose(fleet, able_of(fleet), demand)


def test_the_worker_that_keeps_the_prompt_computes_it_and_reuse_is_predicted() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of(held={1: (prompt[:30], (30,))})
    placed = choose(placement, [a_view(0), a_view(1), a_view(2)], a_demand(prompt))
    assert isinstance(placed, Whole)
    assert placed.worker.address == "w1"
    assert placed.predicted.tokens_reused == 30 * 256
    assert placed.predicted.seconds == pytest.approx((10 * 256 + 10) / RATE, rel=0.3)


def test_the_owner_of_the_prompt_is_passed_over_when_its_queue_takes_longer() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of(held={1: (prompt[:30], (30,))})
    placed = choose(placement, [a_view(0), a_view(1, ahead=1_000_000)], a_demand(prompt))
    assert isinstance(placed, Whole)
    assert placed.worker.address == "w0"
    assert placed.predicted.tokens_reused == 0


def test_a_worker_ten_times_slower_gets_what_its_speed_is_worth() -> None:
    placement = placement_of()
    views = [a_view(0, rate=200.0), a_view(1, rate=2000.0, ahead=4000)]
    placed = choose(placement, views, a_demand(keys("ab", 8)))
    assert isinstance(placed, Whole)
    assert placed.worker.address == "w1"  # 3 s with its queue, 10 s on the other


def test_tokens_that_other_routers_have_queued_count_and_those_sent_with_reuse_do_not_twice() -> None:
    placement = placement_of()
    busy = a_view(0)
    busy = replace(busy, load=replace(busy.load, tokens_waiting=9000))
    mine = a_view(1, prompt_tokens_outstanding=500, prompt_tokens_sent=9000)
    mine = replace(mine, load=replace(mine.load, tokens_waiting=9000))
    placed = choose(placement, [busy, mine], a_demand(keys("ab", 4)))
    assert isinstance(placed, Whole)
    assert placed.worker.address == "w1"


def test_with_nothing_known_of_caches_load_decides() -> None:
    placement = placement_of()
    views = [a_view(0, ahead=5000), a_view(1), a_view(2, ahead=900)]
    placed = choose(placement, views, a_demand((), extra=100, keys={}))
    assert isinstance(placed, Whole)
    assert placed.worker.address == "w1"


def test_a_split_takes_the_prefill_worker_by_cache_and_the_decode_worker_by_credit() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of(held={1: (prompt, (40,))}, workers=4)
    prefills = [a_view(0, role=Role.PREFILL), a_view(1, role=Role.PREFILL)]
    full = CreditUse(limit=Credit(sequences=1, pages=10))
    decodes = [a_view(2, role=Role.DECODE, credit=full), a_view(3, role=Role.DECODE)]
    placed = choose(placement, [*prefills, *decodes], a_demand(prompt), workers=4)
    assert isinstance(placed, Split)
    assert (placed.prefill.address, placed.decode.address) == ("w1", "w3")


def test_of_decode_workers_alike_the_one_that_has_the_prompt_reads_least_and_is_taken() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of(held={2: (prompt[:20], ())}, workers=3)
    views = [a_view(0, role=Role.PREFILL), a_view(1, role=Role.DECODE), a_view(2, role=Role.DECODE)]
    placed = choose(placement, views, a_demand(prompt))
    assert isinstance(placed, Split)
    assert placed.decode.address == "w2"


def test_without_credit_nothing_is_promised_and_the_choice_waits() -> None:
    placement = placement_of()
    full = CreditUse(limit=Credit(sequences=0, pages=0))
    views = [a_view(0, role=Role.PREFILL), a_view(1, role=Role.DECODE, credit=full)]
    placed = choose(placement, views, a_demand(keys("ab", 4)))
    assert isinstance(placed, Split)
    assert placed.decode is None
    assert placed.predicted is None
    assert choose(placement, views[:1], a_demand(keys("ab", 4))) is None


def test_a_prompt_promised_to_a_worker_draws_the_next_one_with_the_same_head() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of()
    views = [a_view(0), a_view(1), a_view(2)]
    first = choose(placement, views, a_demand(prompt))
    views[first.worker.index] = a_view(first.worker.index, ahead=100)
    second = choose(placement, views, a_demand(prompt))
    assert second.worker.index == first.worker.index
    assert second.predicted.tokens_reused == 40 * 256
    placement.finished(first.predicted)
    placement.finished(second.predicted)
    third = choose(placement, views, a_demand(prompt))
    assert third.predicted.tokens_reused == 0  # nothing is there, nothing is promised


def test_idle_workers_take_turns() -> None:
    placement = placement_of()
    views = [a_view(index) for index in range(3)]
    chosen = []
    for number in range(6):
        placed = choose(placement, views, a_demand(keys(str(number), 4)))
        placement.finished(placed.predicted)
        chosen.append(placed.worker.index)
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_places_and_takes_its_promise_back(name: str) -> None:
    prompt = keys("abcdef", 12)
    placement = placement_of(name, held={1: (prompt[:6], (6,))})
    for _ in range(5):
        placed = choose(placement, [a_view(0), a_view(2)], a_demand(prompt, session="s"))
        assert isinstance(placed, Whole)
        assert placed.worker.index in (0, 2)  # 1 is known and may not be chosen
        assert (placed.predicted is None) == (name == "least_wait")
        if placed.predicted is not None:
            placement.finished(placed.predicted)


def test_chains_of_two_wire_ids_are_looked_up_each_for_its_workers() -> None:
    mine, other = keys("a", 4), keys("b", 4)
    placement = placement_of(held={0: (other, (2,)), 1: (mine, (4,))})
    demand = a_demand(mine, keys={"wire": mine, "wire2": other})
    placed = choose(placement, [a_view(0), a_view(1)], demand)
    assert placed.worker.address == "w1"


def test_a_worker_is_believed_what_it_measures_and_one_that_has_not_the_median_of_the_others() -> None:
    predictions = Predictions(unknown_hardware_model(COSTS), ratio_max=RATIO_MAX_UNKNOWN)
    views = [a_view(0, rate=50_000.0), a_view(1, rate=100.0), a_view(2, rate=0.0), a_view(3, rate=2000.0)]
    seconds = factors(predictions, views) * predictions.token_seconds
    assert 1 / seconds == pytest.approx([50_000, 100, 2000, 2000])


def test_a_worker_that_comes_back_is_measured_anew() -> None:
    predictions = Predictions(unknown_hardware_model(COSTS), ratio_max=RATIO_MAX_UNKNOWN)
    assert factors(predictions, [a_view(0, rate=100.0)]) * predictions.token_seconds == pytest.approx(1 / 100)
    back = a_view(0, rate=0.0, session_number=9)
    assert factors(predictions, [back]) == [1.0]
    measured = a_view(0, rate=4000.0, session_number=9)
    assert factors(predictions, [measured]) * predictions.token_seconds == pytest.approx(1 / 4000)
    assert factors(predictions, [back]) * predictions.token_seconds == pytest.approx(1 / 4000)


def factors(predictions: Predictions, views: Sequence[WorkerView]) -> NDArray[np.float64]:
    """Once the figures of these workers have come."""
    fleet = fleet_of(views)
    predictions.learn(fleet, able_of(fleet))
    return predictions.factors_W(fleet, able_of(fleet))


def test_a_worker_with_the_prompt_in_host_memory_copies_it_and_nobody_reads_it_from_there() -> None:
    prompt = keys("abcdef", 40)
    caches = Caches(3, {1: (prompt, (40,))}, on_device={1: (0, ())})
    placement = make_placement("rorqual", caches=caches, workers=WorkerModel(costs=COSTS))
    idle = [a_view(index, can_share=True) for index in range(3)]
    placed = choose(placement, idle, a_demand(prompt))
    assert isinstance(placed, Whole)
    assert (placed.worker.address, placed.predicted.fetch) == ("w1", None)
    assert placed.predicted.tokens_reused == 40 * 256
    busy = [a_view(index, can_share=True, ahead=1_000_000 * (index == 1)) for index in range(3)]
    placed = choose(placement, busy, a_demand(prompt))
    assert isinstance(placed, Whole)
    assert (placed.worker.address, placed.predicted.fetch) == ("w0", None)
    assert placed.predicted.tokens_reused == 0


def test_what_the_store_has_lets_a_free_worker_take_what_a_busy_one_keeps() -> None:
    prompt = keys("abcdef", 40)
    placement = placement_of(held={1: (prompt[:30], (30,))})
    # 8 s of queue, beside 5 to compute, 11 that a copy of 30 pages is charged; half of it where they are stored.
    views = [a_view(0), a_view(1, ahead=16_000)]
    without = choose(placement, views, a_demand(prompt))
    assert isinstance(without, Whole)
    placement.finished(without.predicted)
    placed = choose(placement, views, a_demand(prompt, stored=Stored(pages=40, tail=40)))
    assert isinstance(placed, Whole)
    assert (without.worker.address, placed.worker.address) == ("w1", "w0")
    assert placed.predicted.tokens_reused == 40 * 256
    assert placed.predicted.fetch is None, "the worker asks the store itself"
