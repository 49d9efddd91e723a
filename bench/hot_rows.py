"""What hot buffers cost a layer's step: `hot_rows`, numba beside the torch reference, and beside `locate_rows`.

Requests of 128k tokens with rows of 584 bytes; each step wants top-k entries, of which a given share is in the hot
buffer. `locate_rows` is what the same step costs when all rows are on the device: what is above it is the price of
spilling, found rows at 100 %, and copies of what is missing below. Hot rows too are in pages in random order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from engine.kernels.hot_rows import HITS, MISSES, HostRows, HotBuffers, RowBytes, make_hot_buffers
from engine.kernels.registry import implementations
from engine.kernels.suite import choose_kernels
from kvstore.hisparse import HotShape, hot_shape
from kvstore.layout import Component, Descriptor, Numerics, build_layout
from rorqual.performance import PRESETS

NUM_TOKENS = 131_072
BATCHES = (1, 8, 32)
HIT_RATES = (1.0, 0.95, 0.5, 0.0)
SECONDS = 0.3
"""Of each measurement, at most; the torch reference may be called only twice in it."""

Answer = Callable[[HotBuffers, HostRows, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, bool, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    topk: int
    shape: HotShape
    c4: Descriptor
    host: HostRows  # of as many requests as the largest batch
    pages_RP: Tensor  # device pages of the same requests, were they resident


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench hot_rows", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = ("locate us", "numba us", "numba/locate", "torch us", "torch/numba", "found", "GB/s copied")
    print(f"{'model':6} {'batch':>5} {'hits':>5}" + "".join(f"{name:>13}" for name in columns))
    for model in cast("list[str]", options.models):
        batches = cast("list[int]", options.batches)
        setting = _setting(model, max(batches))
        for batch in batches:
            for hit_rate in HIT_RATES:
                cells = "".join(f"{cell:13.2f}" for cell in _measure(setting, batch, hit_rate))
                print(f"{model:6} {batch:5} {hit_rate:5.0%}{cells}", flush=True)
    return 0


def _setting(model: str, num_requests: int) -> Setting:
    config = PRESETS[model]
    layout = build_layout(config, Numerics.SERVED)
    c4 = layout.find(Component.C4)
    assert c4 is not None
    shape = hot_shape(layout, index_topk=config.index_topk, num_drafts=0, num_tokens_max=NUM_TOKENS)
    num_pages = shape.num_entries // c4.num_rows
    # All requests read the same pages, each in an order of its own: what is read once in a while is out of any cache.
    pages = torch.stack([torch.randperm(num_pages) for _ in range(num_requests)])
    host = HostRows(
        rows=_rows(num_pages, c4.num_rows, c4),
        pages_RP=pages,
        first_new_R=torch.full((num_requests,), shape.num_entries, dtype=torch.int64),
    )
    return Setting(topk=config.index_topk, shape=shape, c4=c4, host=host, pages_RP=pages)


def _rows(num_units: int, num_rows: int, c4: Descriptor) -> RowBytes:
    """One layer's rows; in each unit all data, then all scales. Written once, so that the memory is there."""
    memory = torch.ones((num_units, num_rows * c4.row_bytes), dtype=torch.uint8)
    split = num_rows * c4.data_bytes
    return RowBytes(
        data_Urb=memory[:, :split].unflatten(1, (num_rows, c4.data_bytes)),
        scales_Urb=memory[:, split:].unflatten(1, (num_rows, c4.scale_bytes)),
    )


def _measure(setting: Setting, batch: int, hit_rate: float) -> tuple[float, ...]:
    """A row of the table."""
    functions = {item.name: cast("Answer", item.function) for item in implementations("hot_rows", "cpu")}
    numba, found, copied = _step_seconds(functions["numba"], setting, batch, hit_rate)
    torch_seconds, _, _ = _step_seconds(functions["torch"], setting, batch, hit_rate)
    locate = _locate_seconds(setting, batch)
    times = (1e6 * locate, 1e6 * numba, numba / locate, 1e6 * torch_seconds, torch_seconds / numba)
    return (*times, found, copied / numba / 1e9)


def _step_seconds(
    function: Answer, setting: Setting, batch: int, hit_rate: float
) -> tuple[float, float, float]:
    """Median seconds of a call, the share of wanted entries that was found, and bytes copied in a call."""
    shape, generator = setting.shape, torch.Generator().manual_seed(0)
    hot, requests = _hot_buffers(setting, batch), torch.arange(batch)

    def call(entries: Tensor) -> Tensor:
        return function(hot, setting.host, setting.pages_RP, requests, requests, entries)[3]

    for first in range(0, shape.num_hot, setting.topk):  # fill them
        call(torch.arange(first, first + setting.topk).repeat(batch, 1))
    times: list[float] = []
    hits = misses = 0
    while (sum(times) < SECONDS and len(times) < 50) or len(times) < 3:
        entries = torch.stack(
            [_picks(hot, request, setting, hit_rate, generator) for request in range(batch)]
        )
        start = time.perf_counter()
        counts = call(entries)
        times.append(time.perf_counter() - start)
        hits, misses = hits + int(counts[:, HITS].sum()), misses + int(counts[:, MISSES].sum())
    copied = misses / len(times) * hot.rows.row_bytes
    return statistics.median(times), hits / (hits + misses), copied


def _hot_buffers(setting: Setting, batch: int) -> HotBuffers:
    per_page = setting.c4.num_rows
    num_pages = setting.shape.num_hot_pages(per_page)
    return make_hot_buffers(
        _rows(batch * num_pages, per_page, setting.c4),
        setting.shape,
        unit_rows=per_page,
        pages_RG=torch.randperm(batch * num_pages).view(batch, num_pages),
    )


def _picks(
    hot: HotBuffers, request: int, setting: Setting, hit_rate: float, generator: torch.Generator
) -> Tensor:
    """Top-k entries in ascending order, of which a share is in the hot buffer."""
    held = hot.entries_RH[request].long()
    is_held = torch.zeros(setting.shape.num_entries, dtype=torch.bool).index_fill_(0, held, True)
    others = (~is_held).nonzero().squeeze(1)
    num_found = round(hit_rate * setting.topk)
    found = held[torch.randperm(len(held), generator=generator)[:num_found]]
    missing = others[torch.randperm(len(others), generator=generator)[: setting.topk - num_found]]
    return torch.cat((found, missing)).sort().values


def _locate_seconds(setting: Setting, batch: int) -> float:
    """Median seconds of `locate_rows` for as many picks."""
    locate: Callable[..., Any] = choose_kernels().locate_rows
    requests, times = torch.arange(batch), list[float]()
    stride = setting.c4.unit_rows
    for _ in range(50):
        entries = torch.randint(setting.shape.num_entries, (batch, setting.topk)).sort(-1).values
        start = time.perf_counter()
        locate(setting.pages_RP, requests, entries, setting.c4.num_rows, stride)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(main())
