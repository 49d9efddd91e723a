"""The process of a rank: loads the model, sizes and allocates its state, and passes plans and results.

Runs as `python -m engine.rank_process --fd N`, started by `engine.worker.rank_link`; reads `RankSettings`, answers
`RankProgress` while loading and `RankReady`, then one `StepResult` per `StepPlan`, strictly in order, until `Shutdown`
or the end of the host. With a transfer, others read from its pools and it reads from theirs meanwhile
(`engine.rank_transfer`). What a plan does is `engine.rank`'s.
"""

from __future__ import annotations

import argparse
import gc
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from engine.checkpoint.identity import weights_id
from engine.checkpoint.reader import Checkpoint, open_checkpoint
from engine.drafter import MtpDrafter
from engine.exactness import check_exactness
from engine.frames import FrameWriter, join_host, read_frame, write_frame
from engine.host_memory import HostMemory
from engine.kernels import registry
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.model.weights import ModelWeights, allocate_weights
from engine.plan import (
    RankFailed,
    RankProgress,
    RankReady,
    RankSettings,
    StepPlan,
)
from engine.rank import Rank
from engine.rank_budget import device_budget, host_budget, hot_budget
from engine.rank_transfer import PlanQueue, RankTransfer, ThreadFailed, read_host
from engine.runner import Runner
from engine.sampler import Sampler
from engine.warm_up import warm_up
from kvstore.handover import rebuild_tokens, wire_id
from kvstore.layout import DRAFTS_MAX, Numerics
from kvstore.pools import plain_memory
from kvstore.transfer.contract import Transfer
from kvstore.transfer.opening import TransferBuilder, open_transfer
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError

Made = TypeVar("Made")


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
    try:
        if loaded.engine is not None:
            return _serve_with_transfer(connection, loaded.rank, loaded.engine)
        while isinstance(plan := read_frame(connection), StepPlan):
            write_frame(connection, loaded.rank.step(plan))
        return 0
    finally:
        if loaded.rank.host_memory is not None:
            loaded.rank.host_memory.close()


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
    drafts_max = _drafts_max(settings, checkpoint)
    budget = device_budget(config, numerics, settings, drafts=drafts_max > 0)
    hot = hot_budget(config, numerics, settings, budget, drafts_max=drafts_max)
    below = host_budget(config, numerics, settings, budget, drafts=drafts_max > 0)
    builder = _open_transfer(settings, connection)
    weights = _allocated("the weights", lambda: allocate_weights(config))
    checkpoint.load_into(weights.named.__getitem__, _Progress(connection, stage="weights").report)
    weights.check(config)
    model = _make_model(settings, numerics, checkpoint, weights)
    _tell(connection, "warming up")
    page_digest = implementations["page_digest"].function
    warm_up(model, page_digest, drafts=drafts_max > 0)
    if settings.exact:
        _tell(connection, "testing exactness")
        check_exactness(model)
    sampler = Sampler(vocab_size=config.vocab_size, device=torch.device("cpu"), kernels=implementations)
    sampler.warm_up()
    runner = _allocated(
        "the pools (fewer --pages or --slots need less)",
        lambda: Runner(
            model,
            num_pages=budget.num_pages if hot is None else hot.num_pages,
            num_slots=settings.num_slots,
            num_records=budget.num_records,
            num_thin=0 if hot is None else hot.num_thin,
            drafts=drafts_max > 0,
            allocate=plain_memory if builder is None else builder.allocate,
        ),
    )
    host_memory = _allocated(
        "host memory (a smaller --host-pages or --host-bytes needs less)",
        lambda: HostMemory(
            runner.pools,
            runner.records,
            num_pages=below.num_pages,
            num_records=below.num_records,
            agent=f"{settings.agent}/host" if settings.shares_host_memory else "",
        ),
    )
    if hot is not None:
        runner.allow_spills(host_memory, hot.shape, num_buffers=hot.num_buffers)
    drafter = MtpDrafter(runner, sampler) if drafts_max else None
    rank = Rank(runner, sampler=sampler, page_digest=page_digest, drafter=drafter, host_memory=host_memory)
    engine = None if builder is None else builder.start()
    ready = _ready(
        rank,
        checkpoint,
        engine,
        kernels=tuple((name, item.name) for name, item in implementations.items()),
        weight_bytes=weights.num_bytes,
        drafts_max=drafts_max,
        exact=settings.exact,
    )
    return _Loaded(rank=rank, ready=ready, engine=engine)


def _ready(
    rank: Rank,
    checkpoint: Checkpoint,
    engine: Transfer | None,
    *,
    kernels: tuple[tuple[str, str], ...],
    weight_bytes: int,
    drafts_max: int,
    exact: bool,
) -> RankReady:
    config, runner, host_memory = checkpoint.config, rank.runner, rank.host_memory
    spilled = runner.tables.spilled
    fingerprint, layout = f"{config.fingerprint()}-{weights_id(checkpoint.stored)}", runner.layout
    return RankReady(
        num_pages=runner.pools.num_pages,
        num_slots=runner.pools.num_slots,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        model_fingerprint=fingerprint,
        numerics=layout.numerics.value,
        kernels=kernels,
        weight_bytes=weight_bytes,
        state_bytes=runner.pools.num_bytes
        + runner.records.nbytes
        + (spilled.num_bytes if spilled is not None else 0),
        has_mtp=checkpoint.has_mtp,
        wire_id=wire_id(layout, fingerprint, drafts=runner.drafts, exact=exact),
        endpoint=None if engine is None else engine.endpoint,
        num_records=len(runner.records),
        num_page_components=len(rank.digests.components),
        notices=checkpoint.notices,
        drafts_max=drafts_max,
        page_bytes=layout.page_bytes,
        record_bytes=runner.records.shape[1],
        rebuild_tokens=rebuild_tokens(layout),
        num_host_pages=host_memory.num_pages if host_memory is not None else 0,
        num_host_records=host_memory.num_records if host_memory is not None else 0,
        host_memory=host_memory.shared if host_memory is not None else None,
        num_thin_pages=runner.pools.num_thin,
        num_hot_buffers=spilled.num_buffers if spilled is not None else 0,
        num_hot_pages=spilled.num_hot_pages if spilled is not None else 0,
    )


def _open_transfer(settings: RankSettings, connection: socket.socket) -> TransferBuilder | None:
    if not settings.transfer:
        return None
    assert settings.num_records > 0, "a transfer without records"
    builder = open_transfer(settings.transfer, agent=settings.agent)
    _tell(connection, f"state is read by {builder.reason}")
    return builder


def _drafts_max(settings: RankSettings, checkpoint: Checkpoint) -> int:
    """Of a segment. Raises RorqualError where drafts are required and there is nothing to draft with."""
    assert 0 <= settings.drafts_max <= DRAFTS_MAX, f"rings have no room for {settings.drafts_max} drafts"
    if checkpoint.has_mtp:
        return settings.drafts_max
    if settings.drafts_required:
        raise RorqualError(
            f"--drafts {settings.drafts_max}: {settings.model} has no MTP block to draft with;"
            " choose --drafts 0, or auto, which drafts where it can"
        )
    return 0


def _allocated(what: str, make: Callable[[], Made]) -> Made:
    """torch reports memory that is not to be had as a RuntimeError, shared memory as an OSError."""
    try:
        return make()
    except (MemoryError, OSError, RuntimeError) as error:
        raise RorqualError(f"no memory for {what}: {str(error).splitlines()[0]}") from None


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
