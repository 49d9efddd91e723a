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

    pages_W: I32  # leading pages that are present, on the device or in host memory
    tail_W: I32  # depth of the deepest boundary that can be resumed behind, 0 when there is none
    device_pages_W: I32  # the same of what is on the device: others can read it
    device_tail_W: I32
    num_pages: int  # leading pages that some worker has

    def holders(self, depth: int) -> I32:
        """Indexes of the workers that have the first `depth` pages, ascending; 1 <= depth <= num_pages."""
        return np.flatnonzero(self.pages_W >= depth).astype(np.int32)

    def num_holders_D(self) -> I32:
        """For each leading page, how many workers have it: i32 [num_pages], falling."""
        counts = np.bincount(self.pages_W, minlength=self.num_pages + 1)
        return np.cumsum(counts[::-1])[::-1][1:].astype(np.int32)


def deepest_W(bits_DS: Bits, slot_W: I32) -> I32:
    """In how many rows each worker's bit is set, i32 [workers]; it is the bit of the worker's slot. Where a bit is set
    it is set in all rows above, so it ends in one row at most: only words in which one ends are taken apart:
    0.05 ms for 1,000 workers and 390 rows, where a search by halves for all workers takes 0.2."""
    num_rows, num_words = bits_DS.shape
    depth_S = np.zeros(64 * num_words, dtype=np.int32)
    if num_rows:
        ends_DS = bits_DS.copy()
        ends_DS[:-1] ^= bits_DS[1:]
        places = np.flatnonzero(ends_DS != 0)
        ends = ends_DS.reshape(-1)[places].astype("<u8", copy=False).view(np.uint8)
        # As booleans, which are searched ten times as fast as bytes.
        at = np.flatnonzero(np.unpackbits(ends, bitorder="little").view(np.bool_))
        row, word = np.divmod(places, num_words)
        depth_S[word[at >> 6] * 64 + (at & 63)] = row[at >> 6] + 1
    return depth_S[slot_W]
