"""A fake rank as a program: `python fake_rank_process.py --fd N [--step-ms M]` is the other end of
`engine.worker.rank_link`, and reads what other such programs lend (`fake_memory`)."""

from __future__ import annotations

import argparse
import contextlib
import time

import msgspec
from fake_memory import Owners
from fake_rank import FakeRank
from fake_state import (
    POSITIONS_MAX,
)

from engine.frames import join_host, read_frame, write_frame
from engine.plan import (
    RankFailed,
    RankProgress,
    RankSettings,
    Shutdown,
    StepPlan,
    ToTransfer,
)


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
