"""Conversations over real processes: what is kept of earlier turns changes no bit of an answer, and is neither computed
nor read again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.handover import record_bytes
from kvstore.layout import Numerics, build_layout
from rorqual.model_config import PAGE_TOKENS, load_model_config
from tests.harness.pools import Pools
from tests.harness.repeating import Answer, a_prompt, ask
from tests.harness.system import IDS_CONFIG, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

SYSTEM = ("--exact", "--pages", "40", "--slots", "4", "--prefill-tokens", "512")
REBUILD_PAGES = 1  # of this model: 4 layers with a window of 32
PROMPTS = 5 * PAGE_TOKENS


def lengths() -> list[int]:
    """Of prompts that begin alike: to every boundary, and one token beyond it."""
    return [at + more for at in range(PAGE_TOKENS, PROMPTS + 1, PAGE_TOKENS) for more in (0, 1)][:-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="kept")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Answer]:
    """Of prompts of these lengths, from a worker that keeps nothing."""
    pools = Pools(model, tmp_path_factory.mktemp("off"), *SYSTEM, "--prefix-cache", "off")
    try:
        pools.start("both")
        pools.start_router()
        prompt = a_prompt(1, PROMPTS)
        answers = {length: ask(pools, prompt[:length], 6) for length in lengths()}
        assert {cached for _, cached in answers.values()} == {0}
        return {length: answer for length, (answer, _) in answers.items()}
    finally:
        pools.close()


@pytest.fixture(params=["both", "split"])
def keeping(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Pools]:
    pools = Pools(model, tmp_path, *SYSTEM, transfer="nixl")
    try:
        if request.param == "both":
            pools.start("both")
        else:
            pools.start("prefill")
            pools.start("decode")
        pools.start_router()
        yield pools
    finally:
        pools.close()


def test_prompts_that_begin_alike_get_the_same_bits_as_without_a_cache(
    keeping: Pools, expected: dict[int, Answer]
) -> None:
    prompt = a_prompt(1, PROMPTS)
    cached: dict[int, int] = {}
    for length in sorted(
        lengths(), key=lambda length: -length
    ):  # the longest first: then all begin within it
        answer, cached[length] = ask(keeping, prompt[:length], 6)
        assert answer == expected[length], f"{length} tokens"
    for length in lengths():  # each with a tail of its own now
        answer, again = ask(keeping, prompt[:length], 6)
        assert answer == expected[length], f"{length} tokens, the second time"
        assert again >= cached[length]
        assert again >= (length // PAGE_TOKENS - REBUILD_PAGES) * PAGE_TOKENS
    keeping.wait_until_idle()


def test_a_turn_computes_and_reads_what_is_new_of_it(model: Path, tmp_path: Path) -> None:
    pools = Pools(model, tmp_path, *SYSTEM, transfer="nixl")
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router()
        layout = build_layout(load_model_config(model), Numerics.FLOAT32)
        history = a_prompt(2, 300)
        num_kept = 0  # full pages at the decode worker
        for turn in range(4):
            before = pools["decode-0"].metrics()["rorqual_worker_state_bytes_read_total"]
            answer, cached = ask(pools, history, 200)
            pools.wait_until_idle()
            read = pools["decode-0"].metrics()["rorqual_worker_state_bytes_read_total"] - before
            num_pages = len(history) // PAGE_TOKENS
            least = (num_pages - num_kept) * layout.page_bytes + record_bytes(
                layout, len(history), drafts=False
            )
            print(
                f"turn {turn}: {len(history)} tokens, {cached} cached, {read:.0f} bytes read, at least {least}"
            )
            assert read == least
            history += answer[0]
            num_kept = (len(history) - 1) // PAGE_TOKENS  # the last token is never computed
            history += a_prompt(3 + turn, 100)
    finally:
        pools.close()
