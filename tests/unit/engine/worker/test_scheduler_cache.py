"""A scheduler that keeps prefixes, against a rank that knows what every page and record must hold: what is computed,
what is shared, who waits for whom, and what makes room."""

from __future__ import annotations

import pytest
from fake_state import EOS, PAGE_TOKENS, REBUILD_TOKENS, answer, page_digests

from kvstore.shadow_radix import StartKind
from rorqual.sampling import SamplingParams
from tests.harness.benches import Bench, Pair, a_cache, a_prompt, adopting, lending


def keeping(**options) -> Bench:
    return Bench(**{"num_pages": 32, "num_records": 8, "cache": a_cache(), **options})


def computed(bench: Bench, key: int, prompt: list[int], max_tokens: int, **options) -> int:
    """Tokens that the rank has computed for one answer, which is checked."""
    before = bench.rank.num_tokens_computed
    params = bench.open(key, prompt, max_tokens, ignore_eos=True, **options)
    bench.run()
    assert bench.tokens(key) == answer(prompt, max_tokens, params, ignore_eos=True)
    return bench.rank.num_tokens_computed - before


def test_a_prompt_that_goes_on_from_an_earlier_one_computes_the_rest() -> None:
    bench = keeping()
    prompt = a_prompt(1, 2 * PAGE_TOKENS + 30)
    assert computed(bench, 1, prompt, 1) == len(prompt)
    assert computed(bench, 2, [*prompt, 5], 1) == 31
    assert bench.events[2][0].cached_tokens == 2 * PAGE_TOKENS
    assert computed(bench, 3, a_prompt(2, 700), 1) == 700
    assert bench.events[3][0].cached_tokens == 0
    counts = bench.scheduler.cache_state().counts
    assert counts.pages_hit == {StartKind.COLD: 0, StartKind.TAIL: 2}
    assert (counts.pages_missed, counts.tokens_reused) == (4, 2 * PAGE_TOKENS)
    assert counts.tokens_computed == bench.rank.num_tokens_computed


@pytest.mark.parametrize("max_tokens", [1, 2, 300])
def test_a_prompt_that_is_all_there_is_answered_without_computing_it(max_tokens: int) -> None:
    bench = keeping()
    prompt = a_prompt(1, 2 * PAGE_TOKENS)
    computed(bench, 1, prompt, 1)
    assert computed(bench, 2, prompt, max_tokens) == max_tokens - 1
    assert bench.events[2][0].cached_tokens == len(prompt)


def test_a_next_turn_resumes_where_the_answer_crossed_its_last_boundary() -> None:
    bench = keeping()
    prompt = a_prompt(1, 300)
    computed(bench, 1, prompt, 600)  # 899 tokens are computed: three pages
    history = prompt + bench.tokens(1) + a_prompt(2, 50)
    assert computed(bench, 2, history, 1) == len(history) - 3 * PAGE_TOKENS
    state = bench.scheduler.cache_state()
    assert state.num_pages == 3
    assert state.num_tails == 2  # of the prompt's page, and of the turn's end


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_what_comes_after_an_end_token_is_not_kept(inflight: int) -> None:
    """The plan behind it may even cross a boundary."""
    bench = keeping(plans_inflight_max=inflight)
    prompt = a_prompt(9, PAGE_TOKENS - 2)
    seeds = range(10_000)
    seed = next(seed for seed in seeds if answer(prompt, 3, SamplingParams(seed=seed))[1:] == [EOS])
    bench.open(seed, prompt, 300)
    bench.run()
    assert bench.tokens(seed)[-1] == EOS
    assert bench.scheduler.cache_state().num_pages == 0
    assert bench.scheduler.num_records_free == 8


def test_without_a_tail_the_last_pages_are_replayed_behind_an_empty_window() -> None:
    bench = keeping(num_records=0)
    prompt = a_prompt(1, 5 * PAGE_TOKENS)
    computed(bench, 1, prompt, 1)
    assert computed(bench, 2, [*prompt, 4, 4], 1) == REBUILD_TOKENS + 2
    restore = next(plan.opens[0].restore for plan in reversed(bench.plans) if plan.opens)
    assert restore is not None
    assert (restore.num_computed, restore.record) == (5 * PAGE_TOKENS - REBUILD_TOKENS, -1)
    assert bench.rank.num_tokens_replayed == REBUILD_TOKENS


def test_pages_between_a_tail_and_the_end_of_what_is_there_are_replayed_and_stay_shared() -> None:
    bench = keeping()
    prompt = a_prompt(1, PAGE_TOKENS)
    computed(bench, 1, prompt, 1)
    longer = prompt + a_prompt(2, 2 * PAGE_TOKENS)
    computed(bench, 2, longer, 1)
    other = longer[: 2 * PAGE_TOKENS] + a_prompt(3, 100)  # of whose second page there is no tail
    assert computed(bench, 3, other, 1) == PAGE_TOKENS + 100
    assert bench.rank.num_tokens_replayed == PAGE_TOKENS
    assert bench.scheduler.cache_state().num_pages == 3


def test_two_salts_share_nothing() -> None:
    bench = keeping()
    prompt = a_prompt(1, 600)
    for key, salt in enumerate(("a", "b")):
        assert computed(bench, key, prompt, 1, salt=salt) == 600
    assert computed(bench, 7, prompt, 1, salt="b") == 600 - 2 * PAGE_TOKENS
    assert bench.scheduler.cache_state().num_pages == 4


def test_a_prompt_that_is_scored_is_computed_whole_and_kept() -> None:
    bench = keeping()
    prompt = a_prompt(1, 600)
    assert computed(bench, 1, prompt, 1, prompt_logprobs=0) == 600
    assert computed(bench, 2, prompt, 1, prompt_logprobs=0) == 600
    assert len(bench.scores[2]) == 599
    assert computed(bench, 3, prompt, 1) == 600 - 2 * PAGE_TOKENS
    assert bench.scheduler.cache_state().num_pages == 2


def test_a_cancelled_prompt_leaves_what_it_had_computed() -> None:
    bench = keeping(prefill_tokens_max=PAGE_TOKENS, plans_inflight_max=1)
    prompt = a_prompt(1, 1000)
    bench.open(1, prompt, 1)
    bench.step()
    bench.step()
    bench.send()
    assert bench.cancel(1)
    bench.run()
    assert bench.scheduler.cache_state().num_pages == 2
    assert computed(bench, 2, prompt, 1) == 1000  # replayed from the start, but for no tail
    assert bench.rank.num_tokens_replayed == 2 * PAGE_TOKENS


def test_a_preempted_sequence_goes_on_from_its_own_pages() -> None:
    """The pool is too small for two to finish together: the younger is put off, and has little to compute again."""
    bench = keeping(num_pages=8, num_slots=2)
    prompts = {key: a_prompt(key, 700) for key in (1, 2)}
    params = {key: bench.open(key, prompt, 700, ignore_eos=True) for key, prompt in prompts.items()}
    bench.run()
    for key, prompt in prompts.items():
        assert bench.tokens(key) == answer(prompt, 700, params[key], ignore_eos=True)
        assert bench.events[key][0].cached_tokens == 0
    assert bench.scheduler.num_preemptions > 0
    assert bench.scheduler.cache_state().counts.tokens_reused > 0


def test_one_who_needs_what_another_computes_waits_for_it_and_others_pass() -> None:
    bench = keeping(prefill_tokens_max=2 * PAGE_TOKENS, num_slots=3, plans_inflight_max=1)
    shared = a_prompt(1, 1500)
    bench.open(1, shared, 1, ignore_eos=True)
    bench.open(2, [*shared, 3], 1, ignore_eos=True)
    bench.open(3, a_prompt(3, 40), 1, ignore_eos=True)
    bench.step()
    assert len(bench.tokens(3)) == 1
    assert bench.scheduler.load().sequences_waiting == 1
    bench.run()
    assert bench.rank.num_tokens_computed == 1500 + 40 + 1501 - 5 * PAGE_TOKENS
    assert bench.events[2][0].cached_tokens == 5 * PAGE_TOKENS


@pytest.mark.parametrize("how", ["leader", "follower"])
def test_a_follower_goes_on_when_its_leader_is_cancelled_and_may_be_cancelled_itself(how: str) -> None:
    bench = keeping(prefill_tokens_max=2 * PAGE_TOKENS, plans_inflight_max=1)
    shared = a_prompt(1, 1500)
    for key in (1, 2, 3):
        bench.open(key, shared, 1, ignore_eos=True)
    bench.step()
    assert bench.cancel(1 if how == "leader" else 2)
    bench.run()
    assert [len(bench.tokens(key)) for key in (1, 2, 3)] == ([0, 1, 1] if how == "leader" else [1, 0, 1])


def test_prefixes_in_use_are_not_evicted_and_others_make_room() -> None:
    bench = keeping(num_pages=6, num_slots=2)
    first, second = a_prompt(1, 2 * PAGE_TOKENS), a_prompt(2, 2 * PAGE_TOKENS)
    computed(bench, 1, first, 1)
    computed(bench, 2, second, 1)
    bench.open(3, [*first, 9], 200, ignore_eos=True)
    bench.step()
    # Four pages are kept, two of them in use beside one more; three are to be had.
    load = bench.scheduler.load()
    assert (load.pages_free, load.pages_total) == (3, 6)
    bench.open(4, a_prompt(4, 3 * PAGE_TOKENS), 1, ignore_eos=True)
    bench.run()
    assert len(bench.tokens(3)) == 200
    assert len(bench.tokens(4)) == 1
    counts = bench.scheduler.cache_state().counts
    assert counts.pages_evicted == 2
    assert computed(bench, 5, [*first, 9], 1) == 1


def test_a_cache_that_is_off_keeps_nothing() -> None:
    bench = Bench(num_pages=32, num_records=0)
    prompt = a_prompt(1, 600)
    assert computed(bench, 1, prompt, 1) == 600
    assert computed(bench, 2, prompt, 1) == 600
    assert bench.scheduler.cache_state().num_pages == 0


def test_prompts_that_begin_alike_lend_the_same_pages_and_each_gives_back_its_own_claim() -> None:
    bench = lending(num_pages=8, num_records=6, cache=a_cache())
    shared = a_prompt(1, 2 * PAGE_TOKENS)
    bench.open(1, [*shared, 5], 10, ignore_eos=True)
    bench.drain()
    bench.open(2, shared + a_prompt(2, PAGE_TOKENS), 10, ignore_eos=True)
    bench.drain()
    first, second = ([page for event in bench.pages[key] for page in event.pages] for key in (1, 2))
    assert second[:2] == first
    assert len(second) == 3
    for key, pages in ((1, first), (2, second)):
        digests = [digest for event in bench.pages[key] for digest in event.digests]
        assert digests == [item for page in pages for item in page_digests(bench.rank.memory[page])]
    assert bench.rank.num_tokens_computed == 2 * PAGE_TOKENS + 1 + PAGE_TOKENS
    assert bench.scheduler.load().pages_free == 5
    # Those that one of the two still lends are not to be had.
    bench.take_back(1)
    assert bench.scheduler.load().pages_free == 5
    bench.open(3, a_prompt(3, 5 * PAGE_TOKENS), 10, ignore_eos=True)
    bench.drain()
    assert bench.scheduler.load().pages_free == 0
    bench.take_back(2)
    assert bench.scheduler.load().pages_free == 3
    bench.take_back(3)
    bench.run()
    assert bench.scheduler.cache_state().num_pages == 8


@pytest.mark.parametrize("length", [2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 1])
def test_a_prompt_that_is_all_there_is_lent_without_computing_it(length: int) -> None:
    bench = lending(num_pages=8, num_records=6, cache=a_cache())
    prompt = a_prompt(1, length)
    for key in (1, 2):
        bench.open(key, prompt, 10, ignore_eos=True)
        bench.drain()
        assert len(bench.lent) == key
    assert bench.rank.num_tokens_computed == length + length % PAGE_TOKENS
    for key in (2, 1):
        bench.take_back(key)
    bench.run()


def test_an_adoption_says_what_is_there_and_only_the_rest_is_read() -> None:
    pair = Pair(
        prefill=lending(num_pages=16, num_records=8, cache=a_cache()),
        decode=adopting(num_pages=16, num_records=8, cache=a_cache()),
    )

    def turn(key: int, prompt: list[int], max_tokens: int) -> list[int]:
        pair.prefill.open(key, prompt, max_tokens, ignore_eos=True)
        pair.prefill.drain()
        pair.bind(key, prompt, max_tokens, ignore_eos=True)
        pair.drain()
        return pair.prefill.tokens(key) + pair.decode.tokens(key)

    prompt = a_prompt(1, 300)
    history = prompt + turn(1, prompt, 400)
    assert pair.decode.adoptions[1].num_present == 0
    turn(2, [*history, 7, 7], 5)
    # Of 702 tokens two pages are full; the decode worker has computed the second one itself.
    assert pair.decode.adoptions[2].num_present == 2
    assert pair.decode.rank.num_tokens_computed == 399 + 4
    pair.prefill.run()
    pair.decode.run()


def test_shared_pages_are_not_kept_back_when_an_adoption_is_cancelled() -> None:
    pair = Pair(
        prefill=lending(num_pages=16, num_records=8, cache=a_cache()),
        decode=adopting(num_pages=16, num_records=8, cache=a_cache()),
    )
    shared = a_prompt(1, 2 * PAGE_TOKENS)
    for key in (1, 2):
        prompt = shared + a_prompt(10 + key, 300)
        pair.prefill.open(key, prompt, 10, ignore_eos=True)
        pair.prefill.drain()
        pair.bind(key, prompt, 10, ignore_eos=True)
        if key == 1:
            pair.drain()
    assert pair.begin(2)
    assert pair.cancel_decode(2)
    # Two full pages were there; one more is read, and one was for the rest and what comes after.
    assert pair.decode.scheduler.load().pages_leased == 2
    assert pair.end(2)
    assert pair.decode.scheduler.load().pages_leased == 0
    pair.prefill.take_back(2)
    pair.prefill.run()
    pair.decode.run()


def test_a_tail_that_a_plan_in_flight_reads_is_not_given_to_others_when_its_sequence_is_cancelled() -> None:
    """What is read from elsewhere is written outside the order of plans."""
    pair = Pair(
        prefill=lending(num_pages=16, num_records=8),
        decode=adopting(num_pages=16, num_records=1, cache=a_cache()),
    )
    decode, prompt = pair.decode, a_prompt(1, 2 * PAGE_TOKENS)
    decode.open(1, prompt, 1)
    decode.drain()
    decode.open(2, [*prompt, 8], 3, ignore_eos=True)
    plan = decode.send()
    assert plan is not None
    assert plan.opens[0].restore is not None
    assert decode.cancel(2)
    other = a_prompt(3, 40)
    pair.prefill.open(3, other, 3, ignore_eos=True)
    pair.prefill.drain()
    pair.bind(3, other, 3, ignore_eos=True)
    assert decode.take_adoptions() == []
    assert decode.scheduler.num_records_free == 0
    decode.receive()
    (adoption,) = decode.take_adoptions()
    assert adoption.record == plan.opens[0].restore.record
    assert decode.cancel(3)
    decode.scheduler.settle(adoption.key)
    pair.prefill.take_back(3)
    pair.prefill.run()
    decode.run()


def test_decoding_sequences_leave_a_record_for_each_slot_to_those_that_come_from_elsewhere() -> None:
    bench = adopting(num_pages=16, num_slots=3, num_records=4, cache=a_cache(num_tails_max=0))
    for key in (1, 2, 3):
        bench.open(key, a_prompt(key, 200), 100, ignore_eos=True)
    bench.run()
    held = {segment.tail_record for plan in bench.plans for segment in plan.segments} - {-1}
    assert len(held) == 1
    assert bench.scheduler.cache_state().num_tails == 1
    assert bench.scheduler.cache_state().num_pages == 3
