"""Objects with versions: create, update, delete, watch, owners. No I/O; all within one event loop."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.cluster.stand_in.kinds import Kind

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name

HISTORY_MAX = 5000


class Refused(Exception):
    """Answered as Kubernetes answers: a Status with a code and a reason."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def not_found(kind: Kind, name: str) -> Refused:
    return Refused(404, "NotFound", f'{kind.plural}.{kind.group} "{name}" not found'.replace(". ", " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    kind: Kind
    version: int
    before: Object | None
    item: Object
    is_gone: bool


class Watcher:
    def __init__(self, kind: Kind, namespace: str, selects: Callable[[Object], bool]) -> None:
        self.kind, self.namespace, self.selects = kind, namespace, selects
        self.queue: asyncio.Queue[tuple[str, Object] | None] = asyncio.Queue()

    def offer(self, before: Object | None, item: Object, *, is_gone: bool = False) -> None:
        """Leaving the selection is a deletion, coming into it a creation."""
        if self.namespace and item["metadata"].get("namespace", "") != self.namespace:
            return
        was = before is not None and self.selects(before)
        is_there = not is_gone and self.selects(item)
        if was or is_there:
            event = "DELETED" if not is_there else "MODIFIED" if was else "ADDED"
            self.queue.put_nowait((event, item))


class Objects:
    """`on_write` hears of each object that a user or a controller wrote, after it was."""

    def __init__(self) -> None:
        self.version = 100
        self.on_write: list[Callable[[Kind, Object, bool], None]] = []  # kind, object, is deleted
        self._items: dict[Kind, dict[Key, Object]] = {}
        self._watchers: list[Watcher] = []
        self._history: deque[Change] = deque()
        self._forgotten = 0  # changes up to this version are told no more

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        found = self.find(kind, namespace, name)
        if found is None:
            raise not_found(kind, name)
        return found

    def find(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return self._items.get(kind, {}).get((namespace if kind.namespaced else "", name))

    def all(
        self, kind: Kind, namespace: str = "", *, selects: Callable[[Object], bool] = lambda item: True
    ) -> list[Object]:
        items = self._items.get(kind, {})
        return [
            item
            for key, item in sorted(items.items())
            if (not namespace or key[0] == namespace) and selects(item)
        ]

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        item = copy.deepcopy(body)
        item["apiVersion"], item["kind"] = kind.group_version, kind.kind
        metadata = item.setdefault("metadata", {})
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise Refused(
                    422, "Invalid", "metadata.name: Required value: name or generateName is required"
                )
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if kind.namespaced:
            metadata["namespace"] = namespace
        key = key_of(item)
        if key in self._items.setdefault(kind, {}):
            raise Refused(409, "AlreadyExists", f'{kind.plural} "{metadata["name"]}" already exists')
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = now_text()
        metadata["generation"] = 1
        self._keep(kind, item)
        return item

    def update(self, kind: Kind, item: Object, *, subresource: str = "") -> Object:
        """Replace. A resourceVersion that is not the present one is 409; a changed spec is a new generation."""
        key = key_of(item)
        old = self._items.get(kind, {}).get(key)
        if old is None:
            raise not_found(kind, key[1])
        wanted = item["metadata"].get("resourceVersion")
        if wanted and wanted != old["metadata"]["resourceVersion"]:
            raise Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.plural} "{key[1]}": the object has been modified; please apply'
                " your changes to the latest version and try again",
            )
        new = copy.deepcopy(item)
        new["apiVersion"], new["kind"] = kind.group_version, kind.kind
        for name in ("uid", "creationTimestamp", "generation", "deletionTimestamp"):
            if name in old["metadata"]:
                new["metadata"][name] = old["metadata"][name]
        if subresource == "status":
            new = {**copy.deepcopy(old), "status": new.get("status")}
        elif "status" in kind.subresources and "status" in old:
            new["status"] = copy.deepcopy(old["status"])
        if _without_version(new) == _without_version(old):
            return old
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
        self._keep(kind, new)
        return new

    def change(
        self, kind: Kind, item: Object, change: Callable[[Object], None], *, status: bool = False
    ) -> None:
        """By a controller: always of the present version; one that is gone is passed over."""
        present = self.find(kind, *key_of(item))
        if present is not None:
            new = copy.deepcopy(present)
            change(new)
            new["metadata"].pop("resourceVersion", None)
            self.update(kind, new, subresource="status" if status else "")

    def delete(self, kind: Kind, namespace: str, name: str) -> Object:
        """At once; pods are asked to end first, by whoever hears of `deletionTimestamp`."""
        item = self.get(kind, namespace, name)
        if kind.plural == "pods" and item.get("spec", {}).get("nodeName"):
            if "deletionTimestamp" not in item["metadata"]:
                new = copy.deepcopy(item)
                new["metadata"]["deletionTimestamp"] = now_text()
                self._keep(kind, new)
                return new
            return item
        return self.remove(kind, item)

    def remove(self, kind: Kind, item: Object) -> Object:
        """For good, and what it owned."""
        present = self._items.get(kind, {}).pop(key_of(item), None)
        if present is None:
            return item
        gone = copy.deepcopy(present)
        self.version += 1
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._announce(Change(kind=kind, version=self.version, before=present, item=gone, is_gone=True))
        uid = gone["metadata"]["uid"]
        namespace = gone["metadata"]["name"] if kind.kind == "Namespace" else ""
        for other, owned in [*self._owned(uid), *self._within(namespace)]:
            if self.find(other, *key_of(owned)) is not None:
                self.delete(other, *key_of(owned))
        return gone

    def watch(
        self, kind: Kind, namespace: str, *, selects: Callable[[Object], bool], since: int | None
    ) -> Watcher:
        """`since` None: what is there comes first. Raises Refused 410 for a version that is forgotten."""
        watcher = Watcher(kind, namespace, selects)
        if since is None:
            for item in self.all(kind, namespace, selects=selects):
                watcher.offer(None, item)
        else:
            if since < self._forgotten:
                raise Refused(410, "Expired", f"too old resource version: {since} ({self._forgotten})")
            for change in self._history:
                if change.version > since and change.kind == kind:
                    watcher.offer(change.before, change.item, is_gone=change.is_gone)
        self._watchers.append(watcher)
        return watcher

    def forget_changes(self) -> None:
        """As Kubernetes does after some minutes: whoever watches from a version of before hears 410."""
        self._history.clear()
        self._forgotten = self.version

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.remove(watcher)

    def end_watches(self) -> None:
        for watcher in self._watchers:
            watcher.queue.put_nowait(None)

    def everything(self) -> Iterator[tuple[Kind, Object]]:
        for kind, items in self._items.items():
            for item in items.values():
                yield kind, item

    def _within(self, namespace: str) -> Iterable[tuple[Kind, Object]]:
        return [
            (kind, item)
            for kind, items in self._items.items()
            for item in items.values()
            if namespace and item["metadata"].get("namespace") == namespace
        ]

    def _owned(self, uid: str) -> Iterable[tuple[Kind, Object]]:
        for kind, items in list(self._items.items()):
            for item in list(items.values()):
                owners = item["metadata"].get("ownerReferences") or []
                if any(owner.get("uid") == uid for owner in owners):
                    yield kind, item

    def _keep(self, kind: Kind, item: Object) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        items = self._items.setdefault(kind, {})
        before = items.get(key_of(item))
        items[key_of(item)] = item
        self._announce(Change(kind=kind, version=self.version, before=before, item=item, is_gone=False))

    def _announce(self, change: Change) -> None:
        if len(self._history) == HISTORY_MAX:
            self._forgotten = self._history.popleft().version
        self._history.append(change)
        for watcher in self._watchers:
            if watcher.kind == change.kind:
                watcher.offer(change.before, change.item, is_gone=change.is_gone)
        for hear in self.on_write:
            hear(change.kind, change.item, change.is_gone)


def key_of(item: Object) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _without_version(item: Object) -> Object:
    metadata = {
        name: value
        for name, value in item["metadata"].items()
        if name not in ("resourceVersion", "managedFields")
    }
    return {**item, "metadata": metadata}
