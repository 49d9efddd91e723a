"""Checks of a Kubernetes cluster: does its API answer, may we do what router and autoscaler do, which kinds are there.

Called by `rorqual.doctor.process`. It writes nothing: a SelfSubjectRulesReview is a question.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rorqual.cluster_api import SERVICE_ACCOUNT, ApiError, ApiUnreachable, ClusterApi
from rorqual.doctor.finding import Finding, fail, ok, warn
from rorqual.errors import ConfigError

OF_ROUTERS = (
    ("discovery.k8s.io", "endpointslices", "list"),
    ("discovery.k8s.io", "endpointslices", "watch"),
)
OF_AUTOSCALERS = (
    ("coordination.k8s.io", "leases", "create"),
    ("coordination.k8s.io", "leases", "get"),
    ("coordination.k8s.io", "leases", "update"),
    ("", "pods", "list"),
    ("", "events", "create"),
)
SCALING = (
    ("apps", "deployments/scale", "patch"),
    ("leaderworkerset.x-k8s.io", "leaderworkersets/scale", "patch"),
)
"""Of which an autoscaler needs one."""

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""

Rule = Mapping[str, Sequence[str]]
"""What is allowed, as a SelfSubjectRulesReview lists it. Rules for objects of certain names count, too."""

KINDS = (
    ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1", "workers of several nodes"),
    ("ServiceMonitor", "monitoring.coreos.com/v1", "metrics for a Prometheus operator"),
    ("HTTPRoute", "gateway.networking.k8s.io/v1", "a route from a Gateway"),
    ("ComputeDomain", "resource.nvidia.com/v1beta1", "memory of several NVLink nodes"),
)


def why_left_out(token: Path = SERVICE_ACCOUNT / "token") -> str:
    """Empty: there is a cluster that can be asked."""
    given = os.environ.get("KUBECONFIG")
    files = [Path(each) for each in given.split(os.pathsep)] if given else [Path.home() / ".kube" / "config"]
    if given or any(each.is_file() for each in files):
        return ""
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "not in a pod, and no KUBECONFIG"
    return "" if token.is_file() else "a pod without a token, as those of workers and stores are meant to be"


async def look_at_cluster() -> list[Finding]:
    left_out = why_left_out()
    if left_out:
        return [ok("kubernetes", f"{left_out}: left out")]
    try:
        api = await ClusterApi.connect(call_seconds_max=5.0)
    except ConfigError as error:
        return [fail("kubernetes", str(error), "mend KUBECONFIG")]
    try:
        await api.get("/api")
        rules, is_complete = await _rights(api)
        kinds = [(kind, purpose, await _has(api, group, kind)) for kind, group, purpose in KINDS]
    except ApiUnreachable as error:
        return [
            fail(
                "kubernetes", f"its API cannot be reached: {error}", "look at network policies and KUBECONFIG"
            )
        ]
    except ApiError as error:
        return [fail("kubernetes", f"its API refuses us: {error}", "look at the service account")]
    finally:
        await api.close()
    found = [ok("kubernetes", f"the API server answers; namespace {api.namespace}")]
    return found + judge_rights(rules, is_complete=is_complete) + judge_kinds(kinds)


def judge_rights(rules: Sequence[Rule], *, is_complete: bool) -> list[Finding]:
    """Whoever has all rights of a router and none of an autoscaler's is a router."""

    def missing(rights: Sequence[Right]) -> list[Right]:
        return [right for right in rights if not any(_allows(rule, right) for rule in rules)]

    of_router, of_autoscaler, scaling = missing(OF_ROUTERS), missing(OF_AUTOSCALERS), missing(SCALING)
    if len(scaling) < len(SCALING):
        scaling = []
    denied = [
        *((right, "router") for right in of_router),
        *((right, "autoscaler") for right in of_autoscaler),
    ]
    denied += [(right, "autoscaler, one of them") for right in scaling]
    if not denied:
        return [ok("rights", "all that router and autoscaler need")]
    if not of_router and len(of_autoscaler) == len(OF_AUTOSCALERS) and scaling:
        return [ok("rights", "all that a router needs, and none of an autoscaler's")]
    names = ", ".join(f"{verb} {what} ({who})" for (_, what, verb), who in denied)
    if not is_complete:
        return [warn("rights", f"not told of: {names}", "this API server does not list all rights: try them")]
    cure = "fine for a person; pods get them from the chart's Role and RoleBinding"
    return [warn("rights", f"this account may not: {names}", cure)]


def _allows(rule: Rule, right: Right) -> bool:
    group, resource, verb = right
    _, _, subresource = resource.partition("/")
    resources = {"*", resource, *([f"*/{subresource}"] if subresource else [])}
    return (
        bool({"*", verb} & set(rule.get("verbs") or ()))
        and bool({"*", group} & set(rule.get("apiGroups") or ()))
        and bool(resources & set(rule.get("resources") or ()))
    )


def judge_kinds(kinds: Sequence[tuple[str, str, bool]]) -> list[Finding]:
    """None is needed; who wants what it is for installs it."""
    there = [kind for kind, _, has in kinds if has]
    missing = [f"{kind} (for {purpose})" for kind, purpose, has in kinds if not has]
    text = f"there: {', '.join(there) or 'none'}; not there: {', '.join(missing) or 'none'}"
    return [ok("kinds", text)]


async def _rights(api: ClusterApi) -> tuple[list[Rule], bool]:
    """What we may do in our namespace, and whether that is all."""
    review = await api.create(
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": api.namespace},
        },
    )
    status = review.get("status") or {}
    return list(status.get("resourceRules") or ()), not status.get("incomplete")


async def _has(api: ClusterApi, group: str, kind: str) -> bool:
    try:
        listed = await api.get(f"/apis/{group}")
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return any(each.get("kind") == kind for each in listed.get("resources", ()))
