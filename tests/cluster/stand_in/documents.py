"""What clients ask before they begin: versions, groups, resources, and just enough OpenAPI."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tests.cluster.stand_in.kinds import Kind

IN_ALL = ("Pod", "Service", "Deployment", "ReplicaSet", "StatefulSet", "Job")  # of `kubectl get all`
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


class Documents:
    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self._documents: dict[str, dict[str, Any]] = {}
        paths = {
            path: list(group)
            for path, group in groupby(sorted(kinds, key=lambda kind: kind.path), lambda kind: kind.path)
        }
        version = {"major": "1", "minor": "36", "gitVersion": "v1.36.0", "platform": "linux/amd64"}
        self._documents["/version"] = version
        self._documents["/api"] = {"kind": "APIVersions", "versions": ["v1"]}
        names = sorted({kind.group for kind in kinds if kind.group} | {"authorization.k8s.io"})
        groups = [
            _group(name, next((kind.version for kind in kinds if kind.group == name), "v1")) for name in names
        ]
        self._documents["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        for group in groups:
            self._documents[f"/apis/{group['name']}"] = {"kind": "APIGroup", "apiVersion": "v1", **group}
        for path, found in paths.items():
            resources = [resource for kind in found for resource in _resources(kind)]
            self._documents[path] = {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": found[0].group_version,
                "resources": resources,
            }
            self._documents[f"/openapi/v3{path}"] = _open_api(found)
        self._documents["/apis/authorization.k8s.io/v1"] = {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": "authorization.k8s.io/v1",
            "resources": [
                {
                    "name": "selfsubjectaccessreviews",
                    "singularName": "selfsubjectaccessreview",
                    "namespaced": False,
                    "kind": "SelfSubjectAccessReview",
                    "verbs": ["create"],
                }
            ],
        }
        index = {path.lstrip("/"): {"serverRelativeURL": f"/openapi/v3{path}"} for path in paths}
        self._documents["/openapi/v3"] = {"paths": index}
        self._documents["/openapi/v2"] = {"swagger": "2.0", "info": {"title": "", "version": ""}, "paths": {}}

    def find(self, path: str) -> dict[str, Any] | None:
        return self._documents.get(path.rstrip("/") or "/")


def _group(name: str, version: str) -> dict[str, Any]:
    shown = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [shown], "preferredVersion": shown}


def _resources(kind: Kind) -> list[dict[str, Any]]:
    main = {
        "name": kind.plural,
        "singularName": kind.kind.lower(),
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": VERBS,
        "shortNames": list(kind.short),
        "categories": ["all"] if kind.kind in IN_ALL else [],
    }
    more = [
        {
            "name": f"{kind.plural}/{name}",
            "singularName": "",
            "namespaced": kind.namespaced,
            "verbs": ["get", "patch", "update"],
            **(
                {"kind": "Scale", "group": "autoscaling", "version": "v1"}
                if name == "scale"
                else {"kind": kind.kind}
            ),
        }
        for name in kind.subresources
    ]
    return [main, *more]


def _open_api(kinds: list[Kind]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for kind in kinds:
        place = f"{kind.path}/namespaces/{{namespace}}" if kind.namespaced else kind.path
        operation = {
            "x-kubernetes-group-version-kind": {
                "group": kind.group,
                "version": kind.version,
                "kind": kind.kind,
            },
            "parameters": [
                {"name": name, "in": "query", "schema": {"type": "string"}}
                for name in ("dryRun", "fieldManager", "fieldValidation")
            ],
            "responses": {"200": {"description": "OK"}},
        }
        paths[f"{place}/{kind.plural}/{{name}}"] = {
            "patch": {**operation, "x-kubernetes-action": "patch"},
            "put": {**operation, "x-kubernetes-action": "put"},
        }
        paths[f"{place}/{kind.plural}"] = {"post": {**operation, "x-kubernetes-action": "post"}}
    return {
        "openapi": "3.0.0",
        "info": {"title": "stand-in", "version": "v1.36.0"},
        "paths": paths,
        "components": {"schemas": {}},
    }
