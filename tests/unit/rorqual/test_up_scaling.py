"""Local pools: they follow what is wanted, with children that die, linger and never become ready."""

from __future__ import annotations

import json
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rorqual.up_scaling import DEATHS_TOLD, KILL_AFTER_SECONDS, WELL_SECONDS, LocalPools


class FakeChild:
    def __init__(self, name: str, ready_file: Path) -> None:
        self.name = name
        self.tail: deque[str] = deque(["out of memory"])
        self.exit_status: int | None = None
        self.is_asked = False
        self.is_killed = False
        self._ready_file = ready_file

    def terminate(self) -> None:
        self.is_asked = True

    def kill(self) -> None:
        self.is_killed = True
        self.exit_status = -9

    def be_ready(self) -> None:
        self._ready_file.write_text(json.dumps({"address": f"127.0.0.1:{9000 + int(self.name[-1])}"}))


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: dict[str, FakeChild] = {}
        self.told: list[str] = []
        self.now = 0.0
        self.pools = LocalPools(folder, start=self._start, tell=self.told.append)
        first = self._start("decode", "decode-0", folder / "decode-0.json")
        first.be_ready()
        self.pools.adopt("decode", first, ready_file=folder / "decode-0.json", now=0.0)

    def _start(self, role: str, name: str, ready_file: Path) -> FakeChild:
        child = self.children[name] = FakeChild(name, ready_file)
        return child

    def want(self, **replicas: Any) -> None:
        (self.folder / "wanted.json").write_text(json.dumps({"replicas": replicas}))

    def turn(self, seconds: float = 1.0) -> dict[str, Any]:
        self.now += seconds
        self.pools.turn(self.now)
        return json.loads((self.folder / "workers.json").read_text())

    @property
    def living(self) -> list[str]:
        return [name for name, child in self.children.items() if child.exit_status is None]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nothing_changes_until_somebody_wants_something(world: World) -> None:
    told = world.turn()
    assert told["workers"] == [{"address": "127.0.0.1:9000", "pool": "decode"}]
    assert told["pools"]["decode"] == {"wanted": 1, "starting_seconds": [], "problem": ""}
    assert told["pools"]["prefill"]["wanted"] == 0
    assert world.living == ["decode-0"]


def test_a_wanted_worker_is_started_and_listed_once_it_is_ready(world: World) -> None:
    world.want(decode=2)
    assert world.turn()["pools"]["decode"]["starting_seconds"] == [0.0]
    told = world.turn(7.0)
    assert (len(told["workers"]), told["pools"]["decode"]["starting_seconds"]) == (1, [7.0])
    world.children["decode-1"].be_ready()
    told = world.turn()
    assert [item["address"] for item in told["workers"]] == ["127.0.0.1:9000", "127.0.0.1:9001"]
    assert told["pools"]["decode"]["starting_seconds"] == []


def test_the_youngest_goes_and_is_listed_until_it_has_gone(world: World) -> None:
    world.want(decode=2)
    world.turn()
    world.children["decode-1"].be_ready()
    world.turn()
    world.want(decode=1)
    assert len(world.turn()["workers"]) == 2  # it finishes what it has
    assert [child.is_asked for child in world.children.values()] == [False, True]
    world.children["decode-1"].exit_status = 0
    assert len(world.turn()["workers"]) == 1
    assert world.living == ["decode-0"]


def test_one_that_does_not_serve_yet_goes_before_any_that_does(world: World) -> None:
    world.want(decode=2)
    world.turn()
    world.want(decode=1)
    world.turn()
    assert (world.children["decode-0"].is_asked, world.children["decode-1"].is_asked) == (False, True)


def test_one_that_never_goes_is_killed(world: World) -> None:
    world.want(decode=0)
    world.turn()
    world.turn(KILL_AFTER_SECONDS - 1)
    assert not world.children["decode-0"].is_killed
    world.turn(2.0)
    assert world.children["decode-0"].is_killed


def test_a_worker_that_dies_is_started_again_later_each_time_and_told(world: World) -> None:
    starts: list[float] = []
    seen = 1
    for _ in range(80):
        for child in world.children.values():
            if child.exit_status is None:
                child.exit_status = 3
        told = world.turn()
        if len(world.children) > seen:
            seen = len(world.children)
            starts.append(world.now)
    gaps = [b - a for a, b in pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 16
    assert told["pools"]["decode"]["problem"].endswith("exit status 3: out of memory")
    assert f"{DEATHS_TOLD} workers died" not in world.told[0]


def test_a_single_death_is_no_problem_and_a_worker_that_serves_long_ends_one(world: World) -> None:
    world.children["decode-0"].exit_status = 3
    assert world.turn()["pools"]["decode"]["problem"] == ""
    world.turn(1.0)
    world.children["decode-1"].exit_status = 3
    assert world.turn()["pools"]["decode"]["problem"]
    world.turn(2.0)
    world.children["decode-2"].be_ready()
    assert world.turn()["pools"]["decode"]["problem"]
    assert world.turn(WELL_SECONDS + 1)["pools"]["decode"]["problem"] == ""


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"replicas": {"decode": -1}}', '{"replicas": {"decode": 65}}', '{"replicas": 3}']
)
def test_what_cannot_be_followed_is_told_once_and_changes_nothing(world: World, text: str) -> None:
    (world.folder / "wanted.json").write_text(text)
    for _ in range(3):
        assert world.turn()["pools"]["decode"]["wanted"] == 1
    assert sum("cannot be followed" in line for line in world.told) == 1
    assert world.living == ["decode-0"]


def test_the_first_replica_of_a_role_can_be_wanted_too(world: World) -> None:
    world.want(decode=1, prefill=1)
    world.turn()
    assert world.living == ["decode-0", "prefill-0"]
