"""The pager: what is kept is exactly what the quantisation points leave, where the layout says, and nothing that was
not written is ever read."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.suite import choose_kernels
from engine.model.batch import BatchSegment, build_batch
from engine.model.forward import Model
from engine.model.rounding import rounding_of
from engine.pager import PagedState, SlotTables
from engine.runner import Runner, SegmentTokens
from kvstore.layout import Component, Numerics, build_layout
from kvstore.pools import Pools
from rorqual.model_config import ModelConfig
from tests.harness.comparison import relative_error
from tests.harness.drive import Step, alone, in_turn, random_schedule, run_fresh, run_paged
from tests.harness.models import CSA, HCA, SWA, build_model, config_of, random_tokens, raw_config, real_ratios
from tests.reference.rounding import round_bf16, round_fp4, round_fp8
from tests.reference.weights import random_tensors

numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
modes = pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])


def config() -> ModelConfig:
    """Widths that leave short scale blocks: 104 plain channels and a few index ones."""
    return config_of(
        raw_config((SWA, CSA, HCA), num_hash=1, head_dim=120, index_head_dim=64), num_mtp_blocks=1
    )


def make(numerics: Numerics, *, num_pages: int = 4, num_slots: int = 3) -> SlotTables:
    layout = build_layout(config(), numerics)
    pools = Pools(layout, num_pages=num_pages, num_slots=num_slots)
    pools.fill(0xFF)
    tables = SlotTables(pools, pages_per_slot_max=num_pages)
    for slot in range(num_slots):
        tables.open(slot)
    return tables


def step(tables: SlotTables, segments: list[tuple[int, int, int]]) -> tuple[PagedState, list[BatchSegment]]:
    """The state of a step over (slot, start, count)."""
    batch, places = build_batch([(slot, start, torch.zeros(count).long()) for slot, start, count in segments])
    return PagedState(config(), tables, batch, kernels=choose_kernels(), exact=False), places


def all_rows(state: PagedState, component: Component, layer: int, segment: BatchSegment) -> Tensor:
    return state.chunk_rows(
        component, layer, segment, torch.arange(segment.end // config().layers[layer].ratio)
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- rows in, rows out ---


def kept(numerics: Numerics, component: Component, rows: Tensor) -> Tensor:
    """What the format can hold of rows, by the reference's own rounding."""
    if numerics is Numerics.FLOAT32:
        return rows
    if component is Component.C4_INDEX:
        return round_fp4(rows, block=32)
    plain = config().nope_head_dim
    return torch.cat((round_fp8(rows[:, :plain], block=64), round_bf16(rows[:, plain:])), dim=1)


@numerics_of_both_kinds
@pytest.mark.parametrize(
    ("component", "layer"), [(Component.C4, 1), (Component.C4_INDEX, 1), (Component.C128, 2)]
)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), size=st.sampled_from((1e-6, 0.1, 1.0, 300.0)))
def test_compressed_rows_come_back_as_the_values_that_the_format_holds(
    numerics: Numerics, component: Component, layer: int, seed: int, size: float
) -> None:
    tables = make(numerics)
    tables.append(0, [2, 0])
    tables.append(1, [3])
    state, (long, short) = step(tables, [(0, 0, 320), (1, 0, 37)])
    item = tables.pools.layout.find(component)
    assert item is not None
    ratio = config().layers[layer].ratio
    first, second = long.count // ratio, short.count // ratio
    rows = size * normal(first + second, item.width, seed=seed)
    state.put_rows(component, layer, rows)
    wanted = kept(numerics, component, rows)
    assert torch.equal(all_rows(state, component, layer, long), wanted[:first])
    assert torch.equal(all_rows(state, component, layer, short), wanted[first:])
    # Rounded once, rounded for good.
    state.put_rows(component, layer, wanted)
    assert torch.equal(all_rows(state, component, layer, long), wanted[:first])


def test_what_the_served_model_puts_is_kept_to_the_bit() -> None:
    """The model rounds rows itself, since the chunk that makes them uses them before they are read back."""
    tables, rounding = make(Numerics.SERVED), rounding_of(Numerics.SERVED, choose_kernels())
    tables.append(0, [1])
    state, (segment,) = step(tables, [(0, 0, 200)])
    rows = rounding.kv_rows(normal(200, 120), config().nope_head_dim)
    state.put_window(Component.WINDOW, 0, rows)
    state, (segment,) = step(tables, [(0, 200, 5)])
    assert torch.equal(state.past_window(Component.WINDOW, 0, segment, 7), rows[193:200])
    index = rounding.index_rows(normal(50, 64, seed=1))
    state, (segment,) = step(tables, [(0, 0, 200)])
    state.put_rows(Component.C4_INDEX, 1, index)
    assert torch.equal(all_rows(state, Component.C4_INDEX, 1, segment), index)


def test_a_served_page_in_the_pool_is_the_wire_page_byte_for_byte() -> None:
    """Row 3 of a page: e4m3 codes, then bf16 values; its scales stand behind the data of all rows."""
    tables = make(Numerics.SERVED)
    tables.append(0, [2])
    state, _ = step(tables, [(0, 0, 16)])
    rows = rounding_of(Numerics.SERVED, choose_kernels()).kv_rows(normal(4, 120), config().nope_head_dim)
    state.put_rows(Component.C4, 1, rows)
    pool = tables.pools[Component.C4]
    page = pool.bytes_ulb[2, 0]
    data_bytes, scale_bytes = 104 + 2 * 16, 8
    assert page.numel() == 64 * (data_bytes + scale_bytes)
    data = page[3 * data_bytes : 4 * data_bytes]
    scales = page[64 * data_bytes + 3 * scale_bytes :][:scale_bytes]
    codes = data[:104].view(torch.float8_e4m3fn).float()
    powers = 2.0 ** (scales[:2].float() - 127)
    assert torch.equal(torch.cat((codes[:64] * powers[0], codes[64:] * powers[1])), rows[3, :104])
    assert torch.equal(data[104:].clone().view(torch.bfloat16).float(), rows[3, 104:])
    assert scales[2:].tolist() == [0] * 6
    assert bool((pool.bytes_ulb[[0, 1, 3]] == 0xFF).all()), "another page was written"


@numerics_of_both_kinds
def test_rings_keep_the_last_positions_of_a_chunk_longer_than_themselves(numerics: Numerics) -> None:
    tables = make(numerics)
    tables.append(1, [0, 1, 2])
    ring = tables.pools[Component.WINDOW].descriptor.num_rows
    count = 2 * ring + 17
    state, _ = step(tables, [(1, 0, count)])
    rows = kept(numerics, Component.WINDOW, normal(count, 120))
    state.put_window(Component.WINDOW, 1, rows)
    state, (segment,) = step(tables, [(1, count, 3)])
    assert torch.equal(state.past_window(Component.WINDOW, 1, segment, ring), rows[-ring:])


def test_unfinished_rows_before_the_first_token_are_empty_even_in_a_used_slot() -> None:
    tables = make(Numerics.SERVED)
    for component, layer, window in (
        (Component.C4_UNFINISHED, 1, 4),
        (Component.C4_INDEX_UNFINISHED, 1, 4),
        (Component.C128_UNFINISHED, 2, 16),
    ):
        tables.append(2, [0])
        state, (segment,) = step(tables, [(2, 0, 30)])
        half = tables.pools[component].descriptor.width // 2
        state.put_unfinished(component, layer, normal(30, 2 * half))
        tables.open(2)
        tables.append(2, [1])
        state, (segment,) = step(tables, [(2, 0, 2)])
        past = state.past_unfinished(component, layer, segment, -window)
        assert past.shape == (window, 2 * half)
        assert bool((past[:, :half] == 0).all())
        assert bool((past[:, half:] == -torch.inf).all())


def test_a_step_beyond_the_pages_that_a_slot_holds_is_a_broken_invariant() -> None:
    tables = make(Numerics.FLOAT32)
    tables.append(0, [3])
    step(tables, [(0, 0, 256)])
    with pytest.raises(AssertionError, match="slot 0 holds pages for 256 tokens, not 257"):
        step(tables, [(0, 250, 7)])
    with pytest.raises(AssertionError, match="outgrew"):
        tables.append(0, [0, 1, 2, 2])


# --- the model over pages ---

SCHEDULES: list[tuple[list[int], list[Step]]] = [
    ([300], alone(300)),
    ([300, 40, 9], in_turn([[300], [40], [9]])),
    ([290, 270, 5], in_turn([[130, 1, 1, 100, 58], [253, 1, 1, 1, 1, 13], [1] * 5])),
    ([60, 1, 3], random_schedule([60, 1, 3], random.Random(4))),
]


def model_of(numerics: Numerics, *, exact: bool, raw: dict[str, Any] | None = None) -> Model:
    found = config_of(raw or raw_config())
    return build_model(found, random_tensors(found, seed=6), numerics=numerics, exact=exact)


def prompts_of(model: Model, lengths: list[int]) -> list[Tensor]:
    return [random_tokens(model.config, length, seed=index) for index, length in enumerate(lengths)]


@numerics_of_both_kinds
@modes
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(raw_config, id="small"),
        pytest.param(real_ratios, id="real ratios", marks=pytest.mark.slow),
    ],
)
def test_poisoned_and_shuffled_memory_changes_no_bit(numerics: Numerics, exact: bool, shape: Any) -> None:
    """The same batches over zeroed memory in order, over NaN in order, and over NaN with pages and slots scattered."""
    model = model_of(numerics, exact=exact, raw=shape())
    for lengths, steps in SCHEDULES:
        prompts = prompts_of(model, lengths)
        plain = run_paged(model, prompts, steps)
        poisoned = run_paged(model, prompts, steps, poison=True)
        scattered = run_paged(model, prompts, steps, poison=True, chance=random.Random(len(lengths)))
        for wanted, *others in zip(plain.logits, poisoned.logits, scattered.logits, strict=True):
            assert bool(torch.isfinite(wanted).all())
            assert all(torch.equal(wanted, other) for other in others)


@pytest.mark.slow
@numerics_of_both_kinds
@modes
def test_chunks_longer_than_every_ring_give_what_short_ones_give(numerics: Numerics, exact: bool) -> None:
    """800 tokens at once, over rings of 268 rows, then short chunks and single tokens from what they kept."""
    model = model_of(numerics, exact=exact)
    prompts = prompts_of(model, [840])
    wanted = run_paged(model, prompts, in_turn([[100] * 8 + [40]])).logits[0]
    found = run_paged(model, prompts, in_turn([[800, 1, 1, 1, 17, 20]]), poison=True).logits[0]
    if exact:
        assert torch.equal(found, wanted)
    elif numerics is Numerics.FLOAT32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()))
    else:
        # Without exact sums a rounding may flip, after which only the likeliest token is comparable.
        assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.85


@modes
def test_kinds_of_layers_that_compress_alike_keep_their_rows_apart(exact: bool) -> None:
    """One ratio, but two layers of one kind and one of the other: row ids are not the same."""
    model = model_of(Numerics.FLOAT32, exact=exact, raw=raw_config(compress_rates={CSA: 4, HCA: 4}))
    prompts = prompts_of(model, [300])
    with torch.inference_mode():
        wanted = run_fresh(model, prompts).logits[0]
    found = run_paged(model, prompts, in_turn([[250, *[1] * 20, 30]]), poison=True).logits[0]
    assert relative_error(found, wanted) < 1e-5


@modes
def test_a_slot_and_its_pages_serve_the_next_request_as_if_they_were_new(exact: bool) -> None:
    model = model_of(Numerics.SERVED, exact=exact)
    first, second = prompts_of(model, [300, 280])
    runner = Runner(model, num_pages=2, num_slots=1)
    found: list[Tensor] = []
    for tokens in (first, second):
        runner.open(0)
        runner.extend(0, [1, 0])
        found = runner.run([SegmentTokens(slot=0, start=0, tokens=tokens, all_logits=True)])
    wanted = run_paged(model, [second], alone(280)).logits[0]
    assert torch.equal(found[0], wanted)
