"""What a container of a pod sees: its environment, its files, its command line, as far as one machine can give them.

Volumes become folders of the pod's own; since nothing is mounted, every mount path that stands in a command or a
variable is written as the folder it means. Used by the toy kubelet.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.stand_in.controllers import BY_NAME
from tests.cluster.stand_in.objects import Object, Objects

SECRET, CONFIG_MAP, SERVICE = BY_NAME["Secret"], BY_NAME["ConfigMap"], BY_NAME["Service"]


class MissingReference(Exception):
    """A Secret or ConfigMap, or a key of it, that a pod needs is not there."""


class PodFiles:
    def __init__(self, objects: Objects, pod: Object, *, folder: Path, address: str) -> None:
        self._objects, self._pod, self._folder, self._address = objects, pod, folder, address
        self._namespace: str = pod["metadata"]["namespace"]

    def volumes(self) -> dict[str, Path]:
        """Made, or brought up to date, by name. Raises MissingReference."""
        found: dict[str, Path] = {}
        for volume in self._pod["spec"].get("volumes") or []:
            folder = self._folder / "volumes" / volume["name"]
            if "hostPath" in volume:
                folder = Path(volume["hostPath"]["path"])
            else:
                folder.mkdir(parents=True, exist_ok=True)
                for name, data in self._contents(volume).items():
                    _put(folder / name, data)
            found[volume["name"]] = folder
        return found

    def mounts(self, container: Object, volumes: Mapping[str, Path]) -> dict[str, str]:
        """Real paths by mount path."""
        found: dict[str, str] = {}
        for mount in container.get("volumeMounts") or []:
            path = volumes[mount["name"]]
            found[mount["mountPath"].rstrip("/")] = str(
                path / mount["subPath"] if mount.get("subPath") else path
            )
        return found

    def environment(self, container: Object, mounts: Mapping[str, str]) -> dict[str, str]:
        """Raises MissingReference."""
        env: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            for kind, key in ((SECRET, "secretRef"), (CONFIG_MAP, "configMapRef")):
                if key in source:
                    env |= {
                        name: data.decode() for name, data in self._data(kind, source[key]["name"]).items()
                    }
        for item in container.get("env") or []:
            value = self._from(item["valueFrom"], container) if "valueFrom" in item else item.get("value", "")
            if value is not None:
                env[item["name"]] = self._with_services(with_mounts(_expanded(value, env), mounts))
        return env

    def command(self, container: Object, env: Mapping[str, str], mounts: Mapping[str, str]) -> list[str]:
        """Raises MissingReference when the container leaves its command to its image, which is not there."""
        command = container.get("command")
        if not command:
            raise MissingReference(
                "a container without a command runs its image's, and there are no images here"
            )
        return real_command([*command, *(container.get("args") or [])], env, mounts)

    def _with_services(self, text: str) -> str:
        """There is no DNS: the name of a Service before a port is written as its clusterIP."""

        def address(found: re.Match[str]) -> str:
            service = self._objects.find(SERVICE, found[2] or self._namespace, found[1])
            return (service or {}).get("spec", {}).get("clusterIP", found[0]) if service else found[0]

        return re.sub(
            r"(?<![\w.-])([a-z][a-z0-9-]*)(?:\.([a-z0-9-]+)(?:\.svc[a-z.]*)?)?(?=:\d)", address, text
        )

    def _from(self, source: Object, container: Object) -> str | None:
        if "fieldRef" in source:
            path = source["fieldRef"]["fieldPath"]
            found = re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path)
            if found:
                return (self._pod["metadata"].get(found[1]) or {}).get(found[2], "")
            return {
                "status.podIP": self._address,
                "status.hostIP": "127.0.0.1",
                "metadata.name": self._pod["metadata"]["name"],
                "metadata.namespace": self._namespace,
                "metadata.uid": self._pod["metadata"]["uid"],
                "spec.nodeName": "toy-node",
            }[path]
        if "resourceFieldRef" in source:
            return str(container.get("resources", {}).get("limits", {}).get("memory", ""))
        kind, reference = (
            (SECRET, source["secretKeyRef"])
            if "secretKeyRef" in source
            else (CONFIG_MAP, source["configMapKeyRef"])
        )
        try:
            return self._data(kind, reference["name"])[reference["key"]].decode()
        except (KeyError, MissingReference):
            if reference.get("optional"):
                return None
            raise MissingReference(f"{kind.kind} {reference['name']} has no {reference['key']}") from None

    def _contents(self, volume: Object) -> dict[str, bytes]:
        if "configMap" in volume:
            return self._picked(CONFIG_MAP, volume["configMap"], "name")
        if "secret" in volume:
            return self._picked(SECRET, volume["secret"], "secretName")
        contents: dict[str, bytes] = {}
        for source in (volume.get("projected") or {}).get("sources") or []:
            if "secret" in source:
                contents |= self._picked(SECRET, source["secret"], "name")
            elif "configMap" in source:
                contents |= self._picked(CONFIG_MAP, source["configMap"], "name")
        return contents

    def _picked(self, kind: Any, source: Object, name: str) -> dict[str, bytes]:
        try:
            data = self._data(kind, source[name])
        except MissingReference:
            if source.get("optional"):
                return {}
            raise
        if source.get("items"):
            return {item["path"]: data[item["key"]] for item in source["items"]}
        return data

    def _data(self, kind: Any, name: str) -> dict[str, bytes]:
        item = self._objects.find(kind, self._namespace, name)
        if item is None:
            raise MissingReference(f"{kind.kind} {name} is not there")
        if kind is SECRET:
            return {key: base64.b64decode(value) for key, value in (item.get("data") or {}).items()}
        return {key: value.encode() for key, value in (item.get("data") or {}).items()}


def real_command(command: list[str], env: Mapping[str, str], mounts: Mapping[str, str]) -> list[str]:
    words = [with_mounts(_expanded(word, env), mounts) for word in command]
    programs = {
        "rorqual": [sys.executable, "-m", "rorqual.cli", "--parent", str(os.getpid())],
        "python": [sys.executable],
        "python3": [sys.executable],
    }
    return [*programs.get(words[0], [words[0]]), *words[1:]]


def with_mounts(text: str, mounts: Mapping[str, str]) -> str:
    """Every mount path that begins a path in the text, the longest first, as the folder that it means."""
    places = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    if not places:
        return text
    return re.sub(rf"(?<![\w./-])({places})(?=$|[/,:;\"'?\s])", lambda found: mounts[found[1]], text)


def remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)


def _expanded(text: str, env: Mapping[str, str]) -> str:
    """$(NAME), as the kubelet does it; unknown names stay."""
    return re.sub(r"\$\(([\w.-]+)\)", lambda found: env.get(found[1], found[0]), text)


def _put(path: Path, data: bytes) -> None:
    """As a whole, and only if it is something new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_bytes() == data:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.chmod(0o600)
    partial.replace(path)
