"""A cluster of small real processes, for the tests of `rorqual up`: run by path, never imported.

    fake_cluster.py BEHAVIOUR up OPTIONS        the supervisor; its children are this script
    fake_cluster.py BEHAVIOUR prefill OPTIONS   started by the supervisor, starts a rank; so do "decode" and "worker"
    fake_cluster.py BEHAVIOUR router OPTIONS
    fake_cluster.py BEHAVIOUR kv OPTIONS        a store
    fake_cluster.py BEHAVIOUR rank

BEHAVIOUR is JSON: what the children of a role do, as in '{"decode": {"exits": 3}}'.
A worker's "address" tells its own command line and environment, and the router's "http" tells the router's:
a test can read both through the supervisor's ready file.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rorqual.errors import RorqualError
from rorqual.processes import die_with_parent


def main() -> int:
    behaviour, role, options = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if role == "up":
        return supervise(options)
    # A rank whose parent has died before it came this far must end, too.
    die_with_parent(int(options[0]) if role == "rank" else os.getppid())
    if role == "rank":
        time.sleep(60)
        return 0
    return child(role, options, behaviour.get(role, {}))


def supervise(options: list[str]) -> int:
    from rorqual.console import Console
    from rorqual.up import Supervisor
    from rorqual.up_options import parse_options

    console = Console(sys.stdout)
    supervisor = Supervisor(
        parse_options(options),
        console=console,
        environment=os.environ,
        program=lambda role: (sys.executable, __file__, sys.argv[1], role),
        num_cores=4,
    )
    try:
        return asyncio.run(supervisor.run())
    except RorqualError as error:
        print(f"rorqual up: {error}", file=sys.stderr)
        return 1
    finally:
        console.close()


def child(role: str, options: list[str], behaviour: dict) -> int:
    for line in behaviour.get("says", ()):
        print(line, flush=True)
    for _ in range(behaviour.get("floods_lines", 0)):
        print("x" * 1000)
    sys.stdout.flush()
    if "exits" in behaviour:
        return behaviour["exits"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour.get("is_deaf") else lambda *_: sys.exit(0))
    file = Path(options[options.index("--ready-file") + 1])
    ucx = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    about = json.dumps(
        {"role": role, "options": options, "threads": os.environ["OMP_NUM_THREADS"], "ucx": ucx}
        | {"store": os.environ["RORQUAL_STORE"]}
    )
    if role == "kv":
        ready = {"processes": [os.getpid()], "about": about}
    elif role != "router":
        rank = subprocess.Popen([sys.executable, __file__, "{}", "rank", str(os.getpid())])
        ready = {"address": about, "metrics": "", "processes": [os.getpid(), rank.pid]}
    else:
        ready = {"http": about, "grpc": "127.0.0.1:2", "pid": os.getpid()}
    if not behaviour.get("is_never_ready"):
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(behaviour.get("ready", ready)))
        temporary.rename(file)
    time.sleep(behaviour.get("lives_seconds", 60))
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
