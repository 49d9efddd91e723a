"""Host memory of a fake rank as bytes that its host maps: what lies there is written to a store and read from it."""

from __future__ import annotations

from collections.abc import Set

import msgspec
import numpy as np
from fake_host_memory import FakeHostMemory
from fake_state import PAGE_BYTES, RECORD_BYTES, Rows

from engine.plan import Copies

_LENGTH_BYTES = 4


class FakeSharedMemory(FakeHostMemory):
    """Ids are rows. Bytes behind the content of a page are zeros, so that equal pages are equal bytes."""

    def __init__(self, *, num_pages: int, num_records: int) -> None:
        super().__init__(num_pages=num_pages, num_records=num_records, first_id=0)
        self.page_rows = np.zeros((num_pages, PAGE_BYTES), dtype=np.uint8)
        self.record_rows = np.zeros((num_records, RECORD_BYTES), dtype=np.uint8)

    def demote(
        self,
        copies: Copies,
        memory: list[Rows | None],
        records: list[bytes | None],
        *,
        kept_pages: Set[int],
        kept_records: Set[int],
    ) -> None:
        super().demote(copies, memory, records, kept_pages=kept_pages, kept_records=kept_records)
        for item in copies.pages:
            rows = self.pages[item.host_page]
            assert rows is not None
            self.page_rows[item.host_page] = np.frombuffer(page_bytes(rows), dtype=np.uint8)
        for item in copies.records:
            packed = self.records[item.host_record]
            assert packed is not None
            self.record_rows[item.host_record, : len(packed)] = np.frombuffer(packed, dtype=np.uint8)

    def promote(self, copies: Copies, memory: list[Rows | None], records: list[bytes | None]) -> None:
        for item in copies.pages:
            self.pages[item.host_page] = rows_of(self.page_rows[item.host_page].tobytes())
        for item in copies.records:
            self.records[item.host_record] = self.record_rows[item.host_record, : item.num_bytes].tobytes()
        super().promote(copies, memory, records)


def page_bytes(rows: Rows) -> bytes:
    content = msgspec.msgpack.encode(rows)
    return (len(content).to_bytes(_LENGTH_BYTES, "little") + content).ljust(PAGE_BYTES, b"\0")


def rows_of(page: bytes) -> Rows:
    end = _LENGTH_BYTES + int.from_bytes(page[:_LENGTH_BYTES], "little")
    return msgspec.msgpack.decode(page[_LENGTH_BYTES:end], type=Rows)
