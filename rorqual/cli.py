"""The `rorqual` command: a table of subcommands, each loaded only when asked for.

Owns the one place where expected failures become a line on standard error and an exit status: 1 for what
went wrong, 2 for a command line that cannot be understood, 130 after Ctrl-C. A bug still shows its
traceback. Never imports the engine or the router by name: the ground floor knows them as text
("module:function").
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from rorqual import __version__
from rorqual.errors import RorqualError
from rorqual.processes import die_with_parent

# gRPC's core writes notes of its own to standard error: for every peer that says goodbye, and beside errors that
# reach us as exceptions. It reads this when it is first imported, and children inherit it.
_QUIET = ("GRPC_VERBOSITY", "NONE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand: `target` is "module:function", a `main(argv) -> exit status`."""

    name: str
    target: str
    summary: str
    example: str


COMMANDS = (
    Command(
        name="demo",
        target="rorqual.demo:main",
        summary="serve a small random model with the real tokenizer (makes it the first time)",
        example="rorqual demo --http 8000",
    ),
    Command(
        name="up",
        target="rorqual.up:main",
        summary="start a local cluster: workers and a router as real processes",
        example="rorqual up --model DIR --prefill 1 --decode 2",
    ),
    Command(
        name="prefill",
        target="prefill_worker.process:main",
        summary="run one prefill worker: computes prompts and lends their state",
        example="rorqual prefill --model DIR --listen 127.0.0.1:9000",
    ),
    Command(
        name="decode",
        target="decode_worker.process:main",
        summary="run one decode worker: reads the state of prompts and generates",
        example="rorqual decode --model DIR --listen 127.0.0.1:9001",
    ),
    Command(
        name="worker",
        target="engine.worker.process:main",
        summary="run one worker that does both, prefill and decode",
        example="rorqual worker --model DIR --listen 127.0.0.1:9002",
    ),
    Command(
        name="router",
        target="router.process:main",
        summary="run the router: HTTP and gRPC in front of workers",
        example="rorqual router --model DIR --worker 127.0.0.1:9000 --worker 127.0.0.1:9001",
    ),
    Command(
        name="autoscaler",
        target="autoscaler.process:main",
        summary="set how many workers each pool has, by what users feel, as a policy says",
        example="rorqual autoscaler --policy policy.yaml --once --dry-run",
    ),
    Command(
        name="checkpoint",
        target="engine.checkpoint.cli:main",
        summary="make, inspect and verify checkpoints",
        example="rorqual checkpoint inspect DIR",
    ),
    Command(
        name="kv",
        target="kvstore.store.cli:main",
        summary="look into a store of kept state in Redis: count, list, verify, flush a tenant",
        example="rorqual kv stat --url redis://cache:6379",
    ),
    Command(
        name="doctor",
        target="rorqual.doctor.process:main",
        summary="look at machine, model, workers, routers and store, and say what is wrong",
        example="rorqual doctor --model DIR --worker 127.0.0.1:9000",
    ),
    Command(
        name="bench",
        target="bench.__main__:main",
        summary="races and simulations: `route` of placement policies, `scale` of rules that set replicas",
        example="rorqual bench route --trace FILE --workers 8",
    ),
)


def main(argv: Sequence[str] | None = None, *, commands: Sequence[Command] = COMMANDS) -> int:
    """The whole command; returns the exit status. `commands` is the table, which tests replace."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv), commands)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read standard output has closed it (`| head`). Python would complain again when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _dispatch(arguments: list[str], commands: Sequence[Command]) -> int:
    if arguments[:1] == ["--parent"]:
        # Given by a supervisor to its children, and to nobody else: the child ends when that process is gone.
        if len(arguments) < 2 or not arguments[1].isdecimal():
            return _misused("--parent needs a process id")
        die_with_parent(int(arguments[1]))
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(commands))
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"rorqual {__version__}")
        return 0
    for command in commands:
        if command.name == name:
            return _run(command, rest)
    return _misused(f"unknown command {name!r}{_suggestion(name, commands)}")


def _run(command: Command, argv: list[str]) -> int:
    os.environ.setdefault(*_QUIET)
    try:
        return _load(command)(argv)
    except KeyboardInterrupt:
        return 130
    except (RorqualError, OSError) as error:
        print(f"rorqual {command.name}: {error}", file=sys.stderr)
        return 1


def _load(command: Command) -> Callable[[list[str]], int]:
    module_name, _, function_name = command.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RorqualError(f"cannot start: {error}; README says how to install what is missing") from error
    return cast("Callable[[list[str]], int]", getattr(module, function_name))


def _misused(message: str) -> int:
    print(f"rorqual: {message}\nsee: rorqual --help", file=sys.stderr)
    return 2


def _suggestion(name: str, commands: Sequence[Command]) -> str:
    close = difflib.get_close_matches(name, [command.name for command in commands], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _help(commands: Sequence[Command]) -> str:
    width = max(len(command.name) for command in commands)
    lines = [
        "usage: rorqual COMMAND [OPTIONS]",
        "",
        "Serves DeepSeek-V4-class models, on a cluster or on a laptop without a GPU.",
        "",
        "commands:",
    ]
    for command in commands:
        lines.append(f"  {command.name:<{width}}  {command.summary}")
        lines.append(f"  {'':<{width}}    {command.example}")
    lines += ["", "rorqual COMMAND --help lists a command's options; rorqual --version tells the version."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
