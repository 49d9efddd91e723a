"""The toy kubelet starts, probes, restarts and ends pods as a real one does, and leaves no process behind."""

import contextlib
from pathlib import Path

import pytest

from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME, is_ready
from tests.harness.helm import until

pytestmark = pytest.mark.slow
POD, SECRET, CONFIG_MAP = BY_NAME["Pod"], BY_NAME["Secret"], BY_NAME["ConfigMap"]


def start(cluster: StandIn, script: str, *, name: str = "pod", grace: int = 5, **more: object) -> None:
    """A pod of a shell's script; `more` is of its container, or `spec` of it all."""
    spec = more.pop("spec", {})
    container = {"name": "main", "image": "main:1", "command": ["sh", "-c", script], **more}
    body = {
        "metadata": {"name": name},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": grace, **spec},
    }
    cluster.objects.create(POD, "default", body)


def status(cluster: StandIn, name: str = "pod") -> dict:
    return cluster.objects.get(POD, "default", name).get("status") or {}


def state(cluster: StandIn, name: str = "pod") -> dict:
    return status(cluster, name).get("containerStatuses", [{"state": {}}])[0]["state"]


def waits_for(cluster: StandIn, name: str = "pod") -> str:
    return state(cluster, name).get("waiting", {}).get("reason", "")


def is_alive(number: int) -> bool:
    """A zombie is not: whoever adopts it may take its time."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def end(cluster: StandIn, name: str = "pod") -> None:
    cluster.objects.delete(POD, "default", name)
    await until(lambda: cluster.objects.find(POD, "default", name) is None, what=f"{name} is gone")


async def number_in(path: Path) -> int:
    def written() -> str:
        return path.read_text().strip() if path.exists() else ""

    await until(lambda: bool(written()), what=f"{path.name} is written")
    return int(written())


async def test_a_pod_that_ends_by_itself_is_started_again_and_counted():
    async with StandIn() as cluster:
        start(cluster, "exit 3")
        await until(lambda: waits_for(cluster) == "CrashLoopBackOff", what="the crash is told")
        assert "status 3" in state(cluster)["waiting"]["message"]
        await until(
            lambda: status(cluster)["containerStatuses"][0]["restartCount"] >= 2, what="a second crash"
        )
        assert cluster.kubelet.log_of("pod").count("exit 3") >= 2


@pytest.mark.parametrize(
    ("policy", "code", "phase"),
    [("Never", 0, "Succeeded"), ("Never", 3, "Failed"), ("OnFailure", 0, "Succeeded")],
)
async def test_a_pod_that_is_not_to_be_restarted_is_not(policy, code, phase):
    async with StandIn() as cluster:
        start(cluster, f"exit {code}", spec={"restartPolicy": policy})
        await until(lambda: status(cluster).get("phase") == phase, what=phase)
        assert state(cluster)["terminated"]["exitCode"] == code
        assert status(cluster)["containerStatuses"][0]["restartCount"] == 0
        await end(cluster)


async def test_what_a_pods_main_process_leaves_behind_ends_with_it(tmp_path):
    async with StandIn() as cluster:
        start(cluster, f"sleep 1000 & echo $! > {tmp_path}/crashed; exit 1", name="crashed")
        start(cluster, f"sleep 1000 & echo $! > {tmp_path}/deleted; exec sleep 1000", name="deleted")
        crashed = await number_in(tmp_path / "crashed")
        await until(lambda: not is_alive(crashed), what="the crashed pod's child has ended")
        deleted = await number_in(tmp_path / "deleted")
        assert is_alive(deleted)
        await end(cluster, "deleted")
        await until(lambda: not is_alive(deleted), what="the deleted pod's child has ended")


async def test_nothing_of_a_stand_in_outlives_it(tmp_path):
    async with StandIn() as cluster:
        start(cluster, f"trap '' TERM; echo $$ > {tmp_path}/number; while :; do sleep 0.1; done")
        number = await number_in(tmp_path / "number")
        assert is_alive(number)
    await until(lambda: not is_alive(number), what="the process has ended")


async def test_a_pod_is_asked_to_end_and_made_to_when_its_grace_is_over(tmp_path):
    async with StandIn() as cluster:
        polite = f"trap 'echo done > {tmp_path}/polite; exit 0' TERM; touch {tmp_path}/up; "
        stubborn = f"trap '' TERM; echo $$ > {tmp_path}/number; "
        loop = "while :; do sleep 0.05; done"
        start(cluster, polite + loop, name="polite", grace=60)
        start(cluster, stubborn + loop, name="stubborn", grace=1)
        await until((tmp_path / "up").exists, what="the trap is set")
        number = await number_in(tmp_path / "number")
        await end(cluster, "polite")
        assert (tmp_path / "polite").read_text() == "done\n"
        await end(cluster, "stubborn")
        assert not is_alive(number)


async def test_a_pod_waits_for_its_secret_and_starts_when_it_is_there(tmp_path):
    reference = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "key"}}}
    async with StandIn() as cluster:
        start(cluster, f"printf $KEY > {tmp_path}/key; exec sleep 1000", env=[reference])
        await until(
            lambda: waits_for(cluster) == "CreateContainerConfigError", what="what is missing is told"
        )
        assert "Secret keys has no key" in state(cluster)["waiting"]["message"]
        cluster.objects.create(SECRET, "default", {"metadata": {"name": "keys"}, "data": {"key": "YWJj"}})
        await until(lambda: "running" in state(cluster), what="the pod runs")
        await until((tmp_path / "key").exists, what="its script has begun")
        await until(lambda: (tmp_path / "key").read_text() == "abc", what="the secret's value")


async def test_a_config_map_that_changes_is_changed_in_the_pods_files(tmp_path):
    spec = {"volumes": [{"name": "files", "configMap": {"name": "files"}}]}
    mounts = [{"name": "files", "mountPath": "/files"}]
    script = f"while :; do cp /files/one {tmp_path}/.one; mv {tmp_path}/.one {tmp_path}/one; sleep 0.1; done"
    async with StandIn() as cluster:
        body = {"metadata": {"name": "files"}, "data": {"one": "1"}}
        cluster.objects.create(CONFIG_MAP, "default", body)
        start(cluster, script, spec=spec, volumeMounts=mounts)
        copy = tmp_path / "one"
        await until(lambda: copy.exists() and copy.read_text() == "1", what="the first content")
        cluster.objects.update(CONFIG_MAP, {**body, "data": {"one": "2"}, "metadata": _in_default("files")})
        await until(lambda: copy.read_text() == "2", what="the second content")


def _in_default(name: str) -> dict:
    return {"name": name, "namespace": "default"}


async def test_a_pod_for_which_there_is_no_room_says_so_and_starts_when_there_is():
    async with StandIn(pods_max=1) as cluster:
        start(cluster, "exec sleep 1000", name="first")
        await until(lambda: "running" in state(cluster, "first"), what="the first runs")
        start(cluster, "exec sleep 1000", name="second")
        await until(lambda: bool(status(cluster, "second").get("conditions")), what="it is judged")
        (told,) = status(cluster, "second")["conditions"]
        assert (told["reason"], status(cluster, "second")["phase"]) == ("Unschedulable", "Pending")
        await end(cluster, "first")
        await until(lambda: "running" in state(cluster, "second"), what="the second runs")


async def test_readiness_follows_its_probe_and_a_liveness_probe_restarts(tmp_path):
    ready, alive = tmp_path / "ready", tmp_path / "alive"
    alive.touch()
    probes = {
        "readinessProbe": {"exec": {"command": ["test", "-e", str(ready)]}, "periodSeconds": 1},
        "livenessProbe": {
            "exec": {"command": ["test", "-e", str(alive)]},
            "periodSeconds": 1,
            "failureThreshold": 1,
        },
    }
    async with StandIn() as cluster:

        def present() -> dict:
            return cluster.objects.get(POD, "default", "pod")

        start(cluster, "exec sleep 1000", **probes)
        await until(lambda: "running" in state(cluster), what="it runs")
        assert not is_ready(present())
        ready.touch()
        await until(lambda: is_ready(present()), what="it is ready")
        ready.unlink()
        await until(lambda: not is_ready(present()), what="it is ready no more")
        assert status(cluster)["containerStatuses"][0]["restartCount"] == 0
        alive.unlink()
        await until(lambda: status(cluster)["containerStatuses"][0]["restartCount"] == 1, what="a restart")


async def test_two_stand_ins_share_no_address():
    async with StandIn() as one, StandIn() as other:
        first, second = (cluster.addresses.next_pod() for cluster in (one, other))
        assert first.split(".")[:2] != second.split(".")[:2]
        script = "exec python3 -m http.server --bind $(POD_IP) 8080"
        env = [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
        for cluster in (one, other):
            start(cluster, script, env=env, readinessProbe={"tcpSocket": {"port": 8080}})
        for cluster in (one, other):
            await until(
                lambda cluster=cluster: is_ready(cluster.objects.get(POD, "default", "pod")), what="ready"
            )


async def test_what_ends_the_kubelet_fails_the_test_that_uses_it():
    async def use() -> None:
        async with StandIn() as cluster:
            env = [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "no such field"}}}]
            start(cluster, "true", env=env)
            await until(lambda: not cluster.is_whole, what="the kubelet has ended")

    with pytest.raises(KeyError, match="no such field"):
        await use()
