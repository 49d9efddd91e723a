"""The policy's file as it changes, and what the shell reads out of a policy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoscaler.options import LEASE_NAME, default_lease
from autoscaler.policy import PolicyError
from autoscaler.policy_file import PolicyFile
from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, TargetUnreachable
from autoscaler.targets.local import LocalTarget
from rorqual.clock import ManualClock
from rorqual.errors import ConfigError

POLICY = """
version: 1
interval_seconds: {interval}
objectives: {{ttft: {{percentile: 90, seconds: 2}}, itl: {{percentile: 90, seconds: 0.1}}}}
pools:
  decode: {{role: decode, replicas: {{min: 1, max: 2}}{more}}}
"""
KUBERNETES = ', workers: "dns:decode:9000", target: {kind: Deployment, name: d}'


def text(interval: int = 5, more: str = KUBERNETES) -> str:
    return POLICY.format(interval=interval, more=more)


def test_a_change_is_taken_once_also_through_links_as_config_maps_are_swapped(tmp_path: Path) -> None:
    for number, interval in ((1, 5), (2, 7)):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "policy.yaml").write_text(text(interval))
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "policy.yaml").symlink_to("data/policy.yaml")
    file = PolicyFile(tmp_path / "policy.yaml", target="kubernetes", local_folder=None, clock=ManualClock())
    assert file.load().setup.interval_seconds == 5
    assert file.changed() is None
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "data")
    changed = file.changed()
    assert changed is not None
    assert changed.setup.interval_seconds == 7
    assert file.changed() is None


def test_a_bad_change_is_told_once_and_a_good_one_after_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text())
    file = PolicyFile(path, target="kubernetes", local_folder=None, clock=ManualClock())
    file.load()
    path.write_text(text() + "pool: {}\n")
    with pytest.raises(PolicyError, match="pool"):
        file.changed()
    assert file.changed() is None
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        file.changed()
    assert file.changed() is None
    path.write_text(text(9))
    changed = file.changed()
    assert changed is not None
    assert changed.setup.interval_seconds == 9
    assert changed.setup.is_of_the_same(file.load().setup)
    path.write_text(text(9).replace("name: d", "name: other"))
    other = file.changed()
    assert other is not None
    assert not other.setup.is_of_the_same(changed.setup)


def test_half_of_a_policy_that_is_being_written_is_not_taken_for_one(tmp_path: Path) -> None:
    path, clock = tmp_path / "policy.yaml", ManualClock(1000.0)

    def write(content: str) -> None:
        path.write_text(content)
        os.utime(path, (clock.wall(), clock.wall()))

    whole = (
        text()
        + "  prefill: {role: prefill, replicas: {min: 1, max: 2}"
        + KUBERNETES.replace("name: d", "name: p")
        + "}\n"
    )
    write(whole)
    file = PolicyFile(path, target="kubernetes", local_folder=None, clock=clock)
    file.load()
    clock.advance(60)
    write(text())  # which is a policy, with one pool less
    clock.advance(0.3)
    assert file.changed() is None
    write(whole.replace("interval_seconds: 5", "interval_seconds: 7"))
    clock.advance(0.3)
    assert file.changed() is None
    clock.advance(0.3)
    changed = file.changed()
    assert changed is not None
    assert set(changed.policy.pools) == {"decode", "prefill"}
    assert file.changed() is None


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("kubernetes", "", "pools.decode.target is missing"),
        ("kubernetes", ", target: {kind: Deployment, name: d}", "pools.decode.workers is missing"),
        ("kubernetes", KUBERNETES.replace("dns:decode:9000", "nowhere"), "pools.decode.workers must be"),
        (
            "local",
            "}\n  mine: {role: decode, replicas: {min: 1, max: 2}",
            "a local pool is named as its role",
        ),
    ],
)
def test_what_a_target_needs_and_a_policy_leaves_out_is_named(
    tmp_path: Path, target: str, more: str, message: str
) -> None:
    (tmp_path / "policy.yaml").write_text(text(more=more))
    file = PolicyFile(tmp_path / "policy.yaml", target=target, local_folder=tmp_path, clock=ManualClock())
    with pytest.raises((PolicyError, ConfigError), match=message):
        file.load()


def test_a_local_policy_needs_neither_workers_nor_targets(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(text(more=""))
    setup = (
        PolicyFile(tmp_path / "policy.yaml", target="local", local_folder=tmp_path, clock=ManualClock())
        .load()
        .setup
    )
    assert setup.pools[0].workers is not None
    assert setup.pools[0].workers.pool == "decode"
    assert setup.routers[0].path == tmp_path / "routers.json"


@pytest.mark.parametrize(
    ("hostname", "lease"),
    [("r-rorqual-autoscaler-6d4cf56db6-abcde", "r-rorqual-autoscaler"), ("laptop", LEASE_NAME)],
)
def test_a_lease_is_named_as_the_pods_deployment(hostname: str, lease: str) -> None:
    assert default_lease(hostname) == lease


WORKERS = '{"workers": [], "pools": {"decode": {"wanted": 1, "starting_seconds": [3], "problem": "p"}}}'


async def test_a_local_target_follows_its_folder(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path, pools=["decode"])
    with pytest.raises(TargetUnreachable, match="No such file"):
        await target.read()
    (tmp_path / "workers.json").write_text(WORKERS)
    reading = PoolReading(replicas=1, starting_seconds=(3.0,), problem="p")
    assert (await target.read())["decode"] == reading
    await target.set_replicas("decode", before=1, after=2)
    assert (await target.read())["decode"].replicas == 2
    (tmp_path / "wanted.json").write_text('{"replicas": {"decode": 5}}')
    with pytest.raises(SetBySomebodyElse, match="has 5"):
        await target.set_replicas("decode", before=2, after=3)
    (tmp_path / "wanted.json").write_text("{")
    with pytest.raises(TargetUnreachable, match="is not JSON"):
        await target.read()


async def test_a_pool_that_the_supervisor_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "workers.json").write_text(WORKERS)
    with pytest.raises(TargetUnreachable, match="nothing of pool 'both'"):
        await LocalTarget(tmp_path, pools=["both"]).read()
