"""The options of `rorqual autoscaler`. Called by `autoscaler.process`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from autoscaler.policy_file import KUBERNETES, LOCAL
from rorqual.errors import ConfigError
from rorqual.telemetry import add_log_options
from rorqual.tls import TlsFiles, add_tls_options, read_tls

LEASE_NAME = "rorqual-autoscaler"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerOptions:
    policy: Path
    target: str = KUBERNETES
    local_folder: Path | None = None
    lease: str = LEASE_NAME
    dry_run: bool = False
    once: bool = False
    listen_host: str = "127.0.0.1"
    metrics_port: int = 0
    ready_file: Path | None = None
    tls: TlsFiles | None = None  # towards workers
    routers_cert: Path | None = None  # of routers that speak HTTPS


def parse_options(argv: list[str], *, hostname: str) -> tuple[AutoscalerOptions, str]:
    """The options of a command line, and the log level. Raises ConfigError naming the option."""
    args = _parser().parse_args(argv)
    if args.target == LOCAL and args.local_folder is None:
        raise ConfigError("--target local needs --local-folder DIR, which `rorqual up --autoscale` gives")
    if not 0 <= args.metrics_port <= 65535:
        raise ConfigError(f"--metrics-port must be a port between 0 and 65535, not {args.metrics_port}")
    lease = args.lease or default_lease(hostname)
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", lease):
        raise ConfigError(f"--lease: {lease!r} is no name of a Lease")
    options = AutoscalerOptions(
        policy=args.policy,
        target=args.target,
        local_folder=args.local_folder,
        lease=lease,
        dry_run=args.dry_run,
        once=args.once,
        listen_host=args.listen_host,
        metrics_port=args.metrics_port,
        ready_file=args.ready_file,
        tls=read_tls(args, serves=False),
        routers_cert=args.routers_cert,
    )
    return options, args.log_level


def default_lease(hostname: str) -> str:
    """The name of this pod's Deployment, so that two releases in a namespace do not wait for each other."""
    found = re.fullmatch(r"(.+)-[a-z0-9]{5,10}-[a-z0-9]{5}", hostname)
    return found[1] if found else LEASE_NAME


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual autoscaler",
        description="Set how many workers each pool has, by what users feel (time to first token, time between tokens),"
        " as a policy file says. Several may run: one acts, elected by a Lease.",
        epilog="With --target kubernetes its service account needs, in its namespace: get, patch on deployments/scale"
        " (apps) and leaderworkersets/scale (leaderworkerset.x-k8s.io); get, list on pods; create, patch on events;"
        " get, create, update on leases (coordination.k8s.io); and, where the policy finds workers by kubernetes:, get,"
        " list, watch on endpointslices (discovery.k8s.io)."
        " example: rorqual autoscaler --policy policy.yaml --once --dry-run",
    )
    add = parser.add_argument
    add("--policy", type=Path, required=True, metavar="FILE", help="read again whenever it changes")
    add(
        "--target",
        choices=(KUBERNETES, LOCAL),
        default=KUBERNETES,
        help="where replicas are set: Deployments and LeaderWorkerSets, or the workers of `rorqual up --autoscale`"
        " (default kubernetes)",
    )
    add(
        "--local-folder",
        type=Path,
        metavar="DIR",
        help="of workers.json and wanted.json, with --target local",
    )
    add(
        "--lease",
        default="",
        metavar="NAME",
        help="the Lease by which one of several is elected (default: the name of the pod's Deployment, else"
        f" {LEASE_NAME})",
    )
    add("--dry-run", action="store_true", help="look and decide, and only say what would be set")
    add(
        "--once",
        action="store_true",
        help="look for one interval, decide once, print it with its arithmetic; status 1 where it could not be set",
    )
    add(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="of /metrics, /health and /ready (default: any)",
    )
    add(
        "--listen-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address of that port (default 127.0.0.1)",
    )
    add(
        "--routers-cert",
        type=Path,
        metavar="FILE",
        help="routers speak HTTPS with this certificate (their --gateway-tls-cert), PEM; read anew as it changes",
    )
    add("--ready-file", type=Path, metavar="FILE", help="written once it looks: JSON of its URL and pid")
    add_tls_options(parser)
    add_log_options(parser)
    return parser
