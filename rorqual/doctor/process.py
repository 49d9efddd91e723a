"""The command `rorqual doctor`: options, all checks at once, a line each, and the exit status.

`rorqual.cli` calls `main`. Checks of upper packages are found as text, as commands are; where such a package cannot be
loaded, that is a finding too. It changes nothing but one value in the store, which it removes.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rorqual import __version__
from rorqual.doctor import cluster, machine, network
from rorqual.doctor.finding import Check, Finding, Status, fail, in_thread, run_checks
from rorqual.service import STORE_VARIABLE, format_address, parse_address
from rorqual.tls import TlsFiles, add_tls_options, read_tls

Look = Callable[[], Coroutine[Any, Any, Sequence[Finding]]]

TRANSFER = "kvstore.checks:look_at_transfer"
STORE = "kvstore.checks:look_at_store"
SECONDS_MAX = 60.0
"""Of the whole run. Checks have smaller bounds, and run at once."""


def main(argv: list[str]) -> int:
    """Entry of `rorqual doctor`: 1 when any check fails. Raises RorqualError about options."""
    args = _parser().parse_args(argv)
    checks = make_checks(args, tls=read_tls(args, serves=False))
    findings = asyncio.run(_run(checks))
    print(as_json(findings) if args.json else as_text(findings))
    return 1 if any(finding.status is Status.FAIL for finding in findings) else 0


async def _run(checks: Sequence[Check]) -> list[Finding]:
    try:
        async with asyncio.timeout(SECONDS_MAX):
            return await run_checks(checks)
    except TimeoutError:
        return [fail("doctor", f"the checks are not done after {SECONDS_MAX:g} s", "leave some out")]


def make_checks(args: argparse.Namespace, *, tls: TlsFiles | None) -> list[Check]:
    """In the order in which they are told. Raises ConfigError about addresses."""
    checks = [
        Check(name="versions", look=_blocking(machine.look_at_versions)),
        Check(name="system", look=_blocking(machine.look_at_system)),
        Check(name="gpu", look=machine.look_at_gpus),
    ]
    if args.model is not None:
        checks.append(Check(name="model", look=_blocking(machine.look_at_model, args.model)))
    if args.transfer != "none":
        checks.append(Check(name="transfer", look=_upper(TRANSFER, args.transfer), seconds_max=25.0))
    for text in args.listen:
        host, port = parse_address(text, option="--listen")
        checks.append(Check(name=f"port {text}", look=_blocking(_port, host, port)))
    if args.worker:
        addresses = [format_address(*parse_address(text, option="--worker")) for text in args.worker]
        checks.append(Check(name="workers", look=functools.partial(_look_at_workers, addresses, tls)))
    checks += [
        Check(name=f"router {url}", look=_blocking(network.look_at_router, url, tls)) for url in args.router
    ]
    if args.store and args.store != "none":
        checks.append(Check(name="store", look=_upper(STORE, args.store)))
    checks.append(Check(name="kubernetes", look=cluster.look_at_cluster, seconds_max=45.0))
    return checks


def as_text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.status.value:<4}  {finding.check:<{width}}  {finding.found}")
        if finding.cure and finding.status is not Status.OK:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.cure}")
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    lines.append(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) | {"status": finding.status.value} for finding in findings], indent=2)


async def _look_at_workers(addresses: Sequence[str], tls: TlsFiles | None) -> list[Finding]:
    greetings = await asyncio.gather(*(network.greet(address, tls=tls) for address in addresses))
    found = [network.judge_worker(greeting, is_tls=tls is not None) for greeting in greetings]
    found += network.judge_agreement(greetings)
    return found + network.judge_worker_versions(greetings, ours=__version__)


def _port(host: str, port: int) -> Sequence[Finding]:
    return [network.look_at_port(host, port)]


def _blocking(look: Callable[..., Sequence[Finding]], *arguments: object) -> Look:
    return functools.partial(in_thread, functools.partial(look, *arguments))


def _upper(target: str, argument: str) -> Look:
    """A check of a package above this one."""

    async def look() -> Sequence[Finding]:
        module_name, _, function_name = target.partition(":")
        try:
            # Loading NIXL's or redis's half takes a moment, and blocks.
            module = await in_thread(lambda: _load(module_name))
        except ModuleNotFoundError as error:
            return [fail(module_name, f"cannot be loaded: {error}", "install what is missing")]
        check = cast("Callable[[str], Coroutine[Any, Any, list[Finding]]]", getattr(module, function_name))
        return await check(argument)

    return look


def _load(name: str) -> Any:
    return importlib.import_module(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual doctor",
        description="Look at this machine and, where they are named, at a model, workers, routers and a store, and say"
        " what is wrong and what to do. Exits 1 when something fails. Bounded by a minute.",
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model directory")
    add("--worker", action="append", default=[], metavar="HOST:PORT", help="a worker; repeatable")
    add("--router", action="append", default=[], metavar="URL", help="a router's HTTP; repeatable")
    add("--listen", action="append", default=[], metavar="HOST:PORT", help="is this port free? repeatable")
    add(
        "--store",
        default=os.environ.get(STORE_VARIABLE, ""),
        metavar="URL",
        help=f"a Redis or Valkey; rather give it in {STORE_VARIABLE}; none: left out",
    )
    add(
        "--transfer",
        choices=["auto", "nixl", "shm", "none"],
        default="auto",
        help="engine of one-sided reads to try; none: left out (default auto)",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    add_tls_options(parser)
    return parser
