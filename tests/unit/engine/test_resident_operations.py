"""While nobody is spilled a rank that could spill does what any other does: the same operations in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.hisparse.resident import Work, compare_operations
from engine.model.forward import Model
from engine.spilled import SpilledSlots
from kvstore.hisparse import HotShape
from kvstore.layout import Numerics
from tests.harness.models import CSA, HCA, SWA, build_model, config_of, random_tokens, raw_config
from tests.reference.weights import random_tensors

SHAPE = HotShape(num_hot=64, num_entries=512)


@pytest.fixture(scope="module")
def model() -> Model:
    config = config_of(raw_config((SWA, CSA, HCA, CSA), index_topk=16))
    return build_model(config, random_tensors(config, seed=2), numerics=Numerics.SERVED)


def work(model: Model) -> Work:
    """Chunks beside decodes, sequences of different lengths, and a page that fills."""
    lengths = (20, 300, 509)
    prompts = [
        random_tokens(model.config, length, seed=length).numpy().astype(np.int32) for length in lengths
    ]
    return Work(prompts=prompts, num_generated=7, prefill_tokens_max=256)


@pytest.mark.minutes
def test_prefill_and_decode_steps_are_the_same_operations_with_hot_buffers_and_without(model: Model) -> None:
    num_steps, num_operations, difference = compare_operations(model, work(model), SHAPE)
    assert difference == ""
    assert num_steps >= 8
    assert num_operations > 500 * num_steps


def test_an_operation_more_is_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = SpilledSlots.take_uses
    monkeypatch.setattr(SpilledSlots, "take_uses", lambda self: (self._counts_B4.zero_(), taken(self))[1])
    _, _, difference = compare_operations(model, work(model), SHAPE)
    assert "aten.zero_.default(int64[3, 4]) is only there with HiSparse" in difference


def test_a_kernel_called_once_more_is_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = SpilledSlots.picked

    def picked(self: SpilledSlots, *arguments: Any) -> None:
        taken(self, *arguments)
        self._kernels.round_bf16(arguments[-1].float())

    monkeypatch.setattr(SpilledSlots, "picked", picked)
    _, _, difference = compare_operations(model, work(model), SHAPE)
    assert difference.endswith("with it")
