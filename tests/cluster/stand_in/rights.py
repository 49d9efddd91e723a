"""Who may do what: tokens of service accounts, and the Roles bound to them. The administrator's token may do all."""

from __future__ import annotations

import uuid
from typing import Any

from tests.cluster.stand_in.kinds import KINDS
from tests.cluster.stand_in.objects import Objects

ADMIN_TOKEN = "admin"
_BY_NAME = {kind.kind: kind for kind in KINDS}


class Rights:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._accounts: dict[str, tuple[str, str]] = {}  # by token
        self.refusals: list[str] = []

    def token_of(self, namespace: str, account: str) -> str:
        """A fresh one, as a pod gets it."""
        token = uuid.uuid4().hex
        self._accounts[token] = (namespace, account)
        return token

    def revoke(self, token: str) -> None:
        """It has expired: whoever shows it hears 401."""
        del self._accounts[token]

    def who(self, token: str) -> tuple[str, str] | None:
        """None: the administrator. Raises KeyError for a token that nobody was given."""
        return None if token == ADMIN_TOKEN else self._accounts[token]

    def may(
        self, who: tuple[str, str] | None, verb: str, group: str, resource: str, namespace: str, name: str
    ) -> bool:
        """`resource` is with its subresource: deployments/scale."""
        allowed = any(_allows(rule, verb, group, resource, name) for rule in self.rules(who, namespace))
        if not allowed and who is not None:
            self.refusals.append(f"{who[0]}/{who[1]} may not {verb} {resource}.{group} {name} in {namespace}")
        return allowed

    def rules(self, who: tuple[str, str] | None, namespace: str) -> list[dict[str, Any]]:
        if who is None:
            return [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]
        rules: list[dict[str, Any]] = []
        for binding_kind in ("RoleBinding", "ClusterRoleBinding"):
            if binding_kind == "RoleBinding" and not namespace:
                continue  # what is asked of all namespaces at once takes a ClusterRoleBinding
            in_namespace = namespace if binding_kind == "RoleBinding" else ""
            for binding in self._objects.all(_BY_NAME[binding_kind], in_namespace):
                if any(
                    subject.get("kind") == "ServiceAccount"
                    and (subject.get("namespace", binding["metadata"].get("namespace", "")), subject["name"])
                    == who
                    for subject in binding.get("subjects") or []
                ):
                    reference = binding["roleRef"]
                    role = self._objects.find(_BY_NAME[reference["kind"]], namespace, reference["name"])
                    rules += (role or {}).get("rules") or []
        return rules


def _allows(rule: dict[str, Any], verb: str, group: str, resource: str, name: str) -> bool:
    return (
        _has(rule.get("verbs"), verb)
        and _has(rule.get("apiGroups"), group)
        and _has(rule.get("resources"), resource)
        and (not rule.get("resourceNames") or name in rule["resourceNames"])
    )


def _has(allowed: list[str] | None, wanted: str) -> bool:
    return wanted in (allowed or []) or "*" in (allowed or [])
