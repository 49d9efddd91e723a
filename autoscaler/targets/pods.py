"""A pool's pods, read: how long those that do not serve yet have been starting, and what is wrong with them. Pure.

A pod whose containers have all started and that is not ready is not starting: its node is out of sight, or its probe
fails, and it may well serve. Whether it does, its session tells; without one it is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from autoscaler.targets.contract import PoolReading

POD_SECONDS_MAX = 60.0
"""A replica that has no pod after so long is not being made: quota, admission, or no controller."""

_STUCK = (
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
TEXT_MAX = 300


def read_pods(
    pods: Iterable[Mapping[str, Any]], *, replicas: int, wall: float, shortage_seconds: float
) -> PoolReading:
    """`wall` is now, in seconds since 1970; `shortage_seconds`: for how long there have been too few pods."""
    starting: list[float] = []
    problems: list[str] = []
    num_pods = num_begun = 0
    for pod in pods:
        metadata = pod.get("metadata") or {}
        status = pod.get("status") or {}
        if metadata.get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed"):
            continue
        num_pods += 1
        if is_ready(pod) or _has_begun(status):
            num_begun += 1
        else:
            starting.append(max(0.0, wall - _starting_since(pod, default=wall)))
            problems += [f"{metadata.get('name', '?')}: {problem}" for problem in _problems(status)]
    num_missing = max(0, replicas - num_pods)
    starting += [shortage_seconds] * num_missing
    if num_missing and shortage_seconds > POD_SECONDS_MAX:
        problems.append(
            f"{num_missing} replicas have had no pod for {shortage_seconds:.0f} s (a quota, or admission?)"
        )
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # While a pool rolls it has more pods than replicas: the new one stands for no replica that others are.
    starting = sorted(starting, reverse=True)[: max(0, replicas - num_begun)]
    return PoolReading(
        replicas=replicas,
        starting_seconds=tuple(starting),
        problem=f"{problems[0][:TEXT_MAX]}{more}" if problems else "",
    )


def count_pods(pods: Iterable[Mapping[str, Any]]) -> int:
    """Those that are not going."""
    return sum(
        not (pod.get("metadata") or {}).get("deletionTimestamp")
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        for pod in pods
    )


def is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def _has_begun(status: Mapping[str, Any]) -> bool:
    """All containers run and have passed their startup probes."""
    containers = status.get("containerStatuses") or []
    return bool(containers) and all(item.get("started") is True for item in containers)


def _starting_since(pod: Mapping[str, Any], *, default: float) -> float:
    """Since it was made; or, where a worker in it has ended and starts again, since it was ready last."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    turned = [item.get("lastTransitionTime") for item in conditions if item.get("type") == "Ready"]
    created = _seconds((pod.get("metadata") or {}).get("creationTimestamp"), default=default)
    return max([created, *(_seconds(text, default=created) for text in turned)])


def _problems(status: Mapping[str, Any]) -> Iterator[str]:
    """At most one of a pod."""
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or []:
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                yield ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
                return
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield ": ".join(filter(None, ("Unschedulable", condition.get("message"))))
            return


def _seconds(text: object, *, default: float) -> float:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return default
