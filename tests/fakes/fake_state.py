"""What a fake rank computes, and what its pages and records are a function of: a page holds its tokens and a hash of
all that came before them, a record a hash of all and the tokens of the partial page. Used by `fake_rank`."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

import msgspec

from rorqual.sampling import SamplingParams

PAGE_TOKENS = 256
VOCAB_SIZE = 97
EOS = 1
POSITIONS_MAX = 4096
NUM_PAGE_COMPONENTS = 2
WIRE_ID = "fake-wire"
WIRE_ID_DRAFTS = "fake-wire-drafts"
ROOT = b"root"  # what comes before a sequence's first page
REBUILD_TOKENS = 2 * PAGE_TOKENS
PAGE_BYTES = 8 * PAGE_TOKENS
RECORD_BYTES = 2 * PAGE_BYTES

Rows = tuple[bytes, bytes]
"""Content of a page: a hash of all tokens before it, and its own tokens, little-endian int32."""


def next_token(last: int, position: int, sampling: SamplingParams) -> int:
    """The token at `position`, which follows `last`. One in 97 ends the sequence."""
    value = (last * 1_000_003 + position * 7919 + sampling.seed * 104_729 + sampling.choice * 31 + 17) % 2**32
    value ^= value >> 15
    value = value * 2_246_822_519 % 2**32
    value ^= value >> 13
    return value % VOCAB_SIZE


def is_drafted_well(position: int, sampling: SamplingParams) -> bool:
    """Whether the draft for `position` is the token itself: two of three are, in no simple order."""
    return next_token(5, position, sampling) % 3 != 0


def logprob_of(token: int, position: int) -> float:
    """A power of two times a small integer: exact in float32, which is what crosses the wire."""
    return -(token + position % 8 + 1) / 16


def answer(
    prompt: list[int], max_tokens: int, sampling: SamplingParams, *, ignore_eos: bool = False
) -> list[int]:
    """The whole completion, one token after another."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens[-1], len(tokens), sampling))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


def digest(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "big")


def page_digests(rows: Rows) -> tuple[int, ...]:
    """Of a page one for each component."""
    return tuple(digest(*rows, bytes([component])) for component in range(NUM_PAGE_COMPONENTS))


def next_hash(rows: Rows) -> bytes:
    """What comes before the page that follows a full one."""
    assert len(rows[1]) == 4 * PAGE_TOKENS
    return hashlib.blake2b(b"".join(rows), digest_size=8).digest()


def num_pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


@dataclass
class Slot:
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    tokens_max: int
    num_computed: int = 0
    has_sampled: bool = False
    has_drafted: bool = False  # from then on the host knows bounds of where it is
    pages: list[int] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)  # what `pages` must hold
    lends: bool | None = None  # known with the first segment that computes pages
    exact_from: int = 0  # before that its window is not what it was: nothing may come of it but that window
    has_left: bool = False  # its state is packed: it goes on elsewhere

    def rows_before(self) -> bytes:
        """Of the page that comes next."""
        return next_hash(self.rows[-1]) if self.rows else ROOT

    def compute(self, count: int) -> list[int]:
        """Numbers within the sequence of the pages that have changed."""
        start, end = self.num_computed, self.num_computed + count
        changed = list(range(start // PAGE_TOKENS, num_pages_of(end)))
        for number in changed:
            if number == len(self.rows):
                self.rows.append((self.rows_before(), b""))
            before, old = self.rows[number]
            new = self.tokens[number * PAGE_TOKENS + len(old) // 4 : min(end, (number + 1) * PAGE_TOKENS)]
            self.rows[number] = (before, old + struct.pack(f"<{len(new)}i", *new))
        self.num_computed = end
        return changed

    def pack(self, num_tokens: int | None = None) -> bytes:
        """All state but the full pages, at a page boundary or where it is now. Its length differs from sequence to
        sequence."""
        end = self.num_computed if num_tokens is None else num_tokens
        if end % PAGE_TOKENS:
            before, tokens = self.rows[-1]
        else:
            before, tokens = next_hash(self.rows[end // PAGE_TOKENS - 1]) if end else ROOT, b""
        return msgspec.msgpack.encode((end, before, tokens))
