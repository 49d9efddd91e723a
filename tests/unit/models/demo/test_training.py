"""The demo model's training on a tiny config: it learns, resumes exactly, and writes what it was trained for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint.manifest import expected_weights
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.writer import WriteOptions, write_checkpoint
from engine.kernels.suite import training_kernels
from engine.model.weights import ModelWeights
from kvstore.layout import Numerics
from models.demo.recipe import measure
from models.demo.recipe.architecture import baseline_config, demo_config, fresh_weights
from models.demo.recipe.batches import PhasedSource
from models.demo.recipe.corpus import heldout_windows
from models.demo.recipe.losses import LossOptions, train_step
from models.demo.recipe.optimiser import Optimiser
from models.demo.recipe.prose import Prose
from models.demo.recipe.quantise import quantised
from models.demo.recipe.sequences import SequenceMaker
from models.demo.recipe.trainer import Budget, Phase, Progress, TrainOptions, phase_of, train
from models.demo.recipe.vocabulary import Vocabulary
from rorqual.model_config import ModelConfig

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return demo_config(
        vocab_size=1024,
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
    )


@pytest.fixture
def source(maker: SequenceMaker) -> PhasedSource:
    return PhasedSource(maker, seed=1, workers=1)


def options(folder: Path, steps: int) -> TrainOptions:
    return TrainOptions(folder=folder, budget=Budget(steps=steps), quiet=True)


def phase(*, used: float, quantised: bool = False) -> Phase:
    return Phase(used=used, basics=False, rate=1.0, indexer_weight=0.3, quantised=quantised)


@pytest.mark.minutes
def test_the_loss_falls_in_fifty_steps(config: ModelConfig, source: PhasedSource, tmp_path: Path) -> None:
    _, progress = train(config, lambda: source, options(tmp_path, 50))
    assert progress.step == 50
    losses = [entry["loss"] for entry in progress.history if "loss" in entry]
    assert losses[0] > 5.0
    assert losses[-1] < losses[0] - 0.8
    assert [entry["indexer"] for entry in progress.history if "indexer" in entry]


@pytest.mark.minutes
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    config: ModelConfig, source: PhasedSource, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    class Stopping:
        """Ends the run, as a signal would, when it is asked for its fourth step."""

        def batch(self, step: int, rank: int, phase: Phase) -> object:
            if step == 3:
                raise Stop
            return source.batch(step, rank, phase)

    whole, _ = train(config, lambda: source, options(tmp_path / "whole", 6))
    saving = options(tmp_path / "parts", 6)
    saving = replace(saving, save_seconds=0.0)
    with pytest.raises(Stop):
        train(config, Stopping, saving)  # type: ignore[arg-type]
    parts, progress = train(config, lambda: source, saving)
    assert progress.step == 6
    for one, other in zip(whole.bases, parts.bases, strict=True):
        assert torch.equal(one, other)


def test_every_weight_but_the_indexers_and_the_bias_gets_a_gradient(
    config: ModelConfig, source: PhasedSource
) -> None:
    weights = fresh_weights(config, 1)
    optimiser = Optimiser(config, weights)
    model = measure.make_model(
        config, weights, numerics=Numerics.FLOAT32, dense=True, kernels=training_kernels()
    )
    sequences = source.batch(0, 0, phase(used=0.5))
    result = train_step(
        model, sequences, LossOptions(indexer_weight=0.3, second_draft=True), torch.Generator().manual_seed(1)
    )
    result.loss.backward()
    for name, grad in optimiser.named_grads.items():
        assert bool(grad.abs().sum() > 0) == (not name.endswith("gate.bias")), name
    assert set(result.expert_loads) == {-1, 0, 1, 2, 3}
    assert all(abs(float(load.sum()) - 1) < 1e-5 for load in result.expert_loads.values())


def test_key_columns_of_ape_stay_zero(config: ModelConfig, source: PhasedSource, tmp_path: Path) -> None:
    weights, _ = train(config, lambda: source, options(tmp_path, 2))
    for layer, item in zip(weights.layers, config.layers, strict=True):
        compressor = layer.attn.compressor
        if compressor is None:
            continue
        named = [name for name in weights.named if name.endswith("ape")]
        assert named
        halves = 2 if item.ratio == 4 else 1
        keys = compressor.ape[:, : halves * config.head_dim]
        assert torch.equal(keys, torch.zeros_like(keys))


def test_quantised_weights_are_those_of_the_written_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    weights = fresh_weights(config, 3)
    floats = {name: tensor.clone() for name, tensor in weights.named.items()}
    write_checkpoint(
        config, lambda spec: weights.named[spec.name], WriteOptions(out=tmp_path / "written", tokenizer=None)
    )
    read: ModelWeights = measure.load_weights(tmp_path / "written")[1]
    with quantised(config, weights):
        changed = 0
        for spec in expected_weights(config):
            assert torch.equal(weights.named[spec.name], read.named[spec.name]), spec.name
            changed += not torch.equal(weights.named[spec.name], floats[spec.name])
        assert changed > 20
    assert all(torch.equal(weights.named[name], floats[name]) for name in floats)
    assert open_checkpoint(tmp_path / "written").has_mtp


def test_the_phase_is_a_function_of_the_budget_used() -> None:
    budget = Budget(tokens=1000)

    def at(tokens: int, *, learned: bool = True) -> Phase:
        progress = Progress(step=500, tokens=tokens, learned_at=0.1 if learned else None)
        return phase_of(progress, budget)

    assert at(0, learned=False).basics
    assert not at(300, learned=False).basics, "the first stage ends even where nothing was learned"
    assert at(500).rate == 1.0
    assert at(700).rate < 1.0
    assert at(990).rate < at(900).rate
    assert not at(100).indexer_weight
    assert at(600).indexer_weight
    assert not at(600).quantised
    assert at(950).quantised
    assert at(1000).used == 1.0


def test_the_dense_baseline_sees_far_tokens_and_has_no_compressor(
    config: ModelConfig, source: PhasedSource
) -> None:
    baseline = baseline_config(config)
    weights = fresh_weights(baseline, 1)
    assert all(layer.attn.compressor is None for layer in weights.layers)
    model = measure.make_model(baseline, weights, numerics=Numerics.FLOAT32)
    tokens = source.batch(0, 0, phase(used=0.5))[0].tokens[:200]
    other = tokens.clone()
    other[1] = (other[1] + 1) % 1000
    (one,), (two,) = (list(measure.logits_of(model, [item])) for item in (tokens, other))
    assert not torch.equal(one[-1], two[-1])


def test_measures_count_bytes_and_answers(
    config: ModelConfig, maker: SequenceMaker, prose: Prose, vocabulary: Vocabulary
) -> None:
    model = measure.make_model(config, fresh_weights(config, 1), numerics=Numerics.FLOAT32)
    windows = heldout_windows(vocabulary, prose.heldout, 64, num_windows_max=4)
    bits = measure.bits_per_byte(model, windows)
    # An untrained model knows nothing: about log2(vocabulary) bits a token.
    tokens = sum(len(window.tokens) - 1 for window in windows)
    uniform = tokens * np.log2(config.vocab_size) / sum(window.num_bytes for window in windows)
    assert abs(bits - uniform) < 0.1 * uniform
    sequences = measure.recall_sequences(
        maker.recall, maker.corpus, np.random.default_rng(1), distance=256, questions=10
    )
    assert len(sequences) == 2
    for item in sequences:
        assert item.distances[0] >= 256
        assert item.distances[-1] <= 356
    answers, right = measure.recall_answers(model, sequences)
    assert len(answers) == len(right) == 16
