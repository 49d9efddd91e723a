"""One sequence whose state is being read: where it stands, and what of its offers can be meant.

Kept by `decode_worker.borrowing`, which does everything that waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.plan import Fetch, RecordFetch
from engine.worker.events import Adoption, SequenceKey
from engine.worker.sharing.peers import Peer
from rorqual.errors import InvalidRequest
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Offer, Source, Take


@dataclass(slots=True, kw_only=True, eq=False)
class Loan:
    key: SequenceKey
    request_id: str  # for log lines
    source: Source
    num_prompt: int
    takes: list[Take] = field(
        default_factory=list[Take]
    )  # offered, not read yet; bounded by the prompt's pages
    news: asyncio.Event = field(default_factory=asyncio.Event)  # takes came
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    num_pages: int = 0  # offered
    digests: list[tuple[int, ...]] = field(
        default_factory=list[tuple[int, ...]]
    )  # of those, a tuple for each
    is_complete: bool = False  # the record has been offered
    is_waiting: bool = False  # for more offers: nothing writes into its memory
    is_read: bool = False  # everything
    is_adopted: bool = False  # the scheduler goes on with it
    is_broken: bool = False  # a read from its owner failed
    has_ended: bool = False
    outcome: str = ""
    token_ids: tuple[int, ...] = ()
    read_seconds: float = 0.0  # that the read under way may take
    lease_end: float = 0.0  # at the earliest, on our clock
    adoption: Adoption | None = None
    peer: Peer | None = None
    task: asyncio.Task[None] | None = None
    fetch: asyncio.Future[str] | None = None

    def take(self, command: Take, *, num_page_components: int) -> None:
        """Keep an offer to be read. Raises InvalidRequest when it does not follow on what came before."""
        offer = command.offer
        num_full = self.num_prompt // PAGE_TOKENS
        if offer.lease != self.source.lease or offer.wire_id != self.source.wire_id:
            raise InvalidRequest("an offer names another lease than the source", field="offer")
        if self.is_complete:
            raise InvalidRequest("an offer came after the record's", field="offer")
        if offer.first_page != self.num_pages or self.num_pages + len(offer.pages) > num_full:
            text = f"pages {offer.first_page}..{offer.first_page + len(offer.pages) - 1} were offered after"
            raise InvalidRequest(f"{text} {self.num_pages} of {num_full}", field="offer")
        if not offer.pages and offer.record is None:
            raise InvalidRequest("an offer of nothing came", field="offer")
        if len(offer.digests) != len(offer.pages) * num_page_components:
            text = f"{len(offer.pages)} pages came with {len(offer.digests)} digests"
            raise InvalidRequest(text, field="offer")
        if offer.record is not None:
            self._check_record(command)
        self.takes.append(command)
        self.digests += [
            offer.digests[at : at + num_page_components]
            for at in range(0, len(offer.digests), num_page_components)
        ]
        self.num_pages += len(offer.pages)
        self.is_complete = offer.record is not None
        self.news.set()

    def fetch_message(self, number: int, offers: Sequence[Offer], *, seconds: float) -> Fetch | None:
        """The read of what is not here of `offers`, which follow on one another. None when all of it is."""
        assert self.adoption is not None
        assert self.peer is not None
        source_pages = tuple(page for offer in offers for page in offer.pages)
        digests = tuple(digest for offer in offers for digest in offer.digests)
        num_present = min(max(0, self.adoption.num_present - offers[0].first_page), len(source_pages))
        if num_present:
            digests = digests[num_present * (len(digests) // len(source_pages)) :]
            source_pages = source_pages[num_present:]
        first = offers[0].first_page + num_present
        record = offers[-1].record
        if not source_pages and record is None:
            return None
        if record is None:
            record_fetch = None
        else:
            record_fetch = RecordFetch(
                source=record.record,
                target=self.adoption.record,
                num_tokens=record.num_tokens,
                num_bytes=record.num_bytes,
                digest=record.digest,
            )
        return Fetch(
            fetch=number,
            peer=self.peer.number,
            seconds=seconds,
            source_pages=source_pages,
            target_pages=tuple(self.adoption.pages[first : first + len(source_pages)]),
            digests=digests,
            record=record_fetch,
        )

    def _check_record(self, command: Take) -> None:
        record = command.offer.record
        assert record is not None
        num_pages = self.num_pages + len(command.offer.pages)
        if num_pages != self.num_prompt // PAGE_TOKENS:
            raise InvalidRequest(f"the record was offered after {num_pages} pages", field="offer")
        if record.num_tokens != self.num_prompt:
            text = f"the record holds {record.num_tokens} tokens, the prompt {self.num_prompt}"
            raise InvalidRequest(text, field="offer")
        if not command.token_ids:
            raise InvalidRequest("the record came without the first token", field="token_ids")
