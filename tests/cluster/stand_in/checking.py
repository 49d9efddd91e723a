"""Strict checks of what users write, by Kubernetes' own schemas, and the few defaults that others count on."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import kubernetes_validate

from tests.cluster.stand_in.kinds import Kind
from tests.cluster.stand_in.objects import Object, Refused

VERSION = "1.36"


def check(kind: Kind, item: Object) -> None:
    """Raises Refused 422 naming the field."""
    if kind.is_custom:
        return
    shown = copy.deepcopy(item)
    shown["metadata"] = {
        name: value
        for name, value in shown["metadata"].items()
        if name
        in ("name", "generateName", "namespace", "labels", "annotations", "ownerReferences", "finalizers")
    }
    shown.pop("status", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(shown, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(str(part) for part in error.path)
        raise Refused(
            422, "Invalid", f"{kind.kind} {item['metadata'].get('name')}: {place}: {error.message}"
        ) from None


def fill(kind: Kind, item: Object) -> None:
    """Defaults that controllers, clients and Helm rely on."""
    spec: dict[str, Any] = item.get("spec") or {}
    match kind.kind:
        case "Deployment" | "ReplicaSet" | "StatefulSet":
            spec.setdefault("replicas", 1)
            if kind.kind == "Deployment":
                strategy = spec.setdefault("strategy", {})
                strategy.setdefault("type", "RollingUpdate")
                if strategy["type"] == "RollingUpdate":
                    rolling = strategy.setdefault("rollingUpdate", {})
                    rolling.setdefault("maxSurge", "25%")
                    rolling.setdefault("maxUnavailable", "25%")
        case "Service":
            spec.setdefault("type", "ClusterIP")
            for port in spec.get("ports") or []:
                port.setdefault("protocol", "TCP")
                port.setdefault("targetPort", port["port"])
        case "Secret":
            import base64

            for name, text in (item.pop("stringData", None) or {}).items():
                item.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()
            item.setdefault("type", "Opaque")
        case "LeaderWorkerSet":
            spec.setdefault("replicas", 1)
        case _:
            pass
