"""`rorqual checkpoint init | inspect | verify`: the command line of this package.

Owns options and output: results to stdout, progress and notices to stderr. `rorqual.cli` calls `main`.
Decides nothing about checkpoints itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine.checkpoint.inspect import AllocatedBytes, StoredBytes, inspect_config, to_json, to_text
from engine.checkpoint.progress import ProgressLine, format_bytes
from kvstore.layout import Numerics, build_layout
from rorqual.errors import RorqualError
from rorqual.model_config import ModelConfig, load_model_config

_MEGABYTE = 1_000_000


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status. An expected failure is a message on stderr and status 1."""
    parser = argparse.ArgumentParser(
        prog="rorqual checkpoint",
        description="Make, measure and check model directories: config.json, weights, tokenizer.json.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv), allocated_bytes=_pool_bytes)
    except RorqualError as error:
        print(f"rorqual checkpoint: {error}", file=sys.stderr)
        return 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    init = commands.add_parser("init", help="write a checkpoint with random weights", description=_ABOUT_INIT)
    init.add_argument(
        "--config", type=Path, required=True, help="a config.json of any dialect, or its directory"
    )
    init.add_argument("--seed", type=int, required=True, help="any integer")
    init.add_argument("--out", type=Path, required=True, help="directory to make; must be absent or empty")
    init.add_argument(
        "--weights",
        choices=("quantised", "float32"),
        help="quantised: FP8 blocks, and experts in FP4 unless the config says fp8; "
        "float32: no quantisation; default: what the config says",
    )
    init.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json to copy; without one only token ids work"
    )
    init.add_argument("--shard-mb", type=int, default=4000, help="megabytes a shard may have (default 4000)")
    inspect = commands.add_parser(
        "inspect", help="count tensors, bytes, parameters and a request's state", description=_ABOUT_INSPECT
    )
    inspect.add_argument("model", type=Path, help="a model directory or a config.json")
    inspect.add_argument("--length", type=int, help="tokens of the request (default: the model's most)")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    verify = commands.add_parser("verify", help="read and check every tensor", description=_ABOUT_VERIFY)
    verify.add_argument("model", type=Path, help="a model directory")


_ABOUT_INIT = """
Write a checkpoint with random weights of sane scale, in the official layout. The same seed gives the same
values, however the files are sharded. The directory appears when it is complete; a failure leaves nothing
behind.
"""
_ABOUT_INSPECT = """
Count what a model weighs and what a request keeps, from the config and the file headers alone: works for a
model of any size on any machine. State is shown in the layouts served elsewhere, and as our pools would
allocate it.
"""
_ABOUT_VERIFY = """
Check names, shapes and dtypes, then read every tensor and look for NaN and infinity after dequantisation.
Prints one line and exits 0, or lists everything that is wrong and exits 1.
"""


def run(args: argparse.Namespace, *, allocated_bytes: AllocatedBytes | None = None) -> int:
    """Run parsed arguments. `allocated_bytes` adds our own pools' sizes to `inspect`."""
    if args.command == "init":
        return _init(args)
    if args.command == "inspect":
        return _inspect(args, allocated_bytes)
    return _verify(args)


def _init(args: argparse.Namespace) -> int:
    # torch is imported by those who need it: `--help` and `inspect` of a config answer at once without.
    from engine.checkpoint.init import InitOptions, init_checkpoint

    if args.shard_mb < 1:
        raise RorqualError(f"--shard-mb must be at least 1, not {args.shard_mb}")
    options = InitOptions(
        seed=args.seed,
        out=args.out,
        weights=args.weights,
        tokenizer=args.tokenizer,
        shard_bytes_max=args.shard_mb * _MEGABYTE,
    )
    with ProgressLine(f"writing {args.out}", sys.stderr) as progress:
        num_bytes = init_checkpoint(load_model_config(args.config), options, progress)
    print(f"{args.out}: wrote {format_bytes(num_bytes)} of random weights, seed {args.seed}")
    return 0


def _inspect(args: argparse.Namespace, allocated_bytes: AllocatedBytes | None) -> int:
    config, stored, notices = load_model_config(args.model), None, ()
    if args.model.is_dir() and any(args.model.glob("*.safetensors*")):
        from engine.checkpoint.reader import open_checkpoint

        checkpoint = open_checkpoint(args.model)
        checkpoint.check()
        config, notices = checkpoint.config, checkpoint.notices
        stored = StoredBytes(
            num_tensors=len(checkpoint.stored),
            num_files=checkpoint.num_files,
            naming=checkpoint.naming,
            bytes_by_part=checkpoint.bytes_by_part(),
        )
    num_tokens = config.max_position_embeddings if args.length is None else args.length
    if num_tokens < 1:
        raise RorqualError(f"--length must be at least 1, not {num_tokens}")
    inspection = inspect_config(
        config,
        source=str(args.model),
        num_tokens=num_tokens,
        stored=stored,
        allocated_bytes=allocated_bytes,
        notices=notices,
    )
    print(json.dumps(to_json(inspection), indent=2) if args.json else to_text(inspection))
    return 0


def _pool_bytes(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    return build_layout(config, Numerics.SERVED).allocated_bytes(num_tokens)


def _verify(args: argparse.Namespace) -> int:
    from engine.checkpoint.reader import open_checkpoint
    from engine.checkpoint.verify import verify

    checkpoint = open_checkpoint(args.model)
    for notice in checkpoint.notices:
        print(f"note: {notice}", file=sys.stderr)
    with ProgressLine(f"reading {args.model}", sys.stderr) as progress:
        verified = verify(checkpoint, progress)
    print(
        f"{args.model}: {verified.num_weights:,} weights, {verified.num_parameters:,} values, "
        f"{format_bytes(checkpoint.num_bytes_total)} in {checkpoint.num_files} files: all sound"
    )
    return 0
