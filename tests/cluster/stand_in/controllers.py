"""What makes objects of objects: ReplicaSets and pods of Deployments, EndpointSlices of Services, statuses of all.

Woken by every write; each turn looks at everything (there is little) and does what is missing. Pods are started and
judged by the toy kubelet, which writes their status.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import json
import math
from typing import Any

from tests.cluster.stand_in.addresses import Addresses
from tests.cluster.stand_in.kinds import KINDS, Kind
from tests.cluster.stand_in.objects import Object, Objects, key_of, now_text
from tests.cluster.stand_in.selectors import labels_of

BY_NAME = {kind.kind: kind for kind in KINDS if kind.group != "events.k8s.io"}
DEPLOYMENT, REPLICA_SET, STATEFUL_SET = BY_NAME["Deployment"], BY_NAME["ReplicaSet"], BY_NAME["StatefulSet"]
POD, SERVICE, SLICE = BY_NAME["Pod"], BY_NAME["Service"], BY_NAME["EndpointSlice"]
HASH = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
TICK_SECONDS = 0.5


class Controllers:
    def __init__(self, objects: Objects, *, addresses: Addresses) -> None:
        self._objects, self._addresses = objects, addresses
        self._wake = asyncio.Event()
        objects.on_write.append(lambda kind, item, gone: self._wake.set())

    async def run(self) -> None:
        while True:
            # Not wait_for: Python 3.11's loses a cancellation that comes just as it is woken.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            for service in self._objects.all(SERVICE):
                self._tend_service(service)
            for deployment in self._objects.all(DEPLOYMENT):
                self._tend_deployment(deployment)
            for replica_set in self._objects.all(REPLICA_SET):
                self._tend_replica_set(replica_set)
            for stateful_set in self._objects.all(STATEFUL_SET):
                self._tend_stateful_set(stateful_set)
            for service in self._objects.all(SERVICE):
                self._tend_slice(service)
            await asyncio.sleep(0.02)

    def pods_of(self, owner: Object) -> list[Object]:
        return [
            pod for pod in self._objects.all(POD, owner["metadata"]["namespace"]) if _is_owned(pod, owner)
        ]

    # --- deployments

    def _tend_deployment(self, deployment: Object) -> None:
        spec = deployment["spec"]
        template_hash = _hash(spec["template"])
        owned = [item for item in self._objects.all(REPLICA_SET) if _is_owned(item, deployment)]
        new = next((item for item in owned if labels_of(item).get(HASH) == template_hash), None)
        revision = max([int(item["metadata"]["annotations"][REVISION]) for item in owned], default=0)
        if new is None:
            new = self._new_replica_set(deployment, template_hash, revision + 1, replicas=0)
            owned.append(new)
        elif int(new["metadata"]["annotations"][REVISION]) < revision:
            self._set(
                REPLICA_SET,
                new,
                lambda item: item["metadata"]["annotations"].update({REVISION: str(revision + 1)}),
            )
        olds = [item for item in owned if item is not new]
        self._roll(deployment, new, olds)
        limit = spec.get("revisionHistoryLimit", 10)
        idle = [item for item in olds if not item["spec"]["replicas"] and not self.pods_of(item)]
        idle.sort(key=lambda item: int(item["metadata"]["annotations"][REVISION]))
        for item in idle[: max(0, len(idle) - limit)]:
            self._objects.remove(REPLICA_SET, item)
        self._tell_deployment(deployment, new, owned)

    def _roll(self, deployment: Object, new: Object, olds: list[Object]) -> None:
        """One step towards all pods being of the new ReplicaSet, within maxSurge and maxUnavailable."""
        spec = deployment["spec"]
        wanted = spec.get("replicas", 1)
        if spec["strategy"]["type"] == "Recreate":
            if any(self.pods_of(item) for item in olds):
                for item in olds:
                    self._scale(item, 0)
                return
            self._scale(new, wanted)
            return
        rolling = spec["strategy"]["rollingUpdate"]
        surge = _share(rolling["maxSurge"], wanted, up=True)
        missing_max = _share(rolling["maxUnavailable"], wanted, up=False)
        num_old = sum(item["spec"]["replicas"] for item in olds)
        has = new["spec"]["replicas"]
        if has > wanted or not num_old:
            self._scale(new, wanted)
            return
        self._scale(new, min(wanted, has + max(0, wanted + surge - has - num_old)))
        num_ready = sum(self._num_ready(item) for item in [new, *olds])
        spare = num_ready - (wanted - missing_max)
        for item in olds:
            # Those that are not ready cost nothing to give up.
            unready = item["spec"]["replicas"] - self._num_ready(item)
            give = min(item["spec"]["replicas"], max(0, unready) + max(0, spare))
            if give and (spare > 0 or unready > 0):
                self._scale(item, item["spec"]["replicas"] - give)
                spare -= max(0, give - max(0, unready))

    def _new_replica_set(
        self, deployment: Object, template_hash: str, revision: int, *, replicas: int
    ) -> Object:
        template = copy.deepcopy(deployment["spec"]["template"])
        template["metadata"].setdefault("labels", {})[HASH] = template_hash
        namespace, name = key_of(deployment)
        body = {
            "metadata": {
                "name": f"{name}-{template_hash}",
                "labels": dict(template["metadata"]["labels"]),
                "annotations": {REVISION: str(revision)},
                "ownerReferences": [_owner(DEPLOYMENT, deployment)],
            },
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": dict(template["metadata"]["labels"])},
                "template": template,
            },
        }
        return self._objects.create(REPLICA_SET, namespace, body)

    def _tell_deployment(self, deployment: Object, new: Object, owned: list[Object]) -> None:
        wanted = deployment["spec"].get("replicas", 1)
        num_pods = sum(len(self.pods_of(item)) for item in owned)
        num_ready = sum(self._num_ready(item) for item in owned)
        num_new = len(self.pods_of(new))
        done = num_new == wanted == num_pods and num_ready == wanted
        status: Object = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": num_pods,
            "updatedReplicas": num_new,
            "readyReplicas": num_ready,
            "availableReplicas": num_ready,
            "unavailableReplicas": max(0, wanted - num_ready),
        }
        enough = num_ready >= wanted - _share(
            (deployment["spec"]["strategy"].get("rollingUpdate") or {}).get("maxUnavailable", 0),
            wanted,
            up=False,
        )
        status["conditions"] = [
            _condition(
                deployment,
                "Available",
                enough,
                "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
            ),
            _condition(
                deployment, "Progressing", True, "NewReplicaSetAvailable" if done else "ReplicaSetUpdated"
            ),
        ]
        self._tell(DEPLOYMENT, deployment, status)
        revision = self._objects.get(REPLICA_SET, *key_of(new))["metadata"]["annotations"][REVISION]

        def note(item: Object) -> None:
            item["metadata"].setdefault("annotations", {})[REVISION] = revision

        if (deployment["metadata"].get("annotations") or {}).get(REVISION) != revision:
            self._set(DEPLOYMENT, deployment, note)

    # --- replica sets and stateful sets

    def _tend_replica_set(self, replica_set: Object) -> None:
        wanted = replica_set["spec"]["replicas"]
        pods = [pod for pod in self.pods_of(replica_set) if "deletionTimestamp" not in pod["metadata"]]
        for _ in range(wanted - len(pods)):
            self._new_pod(REPLICA_SET, replica_set, {"generateName": f"{replica_set['metadata']['name']}-"})
        # Those that are not ready first, then the youngest.
        pods.sort(key=lambda pod: (is_ready(pod), -int(pod["metadata"]["resourceVersion"])))
        for pod in pods[: max(0, len(pods) - wanted)]:
            self._objects.delete(POD, *key_of(pod))
        num_ready = self._num_ready(replica_set)
        status: Object = {
            "observedGeneration": replica_set["metadata"]["generation"],
            "replicas": len(self.pods_of(replica_set)),
            "fullyLabeledReplicas": len(pods),
            "readyReplicas": num_ready,
            "availableReplicas": num_ready,
        }
        self._tell(REPLICA_SET, replica_set, status)

    def _tend_stateful_set(self, stateful_set: Object) -> None:
        wanted = stateful_set["spec"]["replicas"]
        template_hash = _hash(stateful_set["spec"]["template"])
        pods = {pod["metadata"]["name"]: pod for pod in self.pods_of(stateful_set)}
        names = [f"{stateful_set['metadata']['name']}-{number}" for number in range(wanted)]
        for name in names:
            pod = pods.get(name)
            if pod is None:
                self._new_pod(STATEFUL_SET, stateful_set, {"name": name, "labels": {HASH: template_hash}})
                break
            if labels_of(pod).get(HASH) != template_hash and "deletionTimestamp" not in pod["metadata"]:
                self._objects.delete(POD, *key_of(pod))
                break
            if not is_ready(pod):
                break
        for name, pod in pods.items():
            if name not in names:
                self._objects.delete(POD, *key_of(pod))
        num_ready = sum(is_ready(pod) for pod in pods.values())
        num_new = sum(labels_of(pod).get(HASH) == template_hash for pod in pods.values())
        status: Object = {
            "observedGeneration": stateful_set["metadata"]["generation"],
            "replicas": len(pods),
            "readyReplicas": num_ready,
            "availableReplicas": num_ready,
            "updatedReplicas": num_new,
            "currentReplicas": num_new,
            "currentRevision": template_hash,
            "updateRevision": template_hash,
        }
        self._tell(STATEFUL_SET, stateful_set, status)

    def _new_pod(self, kind: Kind, owner: Object, metadata: Object) -> None:
        template = copy.deepcopy(owner["spec"]["template"])
        found = template.setdefault("metadata", {})
        labels = {**(found.get("labels") or {}), **metadata.pop("labels", {})}
        body = {
            "metadata": {**found, **metadata, "labels": labels, "ownerReferences": [_owner(kind, owner)]},
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }
        self._objects.create(POD, owner["metadata"]["namespace"], body)

    # --- services

    def _tend_service(self, service: Object) -> None:
        if "clusterIP" in service["spec"] or service["spec"].get("type") == "ExternalName":
            return
        address = self._addresses.next_service()

        def give(item: Object) -> None:
            item["spec"]["clusterIP"] = address
            item["spec"]["clusterIPs"] = [address]

        self._set(SERVICE, service, give)

    def _tend_slice(self, service: Object) -> None:
        selector = service["spec"].get("selector")
        if not selector:
            return
        namespace, name = key_of(service)
        pods = [
            pod
            for pod in self._objects.all(POD, namespace)
            if all(labels_of(pod).get(key) == value for key, value in selector.items())
            and (pod.get("status") or {}).get("podIP")
            and (pod.get("status") or {}).get("phase") == "Running"
        ]
        publishes = bool(service["spec"].get("publishNotReadyAddresses"))
        body: Object = {
            "metadata": {
                "name": f"{name}-slice",
                "labels": {
                    **labels_of(service),
                    "kubernetes.io/service-name": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
                "ownerReferences": [_owner(SERVICE, service)],
            },
            "addressType": "IPv4",
            "endpoints": [_endpoint(pod, publishes=publishes) for pod in pods],
            "ports": [
                {"name": port.get("name", ""), "port": _target(port, pods), "protocol": "TCP"}
                for port in service["spec"].get("ports") or []
                if _target(port, pods)
            ],
        }
        present = self._objects.find(SLICE, namespace, f"{name}-slice")
        if present is None:
            self._objects.create(SLICE, namespace, body)
            return

        def replace(item: Object) -> None:
            item["endpoints"], item["ports"] = body["endpoints"], body["ports"]
            item["metadata"]["labels"] = body["metadata"]["labels"]

        self._set(SLICE, present, replace)

    # --- helpers

    def _num_ready(self, owner: Object) -> int:
        return sum(
            is_ready(pod) and "deletionTimestamp" not in pod["metadata"] for pod in self.pods_of(owner)
        )

    def _scale(self, replica_set: Object, replicas: int) -> None:
        if replica_set["spec"]["replicas"] != replicas:
            self._set(REPLICA_SET, replica_set, lambda item: item["spec"].update(replicas=replicas))

    def _set(self, kind: Kind, item: Object, change: Any) -> None:
        self._objects.change(kind, item, change)

    def _tell(self, kind: Kind, item: Object, status: Object) -> None:
        self._objects.change(kind, item, lambda new: new.update(status=status), status=True)


def is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def _endpoint(pod: Object, *, publishes: bool) -> Object:
    is_terminating = "deletionTimestamp" in pod["metadata"]
    serving = is_ready(pod)
    return {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {
            "ready": publishes or (serving and not is_terminating),
            "serving": serving,
            "terminating": is_terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "name": pod["metadata"]["name"],
            "namespace": pod["metadata"]["namespace"],
        },
    }


def _target(port: Object, pods: list[Object]) -> int:
    """A Service's port may name one of the containers'."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for offered in container.get("ports") or []:
                if offered.get("name") == target:
                    return offered["containerPort"]
    return 0


def _condition(owner: Object, kind: str, holds: bool, reason: str) -> Object:
    old = next(
        (item for item in (owner.get("status") or {}).get("conditions") or [] if item["type"] == kind), None
    )
    status = "True" if holds else "False"
    since = old["lastTransitionTime"] if old and old["status"] == status else now_text()
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": reason,
        "lastTransitionTime": since,
        "lastUpdateTime": since,
    }


def _owner(kind: Kind, item: Object) -> Object:
    return {
        "apiVersion": kind.group_version,
        "kind": kind.kind,
        "name": item["metadata"]["name"],
        "uid": item["metadata"]["uid"],
        "controller": True,
    }


def _is_owned(item: Object, owner: Object) -> bool:
    uid = owner["metadata"]["uid"]
    return any(reference["uid"] == uid for reference in item["metadata"].get("ownerReferences") or [])


def _hash(template: Object) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:9]


def _share(value: Any, of: int, *, up: bool) -> int:
    if isinstance(value, int):
        return value
    share = float(value.rstrip("%")) / 100 * of
    return math.ceil(share) if up else math.floor(share)
