"""The messages between a worker's host and its rank: one small plan down per step, one result up.

The host (`engine.worker.scheduler`) decides, the rank (`engine.rank`) computes. Plans are executed strictly in order,
so a page or slot freed in plan n may be given to another sequence in plan n, and plan n+1 may be sent before result n
has come back: a decode segment's input token is read on the rank from the slot's own token buffer, where the sampler
of the step before has put it. Encoded with msgspec's msgpack. No torch here.
"""

from __future__ import annotations

import msgspec

from kvstore.transfer.contract import Endpoint
from rorqual.sampling import SamplingParams


class RankSettings(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first frame a rank reads: what to load and how much to hold. With neither `num_pages` nor `kv_bytes` the
    rank sizes its pools itself; what it chose comes back in RankReady."""

    model: str  # the model directory
    numerics: str | None  # "float32" | "served"; None: as the checkpoint is, "served" if it is quantised
    exact: bool
    num_pages: int | None
    kv_bytes: int | None
    num_slots: int
    prefill_tokens_max: (
        int  # of all chunks of one plan together; decode segments come on top, one per slot at most
    )
    threads: int
    kernels: dict[str, str]  # operation to implementation, overriding the registry's choice
    transfer: str = (
        ""  # "": none; "auto", "nixl", "shm": pages and records can be read by others, or be read into
    )
    num_records: int = 0  # hand-over records and tails; with a transfer one at least
    tail_share: float = 0.0  # of the memory for pages: for tails, on top of those records
    agent: str = ""  # name of the transfer agent, fresh for each incarnation
    drafts_max: int = 0  # of a segment; above 0 the state of the MTP block is kept up, and handed over
    drafts_required: bool = False  # else a checkpoint without an MTP block is served without
    num_host_pages: int = 0  # in host memory, for what the pools have no room for; tails come on top
    host_bytes: int | None = None  # or so many bytes of both
    shares_host_memory: bool = False  # with the host, which then moves values in and out of a store
    num_hot_buffers: int = 0  # sequences that may be spilled at once: with host memory only
    num_hot_rows: int | None = None  # of a hot buffer in each layer; None: `kvstore.hisparse` chooses
    num_thin_pages: int | None = None  # None: as many as leave these sequences equal lengths


class SharedMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where the host finds the rank's host memory: for `kvstore.transfer.memory.map_segments`. First the pages, then
    the records; what has no bytes has no segment."""

    agent: str
    metadata: bytes


class SlotOpen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give a slot to a sequence. `tokens` is every token known so far (prompt, and for a resumed sequence what it
    generated before preemption), little-endian int32; the first `num_prompt` of them are the prompt."""

    slot: int
    tokens: bytes
    num_prompt: int
    sampling: SamplingParams
    restore: Restore | None = None
    tokens_max: int = (
        1 << 62
    )  # prompt and completion: no token beyond is sampled, no position beyond computed


class Restore(msgspec.Struct, frozen=True, array_like=True):
    """The slot begins with the state of its first `num_computed` tokens: full pages that have been read into `pages`,
    the rest unpacked from a record, whose rows of the partial page go to the last of `pages` when there is one.

    A record of -1 is none, and `num_computed` a page boundary, perhaps 0: the sequence begins there with an empty
    window. Unless that is at 0, its first `RankReady.rebuild_tokens` tokens are replayed, and nothing is made of what
    they give but the state behind them: no page, no record, no token.

    With `host_pages` it begins spilled up to their end, as by a `Spill` of its first pages."""

    num_computed: int
    pages: tuple[int, ...]  # all that hold the computed tokens: the sequence's first ones
    record: int
    host_pages: tuple[int, ...] = ()
    buffer: int = -1


class TailPoint(msgspec.Struct, frozen=True, array_like=True):
    """Pack the sequence's state at `num_tokens` computed tokens into `record`."""

    num_tokens: int  # a page boundary
    record: int


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Compute tokens start .. start+count-1 of the sequence in `slot`; `pages` are appended to its page table first.

    `sample` is true when the last of these tokens is the last one known: its logits are then sampled, the new token
    is appended to the slot's token buffer at position start+count and reported.

    A decode, a segment of one token with `sample`, may come while the host does not know yet how many drafts earlier
    plans have accepted: it computes the slot's newest token, wherever that is, and `start` is a lower bound. With
    `drafts` the rank drafts up to so many tokens, computes them behind the newest one, and samples behind each: what is
    sampled is accepted up to and with the first token that differs from its draft. `pages` cover all it may compute.
    A decode of a slot that has `tokens_max` tokens already does nothing.

    A segment of no token, with `sample`, may be the first of a slot that is restored with all its tokens computed: the
    next one is sampled from the last streams of the record.

    With `replay` the tokens are computed for the windows alone: the rows that they would add to pages are in `pages`
    already, or in those before, where they are read and never written. They may be shared.
    """

    slot: int
    start: int
    count: int
    pages: tuple[int, ...]
    sample: bool
    lend: bool = (
        False  # its sequence will be read by another worker: digest every full page that this completes
    )
    record: int = -1  # after the segment, pack the sequence's state into this record
    drafts: int = 0
    replay: bool = False
    digest: bool = False  # report the full pages that the sequence has when this is done and had not before
    tails: tuple[
        TailPoint, ...
    ] = ()  # inside: start < num_tokens <= start + count; ascending. Not with drafts
    tail_record: int = (
        -1
    )  # of a decode: when the accepted tokens reach a page boundary, pack their state there


class PageCopy(msgspec.Struct, frozen=True, array_like=True):
    """A whole page, between the device's pools and host memory."""

    page: int
    host_page: int


class RecordCopy(msgspec.Struct, frozen=True, array_like=True):
    """The first `num_bytes` of a record, between the device's records and host memory."""

    record: int
    host_record: int
    num_bytes: int


class Copies(msgspec.Struct, frozen=True, array_like=True):
    """All of one direction. No target is named twice."""

    pages: tuple[PageCopy, ...] = ()
    records: tuple[RecordCopy, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pages or self.records)


NO_COPIES = Copies()


class Spill(msgspec.Struct, frozen=True, array_like=True):
    """C4 rows of the slot's pages from number `first` on are read in `host_pages` from now on, where they are; all
    else of these pages is in `pages`, into which it is copied where they are others than before. The slot is spilled
    up to `first` already. The first `RankReady.num_hot_pages` of a sequence are whole pages of its own, whose C4 units
    take hot rows; the others are thin. A slot has the same hot buffer until it is unspilled or closed."""

    slot: int
    buffer: int
    first: int
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]


class Unspill(msgspec.Struct, frozen=True, array_like=True):
    """All that is spilled of a slot is in these whole pages, and read there from now on."""

    slot: int
    pages: tuple[int, ...]


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Order of effects: close slots; copy from the device to host memory (`demote`); spill, one after another; copy
    from host memory to the device (`promote`); unspill; open slots; then all segments as one ragged forward. So what
    was copied away or spilled may be written by the same plan, and what was copied here may be read by it. None of
    this can fail, or has an answer of its own."""

    number: int
    closes: tuple[int, ...]
    opens: tuple[SlotOpen, ...]
    segments: tuple[Segment, ...]
    demote: Copies = NO_COPIES
    promote: Copies = NO_COPIES
    spills: tuple[Spill, ...] = ()
    unspills: tuple[Unspill, ...] = ()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """A token sampled for a segment: exactly one without drafts. Those of one slot are in order, one after another.
    `alternatives` holds (token id, logprob) pairs, best first."""

    slot: int
    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of prompt tokens first .. first+len-1, computed by this step's chunk."""

    slot: int
    first: int
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...]


class Lent(msgspec.Struct, frozen=True, array_like=True):
    """What a segment with `lend` has made readable. Digests are unsigned 64 bits, of each full page one for each paged
    component in layout order."""

    slot: int
    page_digests: tuple[int, ...]
    record_bytes: int = 0  # with Segment.record
    record_digest: int = 0


class Completed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Full pages that a segment with `digest` has completed, all their tokens accepted: those of the sequence from its
    page number `first` on. Digests as in Lent. A segment that completes none has no Completed."""

    slot: int
    first: int
    page_digests: tuple[int, ...]


class Tailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A record of `Segment.tails` or `tail_record` holds the sequence's state at `num_tokens` computed tokens. A decode
    that has reached no page boundary has left its record alone, and there is no Tailed."""

    slot: int
    num_tokens: int
    num_bytes: int
    digest: int  # unsigned 64 bits


class Verified(msgspec.Struct, frozen=True, array_like=True):
    """What became of the drafts of one segment that asked for some. `num_drafts` may be fewer than asked for, near
    `tokens_max`; num_accepted of them were equal to the tokens sampled."""

    slot: int
    num_drafts: int
    num_accepted: int


class HotUse(msgspec.Struct, frozen=True, array_like=True):
    """What a spilled sequence has read of C4 rows before its newest, over all layers: rows found on the device, copied
    from host memory, and, of those brought in ahead, found for the first time, and evicted before."""

    slot: int
    num_hits: int
    num_misses: int
    num_useful: int
    num_wasted: int


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    number: int
    sampled: tuple[Sampled, ...]
    prompt_scores: tuple[PromptScores, ...]
    step_ms: float
    lent: tuple[Lent, ...] = ()
    verified: tuple[Verified, ...] = ()
    completed: tuple[Completed, ...] = ()
    tailed: tuple[Tailed, ...] = ()
    copy_ms: float = 0.0  # of step_ms, for the plan's copies
    hot: tuple[HotUse, ...] = ()


class PeerOpen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Host to rank: connect to an owner. Peer numbers are the host's and are not used again. Answered by PeerOpened."""

    peer: int
    endpoint: Endpoint


class PeerClose(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Host to rank: no fetch from this peer is open or will be made."""

    peer: int


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Host to rank: read full pages and perhaps a record of a peer into pages and a record here, and check their
    digests. No plan that uses the targets is in flight. Answered by exactly one Fetched, once nothing is written into
    the targets any more; a FetchOverdue comes before it when that is not within `seconds`."""

    fetch: int  # numbered by the host, not used again
    peer: int
    seconds: float
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    digests: tuple[int, ...]
    record: RecordFetch | None = None


class RecordFetch(msgspec.Struct, frozen=True, array_like=True):
    source: int
    target: int
    num_tokens: int  # computed; says how long the record has to be
    num_bytes: int
    digest: int


class Expose(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Host to rank: whether leases are out, so that peers may be reading: the agent then polls often."""

    active: bool


class PeerOpened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    peer: int
    error: str = ""  # one line; empty: connected


class FetchOverdue(msgspec.Struct, frozen=True, array_like=True, tag=True):
    fetch: int


class Fetched(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The fetch is over and its targets are the host's again. They hold what was asked for when `error` is empty."""

    fetch: int
    error: str
    num_bytes: int  # read, digests and metadata not counted
    transfer_ms: float  # from post to done
    verify_ms: float  # digests


class RankProgress(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Sent while loading, for people: "weights 3.1 of 16.0 GB"."""

    stage: str
    done: float
    total: float
    unit: str


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The rank can take plans. The host owns page ids 0..num_pages-1 and slots 0..num_slots-1 from here on."""

    num_pages: int
    num_slots: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    model_fingerprint: str
    numerics: str  # in use
    kernels: tuple[tuple[str, str], ...]
    weight_bytes: int
    state_bytes: int
    has_mtp: bool
    wire_id: str = ""  # of its state, wherever that goes
    endpoint: Endpoint | None = None
    num_records: int = 0
    num_page_components: int = 0  # digests of a page
    notices: tuple[str, ...] = ()  # one line each: what the files hold other than their config says
    drafts_max: int = 0  # in use: as the settings say, but 0 for a checkpoint without an MTP block
    page_bytes: int = 0
    record_bytes: int = 0  # of the longest one
    rebuild_tokens: int = (
        0  # to replay before a page boundary whose tail is gone: `kvstore.handover.rebuild_tokens`
    )
    num_host_pages: int = 0  # 0 .. num_host_pages - 1 in host memory
    num_host_records: int = 0
    num_thin_pages: int = 0  # page ids num_pages .. num_pages + num_thin_pages - 1
    num_hot_buffers: int = 0
    num_hot_pages: int = 0  # of one hot buffer
    host_memory: SharedMemory | None = None  # if it is shared with the host


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The rank cannot go on: bad checkpoint, out of memory, a broken invariant. One line for a person."""

    message: str


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Host to rank: finish and exit."""


ToTransfer = PeerOpen | PeerClose | Fetch | Expose
FromTransfer = PeerOpened | FetchOverdue | Fetched
ToRank = RankSettings | StepPlan | ToTransfer | Shutdown
FromRank = StepResult | FromTransfer | RankProgress | RankReady | RankFailed
