"""Hand-overs to a decode worker that drafts: from its first step on, and only where the state for it comes along."""

from __future__ import annotations

import dataclasses

import pytest

from rorqual.session import ErrorCode, FinishReason
from tests.harness.lending import a_world
from tests.harness.pairs import Pair
from tests.harness.virtual import virtual


@virtual
@pytest.mark.parametrize("length", [1, 255, 256, 700])
@pytest.mark.parametrize("drafts", [1, 4, "auto"])
async def test_the_first_step_after_a_hand_over_drafts_and_the_answer_is_the_same(
    length: int, drafts: int | str
) -> None:
    async with a_world() as world:
        pair = Pair(world, drafts=drafts)
        prompt = await pair.lent(1, length=length, max_tokens=40)
        pair.bind(prompt)
        await pair.check_handed_over(prompt)
        await pair.empty()
        first = pair.decode.link.plans[0].segments[0]
        assert first.start == length
        assert first.drafts == {"auto": first.drafts}.get(drafts, drafts)
        assert pair.decode.count("drafts_accepted_total") > 0
        assert pair.prefill.count("drafts_proposed_total") == 0


@virtual
async def test_drafting_sequences_that_have_too_few_pages_are_preempted_and_still_answer() -> None:
    async with a_world() as world:
        pair = Pair(world, num_pages=4, drafts=3)
        prompts = [await pair.lent(number, length=200, max_tokens=500) for number in (1, 2, 3)]
        for prompt in prompts:
            pair.bind(prompt)
        for prompt in prompts:
            await pair.check_handed_over(prompt)
        assert pair.decode.host.scheduler.num_preemptions > 0
        await pair.empty()


@virtual
async def test_state_without_what_drafts_need_is_refused_with_the_option_to_blame() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1, max_tokens=40)
        drafting = world.start_decode("another", drafts=2)
        ear = drafting.connect()
        ear.submit(dataclasses.replace(prompt.command, source=prompt.source))
        report = await ear.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.INVALID
        assert "--drafts 0 on one side only" in report.error
        pair.bind(prompt)
        await pair.check_handed_over(prompt)
        await pair.empty()
