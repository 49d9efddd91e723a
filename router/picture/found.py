"""What a picture answers: how far each worker's cache reaches into one prompt. Made by `Picture.look_up`, pure.

Depths are in pages: depth d stands for the first d pages of the prompt. W counts workers by their index in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.picture.holders import Bits

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A moment's answer: later changes of the picture do not show in it. A page counts for a worker only when all
    pages before it are there too."""

    pages_W: I32  # leading pages that are present
    tail_W: I32  # depth of the deepest boundary that can be resumed behind, 0 when there is none
    num_pages: int  # leading pages that some worker has

    def holders(self, depth: int) -> I32:
        """Indexes of the workers that have the first `depth` pages, ascending; 1 <= depth <= num_pages. The
        page at that depth can be read from each of them."""
        return np.flatnonzero(self.pages_W >= depth).astype(np.int32)

    def num_holders_D(self) -> I32:
        """For each leading page, how many workers have it: i32 [num_pages], falling."""
        counts = np.bincount(self.pages_W, minlength=self.num_pages + 1)
        return np.cumsum(counts[::-1])[::-1][1:].astype(np.int32)


def deepest_W(bits_DS: Bits, slot_W: I32) -> I32:
    """In how many rows each worker's bit is set, i32 [workers]; it is the bit of the worker's slot. Where a bit is set
    it is set in all rows above, so all workers search for their last row together, each by halves: 0.14 ms for 1,000
    workers and 390 rows, a tenth of what taking the bits apart costs when all end in different rows."""
    num_rows = len(bits_DS)
    depth_W = np.zeros(len(slot_W), dtype=np.int32)
    if not num_rows:
        return depth_W
    word_W = slot_W >> 6
    bit_W = np.uint64(1) << (slot_W & 63).astype(np.uint64)
    step = 1 << (num_rows.bit_length() - 1)
    while step:
        next_W = depth_W + np.int32(step)
        row_W = np.minimum(next_W, num_rows) - 1
        is_deeper_W = (bits_DS[row_W, word_W] & bit_W != 0) & (next_W <= num_rows)
        depth_W[is_deeper_W] = next_W[is_deeper_W]
        step >>= 1
    return depth_W
