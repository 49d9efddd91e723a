"""The rank: a worker's muscle. Loads the model, holds weights, pools and sampler state, and carries out step plans.

Runs as `python -m engine.rank --fd N`, started by `engine.worker.rank_link`; reads `RankSettings`, answers
`RankProgress` while loading and `RankReady`, then one `StepResult` per `StepPlan`, strictly in order, until `Shutdown`
or the end of the host. With a transfer, others read from its pools and it reads from theirs meanwhile
(`engine.rank_transfer`). It decides nothing: which pages, slots, records and tokens is the host's business.
"""

from __future__ import annotations

import argparse
import gc
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.reader import Checkpoint, open_checkpoint
from engine.exactness import check_exactness
from engine.frames import FrameWriter, join_host, read_frame, write_frame
from engine.kernels import registry
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.model.weights import ModelWeights, allocate_weights
from engine.plan import (
    Lent,
    PromptScores,
    RankFailed,
    RankProgress,
    RankReady,
    RankSettings,
    Sampled,
    Segment,
    SlotOpen,
    StepPlan,
    StepResult,
)
from engine.rank_transfer import PageDigest, PlanQueue, RankTransfer, StateDigests, ThreadFailed, read_host
from engine.runner import Runner, SegmentTokens
from engine.sampler import Sampler
from kvstore.handover import wire_id
from kvstore.layout import Numerics, build_layout
from kvstore.pools import plain_memory
from kvstore.transfer.contract import Transfer
from kvstore.transfer.opening import TransferBuilder, open_transfer
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS, ModelConfig

Made = TypeVar("Made")

KV_BYTES_DEFAULT = 1 << 30
SCORED_ROWS = 32
"""Prompt logprobs are computed this many tokens at a time: 32 x 129,280 f32 logits are 16 MiB."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A worker's compute process; started by its host, not by hand."
    )
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the host")
    connection = join_host(parser.parse_args().fd)
    try:
        return _serve(connection)
    except ConnectionError:
        return 0  # the host is gone while it was written to, and with it whoever would read more


def _serve(connection: socket.socket) -> int:
    """The exit status. Raises ConnectionError when the host goes away."""
    settings = read_frame(connection)
    if settings is None:
        return 0
    assert isinstance(settings, RankSettings), "the first frame must be the settings"
    try:
        loaded = _load(settings, connection)
    except RorqualError as error:
        write_frame(connection, RankFailed(message=str(error)))
        return 1
    write_frame(connection, loaded.ready)
    # Weights and code live as long as the process: the collector need not walk them again.
    gc.collect()
    gc.freeze()
    if loaded.engine is not None:
        return _serve_with_transfer(connection, loaded.rank, loaded.engine)
    while isinstance(plan := read_frame(connection), StepPlan):
        write_frame(connection, loaded.rank.step(plan))
    return 0


def _serve_with_transfer(connection: socket.socket, rank: Rank, engine: Transfer) -> int:
    """As `_serve`, with two threads beside this one, which computes."""
    writer = FrameWriter(connection)
    plans = PlanQueue()
    transfer = RankTransfer(
        engine,
        rank.digests,
        record_bytes=rank.record_bytes,
        tell=writer.write,
        fail=plans.fail,
        clock=SystemClock(),
    )
    # A daemon: when a step fails here, the process does not wait for the host to say more.
    threading.Thread(target=read_host, args=(connection, plans, transfer), name="host", daemon=True).start()
    try:
        while (plan := plans.next()) is not None:
            writer.write(rank.step(plan))
    except ThreadFailed as error:
        writer.write(RankFailed(message=str(error)))
        return 1
    finally:
        transfer.stop()
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    rank: Rank
    ready: RankReady
    engine: Transfer | None


class Rank:
    """Everything between two frames. Tests drive it without a process."""

    def __init__(self, runner: Runner, *, sampler: Sampler, page_digest: PageDigest) -> None:
        self.digests = StateDigests(runner.pools, runner.records, page_digest=page_digest)
        self.record_bytes = runner.record_bytes
        self._runner = runner
        self._sampler = sampler
        self._slots: dict[int, _Slot] = {}

    def step(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        for slot in plan.closes:
            self._sampler.close(slot)
            del self._slots[slot]
        for item in plan.opens:
            self._open(item)
        sampled: list[Sampled] = []
        scores: list[PromptScores] = []
        if plan.segments:
            sampled, scores = self._compute(plan.segments)
        lent = self._lend([segment for segment in plan.segments if segment.lend])
        return StepResult(
            number=plan.number,
            sampled=tuple(sampled),
            prompt_scores=tuple(scores),
            step_ms=(time.perf_counter() - started) * 1e3,
            lent=tuple(lent),
        )

    def _open(self, item: SlotOpen) -> None:
        assert item.slot not in self._slots, f"slot {item.slot} is open"
        self._sampler.open(item)
        if (known := item.restore) is None:
            self._runner.open(item.slot)
        else:
            self._runner.restore(item.slot, known.num_computed, known.pages, known.record)
        tokens = np.frombuffer(item.tokens, dtype="<i4")
        buffer = torch.empty(len(tokens) + PAGE_TOKENS, dtype=torch.int64)
        buffer[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        self._slots[item.slot] = _Slot(
            tokens=buffer,
            num_tokens=len(tokens),
            num_prompt=item.num_prompt,
            prompt_logprobs=item.sampling.prompt_logprobs,
        )

    @torch.inference_mode()
    def _compute(self, segments: tuple[Segment, ...]) -> tuple[list[Sampled], list[PromptScores]]:
        work: list[SegmentTokens] = []
        for segment in segments:
            slot = self._slots[segment.slot]
            end = segment.start + segment.count
            assert end <= slot.num_tokens, f"slot {segment.slot} knows {slot.num_tokens} tokens, not {end}"
            if segment.pages:
                self._runner.extend(segment.slot, segment.pages)
            tokens = slot.tokens[segment.start : end]
            work.append(
                SegmentTokens(
                    slot=segment.slot, start=segment.start, tokens=tokens, all_logits=slot.wants_scores
                )
            )
        streams, rows = self._runner.streams(work)
        scores = [
            part
            for segment, segment_rows in zip(segments, rows, strict=True)
            if self._slots[segment.slot].wants_scores
            for part in self._score_prompt(segment, streams, segment_rows)
        ]
        chosen = [(segment, part[-1]) for segment, part in zip(segments, rows, strict=True) if segment.sample]
        if not chosen:
            return [], scores
        logits = self._runner.model.logits(streams[torch.stack([row for _, row in chosen])])
        slots = [segment.slot for segment, _ in chosen]
        positions = [segment.start + segment.count for segment, _ in chosen]
        sampled = self._sampler.sample(slots, positions, logits)
        for item, position in zip(sampled, positions, strict=True):
            self._slots[item.slot].append(item.token_id, position)
        return sampled, scores

    def _lend(self, segments: Sequence[Segment]) -> list[Lent]:
        """What these segments have made readable: the full pages they completed, and records."""
        completed = [
            self._runner.tables.pages_SP[
                item.slot, item.start // PAGE_TOKENS : (item.start + item.count) // PAGE_TOKENS
            ].tolist()
            for item in segments
        ]
        digests = iter(self.digests.of_pages([page for pages in completed for page in pages]))
        lent: list[Lent] = []
        for item, pages in zip(segments, completed, strict=True):
            num_bytes = digest = 0
            if item.record >= 0:
                num_bytes = self._runner.pack(item.slot, item.start + item.count, item.record)
                digest = self.digests.of_record(item.record, num_bytes)
            lent.append(
                Lent(
                    slot=item.slot,
                    page_digests=tuple(islice(digests, len(pages) * len(self.digests.components))),
                    record_bytes=num_bytes,
                    record_digest=digest,
                )
            )
        return lent

    def _score_prompt(self, segment: Segment, streams: Tensor, rows: Tensor) -> list[PromptScores]:
        """Logprobs of the prompt tokens that follow this segment's tokens."""
        slot = self._slots[segment.slot]
        assert slot.prompt_logprobs is not None
        num_scored = min(segment.count, slot.num_prompt - 1 - segment.start)
        parts: list[PromptScores] = []
        for first in range(0, num_scored, SCORED_ROWS):
            last = min(first + SCORED_ROWS, num_scored)
            position = segment.start + first + 1
            parts.append(
                self._sampler.prompt_scores(
                    segment.slot,
                    first_position=position,
                    logits_RV=self._runner.model.logits(streams[rows[first:last]]),
                    token_ids=slot.tokens[position : position + last - first].tolist(),
                    num_alternatives=slot.prompt_logprobs,
                )
            )
        return parts


@dataclass(slots=True, kw_only=True)
class _Slot:
    """Tokens of the sequence in a slot: given by the host, then extended by the sampler."""

    tokens: Tensor  # i64, longer than needed
    num_tokens: int
    num_prompt: int
    prompt_logprobs: int | None

    @property
    def wants_scores(self) -> bool:
        return self.prompt_logprobs is not None

    def append(self, token: int, position: int) -> None:
        assert position == self.num_tokens, "a token was sampled out of turn"
        if position == len(self.tokens):
            self.tokens = torch.cat((self.tokens, torch.empty_like(self.tokens)))
        self.tokens[position] = token
        self.num_tokens = position + 1


def _make_model(
    settings: RankSettings, numerics: Numerics, checkpoint: Checkpoint, weights: ModelWeights
) -> Model:
    return Model(
        checkpoint.config,
        weights,
        numerics=numerics,
        kernels=choose_kernels("cpu", settings.kernels),
        exact=settings.exact,
    )


def _load(settings: RankSettings, connection: socket.socket) -> _Loaded:
    # One thread in exact mode: with more, sums are cut by the number of threads.
    torch.set_num_threads(1 if settings.exact else settings.threads)
    checkpoint = open_checkpoint(Path(settings.model))
    config = checkpoint.config
    numerics = Numerics(settings.numerics or ("served" if config.quantised else "float32"))
    # What is wrong with an option is told before weights are read for minutes.
    implementations = registry.choose("cpu", settings.kernels)
    num_pages = settings.num_pages or _num_pages(config, numerics, settings)
    builder = _open_transfer(settings, connection)
    weights = _allocated("the weights", lambda: allocate_weights(config))
    checkpoint.load_into(weights.named.__getitem__, _Progress(connection, stage="weights").report)
    weights.check(config)
    model = _make_model(settings, numerics, checkpoint, weights)
    _tell(connection, "warming up")
    page_digest = implementations["page_digest"].function
    _warm_up(model, page_digest)
    if settings.exact:
        _tell(connection, "testing exactness")
        check_exactness(model)
    sampler = Sampler(vocab_size=config.vocab_size, device=torch.device("cpu"), kernels=implementations)
    sampler.warm_up()
    runner = _allocated(
        "the pools (fewer --pages or --slots need less)",
        lambda: Runner(
            model,
            num_pages=num_pages,
            num_slots=settings.num_slots,
            num_records=settings.num_records,
            allocate=plain_memory if builder is None else builder.allocate,
        ),
    )
    rank = Rank(runner, sampler=sampler, page_digest=page_digest)
    engine = None if builder is None else builder.start()
    ready = RankReady(
        num_pages=num_pages,
        num_slots=settings.num_slots,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        model_fingerprint=config.fingerprint(),
        numerics=numerics.value,
        kernels=tuple((name, item.name) for name, item in implementations.items()),
        weight_bytes=weights.num_bytes,
        state_bytes=runner.pools.num_bytes + runner.records.nbytes,
        has_mtp=checkpoint.has_mtp,
        wire_id="" if engine is None else wire_id(runner.layout, config.fingerprint(), drafts=runner.drafts),
        endpoint=None if engine is None else engine.endpoint,
        num_records=settings.num_records,
        num_page_components=len(rank.digests.components),
        notices=checkpoint.notices,
    )
    return _Loaded(rank=rank, ready=ready, engine=engine)


def _open_transfer(settings: RankSettings, connection: socket.socket) -> TransferBuilder | None:
    if not settings.transfer:
        assert settings.num_records == 0, "records without a transfer"
        return None
    assert settings.num_records > 0, "a transfer without records"
    builder = open_transfer(settings.transfer, agent=settings.agent)
    _tell(connection, f"state is read by {builder.reason}")
    return builder


def _num_pages(config: ModelConfig, numerics: Numerics, settings: RankSettings) -> int:
    """As many pages as the byte budget holds, and no more than all slots could ever use."""
    layout = build_layout(config, numerics)
    budget = settings.kv_bytes or KV_BYTES_DEFAULT
    useful = settings.num_slots * -(-config.max_position_embeddings // PAGE_TOKENS)
    # A model of window-only layers has no paged state: pages cost nothing then.
    fitting = budget // layout.page_bytes if layout.page_bytes else useful
    if fitting == 0:
        raise RorqualError(
            f"--kv-bytes {budget} holds no page: a page of {PAGE_TOKENS} tokens takes {layout.page_bytes}"
        )
    return min(fitting, useful)


def _allocated(what: str, make: Callable[[], Made]) -> Made:
    """torch reports memory that is not to be had as a RuntimeError, shared memory as an OSError."""
    try:
        return make()
    except (MemoryError, OSError, RuntimeError) as error:
        raise RorqualError(f"no memory for {what}: {str(error).splitlines()[0]}") from None


def _warm_up(model: Model, page_digest: PageDigest) -> None:
    """Compile every kernel before the first request: one chunk, then a decode beside a chunk. With a small top-k, so
    that the indexer has to choose too."""
    config = replace(model.config, index_topk=1)
    model = Model(config, model.weights, numerics=model.numerics, kernels=model.kernels, exact=model.exact)
    runner = Runner(model, num_pages=2, num_slots=2)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, [slot])
    count = max(min(PAGE_TOKENS - 2, model.config.max_position_embeddings - 2), 1)
    tokens = torch.arange(count + 1) % model.config.vocab_size
    runner.run([SegmentTokens(slot=0, start=0, tokens=tokens[:count])])
    runner.run(
        [
            SegmentTokens(slot=0, start=count, tokens=tokens[:1]),
            SegmentTokens(slot=1, start=0, tokens=tokens[:8]),
        ]
    )
    page_digest(torch.zeros((1, 4), dtype=torch.uint8), torch.tensor([0]))


def _tell(connection: socket.socket, stage: str) -> None:
    write_frame(connection, RankProgress(stage=stage, done=0, total=0, unit=""))


class _Progress:
    """Loading progress, at most every half second."""

    def __init__(self, connection: socket.socket, *, stage: str) -> None:
        self._connection = connection
        self._stage = stage
        self._told_at = 0.0

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told_at < 0.5:
            return
        self._told_at = now
        gigabyte = 1e9
        message = RankProgress(stage=self._stage, done=done / gigabyte, total=total / gigabyte, unit="GB")
        write_frame(self._connection, message)


if __name__ == "__main__":
    raise SystemExit(main())
