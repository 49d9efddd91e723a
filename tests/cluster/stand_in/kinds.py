"""The kinds that the stand-in knows, as discovery tells them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    is_custom: bool = False  # no schema is known: anything is accepted

    @property
    def group_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


def _kind(group_version: str, kind: str, plural: str, **more: object) -> Kind:
    group, _, version = group_version.rpartition("/")
    return Kind(group=group, version=version, kind=kind, plural=plural, **more)  # type: ignore[arg-type]


RBAC = "rbac.authorization.k8s.io/v1"
KINDS = (
    _kind("v1", "Namespace", "namespaces", namespaced=False, short=("ns",)),
    _kind("v1", "Node", "nodes", namespaced=False, short=("no",)),
    _kind("v1", "Pod", "pods", subresources=("status", "log"), short=("po",)),
    _kind("v1", "Service", "services", subresources=("status",), short=("svc",)),
    _kind("v1", "ConfigMap", "configmaps", short=("cm",)),
    _kind("v1", "Secret", "secrets"),
    _kind("v1", "ServiceAccount", "serviceaccounts", short=("sa",)),
    _kind("v1", "Event", "events", short=("ev",)),
    _kind("v1", "Endpoints", "endpoints"),
    _kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims", subresources=("status",), short=("pvc",)),
    _kind("apps/v1", "Deployment", "deployments", subresources=("status", "scale"), short=("deploy",)),
    _kind("apps/v1", "ReplicaSet", "replicasets", subresources=("status", "scale"), short=("rs",)),
    _kind("apps/v1", "StatefulSet", "statefulsets", subresources=("status", "scale"), short=("sts",)),
    _kind("batch/v1", "Job", "jobs", subresources=("status",)),
    _kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices"),
    _kind("coordination.k8s.io/v1", "Lease", "leases"),
    _kind("events.k8s.io/v1", "Event", "events"),
    _kind(
        "policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", subresources=("status",), short=("pdb",)
    ),
    _kind("networking.k8s.io/v1", "Ingress", "ingresses", subresources=("status",), short=("ing",)),
    _kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", short=("netpol",)),
    _kind(RBAC, "Role", "roles"),
    _kind(RBAC, "RoleBinding", "rolebindings"),
    _kind(RBAC, "ClusterRole", "clusterroles", namespaced=False),
    _kind(RBAC, "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    _kind(
        "apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False
    ),
)

LEADER_WORKER_SET = _kind(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    "leaderworkersets",
    subresources=("status", "scale"),
    is_custom=True,
)
"""Given to a stand-in that is to know it; nothing makes pods of it."""
