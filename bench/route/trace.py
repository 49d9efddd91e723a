"""Traces of requests: read from a file or made from a seed, and brought to a load. Called by `bench.route`.

A trace is JSON lines with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`: one id for each
512 tokens of the prompt, equal where all tokens up to there are equal (the format of the public Mooncake traces). Block
i is pages 2i and 2i+1; a prompt has input_length // 256 full pages.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvstore.keys import PageKey
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS

BLOCK_TOKENS = 512
BLOCK_PAGES = BLOCK_TOKENS // PAGE_TOKENS
SMEAR_SECONDS = 3.0
"""Steps of the time stamps of the public conversation trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. `ideal_pages` are those an endless cache of one worker would have had, all resumable."""

    number: int
    seconds: float
    num_tokens: int
    keys: tuple[PageKey, ...]
    session: str
    ideal_pages: int

    @property
    def num_pages(self) -> int:
        return len(self.keys)


def load_trace(name: str, *, seed: int) -> list[Request]:
    """`name` is a .jsonl or .jsonl.gz file, or `synthetic:N` for N made requests. Raises RorqualError naming the
    file and line of what cannot be read."""
    if name.startswith("synthetic:"):
        count = name.removeprefix("synthetic:")
        if not count.isdecimal() or not 0 < int(count) <= 1_000_000:
            raise RorqualError(f"--trace {name}: the number of requests must be 1 to 1,000,000")
        return _requests(made_rows(int(count), seed=seed))
    path = Path(name)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise RorqualError(f"{path}: not a gzip file: {error}") from None
    lines = content.splitlines()
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise RorqualError(f"{path}: holds no request")
    return _requests(sorted(rows, key=lambda row: row.seconds))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a trace."""

    seconds: float
    num_tokens: int
    blocks: tuple[int, ...]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        raw = json.loads(line)
        row = Row(raw["timestamp"] / 1000, int(raw["input_length"]), tuple(raw["hash_ids"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RorqualError(f"{path}, line {number}: {error!r}") from None
    num_blocks = -(-row.num_tokens // BLOCK_TOKENS)
    if (
        row.num_tokens < 1
        or len(row.blocks) != num_blocks
        or not all(type(block) is int for block in row.blocks)
    ):
        raise RorqualError(
            f"{path}, line {number}: {row.num_tokens} tokens need {num_blocks} integer hash_ids"
        )
    return row


def made_rows(count: int, *, seed: int) -> list[Row]:
    """Conversations that share a head of one block: Poisson arrivals, prompts of some thousand tokens, each turn the
    one before with an answer and a question more; now and then a conversation parts from itself."""
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    open_ones: list[tuple[int, list[int]]] = []  # tokens and whole blocks of the last turn
    next_block, seconds = 1, 0.0
    for _ in range(count):
        seconds += float(random.exponential(0.25))
        if open_ones and random.random() < 0.55:
            index = int(random.integers(len(open_ones)))
            num_tokens, blocks = open_ones[index]
            if random.random() < 0.1:
                blocks = blocks[: max(1, len(blocks) * 2 // 3)]
                num_tokens = len(blocks) * BLOCK_TOKENS
            num_tokens += int(random.integers(300, 3000))
        else:
            index, blocks = -1, [0]
            num_tokens = BLOCK_TOKENS + int(random.lognormal(8.3, 1.0))
        num_tokens = min(num_tokens, 60_000)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        fresh = max(num_blocks - len(blocks), 0)
        blocks = [*blocks[:num_blocks], *range(next_block, next_block + fresh)]
        next_block += fresh
        rows.append(Row(seconds, num_tokens, tuple(blocks)))
        turn = (num_tokens, blocks[: num_tokens // BLOCK_TOKENS])
        if index >= 0:
            open_ones[index] = turn
        elif random.random() < 0.6:
            open_ones.append(turn)
        if len(open_ones) > 200:
            open_ones.pop(0)
    return rows


def _requests(rows: Sequence[Row]) -> list[Request]:
    """Page keys, sessions, and what an endless cache would have had."""
    pages: dict[int, tuple[PageKey, ...]] = {}
    sessions: dict[int, str] = {}  # of each block, the session that brought it
    found: list[Request] = []
    for number, row in enumerate(rows):
        matched = 0
        while matched < len(row.blocks) and row.blocks[matched] in sessions:
            matched += 1
        # The trace names no sessions. Whoever goes on from more than a common head belongs to the one that brought it.
        session = sessions[row.blocks[matched - 1]] if matched > 1 else str(number)
        for block in row.blocks:
            sessions.setdefault(block, session)
            if block not in pages:
                pages[block] = tuple(
                    PageKey((block * BLOCK_PAGES + half).to_bytes(16, "little"))
                    for half in range(BLOCK_PAGES)
                )
        num_pages = row.num_tokens // PAGE_TOKENS
        keys = tuple(key for block in row.blocks for key in pages[block])[:num_pages]
        found.append(
            Request(
                number=number,
                seconds=row.seconds - rows[0].seconds,
                num_tokens=row.num_tokens,
                keys=keys,
                session=session,
                ideal_pages=min(matched * BLOCK_PAGES, num_pages),
            )
        )
    return found


def smear(requests: Sequence[Request], *, seed: int) -> list[Request]:
    """Arrivals uniform inside each step of 3 s, in the order they had."""
    random = np.random.default_rng(seed)
    steps = np.floor(np.array([item.seconds for item in requests]) / SMEAR_SECONDS)
    times = steps * SMEAR_SECONDS + random.uniform(0, SMEAR_SECONDS, len(requests))
    times.sort()  # the steps ascend, so sorting moves nothing out of its step
    return [replace(item, seconds=float(time)) for item, time in zip(requests, times, strict=True)]


def ideal_seconds(requests: Iterable[Request], prefill_seconds: Callable[[float, float], float]) -> float:
    """Work of the whole trace if every page that was ever there had been reused; `prefill_seconds(tokens, context)`."""
    return sum(
        prefill_seconds(
            max(item.num_tokens - item.ideal_pages * PAGE_TOKENS, 1), item.ideal_pages * PAGE_TOKENS
        )
        for item in requests
    )


def to_load(
    requests: Sequence[Request], *, work_seconds: float, num_workers: int, load: float
) -> list[Request]:
    """Time stamps scaled so that `work_seconds` is `load` of what the workers can do while requests arrive."""
    duration = requests[-1].seconds
    if duration <= 0:
        raise RorqualError("all requests of the trace arrive at once: there is no load to bring it to")
    scale = work_seconds / (num_workers * load) / duration
    return [replace(item, seconds=item.seconds * scale) for item in requests]
