"""A `kvstore.feed.Content` as a dict, which asserts that it is used as the contract says."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.feed import FeedWriter
from rorqual.feed import ABSENT, KEY_BYTES, PAGE, TAIL


class FakeContent:
    def __init__(self) -> None:
        self.visible: dict[bytes, int] = {}
        self.arriving: dict[bytes, int] | None = None
        self.has_room = True

    def start(self) -> None:
        assert self.arriving is None, "the one before was neither committed nor abandoned"
        self.arriving = {}

    def add(self, keys: bytes, flags: bytes) -> bool:
        assert self.arriving is not None
        for key, flag in entries(keys, flags):
            assert key not in self.arriving
            assert flag
            self.arriving[key] = flag
        return self.has_room

    def commit(self) -> None:
        assert self.arriving is not None
        self.visible, self.arriving = self.arriving, None

    def abandon(self) -> None:
        assert self.arriving is not None
        self.arriving = None

    def change(self, keys: bytes, flags: bytes) -> bool:
        for key, flag in entries(keys, flags):
            if flag:
                self.visible[key] = flag
            else:
                del self.visible[key]
        return self.has_room

    def clear(self) -> None:
        self.visible = {}


def entries(keys: bytes, flags: bytes) -> list[tuple[bytes, int]]:
    assert len(keys) == KEY_BYTES * len(flags)
    return [(keys[KEY_BYTES * i : KEY_BYTES * (i + 1)], flag) for i, flag in enumerate(flags)]


def key_of(number: int) -> bytes:
    """A page key that looks like any other: the numbers are spread over all 16 bytes."""
    spread = (number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128)
    return spread.to_bytes(KEY_BYTES, "little")


def tell(
    writer: FeedWriter,
    *,
    pages_added: Iterable[bytes] = (),
    pages_removed: Iterable[bytes] = (),
    tails_added: Iterable[bytes] = (),
    tails_removed: Iterable[bytes] = (),
) -> None:
    """Changes of a cache without host memory. Pages go with their tails, whether these are listed or not."""
    writer.note([(key, ABSENT, PAGE) for key in pages_added])
    adds = [(key, writer.flags(key) | PAGE, PAGE | TAIL) for key in tails_added]
    writer.note([entry for entry in adds if entry[1] != entry[2]])
    writer.note([(key, PAGE | TAIL, PAGE) for key in tails_removed])
    writer.note([(key, writer.flags(key) | PAGE, ABSENT) for key in pages_removed])
