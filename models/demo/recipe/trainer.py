"""The training loop: one process a core, gradients summed between them, progress saved so that a run can be resumed.

`train.py` calls `train`. What is trained when (`Phase`) is a pure function of how much of the budget is used and of
whether recall has been learned, so that a resumed run goes on as if it had never stopped, but for the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn  # pyright: ignore[reportPrivateImportUsage]
from tqdm import tqdm

from engine.kernels.suite import training_kernels
from engine.model.forward import Model
from engine.model.rounding import StraightThrough
from engine.model.weights import ModelWeights
from kvstore.layout import Numerics
from models.demo.recipe.architecture import dense_picks, fresh_weights
from models.demo.recipe.losses import LossOptions, Measures, Sequenced, train_step
from models.demo.recipe.optimiser import Optimiser
from models.demo.recipe.quantise import quantised
from rorqual.model_config import ModelConfig

WARM_UP_STEPS = 50
RECALL_LEARNED = 0.9
"""Accuracy that ends the first stage."""
LOG_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One of the three ends a run: seconds of work (all resumed parts together), tokens, or steps."""

    seconds: float | None = None
    tokens: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    folder: Path  # of the saved state
    budget: Budget
    seed: int = 1
    workers: int = 1
    quiet: bool = False
    save_seconds: float = 60.0


@dataclass(slots=True)
class Progress:
    """What is saved besides weights and optimiser state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recall: float = 0.0  # running accuracy
    learned_at: float | None = None  # part of the budget used when recall was learned
    history: list[dict[str, float]] = field(default_factory=lambda: [])

    def used(self, budget: Budget) -> float:
        """Part of the budget that is used: 0 to 1."""
        if budget.seconds is not None:
            return min(self.seconds / budget.seconds, 1.0)
        if budget.tokens is not None:
            return min(self.tokens / budget.tokens, 1.0)
        assert budget.steps is not None
        return min(self.step / budget.steps, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """How one step is trained."""

    used: float  # part of the budget
    basics: bool  # the first stage: short sequences, nearly all recall
    rate: float  # of the learning rates
    indexer_weight: float
    quantised: bool
    second_draft: bool = False


BASICS_MAX = 0.25
DECAY_FROM = 0.6
SECOND_DRAFT_FROM = 0.3
INDEXER_FROM = 0.4
QUANTISED_FROM = 0.82


def phase_of(progress: Progress, budget: Budget) -> Phase:
    used = progress.used(budget)
    warm = min((progress.step + 1) / WARM_UP_STEPS, 1.0)
    decay = 1.0 if used < DECAY_FROM else max((1 - used) / (1 - DECAY_FROM), 0.02)
    return Phase(
        used=used,
        basics=progress.learned_at is None and used < BASICS_MAX,
        rate=warm * decay,
        indexer_weight=0.3 if used >= INDEXER_FROM else 0.0,
        quantised=used >= QUANTISED_FROM,
        # Every other step: it costs a fifth.
        second_draft=used >= SECOND_DRAFT_FROM and progress.step % 2 == 0,
    )


class Source(Protocol):
    """Where sequences come from."""

    def batch(self, step: int, rank: int, phase: Phase) -> Sequence[Sequenced]:
        """A worker's batch of a step: a pure function of the arguments and of what the source was made with. Batches of
        one step have the same number of tokens."""
        ...


def train(
    config: ModelConfig, make_source: Callable[[], Source], options: TrainOptions
) -> tuple[ModelWeights, Progress]:
    """Train, or go on training from `options.folder`. Returns the weights (floats, not rounded) and the history."""
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.workers == 1:
        _work(0, config, make_source, options, None)
    else:
        # Absolute: it goes into a URL, and gloo waits for ever for a file that cannot be.
        rendezvous = options.folder.resolve() / f"rendezvous-{os.getpid()}"
        try:
            # Daemons: whatever ends this process ends them.
            arguments = (config, make_source, options, str(rendezvous))
            spawn(_work, args=arguments, nprocs=options.workers, daemon=True)
        finally:
            rendezvous.unlink(missing_ok=True)
    weights = fresh_weights(config, options.seed)
    saved = load_state(options.folder)
    assert saved is not None
    restore_weights(weights, saved)
    return weights, saved["progress"]


def state_file(folder: Path) -> Path:
    return folder / "state.pt"


def load_state(folder: Path) -> dict[str, Any] | None:
    file = state_file(folder)
    return torch.load(file, weights_only=False) if file.is_file() else None


def restore_weights(weights: ModelWeights, saved: dict[str, Any]) -> None:
    with torch.no_grad():
        for base, values in zip(weights.bases, saved["bases"], strict=True):
            base.detach().copy_(values)


def _work(
    rank: int,
    config: ModelConfig,
    make_source: Callable[[], Source],
    options: TrainOptions,
    rendezvous: str | None,
) -> None:
    torch.set_num_threads(1)
    if rendezvous is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.workers
        )
    worker = _Worker(rank, config, make_source(), options)
    try:
        worker.run()
    finally:
        if rendezvous is not None:
            dist.destroy_process_group()


class _Worker:
    def __init__(self, rank: int, config: ModelConfig, source: Source, options: TrainOptions) -> None:
        self.rank = rank
        self.config = config
        self.source = source
        self.options = options
        self.weights = fresh_weights(config, options.seed)
        self.progress = Progress()
        self.optimiser = Optimiser(config, self.weights)
        self.measures = Measures()
        kernels = training_kernels()
        dense = dense_picks(config)
        self.floats = Model(dense, self.weights, numerics=Numerics.FLOAT32, kernels=kernels, exact=False)
        self.rounded = Model(
            dense,
            self.weights,
            numerics=Numerics.SERVED,
            kernels=kernels,
            exact=False,
            rounding=StraightThrough(kernels),
        )
        saved = load_state(options.folder)
        if saved is not None:
            restore_weights(self.weights, saved)
            self.optimiser.load(saved["optimiser"])
            self.progress = saved["progress"]

    def run(self) -> None:
        budget, progress = self.options.budget, self.progress
        last_saved = began = time.monotonic()
        bar = tqdm(total=1000, disable=self.rank > 0 or self.options.quiet, unit="o/oo", mininterval=2.0)
        while (phase := self._agreed(phase_of(progress, budget))).used < 1:
            self._step(phase)
            now = time.monotonic()
            progress.seconds += now - began
            began = now
            if progress.step % LOG_STEPS == 0 and self.rank == 0:
                self._log(phase, bar)
            if now - last_saved > self.options.save_seconds and self.rank == 0:
                self._save()
                last_saved = now
        if self.rank == 0:
            self._log(phase, bar)
            self._save()
        bar.close()

    def _agreed(self, phase: Phase) -> Phase:
        """The first worker's phase, for all: clocks differ."""
        if self.options.workers == 1:
            return phase
        shared = [phase]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _step(self, phase: Phase) -> None:
        options, progress = self.options, self.progress
        sequences = self.source.batch(progress.step, self.rank, phase)
        index = progress.step * options.workers + self.rank
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + index)
        loss_options = LossOptions(indexer_weight=phase.indexer_weight, second_draft=phase.second_draft)
        self.optimiser.zero()
        if phase.quantised:
            with quantised(self.config, self.weights):
                result = train_step(self.rounded, sequences, loss_options, generator)
                result.loss.backward()
        else:
            result = train_step(self.floats, sequences, loss_options, generator)
            result.loss.backward()
        if options.workers > 1:
            self._share(result.expert_loads)
        self.optimiser.step(phase.rate)
        self.optimiser.balance(result.expert_loads, phase.rate)
        for name, total in result.measures.sums.items():
            self.measures.add(name, total, result.measures.counts[name])
        progress.step += 1
        progress.tokens += options.workers * sum(sequence.tokens.numel() for sequence in sequences)
        self._watch_recall(result.measures, phase)

    def _share(self, loads: dict[int, Tensor]) -> None:
        """Average gradients and expert loads over the workers."""
        flat = torch.cat([grad.flatten() for grad in self.optimiser.grads])
        flat = torch.cat((flat, *(loads[layer] for layer in sorted(loads))))
        dist.all_reduce(flat)
        flat /= self.options.workers
        first = 0
        for target in (*self.optimiser.grads, *(loads[layer] for layer in sorted(loads))):
            target.copy_(flat[first : first + target.numel()].view_as(target))
            first += target.numel()

    def _watch_recall(self, measures: Measures, phase: Phase) -> None:
        right = measures.means().get("recall")
        if right is not None:
            self.progress.recall += 0.1 * (right - self.progress.recall)
        if phase.basics and self.progress.recall >= RECALL_LEARNED:
            self.progress.learned_at = phase.used

    def _log(self, phase: Phase, bar: Any) -> None:
        progress = self.progress
        entry = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "used": phase.used,
        }
        entry |= self.measures.means()
        progress.history.append({name: float(value) for name, value in entry.items()})
        self.measures = Measures()
        bar.n = int(1000 * phase.used)
        shown = ("loss", "prose nats", "recall", "draft agreement", "second draft agreement", "indexer")
        text = " ".join(f"{name} {entry[name]:.3f}" for name in shown if name in entry)
        rate = progress.tokens / max(progress.seconds, 1e-9)
        stage = "basics" if phase.basics else "served" if phase.quantised else "main"
        bar.set_description_str(f"{stage} {progress.step}: {text}, {rate:,.0f} tokens/s")

    def _save(self) -> None:
        file = state_file(self.options.folder)
        partial = file.with_suffix(".partial")
        bases = [base.detach().clone() for base in self.weights.bases]
        torch.save({"bases": bases, "optimiser": self.optimiser.state(), "progress": self.progress}, partial)
        partial.replace(file)
