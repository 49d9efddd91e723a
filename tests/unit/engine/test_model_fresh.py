"""The model without paged state, as training uses it: gradients reach every weight, and are the right ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.suite import choose_kernels, reference_kernels
from engine.model.batch import build_batch
from engine.model.forward import Model
from engine.model.fresh import FreshState
from tests.harness.comparison import relative_error
from tests.harness.drive import alone, run_fresh, run_paged
from tests.harness.models import build_model, config_of, random_tokens, raw_config
from tests.harness.picks import ForcedPicks, Picks
from tests.reference.weights import random_tensors

NUM_TOKENS = 60


@pytest.fixture
def model() -> Model:
    # Four experts at two a token: every one of them gets some of the tokens.
    config = config_of(raw_config(n_routed_experts=4, num_experts_per_tok=2, swiglu_limit=10.0))
    return build_model(config, random_tensors(config, seed=2), kernels=reference_kernels())


def prompts_of(model: Model) -> list[Tensor]:
    return [random_tokens(model.config, NUM_TOKENS - 13 * index, seed=index) for index in range(3)]


def leaves(value: Any) -> Iterator[Tensor]:
    """Every float tensor that the forward pass reads."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item)
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from leaves(getattr(value, item.name))


def loss_of(model: Model, prompts: list[Tensor], picks: list[Picks]) -> Tensor:
    """Next-token cross entropy with fixed choices, so that it is a smooth function of the weights."""
    segments = [(request, 0, tokens) for request, tokens in enumerate(prompts)]
    batch, places = build_batch(segments, decode_together=False)
    hook = ForcedPicks(list(enumerate(places)), picks)
    streams = model.streams(model.begin(batch, FreshState(model.config, batch), hook=hook))
    losses = [
        torch.nn.functional.cross_entropy(model.logits(streams[place.rows])[:-1], tokens[1:])
        for tokens, place in zip(prompts, places, strict=True)
    ]
    return torch.stack(losses).sum()


def backward(model: Model) -> tuple[float, list[Tensor], list[Tensor], list[Picks]]:
    """Loss, weights, their gradients and the choices made."""
    prompts = prompts_of(model)
    with torch.no_grad():
        picks = run_fresh(model, prompts, record=True).picks
    weights = list(leaves(dataclasses.replace(model.weights, named={})))
    for weight in weights:
        weight.requires_grad_()
    loss = loss_of(model, prompts, picks)
    loss.backward()
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(False)
    return loss.item(), weights, gradients, picks


def test_gradients_reach_every_weight_that_is_not_behind_a_discrete_choice(model: Model) -> None:
    _, weights, gradients, _ = backward(model)
    by_storage = {
        weight.untyped_storage().data_ptr(): gradient.contiguous()
        for weight, gradient in zip(weights, gradients, strict=True)
    }
    unreached: list[str] = []
    for name, tensor in model.weights.named.items():
        if tensor.is_floating_point():
            stacked = by_storage[tensor.untyped_storage().data_ptr()]
            gradient = stacked.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            assert bool(torch.isfinite(gradient).all()), name
            if not bool(gradient.any()):
                unreached.append(name)
    behind_a_choice = [
        name for name in model.weights.named if ".attn.indexer." in name or name.endswith("gate.bias")
    ]
    assert unreached == behind_a_choice
    assert behind_a_choice


def test_gradients_predict_how_the_loss_changes(model: Model) -> None:
    """Along a random direction: (loss(w + e d) - loss(w - e d)) / 2e against gradient . d."""
    loss, weights, gradients, picks = backward(model)
    assert 1 < loss < 100
    generator = torch.Generator().manual_seed(0)
    # Half gradient, half noise: a direction of noise alone would predict a difference lost in rounding.
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    directions = [
        gradient / norm + 0.02 * torch.randn(gradient.shape, generator=generator) / len(gradients) ** 0.5
        for gradient in gradients
    ]
    predicted = sum(
        float((gradient * direction).sum()) for gradient, direction in zip(gradients, directions, strict=True)
    )
    step = 2e-3

    def moved(distance: float) -> float:
        for weight, direction in zip(weights, directions, strict=True):
            weight.add_(direction, alpha=distance)
        with torch.no_grad():
            moved_loss = float(loss_of(model, prompts_of(model), picks))
        for weight, direction in zip(weights, directions, strict=True):
            weight.add_(direction, alpha=-distance)
        return moved_loss

    measured = (moved(step) - moved(-step)) / (2 * step)
    assert measured == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kernels", [reference_kernels, choose_kernels])
def test_whole_prompts_with_and_without_pages_are_the_same(exact: bool, kernels: Any) -> None:
    config = config_of(raw_config())
    model = build_model(config, random_tensors(config, seed=5), kernels=kernels(), exact=exact)
    prompts = [*prompts_of(model), random_tokens(config, 1, seed=8), random_tokens(config, 3, seed=9)]
    with torch.inference_mode():
        fresh = run_fresh(model, prompts)
    for prompt, logits in zip(prompts, fresh.logits, strict=True):
        paged = run_paged(model, [prompt], alone(len(prompt))).logits[0]
        assert relative_error(logits, paged) < 1e-5


def test_kernels_that_cannot_be_differentiated_say_so(model: Model) -> None:
    chosen = build_model(model.config, model.weights.named, kernels=choose_kernels())
    chosen.weights.embed.requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad"):
        run_fresh(chosen, prompts_of(chosen))
