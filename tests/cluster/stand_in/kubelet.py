"""The toy kubelet: each pod's own command as a local process on an address of its own, probed, restarted, ended.

Owns these processes: none outlives `run`. It has one node with room for so many pods. Images are names; one that is in
`missing_images` cannot be pulled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from tests.cluster.stand_in.addresses import Addresses
from tests.cluster.stand_in.controllers import BY_NAME, POD
from tests.cluster.stand_in.objects import Object, Objects, key_of, now_text
from tests.cluster.stand_in.pod_files import MissingReference, PodFiles, real_command, remove
from tests.cluster.stand_in.probes import Prober, probe_period
from tests.cluster.stand_in.rights import Rights

SERVICE_ACCOUNT = BY_NAME["ServiceAccount"]
LOOK_SECONDS = 0.05
BACKOFF_SECONDS_MAX = 10.0
REFRESH_SECONDS = 1.0


class ToyKubelet:
    def __init__(
        self,
        objects: Objects,
        *,
        addresses: Addresses,
        rights: Rights,
        folder: Path,
        kubeconfig: Any,  # (token, namespace) -> text
        environment: dict[str, str],
        pods_max: int = 16,
    ) -> None:
        self.missing_images: set[str] = set()
        self.pods_max = pods_max
        self._objects, self._rights, self._folder = objects, rights, folder
        self._addresses = addresses
        self._kubeconfig, self._environment = kubeconfig, environment
        self._runs: dict[str, asyncio.Task[None]] = {}  # by uid

    async def run(self) -> None:
        try:
            while True:
                for pod in self._objects.all(POD):
                    self._look_at(pod)
                for uid in [uid for uid, task in self._runs.items() if task.done()]:
                    self._runs.pop(uid).result()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._runs.values():
                task.cancel()
            await asyncio.gather(*self._runs.values(), return_exceptions=True)

    @property
    def num_pods(self) -> int:
        return len(self._runs)

    def log_of(self, name: str) -> str:
        path = self._folder / name / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def logs(self) -> dict[str, str]:
        """The end of what each pod wrote, by its name."""
        return {
            path.parent.name: path.read_text(encoding="utf-8", errors="replace")[-6000:]
            for path in sorted(self._folder.glob("*/log.txt"))
        }

    def _look_at(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid in self._runs or pod["spec"].get("nodeName"):
            return
        if "deletionTimestamp" in pod["metadata"]:
            self._objects.remove(POD, pod)
            return
        if len(self._runs) >= self.pods_max:
            told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            told["message"] = f"0/1 nodes are available: 1 Too many pods ({self.pods_max})."
            self._tell(pod, {"phase": "Pending", "conditions": [told]})
            return
        address = self._addresses.next_pod()
        self._objects.change(POD, pod, lambda item: item["spec"].update(nodeName="toy-node"))
        folder = self._folder / pod["metadata"]["name"]
        self._runs[uid] = asyncio.create_task(PodRun(self, pod, address=address, folder=folder).run())

    def _tell(self, pod: Object, status: Object) -> None:
        self._objects.change(POD, pod, lambda item: item.update(status=status), status=True)


class PodRun:
    """One pod's life. Containers beyond the first are not understood."""

    def __init__(self, owner: ToyKubelet, pod: Object, *, address: str, folder: Path) -> None:
        self._owner, self._pod, self._address, self._folder = owner, pod, address, folder
        self._files = PodFiles(owner._objects, pod, folder=folder, address=address)
        assert len(pod["spec"]["containers"]) == 1, "the toy kubelet runs pods of one container"
        self._container: Object = pod["spec"]["containers"][0]
        self._num_restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._is_ready = False
        self._state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self._phase = ""  # once it is over
        self._started_at = now_text()

    async def run(self) -> None:
        living = asyncio.create_task(self._live())
        ending = asyncio.create_task(self._until_deleted())
        refreshing = asyncio.create_task(self._keep_files())
        try:
            await asyncio.wait({living, ending, refreshing}, return_when=asyncio.FIRST_COMPLETED)
            for task in (living, refreshing):
                if task.done() and not task.cancelled():
                    task.result()
            await self._end()
        finally:
            for task in (living, ending, refreshing):
                task.cancel()
            await asyncio.gather(living, ending, refreshing, return_exceptions=True)
            await self._kill_and_wait()
            remove(self._folder / "volumes")

    async def _live(self) -> None:
        while True:
            self._state = {"waiting": {"reason": "ContainerCreating"}}
            self._tell()
            try:
                await self._start()
            except MissingReference as error:
                self._state = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
                self._tell()
                await asyncio.sleep(1.0)
                continue
            except _NoImage as error:
                self._state = {"waiting": {"reason": "ImagePullBackOff", "message": str(error)}}
                self._tell()
                await asyncio.sleep(0.5)
                continue
            process = self._process
            assert process is not None
            self._state = {"running": {"startedAt": now_text()}}
            self._tell()
            probing = asyncio.create_task(self._probe())
            try:
                status = await process.wait()
            finally:
                probing.cancel()
                await asyncio.gather(probing, return_exceptions=True)
            self._kill()
            self._is_ready = False
            if self._is_over(status):
                reason = "Error" if status else "Completed"
                self._state = {"terminated": {"exitCode": status % 256, "reason": reason}}
                self._phase = "Failed" if status else "Succeeded"
                self._tell()
                await asyncio.Event().wait()  # until somebody deletes it
            self._num_restarts += 1
            self._state = {
                "waiting": {"reason": "CrashLoopBackOff", "message": f"ended with status {status}"},
            }
            self._tell()
            await asyncio.sleep(min(BACKOFF_SECONDS_MAX, 0.5 * 2 ** min(self._num_restarts, 10)))

    def _is_over(self, status: int) -> bool:
        policy = self._pod["spec"].get("restartPolicy", "Always")
        return policy == "Never" or (policy == "OnFailure" and status == 0)

    async def _start(self) -> None:
        if self._container["image"] in self._owner.missing_images:
            raise _NoImage(f"Back-off pulling image {self._container['image']}")
        volumes = self._files.volumes()
        for container in self._pod["spec"].get("initContainers") or []:
            process = await self._spawn(container, volumes)
            status = await process.wait()
            self._kill()
            if status != 0:
                raise MissingReference(f"init container {container['name']} failed")
        await self._spawn(self._container, volumes)

    async def _spawn(self, container: Object, volumes: dict[str, Path]) -> asyncio.subprocess.Process:
        mounts = self._files.mounts(container, volumes)
        self._env = {**self._owner._environment, **self._files.environment(container, mounts)}
        self._mounts = mounts
        self._give_account()
        command = self._files.command(container, self._env, mounts)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "log.txt").open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                start_new_session=True,
            )
        return self._process

    def _give_account(self) -> None:
        """A kubeconfig with the service account's token, where Kubernetes would mount one."""
        spec, namespace = self._pod["spec"], self._pod["metadata"]["namespace"]
        name = spec.get("serviceAccountName", "default")
        account = self._owner._objects.find(SERVICE_ACCOUNT, namespace, name) or {}
        if not spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "kubeconfig"
        token = self._owner._rights.token_of(namespace, name)
        path.write_text(self._owner._kubeconfig(token=token, namespace=namespace), encoding="utf-8")
        path.chmod(0o600)
        self._env["KUBECONFIG"] = str(path)

    async def _keep_files(self) -> None:
        """ConfigMaps and Secrets that change while the pod runs change in its folders, too."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            with contextlib.suppress(MissingReference):
                self._files.volumes()

    async def _probe(self) -> None:
        prober = Prober(self._container, address=self._address, run=self._exec)
        startup, readiness, liveness = (
            self._container.get(f"{name}Probe") for name in ("startup", "readiness", "liveness")
        )
        if startup:
            num_failed = 0
            while not await prober.ask(startup):
                num_failed += 1
                if num_failed >= startup.get("failureThreshold", 3) * max(
                    1, startup.get("periodSeconds", 10)
                ):
                    self._kill()
                await asyncio.sleep(probe_period(startup))
        num_dead = 0
        while True:
            ready = not readiness or await prober.ask(readiness)
            if ready != self._is_ready:
                self._is_ready = ready
                self._tell()
            if liveness:
                num_dead = 0 if await prober.ask(liveness) else num_dead + 1
                if num_dead >= liveness.get("failureThreshold", 3) * max(
                    1, liveness.get("periodSeconds", 10)
                ):
                    self._kill()
            await asyncio.sleep(probe_period(readiness or liveness or {}))

    async def _exec(self, command: list[str]) -> bool:
        process = await asyncio.create_subprocess_exec(
            *real_command(command, self._env, self._mounts),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._env,
        )
        try:
            return await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _until_deleted(self) -> None:
        while True:
            present = self._owner._objects.find(POD, *key_of(self._pod))
            if present is None or "deletionTimestamp" in present["metadata"]:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _end(self) -> None:
        """preStop and SIGTERM; SIGKILL when the grace period is over."""
        grace = self._pod["spec"].get("terminationGracePeriodSeconds", 30)
        try:
            async with asyncio.timeout(grace):
                hook = (self._container.get("lifecycle") or {}).get("preStop") or {}
                if "exec" in hook:
                    await self._exec(hook["exec"]["command"])
                if "sleep" in hook:
                    await asyncio.sleep(hook["sleep"]["seconds"])
                if self._process is not None and self._process.returncode is None:
                    self._process.send_signal(signal.SIGTERM)
                    await self._process.wait()
        except TimeoutError:
            pass
        await self._kill_and_wait()
        present = self._owner._objects.find(POD, *key_of(self._pod))
        if present is not None:
            self._owner._objects.remove(POD, present)

    def _kill(self) -> None:
        """The whole group: what the main process leaves behind ends with its container, too."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._process.returncode is not None:
                self._process = None  # its number may be somebody else's soon

    async def _kill_and_wait(self) -> None:
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()

    def _tell(self) -> None:
        running = "running" in self._state
        flag = "True" if self._is_ready else "False"
        conditions = [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Initialized", "status": "True" if running else "False"},
            {"type": "ContainersReady", "status": flag},
            {"type": "Ready", "status": flag},
        ]
        status = {
            "phase": self._phase or ("Running" if running or self._num_restarts else "Pending"),
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "hostIP": "127.0.0.1",
            "startTime": self._started_at,
            "conditions": [{**item, "lastTransitionTime": now_text()} for item in conditions],
            "containerStatuses": [
                {
                    "name": self._container["name"],
                    "image": self._container["image"],
                    "imageID": "",
                    "ready": self._is_ready,
                    "started": running,
                    "restartCount": self._num_restarts,
                    "state": self._state,
                    "lastState": {},
                }
            ],
        }
        self._owner._tell(self._pod, status)


class _NoImage(Exception):
    """The image cannot be pulled."""
