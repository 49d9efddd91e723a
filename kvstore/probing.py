"""One one-sided read between two engines of transfers in this process, measured: `python -m kvstore.probing KIND`.

`kvstore.checks` starts it as a process of its own, since a fabric that hangs can only be ended from outside. Its last
line of output is JSON: which engine, why, and bytes per second.
"""

from __future__ import annotations

import json
import os
import sys
import time

from kvstore.transfer.contract import PeerId, ReadState, Run
from kvstore.transfer.opening import open_transfer
from rorqual.errors import RorqualError

NUM_BYTES = 64 << 20
READS = 4
SECONDS_MAX = 15.0
REGION = "probe"


def main(argv: list[str]) -> int:
    kind = argv[0] if argv else "auto"
    try:
        print(json.dumps(measure(kind)))
    except RorqualError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    return 0


def measure(kind: str) -> dict[str, object]:
    """Raises RorqualError: no such engine, a read that fails, is late, or brings other bytes."""
    owner_builder = open_transfer(kind, agent=f"doctor-owner#{os.getpid():x}")
    reader_builder = open_transfer(owner_builder.kind, agent=f"doctor-reader#{os.getpid():x}")
    source = owner_builder.allocate(REGION, NUM_BYTES, 1)
    target = reader_builder.allocate(REGION, NUM_BYTES, 1)
    source[:] = 0x5A
    owner, reader = owner_builder.start(), reader_builder.start()
    try:
        peer = PeerId(1)
        reader.connect(peer, owner.endpoint)
        began = time.perf_counter()
        for _ in range(READS):
            read = reader.post(peer, [Run(region=REGION, source=0, target=0, num_bytes=NUM_BYTES)])
            while (state := reader.poll(read)) is ReadState.PENDING:
                owner.progress()
                if time.perf_counter() - began > SECONDS_MAX:
                    raise RorqualError(f"a read of {NUM_BYTES >> 20} MiB is not done after {SECONDS_MAX:g} s")
            if state is not ReadState.DONE:
                raise RorqualError("the read failed")
        seconds = time.perf_counter() - began
        if not (target == 0x5A).all():
            raise RorqualError("the read brought other bytes than there were")
        return {
            "kind": owner_builder.kind,
            "reason": owner_builder.reason,
            "bytes_per_second": READS * NUM_BYTES / seconds,
        }
    finally:
        reader.close()
        owner.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
