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


def deepest_S(bits_DS: Bits) -> I32:
    """Rows in which each slot's bit is set, i32 [64 x words]. Where it is set it is set in all rows above, so that is
    also the depth of the last one. Only rows in which somebody ends are taken apart, and most prompts have few."""
    depth_S = np.zeros(64 * bits_DS.shape[1], dtype=np.int32)
    ends_DS = bits_DS.copy()
    ends_DS[:-1] &= ~bits_DS[1:]
    rows = np.flatnonzero(ends_DS.any(axis=1))
    flags = np.unpackbits(ends_DS[rows].astype("<u8", copy=False).view(np.uint8), axis=1, bitorder="little")
    row, slot = np.nonzero(flags)
    depth_S[slot] = rows[row] + 1
    return depth_S
