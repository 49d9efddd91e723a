"""How many requests a device holds, resident and spilled (HiSparse), by formula: nothing is measured here.

Bytes of one request of N tokens, from the descriptors of its layout (kvstore/layout.py):
  resident = ceil(N / 256) x page bytes (c4 + c4_index + c128, all layers) + bytes of a slot (rings)
  whole    = G + 2, G = hot rows / 64: pages of hot rows, and of newest ones
  state    = C4 layers x (7 bytes a hot row + 2 bytes an entry of the longest)
  hot      = whole x C4 bytes of a page + state
  spilled  = resident - (ceil(N / 256) - whole, 0 at least) x C4 bytes of a page + state
             + one thin page, the page bytes without C4, if any is thin: for the turn of a page
  host     = floor(N / 256) x page bytes: full pages, whole
Hot rows are 8 x top-k. Columns `resident` and `spilled` in requests: all of them resident; all spilled but one, since
the next request arrives resident. `gain` is the ratio of bytes of a request, `here` that of requests on this device.
`tokens`: the length from which on a spilled request takes less of the device.

Index rows are FP4, as our layouts have them (68 bytes); `fp8` is what the same would give with the index rows that
other engines keep, 128 codes and a float32 scale (132 bytes).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from kvstore.hisparse import capacity, hot_shape, tokens_worth_spilling
from kvstore.layout import Component, Numerics, StateLayout, build_layout
from rorqual.performance import PRESETS

LENGTHS = (32_768, 131_072, 1_048_576)
DEVICE_GIB = 64.0
"""Of an accelerator with 141 GB, what may be left beside weights and activations."""

FP8_SCALE_BYTES = 4  # float32, one for an index row of other engines
COLUMNS = ("resident MB", "spilled MB", "hot MB", "host MB", "resident", "spilled", "gain", "here", "tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device-gib", type=float, default=DEVICE_GIB, help="for cached state (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS), help="lengths of requests")
    parser.add_argument("--hot-rows", type=int, help="of each request and layer (default 8 x top-k)")
    parser.add_argument("--drafts", type=int, default=0, help="of a step; each picks top-k rows too")
    options = parser.parse_args(arguments)
    print(f"{'model':6} {'index':5} {'length':>9}" + "".join(f"{name:>12}" for name in COLUMNS))
    for row in rows(
        cast("list[int]", options.tokens),
        device_bytes=int(cast("float", options.device_gib) * 2**30),
        num_hot=cast("int | None", options.hot_rows),
        num_drafts=cast("int", options.drafts),
    ):
        print(row)
    return 0


def rows(
    lengths: Sequence[int], *, device_bytes: int, num_hot: int | None = None, num_drafts: int = 0
) -> list[str]:
    """The table, for each released model, form of index rows, and length."""
    found: list[str] = []
    for model, config in PRESETS.items():
        served = build_layout(config, Numerics.SERVED)
        for index, layout in (("fp4", served), ("fp8", with_fp8_index(served))):
            shape = hot_shape(
                layout,
                index_topk=config.index_topk,
                num_drafts=num_drafts,
                num_tokens_max=max(lengths),
                num_hot=num_hot,
            )
            for length in lengths:
                item = capacity(layout, shape, num_tokens=length, device_bytes=device_bytes)
                sizes = (item.resident_bytes, item.spilled_bytes, item.hot_bytes, item.host_bytes)
                cells = "".join(f"{size / 1e6:12,.0f}" for size in sizes)
                cells += f"{item.num_resident:12,}{item.num_spilled:12,}"
                cells += f"{item.gain:11.2f}x{item.gain_here:11.2f}x"
                cells += f"{tokens_worth_spilling(layout, shape):12,}"
                found.append(f"{model:6} {index:5} {length:9,}{cells}")
    return found


def with_fp8_index(layout: StateLayout) -> StateLayout:
    """The layout with the index rows of other engines: a byte a value, and one scale a row."""
    return replace(
        layout,
        descriptors=tuple(
            replace(item, data_bytes=item.width, scale_bytes=FP8_SCALE_BYTES)
            if item.component is Component.C4_INDEX
            else item
            for item in layout.descriptors
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
