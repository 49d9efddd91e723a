"""A rank with a computable answer that holds its host to the contract of `engine.plan` to the letter.

The next token is a hash of (the token before, its position, seed, choice). `FakeRank` answers plans in the process;
run as a program (`python fake_rank.py --fd N [--step-ms M]`) it is the other end of `engine.worker.rank_link`, and
reads what other such programs lend (`fake_memory`).

Its memory is what the pages and records of a real one would be a function of: a page holds its tokens and a hash of
all that came before them. Every step checks that a sequence's pages still hold what it has put there; so a page or
record that was given away too early, read into while a plan used it, or overwritten while it was lent, is found.
"""

from __future__ import annotations

import argparse
import contextlib
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
from fake_host_memory import FakeHostMemory
from fake_memory import Owners
from fake_spilled import FakeSpills
from fake_state import (
    EOS,
    NUM_PAGE_COMPONENTS,
    PAGE_BYTES,
    PAGE_TOKENS,
    POSITIONS_MAX,
    REBUILD_TOKENS,
    RECORD_BYTES,
    VOCAB_SIZE,
    WIRE_ID,
    WIRE_ID_DRAFTS,
    Rows,
    Slot,
    digest,
    is_drafted_well,
    logprob_of,
    next_token,
    num_pages_of,
    page_digests,
)

from engine.frames import join_host, read_frame, write_frame
from engine.plan import (
    Completed,
    Expose,
    Fetch,
    Fetched,
    FromTransfer,
    Lent,
    PeerClose,
    PeerOpen,
    PeerOpened,
    PromptScores,
    RankFailed,
    RankProgress,
    RankReady,
    RankSettings,
    RecordFetch,
    Restore,
    Sampled,
    Segment,
    Shutdown,
    SlotOpen,
    StepPlan,
    StepResult,
    Tailed,
    ToTransfer,
    Verified,
)
from kvstore.transfer.contract import Endpoint
from rorqual.sampling import SamplingParams


class FakeRank:
    """`agent`: its name as an owner of memory that others read. `drafts_well` says of a position whether the draft for
    it is right."""

    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        prefill_tokens_max: int,
        num_records: int = 0,
        agent: str = "fake",
        drafts_max: int = 0,
        drafts_well: Callable[[int, SamplingParams], bool] = is_drafted_well,
        num_host_pages: int = 0,
        num_host_records: int = 0,
        first_host_id: int = 0,
        positions_max: int = POSITIONS_MAX,
        num_thin: int = 0,
        num_hot_buffers: int = 0,
        num_hot_pages: int = 0,
    ) -> None:
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.prefill_tokens_max = prefill_tokens_max
        self.num_records = num_records
        self.agent = agent
        self.drafts_max = drafts_max
        self.drafts_well = drafts_well
        self.positions_max = positions_max
        self.metadata = b""  # how it is reached from other processes
        self.slots: dict[int, Slot] = {}
        self.memory: list[Rows | None] = [None] * (num_pages + num_thin)
        self.records: list[bytes | None] = [None] * num_records
        self.host_memory = FakeHostMemory(
            num_pages=num_host_pages, num_records=num_host_records, first_id=first_host_id
        )
        self.host_memory.wipes = not num_hot_buffers
        self.spills = FakeSpills(
            num_pages=num_pages,
            num_buffers=num_hot_buffers,
            num_hot_pages=num_hot_pages,
            memory=self.memory,
            host_memory=self.host_memory,
            slots=self.slots,
        )
        self.lent_pages: Counter[int] = Counter()  # others may read them: whoever tests says so, with `lend`
        self.lent_records: set[int] = set()
        self.fetches: dict[int, Fetch] = {}  # begun, not ended
        self.peers: dict[int, str] = {}  # agent names
        self.is_exposed = False
        self.owners: Counter[int] = Counter()  # of pages, in the step
        self.num_steps = 0
        self.num_tokens_computed = 0
        self.num_tokens_restored = 0
        self.num_tokens_replayed = 0  # of those computed

    def ready(self) -> RankReady:
        transfer = {}
        if self.num_records:
            transfer = {
                "wire_id": WIRE_ID_DRAFTS if self.drafts_max else WIRE_ID,
                "endpoint": Endpoint(backend="fake", agent=self.agent, metadata=self.metadata, regions=()),
                "num_records": self.num_records,
                "num_page_components": NUM_PAGE_COMPONENTS,
            }
        return RankReady(
            num_pages=self.num_pages,
            num_slots=self.num_slots,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=self.positions_max,
            eos_token_ids=(EOS,),
            model_fingerprint="fake",
            numerics="float32",
            kernels=(("attention", "fake"), ("argmax", "torch")),
            weight_bytes=0,
            state_bytes=0,
            has_mtp=self.drafts_max > 0,
            drafts_max=self.drafts_max,
            notices=() if self.drafts_max else ("no MTP weights: served without drafts",),
            page_bytes=PAGE_BYTES,
            record_bytes=RECORD_BYTES,
            rebuild_tokens=REBUILD_TOKENS,
            num_host_pages=len(self.host_memory.pages),
            num_host_records=len(self.host_memory.records),
            **transfer,
        )

    def step(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        assert plan.number == self.num_steps, f"plan {plan.number} is the {self.num_steps}th"
        does = plan.closes or plan.opens or plan.segments or plan.demote or plan.promote
        assert does or plan.spills or plan.unspills, "empty plan"
        for slot in plan.closes:
            assert slot in self.slots, f"close of slot {slot}, which is not open"
            self.spills.close(slot)
            del self.slots[slot]
        self._copy(plan)
        for item in plan.opens:
            self._open(item)
        slots = [segment.slot for segment in plan.segments]
        assert len(slots) == len(set(slots)), "two segments of one slot in a plan"
        assert {item.slot for item in plan.opens} <= set(slots), "a slot is opened and not computed"
        prefill = sum(segment.count for segment in plan.segments if segment.count > 1)
        assert prefill <= self.prefill_tokens_max, f"{prefill} prefill tokens in one step"
        # All page tables first: a page must belong to one sequence among all of the step.
        for segment in plan.segments:
            self._map(segment)
        self._check_pages(plan)
        sampled, scores, lent, verified, completed, tailed = [], [], [], [], [], []
        for segment in plan.segments:
            first = self.slots[segment.slot].num_computed
            if segment.drafts or self.slots[segment.slot].has_drafted:
                self._verify(segment, sampled, verified)
            else:
                self._compute(segment, sampled, scores)
            if segment.lend:
                lent.append(self._lend(segment))
            if segment.digest:
                completed += self._completed(segment, first)
            tailed += self._take_tails(segment, first)
        return StepResult(
            number=plan.number,
            sampled=tuple(sampled),
            prompt_scores=tuple(scores),
            step_ms=1.0,
            lent=tuple(lent),
            verified=tuple(verified),
            completed=tuple(completed),
            tailed=tuple(tailed),
            hot=self.spills.uses(slots),
        )

    def _copy(self, plan: StepPlan) -> None:
        """What is copied is nobody's: who had it is gone, and nobody reads or writes it from elsewhere. Where sequences
        spill, full pages are copied away while somebody has them."""
        if self.spills.num_buffers:
            assert not {item.page for item in plan.demote.pages} & self.spills.hot_pages, (
                "hot rows are copied"
            )
            self._check_untouched({item.page for item in plan.demote.pages} & self._fetched_pages())
        else:
            self._check_untouched(self._used() & {item.page for item in plan.demote.pages})
        for item in (*plan.demote.records, *plan.promote.records):
            self._check_record(item.record)
        self.host_memory.demote(plan.demote, self.memory, self.records)
        returning = [self.slots[item.slot].pages for item in plan.unspills]
        vacated = {page for pages in returning for page in pages}
        for item in plan.spills:
            self.spills.spill(item, taken=self._used(but=item.slot) - vacated)
        promoted = {item.page for item in plan.promote.pages}
        self._check_untouched(promoted & (self._used() - vacated))
        self.host_memory.promote(plan.promote, self.memory, self.records)
        written = promoted | {page for item in plan.spills for page in item.pages}
        for item in plan.unspills:
            self.spills.unspill(item, written=written)

    def _used(self, *, but: int = -1) -> set[int]:
        """Pages of slots, of all but one, and those that are read or written from elsewhere."""
        used = {page for number, slot in self.slots.items() if number != but for page in slot.pages}
        return used | self._fetched_pages() | self.lent_pages.keys()

    def _check_untouched(self, used: set[int]) -> None:
        assert not used, f"pages {used} are copied while in use"

    def transfer(self, message: ToTransfer, owners: Mapping[str, FakeRank]) -> FromTransfer | None:
        """What the rank answers, at once; `owners` are the ranks that can be reached, by their agents' names."""
        match message:
            case PeerOpen():
                assert message.peer not in self.peers, f"peer {message.peer} is used again"
                self.peers[message.peer] = message.endpoint.agent
                gone = message.endpoint.agent not in owners
                return PeerOpened(peer=message.peer, error="nobody answers" if gone else "")
            case PeerClose():
                del self.peers[message.peer]
                return None
            case Fetch():
                self.begin_fetch(message)
                return self.end_fetch(message.fetch, owners.get(self.peers[message.peer]))
            case Expose():
                assert message.active or self.is_exposed, "hidden twice"
                self.is_exposed = message.active
                return None

    def begin_fetch(self, message: Fetch) -> None:
        """From now on until its end the targets are written into, at any time."""
        assert message.fetch not in self.fetches, f"fetch {message.fetch} is used again"
        assert len(message.source_pages) == len(message.target_pages)
        assert len(message.digests) == len(message.target_pages) * NUM_PAGE_COMPONENTS
        assert message.source_pages or message.record, "a fetch of nothing"
        targets = set(message.target_pages)
        assert len(targets) == len(message.target_pages), "a page is read into twice"
        assert not targets & (self._fetched_pages() | self.lent_pages.keys()), (
            "a page is read into while in use"
        )
        assert all(0 <= page < self.num_pages for page in targets), "a page beyond the pool"
        if message.record is not None:
            self._check_record(message.record.target)
        self.fetches[message.fetch] = message

    def end_fetch(self, fetch: int, owner: FakeRank | None) -> Fetched:
        """The bytes have come, or the owner is gone."""
        message = self.fetches.pop(fetch)
        error = "" if owner is not None else "the peer is gone"
        num_bytes = 0
        if owner is not None:
            for number, (source, target) in enumerate(
                zip(message.source_pages, message.target_pages, strict=True)
            ):
                self.memory[target] = rows = owner.memory[source]
                first = number * NUM_PAGE_COMPONENTS
                expected = message.digests[first : first + NUM_PAGE_COMPONENTS]
                if rows is None or page_digests(rows) != expected:
                    error = f"page {source} is not what was offered"
                num_bytes += 4 * PAGE_TOKENS
            if message.record is not None:
                error = error or self._fetch_record(message.record, owner)
                num_bytes += message.record.num_bytes
        return Fetched(fetch=fetch, error=error, num_bytes=num_bytes, transfer_ms=1.0, verify_ms=0.5)

    def lend(self, pages: tuple[int, ...], record: int | None = None) -> None:
        """Others may read these from now on, until they are taken back: nothing may be written there."""
        self.lent_pages.update(pages)
        if record is not None:
            assert record not in self.lent_records, f"record {record} is lent twice"
            self.lent_records.add(record)

    def take_back(self, pages: tuple[int, ...], record: int | None = None) -> None:
        self.lent_pages.subtract(pages)
        self.lent_pages = +self.lent_pages
        self.lent_records.discard(record if record is not None else -1)

    def _fetch_record(self, item: RecordFetch, owner: FakeRank) -> str:
        self.records[item.target] = packed = owner.records[item.source]
        if packed is None or len(packed) != item.num_bytes or digest(packed) != item.digest:
            return f"record {item.source} is not what was offered"
        return ""

    def _fetched_pages(self) -> set[int]:
        return {page for fetch in self.fetches.values() for page in fetch.target_pages}

    def _check_record(self, record: int, *, to_write: bool = True) -> None:
        """It may be written into, or read."""
        assert 0 <= record < self.num_records, f"record {record} of {self.num_records}"
        assert not to_write or record not in self.lent_records, f"record {record} is written while it is lent"
        targets = {fetch.record.target for fetch in self.fetches.values() if fetch.record is not None}
        assert record not in targets, f"record {record} is used while it is read into"

    def _open(self, item: SlotOpen) -> None:
        assert 0 <= item.slot < self.num_slots, f"slot {item.slot} of {self.num_slots}"
        assert item.slot not in self.slots, f"slot {item.slot} opened while open"
        tokens = [token for (token,) in struct.iter_unpack("<i", item.tokens)]
        assert 1 <= item.num_prompt <= len(tokens) < item.tokens_max
        slot = Slot(
            tokens=tokens, num_prompt=item.num_prompt, sampling=item.sampling, tokens_max=item.tokens_max
        )
        self.slots[item.slot] = slot
        if item.restore is not None:
            self._restore(slot, item.restore)

    def _restore(self, slot: Slot, restore: Restore) -> None:
        is_boundary = restore.num_computed % PAGE_TOKENS == 0
        assert is_boundary or restore.num_computed == slot.num_prompt < len(slot.tokens)
        assert restore.num_computed <= len(slot.tokens)
        assert len(restore.pages) == num_pages_of(restore.num_computed)
        assert slot.sampling.prompt_logprobs is None, "scores of a prompt that was computed elsewhere"
        slot.compute(restore.num_computed)
        slot.pages = list(restore.pages)
        if restore.record < 0:
            assert is_boundary, "an empty window within a page"
            slot.exact_from = restore.num_computed + REBUILD_TOKENS if restore.num_computed else 0
        else:
            self._check_record(restore.record, to_write=False)
            assert self.records[restore.record] == slot.pack(), "the record holds another state"
        if not is_boundary:
            self._write(restore.pages[-1], slot.rows[-1])
        self._check_memory(slot)
        self.num_tokens_restored += restore.num_computed

    def _map(self, segment: Segment) -> None:
        slot = self.slots[segment.slot]
        self._check_memory(slot)
        self.spills.check(segment.slot)
        slot.pages.extend(segment.pages)
        end = segment.start + segment.count
        results = [point.num_tokens for point in segment.tails]
        results += [end] if segment.sample or segment.record >= 0 else []
        assert min(results, default=slot.exact_from) >= slot.exact_from, "something came of an empty window"
        assert segment.replay or segment.start >= slot.exact_from, "a page is made with an empty window"
        assert all(segment.start < point.num_tokens <= end for point in segment.tails), "a tail outside"
        if segment.drafts or slot.has_drafted:
            self._check_decode(slot, segment)
            return
        assert segment.start == slot.num_computed, f"start {segment.start}, computed {slot.num_computed}"
        assert segment.count >= 1 or (segment.sample and not slot.has_sampled), "computes nothing"
        assert end <= len(slot.tokens), "computes tokens that are not known"
        assert len(slot.pages) == num_pages_of(end), f"{len(slot.pages)} pages for {end} tokens"
        assert end % PAGE_TOKENS == 0 or end == len(slot.tokens), (
            "chunk ends neither at a page nor at the end"
        )
        assert segment.sample == (end == len(slot.tokens)), "sample flag is wrong"
        assert not slot.has_left, "a sequence goes on here and elsewhere"
        if not segment.replay:
            assert slot.lends in (None, segment.lend), "a sequence lends a part of its prompt"
            slot.lends = segment.lend
        assert (segment.record >= 0) == (segment.lend and segment.sample), "a record at the wrong time"

    def _check_decode(self, slot: Slot, segment: Segment) -> None:
        slot.has_drafted = True
        assert 0 <= segment.drafts <= self.drafts_max, f"{segment.drafts} drafts of {self.drafts_max}"
        assert (segment.count, segment.sample, segment.lend) == (1, True, False), "drafts behind no decode"
        assert slot.num_prompt <= segment.start <= slot.num_computed, "no lower bound of where it is"
        assert segment.start + 1 < slot.tokens_max, "a plan for a slot that is full for sure"
        assert slot.num_computed == len(slot.tokens) - 1
        num_pages = num_pages_of(slot.num_computed + self._num_rows(slot, segment))
        assert len(slot.pages) >= num_pages, f"{len(slot.pages)} pages where {num_pages} are computed"

    def _num_rows(self, slot: Slot, segment: Segment) -> int:
        """The newest token and the drafts behind it."""
        return min(1 + segment.drafts, slot.tokens_max - len(slot.tokens))

    def _check_pages(self, plan: StepPlan) -> None:
        owned = [page for slot in self.slots.values() for page in slot.pages]
        self.owners = Counter(owned)
        assert all(len(slot.pages) == len(set(slot.pages)) for slot in self.slots.values()), "a page twice"
        assert all(0 <= page < len(self.memory) for page in owned), "a page beyond the pool"
        used = {page for segment in plan.segments for page in self.slots[segment.slot].pages}
        assert not used & self._fetched_pages(), "a page is used while it is read into"
        written = [segment.record for segment in plan.segments if segment.record >= 0]
        written += [segment.tail_record for segment in plan.segments if segment.tail_record >= 0]
        written += [point.record for segment in plan.segments for point in segment.tails]
        assert len(written) == len(set(written)), "a record is written twice"
        restored = {item.restore.record for item in plan.opens if item.restore is not None}
        assert not restored & set(written), "a record is read and written"

    def _check_memory(self, slot: Slot) -> None:
        # With drafts there may be pages for tokens that were rejected.
        for page, rows in zip(slot.pages, slot.rows, strict=not slot.has_drafted):
            assert self.memory[page] == rows, f"page {page} does not hold what its sequence has put there"

    def _write(self, page: int, rows: Rows) -> None:
        assert page not in self.lent_pages, f"page {page} is written while it is lent"
        assert page < self.num_pages, f"thin page {page} is written"
        assert self.owners[page] <= 1, f"page {page} is written while two sequences have it"
        self.memory[page] = rows

    def _lend(self, segment: Segment) -> Lent:
        """After the segment is computed, and before its token is known."""
        slot = self.slots[segment.slot]
        end = segment.start + segment.count
        full = slot.rows[segment.start // PAGE_TOKENS : end // PAGE_TOKENS]
        digests = tuple(item for rows in full for item in page_digests(rows))
        if segment.record < 0:
            return Lent(slot=segment.slot, page_digests=digests)
        self._check_record(segment.record)
        slot.has_left = True
        self.records[segment.record] = packed = slot.pack()
        return Lent(
            slot=segment.slot,
            page_digests=digests,
            record_bytes=len(packed),
            record_digest=digest(packed),
        )

    def _completed(self, segment: Segment, first: int) -> list[Completed]:
        """The pages that the segment has filled, which had `first` tokens computed before."""
        slot = self.slots[segment.slot]
        numbers = range(first // PAGE_TOKENS, slot.num_computed // PAGE_TOKENS)
        digests = tuple(item for number in numbers for item in page_digests(slot.rows[number]))
        return [Completed(slot=segment.slot, first=numbers.start, page_digests=digests)] if digests else []

    def _take_tails(self, segment: Segment, first: int) -> list[Tailed]:
        slot = self.slots[segment.slot]
        points = [(point.num_tokens, point.record) for point in segment.tails]
        boundary = slot.num_computed // PAGE_TOKENS * PAGE_TOKENS
        if segment.tail_record >= 0:
            assert (segment.count, segment.sample, segment.lend) == (1, True, False), "a tail of no decode"
            self._check_record(segment.tail_record)
            if first < boundary:
                points.append((boundary, segment.tail_record))
        tailed = []
        for num_tokens, record in points:
            self._check_record(record)
            self.records[record] = packed = slot.pack(num_tokens)
            tailed.append(
                Tailed(slot=segment.slot, num_tokens=num_tokens, num_bytes=len(packed), digest=digest(packed))
            )
        return tailed

    def _compute(self, segment: Segment, sampled: list[Sampled], scores: list[PromptScores]) -> None:
        slot = self.slots[segment.slot]
        end = segment.start + segment.count
        self.num_tokens_computed += segment.count
        for number in slot.compute(segment.count):
            if segment.replay:
                held = self.memory[slot.pages[number]]
                assert held == slot.rows[number], (
                    f"page {slot.pages[number]} is shared and holds something else"
                )
            else:
                self._write(slot.pages[number], slot.rows[number])
        self.num_tokens_replayed += segment.count * segment.replay
        wanted = slot.sampling.prompt_logprobs
        last_scored = min(end + 1, slot.num_prompt)
        if wanted is not None and segment.start + 1 < last_scored:
            positions = range(segment.start + 1, last_scored)
            scores.append(
                PromptScores(
                    slot=segment.slot,
                    first=segment.start + 1,
                    logprobs=tuple(logprob_of(slot.tokens[position], position) for position in positions),
                    alternatives=tuple(
                        tuple((rank, -float(rank)) for rank in range(wanted)) for _ in positions
                    ),
                )
            )
        if segment.sample:
            sampled.append(self._sample(segment.slot))

    def _sample(self, number: int) -> Sampled:
        slot = self.slots[number]
        position = len(slot.tokens)
        slot.has_sampled = True
        token = next_token(slot.tokens[-1], position, slot.sampling)
        slot.tokens.append(token)
        count = slot.sampling.logprobs
        return Sampled(
            slot=number,
            token_id=token,
            logprob=None if count is None else logprob_of(token, position),
            alternatives=tuple((rank, -float(rank)) for rank in range(count or 0)),
        )

    def _verify(self, segment: Segment, sampled: list[Sampled], verified: list[Verified]) -> None:
        """The newest token and drafts behind it: as many of these are accepted as are right."""
        slot = self.slots[segment.slot]
        num_rows = self._num_rows(slot, segment)
        if num_rows == 0:
            return  # full
        self.num_tokens_computed += num_rows
        for number in range(slot.num_computed // PAGE_TOKENS, num_pages_of(slot.num_computed + num_rows)):
            # Rows of drafts, which nobody reads when they are rejected.
            self._write(slot.pages[number], (b"draft", b""))
        num_accepted = 0
        while True:
            for number in slot.compute(1):
                self._write(slot.pages[number], slot.rows[number])
            is_right = self.drafts_well(len(slot.tokens), slot.sampling)
            sampled.append(self._sample(segment.slot))
            if not is_right or num_accepted == num_rows - 1:
                break
            num_accepted += 1
        if segment.drafts:
            verified.append(Verified(slot=segment.slot, num_drafts=num_rows - 1, num_accepted=num_accepted))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument(
        "--fail", choices=["at-load", "at-step", "exit-at-step", "hang-at-step", "ignore-shutdown"]
    )
    parser.add_argument("--no-mtp", action="store_true")
    parser.add_argument("--positions-max", type=int, default=POSITIONS_MAX)
    args = parser.parse_args()
    connection = join_host(args.fd)
    settings = read_frame(connection)
    assert isinstance(settings, RankSettings), settings
    if args.fail == "at-load":
        write_frame(connection, RankFailed(message=f"{settings.model}/config.json: no such file"))
        return
    if args.no_mtp and settings.drafts_required:
        write_frame(connection, RankFailed(message=f"--drafts {settings.drafts_max}: has no MTP block"))
        return
    rank = FakeRank(
        num_pages=settings.num_pages or 64,
        num_slots=settings.num_slots,
        prefill_tokens_max=settings.prefill_tokens_max,
        num_records=settings.num_records if settings.transfer else 0,
        agent=settings.agent,
        drafts_max=0 if args.no_mtp else settings.drafts_max,
        num_host_pages=settings.num_host_pages,
        num_host_records=settings.num_host_pages,
        positions_max=args.positions_max,
    )
    owners = Owners(rank)
    write_frame(connection, RankProgress(stage="weights", done=1.0, total=2.0, unit="GB"))
    write_frame(connection, rank.ready())
    while (message := read_frame(connection)) is not None:
        if isinstance(message, Shutdown):
            if args.fail == "ignore-shutdown":
                time.sleep(60)
            return
        if isinstance(message, ToTransfer):
            answered = owners.carry_out(message)
            if answered is not None:
                write_frame(connection, answered)
            continue
        assert isinstance(message, StepPlan), message
        if message.segments and args.fail == "at-step":
            write_frame(connection, RankFailed(message="out of memory"))
            return
        if message.segments and args.fail == "exit-at-step":
            raise SystemExit(3)
        if args.fail == "hang-at-step":
            time.sleep(60)
        time.sleep(args.step_ms / 1000)
        try:
            result = rank.step(message)
        except AssertionError as error:
            write_frame(
                connection, RankFailed(message=f"contract: {error} {msgspec.json.encode(message)[:300]!r}")
            )
            return
        write_frame(connection, result)


if __name__ == "__main__":
    # Like the real one: a host that is gone while it is written to is not worth a traceback.
    with contextlib.suppress(ConnectionError):
        main()
