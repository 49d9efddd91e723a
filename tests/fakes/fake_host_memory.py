"""Host memory of a fake rank: what is copied there and back is held to what copies may be. Used by `fake_rank`."""

from __future__ import annotations

from collections.abc import Set
from typing import TypeVar

from fake_state import PAGE_TOKENS, Rows

from engine.plan import Copies

Content = TypeVar("Content")


class FakeHostMemory:
    """Ids begin at `first_id`."""

    def __init__(self, *, num_pages: int, num_records: int, first_id: int) -> None:
        self.pages: dict[int, Rows | None] = dict.fromkeys(range(first_id, first_id + num_pages))
        self.records: dict[int, bytes | None] = dict.fromkeys(range(first_id, first_id + num_records))
        self.wipes = True  # what is copied away is nobody's
        self.num_pages_demoted = 0
        self.num_pages_promoted = 0
        self.num_records_promoted = 0

    def demote(
        self,
        copies: Copies,
        memory: list[Rows | None],
        records: list[bytes | None],
        *,
        kept_pages: Set[int],
        kept_records: Set[int],
    ) -> None:
        """What has been copied away and is not kept is gone: whoever gets the page or the record writes it first."""
        for targets in (
            [item.host_page for item in copies.pages],
            [item.host_record for item in copies.records],
        ):
            assert len(targets) == len(set(targets)), "copied to twice"
        for item in copies.pages:
            rows = _content(memory[item.page])
            assert len(rows[1]) == 4 * PAGE_TOKENS, f"page {item.page} is not full"
            assert item.host_page in self.pages, f"{item.host_page} is no page of the host's"
            self.pages[item.host_page] = rows
        for item in copies.records:
            packed = _content(records[item.record])
            assert len(packed) == item.num_bytes, f"{item.num_bytes} bytes of a record of {len(packed)}"
            assert item.host_record in self.records, f"{item.host_record} is no record of the host's"
            self.records[item.host_record] = packed
        self.num_pages_demoted += len(copies.pages)
        if not self.wipes:
            return
        for item in copies.pages:
            if item.page not in kept_pages:
                memory[item.page] = None
        for item in copies.records:
            if item.record not in kept_records:
                records[item.record] = None

    def promote(self, copies: Copies, memory: list[Rows | None], records: list[bytes | None]) -> None:
        for targets in ([item.page for item in copies.pages], [item.record for item in copies.records]):
            assert len(targets) == len(set(targets)), "copied to twice"
        for item in copies.pages:
            memory[item.page] = _content(self.pages[item.host_page])
        for item in copies.records:
            records[item.record] = packed = _content(self.records[item.host_record])
            assert len(packed) == item.num_bytes
        self.num_pages_promoted += len(copies.pages)
        self.num_records_promoted += len(copies.records)


def _content(found: Content | None) -> Content:
    assert found is not None, "what was never written is copied, or what was copied away"
    return found
