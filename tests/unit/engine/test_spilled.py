"""What a spill brings in ahead: the last picks of its sequence, whatever group of decodes that was in."""

from __future__ import annotations

import torch

from engine.host_memory import HostMemory
from engine.plan import Spill
from engine.runner import Runner
from kvstore.hisparse import HotShape
from kvstore.layout import Numerics
from tests.harness.models import CSA, build_model, config_of, raw_config
from tests.reference.weights import random_tensors

LAYER = 0
PICKS = [[3, 5, 70], [1, 64, 100], [2, 9, 65]]  # of three decodes of slots 0, 1 and 1


def spilling_runner() -> Runner:
    config = config_of(raw_config((CSA,), num_hash=1))
    model = build_model(config, random_tensors(config, seed=2), numerics=Numerics.FLOAT32)
    runner = Runner(model, num_pages=6, num_slots=2, num_thin=4)
    host_memory = HostMemory(runner.pools, runner.records, num_pages=4, num_records=0)
    runner.allow_spills(host_memory, HotShape(num_hot=64, num_entries=512), num_buffers=2)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, range(3 * slot, 3 * slot + 3))
    return runner


def num_found(runner: Runner, slot: int, picks: list[int]) -> int:
    spilled = runner.tables.spilled
    assert spilled is not None
    spilled.locate(LAYER, torch.tensor([slot]), torch.tensor([picks]))
    (use,) = spilled.take_uses()
    assert use.slot == slot
    return use.num_useful


def test_the_newest_picks_of_a_sequence_in_any_group_are_on_the_device_when_it_has_spilled() -> None:
    for slot, newest in ((0, PICKS[0]), (1, PICKS[2])):
        runner = spilling_runner()
        spilled = runner.tables.spilled
        assert spilled is not None
        for _ in range(2):  # a step's groups replace those of the step before
            spilled.picked(LAYER, 0, [0], torch.tensor(PICKS[:1]))
            spilled.picked(LAYER, 1, [1, 1], torch.tensor(PICKS[1:]))
        spilled.spill(Spill(slot=slot, buffer=slot, first=0, pages=(3 * slot, 6 + slot), host_pages=(0, 1)))
        spilled.take_uses()
        assert num_found(runner, slot, newest) == 3


def test_picks_of_an_earlier_step_are_forgotten_when_the_groups_change() -> None:
    runner = spilling_runner()
    spilled = runner.tables.spilled
    assert spilled is not None
    spilled.picked(LAYER, 0, [0], torch.tensor(PICKS[:1]))
    spilled.picked(LAYER, 1, [1, 1], torch.tensor(PICKS[1:]))
    spilled.picked(LAYER, 0, [1], torch.tensor([[7, 8, 66]]))
    spilled.spill(Spill(slot=1, buffer=0, first=0, pages=(3, 6), host_pages=(0, 1)))
    assert num_found(runner, 1, [7, 8, 66]) == 3
    assert num_found(runner, 1, PICKS[2]) == 0
